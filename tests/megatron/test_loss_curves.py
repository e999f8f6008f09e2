"""Losses are those of tests/golden/loss_curves.json, see tests/megatron/loss_curves.py."""

import json

import pytest

from megatron_rltd.patching import versions
from tests.megatron import loss_curves

GOLDEN = json.loads(loss_curves.GOLDEN.read_text())


@pytest.mark.skipif(
    not GOLDEN["made with"].endswith(f"megatron-core {versions.megatron_version()}"),
    reason="each release of Megatron initialises and makes mock data in its own way",
)
@pytest.mark.parametrize("name", loss_curves.RUNS)
def test_losses_are_those_of_the_golden_file(name):
    golden = GOLDEN[name]
    now = loss_curves.curves(name)
    assert now["kept"] == golden["kept"]
    for what in ("loss", "grad norm"):
        assert now[what] == pytest.approx(golden[what], rel=loss_curves.TOLERANCE), (
            "if this is meant: python -m tests.megatron.loss_curves --write"
        )
