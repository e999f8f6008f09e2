"""Megatron's GPT with random-LTD on a GPU that is made up: what would break or wait on a real one.

Two processes run all cases; see tests/gpu/fake_gpu.py for how, and docs/testing.md for what this
shows.
"""

import json
import os
import re
from collections import Counter
from typing import Any

import pytest
import torch

from tests.gpu import fake_faults, fake_gpt, op_counts
from tests.gpu.fake_gpt import Case
from tests.gpu.op_counts import COUNTED, FULL
from tests.parallel import ROOT, run

PAGE = ROOT / "docs" / "testing.md"
GROUPS = {**FULL, "recompute_num_layers": 4}
SOME = {**FULL, "recompute_method": "block", "recompute_num_layers": 3}
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
GROUPED = {**FULL, "apply_rope_fusion": True, "num_query_groups": 2}

CASES: dict[str, Case] = {
    **COUNTED,
    "dense": Case(dropping=False, rotary=True, mask="documents"),
    "shared indices": Case(rotary=True, mask="documents", random_ltd={"shared_indices": True}),
    "no neighbours": Case(layers=6, rotary=True, random_ltd={"layers": "2,4-5"}),
    "recompute in groups": Case(layers=6, rotary=True, options=GROUPS),
    "recompute some layers": Case(layers=5, rotary=True, options=SOME),
    "recompute attention": Case(rotary=True, options=CORE),
    "rope, fused, recompute, queries in groups": Case(rotary=True, options=GROUPED),
    "padding mask": Case(padding=True),
    "packed, padded": Case(packed="padded"),
    "packed, padded nowhere": Case(packed="one tensor"),
    "rope, packed, recompute, plain torch": Case(
        rotary=True, packed="dense", options=FULL, backend="torch"
    ),
    "rope, packed, TP and SP": Case(rotary=True, packed="dense", tensor_parallel=2, rank=1),
    "documents, TP and SP, rank 0": Case(mask="documents", tensor_parallel=2),
    "rope, TP and SP, recompute": Case(rotary=True, tensor_parallel=2, rank=1, options=FULL),
    "plain torch, TP and SP": Case(tensor_parallel=2, rank=1, backend="torch"),
    "joined micro-batches": Case(rotary=True, mask="documents", joined=4),
    "joined micro-batches, packed": Case(rotary=True, packed="one tensor", joined=4),
    "last pipeline stage": Case(layers=8, rotary=True, first_stage=False, rank=1),
}
LARGER = {name: op_counts.with_more_layers(case) for name, case in COUNTED.items()}
# What a fault is put into.
WITH_FAULT = Case(rotary=True, mask="documents", options=FULL)


def _half() -> dict[str, Any]:
    """Run all cases on one of two processes, faults and larger models on the other."""
    if os.environ["RANK"] == "0":
        return {"cases": op_counts.run_cases(CASES)}
    found = {}
    larger = op_counts.run_cases(LARGER)
    for name, fault in fake_faults.FAULTS.items():
        with fake_faults.put(fault):
            found[name] = fake_gpt.run(WITH_FAULT).found
    return {"larger": larger, "faults": found}


@pytest.fixture(scope="module")
def results():
    first, second = run(2, _half)
    return first | second


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_copies_or_is_on_the_cpu(name, results):
    result = results["cases"][name]
    assert result["found"] == []
    if CASES[name].dropping:
        assert len(result["forward"]) > 3 and result["backward"], "our code was not seen"
    else:
        assert not result["forward"] and not result["backward"]


@pytest.mark.parametrize("name", COUNTED)
def test_launches_are_those_of_the_golden_file(name, results):
    golden = json.loads(op_counts.GOLDEN.read_text())
    if name == op_counts.PLAIN_TORCH and golden["torch"] != torch.__version__.split("+")[0]:
        pytest.skip(f"torch {golden['torch']} counted; another has other ops")
    counted = op_counts.count(name, results["cases"], results["larger"])
    assert counted == golden["micro-batch"][name], "python -m tests.gpu.op_counts says more"


def test_the_page_has_the_golden_figures():
    golden = json.loads(op_counts.GOLDEN.read_text())["micro-batch"]
    rows = re.findall(r"^\| (.+) \| (.*n.*) \| (.*n.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 5
    for name, forward, backward in rows:
        counts = golden[name]
        assert (counts["forward"]["all"], counts["backward"]["all"]) == (forward, backward)


def test_nothing_is_launched_that_is_not_counted(results):
    """All that a pass launches more than a dense one is what was counted as ours."""
    ours, dense = (results["cases"][name] for name in ("rope, documents", "dense"))
    counted = Counter(ours["forward"]) + Counter(ours["backward"])
    assert Counter(ours["all"]) == Counter(dense["all"]) + counted


@pytest.mark.parametrize("name", fake_faults.FAULTS)
def test_faults_are_found(name, results):
    fault = fake_faults.FAULTS[name]
    found = results["faults"][name]
    assert found, "the guard saw nothing"
    assert fault.found in found[0]
    module, function = (fault.seen_in or fault.function).split(":")
    assert f"megatron_rltd/{module.replace('.', '/')}.py:" in found[0]
    assert found[0].endswith(f"in {function.split('.')[-1]}")
