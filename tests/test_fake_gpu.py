"""Megatron's GPT with random-LTD on a GPU that is made up: what would break or wait on a real one.

One process runs all cases; see tests/fake_gpu.py for how, and docs/testing.md for what this shows.
"""

import dataclasses
from typing import Any

import pytest

from tests import fake_faults, fake_gpt
from tests.fake_gpt import Case
from tests.parallel import run

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
GROUPS = {**FULL, "recompute_num_layers": 4}
SOME = {**FULL, "recompute_method": "block", "recompute_num_layers": 3}
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FUSED = {"apply_rope_fusion": True}

CASES: dict[str, Case] = {
    "dense": Case(dropping=False, rotary=True, mask="documents"),
    "learned positions": Case(),
    "rope": Case(rotary=True),
    "causal mask": Case(mask="causal"),
    "rope and documents": Case(rotary=True, mask="documents"),
    "plain torch": Case(rotary=True, mask="documents", backend="torch"),
    "shared indices": Case(rotary=True, mask="documents", random_ltd={"shared_indices": True}),
    "neighbours apart": Case(layers=6, rotary=True, random_ltd={"layers": "2,4-5"}),
    "recompute": Case(rotary=True, mask="documents", options=FULL),
    "recompute in groups": Case(layers=6, rotary=True, options=GROUPS),
    "recompute some layers": Case(layers=5, rotary=True, options=SOME),
    "recompute attention": Case(rotary=True, options=CORE),
    "fused rope": Case(rotary=True, options=FUSED),
    "fused rope, recomputed, queries in groups": Case(
        rotary=True, options={**FUSED, **FULL, "num_query_groups": 2}
    ),
    "padding mask": Case(rotary=True, padding=True),
    "packed": Case(packed="dense"),
    "packed, rope, padded": Case(rotary=True, packed="padded"),
    "packed, rope, recomputed, plain torch": Case(
        rotary=True, packed="dense", options=FULL, backend="torch"
    ),
    "packed under TP and SP": Case(rotary=True, packed="dense", tensor_parallel=2, rank=1),
    "TP and SP, rank 0": Case(rotary=True, mask="documents", tensor_parallel=2),
    "TP and SP, rank 1, recomputed": Case(rotary=True, tensor_parallel=2, rank=1, options=FULL),
    "TP and SP, plain torch": Case(tensor_parallel=2, rank=1, backend="torch"),
    "CP, TP and SP": Case(rotary=True, context_parallel=2, tensor_parallel=2, rank=3),
    "last pipeline stage": Case(layers=8, rotary=True, first_stage=False, rank=1),
}
# What a fault is put into.
WITH_FAULT = Case(rotary=True, mask="documents", options=FULL)


def _all(cases: dict[str, Case], faults: dict[str, fake_faults.Fault]) -> dict[str, Any]:
    from tests import fake_gpu

    fake_gpu.install()
    results = {name: dataclasses.asdict(fake_gpt.run(case)) for name, case in cases.items()}
    found = {}
    for name, fault in faults.items():
        with fake_faults.put(fault):
            found[name] = fake_gpt.run(WITH_FAULT).found
    return {"cases": results, "faults": found}


@pytest.fixture(scope="module")
def results():
    (result,) = run(1, _all, CASES, fake_faults.FAULTS)
    return result


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_copies_or_is_on_the_cpu(name, results):
    result = results["cases"][name]
    assert result["found"] == []
    if CASES[name].dropping:
        assert len(result["forward"]) > 3 and result["backward"], "our code was not seen"
    else:
        assert not result["forward"] and not result["backward"]


@pytest.mark.parametrize("name", fake_faults.FAULTS)
def test_faults_are_found(name, results):
    fault = fake_faults.FAULTS[name]
    found = results["faults"][name]
    assert found, "the guard saw nothing"
    assert fault.found in found[0]
    module, function = (fault.seen_in or fault.function).split(":")
    assert f"megatron_rltd/{module}.py:" in found[0]
    assert found[0].endswith(f"in {function.split('.')[-1]}")
