"""The benchmarks run and count right. How long anything takes is not tested."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_rltd import ops
from tests.parallel import ROOT, environment

sys.path.insert(0, str(ROOT / "tools"))

import bench_gpt
import bench_moves
import bench_timing
import bench_training

S, B, H, LAYERS = 512, 3, 2, 22
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9]
MOVES = bench_moves.moves(has_kernels=True)  # without compiled ones these are torch's too


@pytest.fixture(autouse=True)
def backend():
    yield
    ops.use_backend("auto")


def inputs_of(share: float) -> bench_moves.Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator)
    return bench_moves.random_inputs(hidden, LAYERS, round(share * S))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("way", MOVES)
def test_rows_counted_are_those_expected(way, share):
    inputs = inputs_of(share)
    counted = 2 * sum(bench_moves.rows_copied(way, inputs)) / inputs.rows / LAYERS
    assert math.isclose(counted, bench_moves.expected_rows(way, inputs.share, LAYERS), rel_tol=0.01)


@pytest.mark.parametrize(
    ("way", "formula"),
    [
        (bench_moves.DEEPSPEED_LINES, lambda p: 8 * p + 2),
        (bench_moves.TORCH, lambda p: 8 * p),
        (bench_moves.IN_PLACE, lambda p: 8 * p),
        (bench_moves.KERNELS, lambda p: 8 * p - 4 * p**2),
    ],
)
@pytest.mark.parametrize("share", SHARES)
def test_rows_expected_of_a_long_run(way, formula, share):
    assert math.isclose(bench_moves.expected_rows(way, share, 10**6), formula(share), rel_tol=1e-4)


class CopiedRows(TorchDispatchMode):
    """Counts the rows that torch's own operations copy."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in ("index_select", "clone") and result.size(-1) == H:
            self.rows += result.numel() // H
        elif name == "index_copy_":
            self.rows += args[3].numel() // H
        return result


@pytest.mark.parametrize("way", [bench_moves.TORCH, bench_moves.DEEPSPEED_LINES])
def test_rows_counted_are_those_that_torch_copies(way):
    inputs = inputs_of(0.3)
    hidden = inputs.hidden.requires_grad_()
    expected = bench_moves.rows_copied(way, inputs)
    with CopiedRows() as forward:
        output = MOVES[way](hidden, inputs.index_sets, lambda tokens: tokens)
    with CopiedRows() as backward:
        torch.autograd.grad(output, hidden, torch.ones_like(output))
    assert (forward.rows, backward.rows) == expected


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_all_ways_move_the_same_rows(share):
    bench_moves.check(MOVES, inputs_of(share))


def test_other_rows_are_noticed():
    inputs = inputs_of(0.25)

    def wrong(hidden, index_sets, layer):
        return MOVES[bench_moves.TORCH](hidden, [*index_sets[:-1], index_sets[0]], layer)

    with pytest.raises(AssertionError, match="wrong moves other rows than torch"):
        bench_moves.check({"torch": MOVES[bench_moves.TORCH], "wrong": wrong}, inputs)


def test_calls_are_timed_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = bench_timing.interleaved(calls, lambda call: call() or len(order), 2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert times == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}
    assert bench_timing.ratio([1, 2, 30], [2, 4, 6]) == 0.5
    assert bench_timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert bench_timing.spread([1, 2, 3, 4, 5]) == (3, 2, 4)


TINY = bench_gpt.PRESETS["tiny"]


@pytest.mark.parametrize("kept", [16, TINY.seq_length])
def test_operations_are_those_of_the_model(kept):
    from megatron.training.training import num_floating_point_operations as megatrons

    from megatron_rltd.metrics import floating_point_operations
    from tests.test_metrics import arguments

    with bench_gpt.one_process(torch.device("cpu")):
        trainer = bench_gpt.Trainer(TINY, 16, torch.device("cpu"), "auto")
        counter = FlopCounterMode(display=False)
        with counter:
            trainer.step(kept, TINY.micro_batch_size, 4, lambda part: None)
        args = arguments(trainer.model.config)
        resolved = trainer._random_ltd.resolved
    args.seq_length, args.padded_vocab_size = TINY.seq_length, TINY.vocab_size
    counted = bench_gpt.operations(TINY, kept, trainer.dropped, is_causal=False)
    assert counter.get_total_flops() == 4 * counted
    causal = bench_gpt.operations(TINY, kept, trainer.dropped, is_causal=True)
    assert floating_point_operations(megatrons, resolved, kept, args, 4) == 4 * causal


def test_saving_over_the_schedule():
    shape = bench_gpt.PRESETS["gpt3-1.3b"]
    schedule = bench_training.paper_schedule(shape)
    assert (schedule.min_tokens, schedule.increment) == (128, 16)
    weights = bench_training.shares(schedule, bench_training.STEPS)
    assert len(weights) == 121
    assert math.isclose(sum(weights.values()), 1)
    assert weights[2048] == 0.3
    tokens = bench_training.LayerTokens(schedule, 24, 22)

    def cost(kept):
        return bench_gpt.operations(shape, kept, 22, is_causal=True)

    lengths = [*bench_training.default_lengths(schedule), 2048]
    assert lengths == [128, 256, 512, 1024, 1536, 2032, 2048]
    rows = [{"operation_ratio": cost(k) / cost(2048)} for k in lengths]
    for row in rows:
        row["time_ratio"] = 0.4 + 0.6 * row["operation_ratio"]
    over = bench_training.over_schedule(schedule, tokens, cost, rows)
    consumed = sum(w * tokens.per_sample(k) for k, w in weights.items()) / tokens.dense
    assert math.isclose(over["layer_tokens_saved"], 1 - consumed)
    assert math.isclose(over["saving_realised"], 0.6)
    assert math.isclose(over["time_saved"], 0.6 * over["operations_saved"])
    assert bench_training.grown_micro_batch(shape, tokens, 128, limit=8) == 4 * 4
    assert bench_training.grown_micro_batch(shape, tokens, 1024, limit=8) == 4


def run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def read(folder: Path) -> tuple[dict, list[dict], bytes]:
    """Return what the JSON, CSV and PNG in a folder hold, one of each."""
    files = {path.suffix: path for path in folder.iterdir()}
    assert set(files) == {".json", ".csv", ".png"}
    assert len({path.stem for path in files.values()}) == 1
    with files[".csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    return json.loads(files[".json"].read_text()), table, files[".png"].read_bytes()


def check_files(folder: Path, tool: str) -> list[dict]:
    """Check the files of a tool, and that it shows and draws them again; return the JSON's rows."""
    results, table, png = read(folder)
    facts = results["machine"]
    assert {"device", "torch", "megatron_core", "kernels", "load_average_after"} <= set(facts)
    assert facts["command"].startswith("python ")
    assert len(table) == len(results["rows"]) > 0
    for row, cells in zip(results["rows"], table, strict=True):
        assert cells["torch"] == facts["torch"]
        for key, value in row.items():
            if not isinstance(value, list):
                assert cells[key] == ("" if value is None else str(value))
    assert png.startswith(b"\x89PNG")
    (path,) = folder.glob("*.json")
    path.with_suffix(".png").unlink()
    shown = run_tool(tool, "--from", str(path), "--plot")
    assert facts["device"] in shown
    assert read(folder) == (results, table, png)
    return results["rows"]


def test_bench_ops(tmp_path):
    options = ("--quick", "--threads", "1", "--device", "cpu", "--plot")
    shown = run_tool("bench_ops.py", *options, "--output", str(tmp_path))
    rows = check_files(tmp_path, "bench_ops.py")
    whats = ["gather", "scatter", "split", "exchange_", "merge_"]
    whats += ["rotary angles", "select_mask", "sample", "run, forward", "run, forward+backward"]
    assert list(dict.fromkeys(row["what"] for row in rows)) == whats
    ways = {bench_moves.TORCH, bench_moves.DEEPSPEED_LINES}
    run_rows = [row for row in rows if row["what"] == whats[-1]]
    assert ways <= {row["way"] for row in run_rows}
    for row in run_rows:
        assert math.isclose(row["rows_per_layer"], row["rows_expected"], rel_tol=0.05)
        assert len(row["seconds"]) == 2
        assert row["way"] in shown
    assert all(row["time_vs_torch"] == 1 for row in rows if row["way"] == bench_moves.TORCH)


def test_bench_training(tmp_path):
    options = ("--quick", "--threads", "1", "--num-layers", "6", "--grow-micro-batch", "2")
    options += ("--rounds", "1", "--profile", "--plot")
    shown = run_tool("bench_training.py", *options, "--output", str(tmp_path))
    rows = check_files(tmp_path, "bench_training.py")
    assert "random-LTD" in shown.partition("beyond theory")[2]
    assert "fixed micro-batch" in shown
    assert "grown micro-batch" in shown
    lengths = [(row["kept_tokens"], row["micro_batch_size"]) for row in rows]
    assert lengths == [
        (64, 2),
        (4, 2),
        (8, 2),
        (16, 2),
        (32, 2),
        (48, 2),
        (63, 2),
        (4, 4),
        (8, 4),
        (16, 4),
    ]
    assert rows[0]["time_ratio"] == rows[0]["operation_ratio"] == 1
    assert rows[0]["saving_realised"] is None
    for row in rows[1:5]:
        saved = 1 - row["operation_ratio"]
        assert math.isclose(row["saving_realised"], (1 - row["time_ratio"]) / saved)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bench_ops.py", ["--from", "no.json"], "no.json"),
        ("bench_ops.py", ["--quick", "--shares", "0"], "--shares between 0 and 1"),
        ("bench_training.py", ["--quick", "--kept", "64"], "--kept must be between 1 and s - 1"),
    ],
)
def test_what_cannot_be_measured(tool, arguments, message):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
