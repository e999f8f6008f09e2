"""The benchmarks run and count right. How long anything takes is not tested."""

import csv
import dataclasses
import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import bench_sweep
import bench_training
import pytest
import torch
from lib import attention as bench_attention
from lib import gpt as bench_gpt
from lib import lengths as bench_lengths
from lib import moves as bench_moves
from lib import profile as bench_profile
from lib import timing as bench_timing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_rltd.schedule import LayerTokenCost
from tests.parallel import ROOT, environment, run_all

S, B, H, LAYERS = 512, 3, 2, 22
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9]
MOVES = bench_moves.moves(has_kernels=True)  # without compiled ones these are torch's too


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
CPU = torch.device("cpu")


def trainer_with(attention: str) -> bench_gpt.Trainer:
    return bench_gpt.Trainer(TINY, 16, CPU, "auto", attention, bench_gpt.UNFUSED)


@pytest.mark.parametrize("kept", [16, TINY.seq_length])
def test_operations_are_those_of_the_model(kept):
    from megatron.training.training import num_floating_point_operations as megatrons

    from megatron_rltd.training.metrics import floating_point_operations
    from tests.megatron.test_metrics import arguments

    with bench_gpt.one_process(CPU):
        trainer = trainer_with(bench_attention.MEGATRON)
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


def attentions(**options):
    """Return torch's attention and Megatron's, as a model would build them."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    settings = {"hidden_size": 24, "num_attention_heads": 4, "attention_dropout": 0.0, **options}
    config = TransformerConfig(num_layers=2, use_cpu_initialization=True, **settings)
    ours = bench_attention.layer_spec(bench_attention.SDPA)
    classes = ours.submodules.self_attention.submodules.core_attention, DotProductAttention
    return [c(config, 2, AttnMaskType.causal, "self") for c in classes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 13, 40])
def test_fused_attention_is_megatrons(dtype, tolerance, groups, length):
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, 3, 4, 6), (length, 3, groups, 6), (length, 3, groups, 6), (length, 3, 24))
    *inputs, upstream = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    results = []
    with bench_gpt.one_process(CPU):
        for attention in attentions(num_query_groups=groups):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            output = attention(*leaves, None)
            results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for ours, megatrons in zip(*results, strict=True):
        assert ours.shape == megatrons.shape
        assert torch.allclose(ours, megatrons, rtol=tolerance, atol=tolerance)


def test_fused_attention_refuses_what_it_does_not_do():
    with bench_gpt.one_process(CPU):
        for options in ({"attention_dropout": 0.1}, {"window_size": (4, 0)}):
            with pytest.raises(ValueError, match="scaled_dot_product_attention"):
                attentions(**options)
        ours, _ = attentions()
        x = torch.zeros(5, 1, 4, 6)
        with pytest.raises(ValueError, match="takes no mask"):
            ours(x, x, x, torch.zeros(1, 1, 5, 5, dtype=torch.bool))


def test_a_gpt_learns_the_same_with_either_attention():
    norms = []
    for attention in (bench_attention.SDPA, bench_attention.MEGATRON):
        with bench_gpt.one_process(CPU):
            trainer = trainer_with(attention)
            kinds = {type(m).__name__ for m in trainer.model.modules()}
            assert ("ScaledDotProductAttention" in kinds) == (attention == bench_attention.SDPA)
            assert ("DotProductAttention" in kinds) == (attention == bench_attention.MEGATRON)
            for kept in (20, TINY.seq_length):
                trainer.step(kept, 2, 4, lambda part: None)
            norms.append([p.detach().double().norm().item() for p in trainer.model.parameters()])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_lengths_of_the_schedule():
    schedule = bench_lengths.paper_schedule(2048)
    assert (schedule.min_tokens, schedule.increment) == (128, 16)
    assert bench_lengths.default_lengths(schedule) == [
        *(128, 144, 256, 512, 528, 1024, 1040, 1168, 1536, 1680, 1840, 2032),
    ]
    for s in (32, 64, 512, 1000, 4096):
        lengths = bench_lengths.default_lengths(bench_lengths.paper_schedule(s))
        assert lengths == sorted(set(lengths))
        assert s // 16 <= lengths[0] < lengths[-1] < s
    levels = bench_lengths.sweep(schedule, None)
    assert levels == list(range(128, 2049, 16))
    assert bench_lengths.sweep(schedule, 3) == [128, 1088, 2048]
    assert bench_lengths.sweep(schedule, 1) == [128]
    assert len(set(bench_lengths.sweep(schedule, 50))) == 50


def test_saving_over_the_schedule():
    shape = bench_gpt.PRESETS["gpt3-1.3b"]
    schedule = bench_lengths.paper_schedule(shape.seq_length)
    weights = bench_lengths.shares(schedule, bench_lengths.STEPS)
    assert len(weights) == 121
    assert math.isclose(sum(weights.values()), 1)
    assert weights[2048] == 0.3
    tokens = LayerTokenCost(schedule, 24, 22)

    def cost(kept):
        return bench_gpt.operations(shape, kept, 22, is_causal=True)

    lengths = [*bench_lengths.default_lengths(schedule), 2048]
    rows = [{"operation_ratio": cost(k) / cost(2048)} for k in lengths]
    for row in rows:
        row["time_ratio"] = 0.4 + 0.6 * row["operation_ratio"]
    over = bench_lengths.over_schedule(schedule, tokens, cost, rows)
    consumed = sum(w * tokens.per_sample(k) for k, w in weights.items()) / tokens.dense
    assert math.isclose(over["layer_tokens_saved"], 1 - consumed)
    assert math.isclose(over["saving_realised"], 0.6)
    assert math.isclose(over["time_saved"], 0.6 * over["operations_saved"])


def test_steps_with_joined_micro_batches_train_the_same():
    shape = dataclasses.replace(TINY, num_layers=12)
    norms, sizes = [], []
    for size in (shape.micro_batch_size, 4 * shape.micro_batch_size):
        with bench_gpt.one_process(CPU):
            options = ("auto", bench_attention.MEGATRON, bench_gpt.UNFUSED, 4)
            trainer = bench_gpt.Trainer(shape, 4, CPU, *options)
            embedding = trainer.model.module.embedding
            embedding.register_forward_pre_hook(
                lambda module, args, kwargs: sizes.append(kwargs["input_ids"].size(0)),
                with_kwargs=True,
            )
            torch.manual_seed(3)
            trainer.step(4, size, 8 * shape.micro_batch_size, lambda part: None)
            keys = bench_training.keys_of(trainer, [4, 40], 8)
            norms.append([p.detach().double().norm().item() for p in trainer.model.parameters()])
    b = shape.micro_batch_size
    assert keys == [(shape.seq_length, b), (4, b), (40, b), (4, 4 * b)]
    assert sizes == [b] * 8 + [4 * b] * 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # after a step of Adam


def event(name, parent=None, kernels=(), **others):
    """Return what torch's profiler has of an op: its kernels are (name, microseconds)."""
    started = [SimpleNamespace(name=n, duration=us) for n, us in kernels]
    facts = {"device_type": torch.autograd.DeviceType.CPU, "is_user_annotation": False, **others}
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=started, **facts)


def test_costs_of_a_gpu_by_what_started_the_kernels():
    engine = "autograd::engine::evaluate_function: "
    loss = event("_VocabParallelCrossEntropy")
    accumulate = event(f"{engine}torch::autograd::AccumulateGrad")
    move = event("_ExchangeBackward", event(f"{engine}_ExchangeBackward"))
    optimizer = event(bench_gpt.OPTIMIZER, None, [(bench_gpt.OPTIMIZER, 1000)])
    fused = event("aten::_scaled_dot_product_flash_attention", event("aten::linear"))
    found = bench_profile.microseconds(
        [
            optimizer,
            event("aten::_foreach_add_", optimizer, [("multi_tensor_apply_kernel", 7)]),
            event("aten::mm", event("aten::linear"), [("nvjet_tst_128x256", 10)]),
            event("_LayerNormLinear", None, [("nvjet_tst_256x128", 20), ("ln_fwd_kernel", 3)]),
            event("aten::exp", loss, [("vectorized_elementwise_kernel", 5)]),
            event("## Call CompiledFxGraph x ##", loss, [("triton_red_fused_exp_sub_0", 6)]),
            event("aten::add_", accumulate, [("vectorized_elementwise_kernel", 4)]),
            event("megatron_rltd::exchange_", move, [("megatron_rltd::exchange_kernel", 2)]),
            event("_Split", None, [("Memset (Device)", 1)]),
            event("aten::_flash_attention_forward", fused, [("pytorch_flash::flash_fwd", 30)]),
            event("aten::bmm", None, [("cutlass_80_gemm", 11)]),
            event("aten::gelu", None, [("GeluCUDAKernelImpl", 8)]),
            event("a kernel", device_type=torch.autograd.DeviceType.CUDA),
        ],
        is_gpu=True,
    )
    spent = {}
    for cost, _, microseconds in found:
        spent[cost] = spent.get(cost, 0) + microseconds
    assert spent == {
        bench_profile.UPDATE: 7,
        bench_profile.GEMM: 30,
        bench_profile.OTHER: 3 + 8,
        bench_profile.LOSS: 11,
        bench_profile.GRADIENTS: 4,
        bench_profile.OURS: 3,
        bench_profile.ATTENTION: 41,
    }


def test_a_gpu_is_busy_while_any_kernel_runs():
    def kernel(start, end, **others):
        times = SimpleNamespace(start=start, end=end)
        facts = {"device_type": torch.autograd.DeviceType.CUDA, **others}
        return event("kernel", time_range=times, **facts)

    kernels = [kernel(0, 10), kernel(5, 12), kernel(6, 8), kernel(20, 21), kernel(12, 13)]
    kernels += [kernel(0, 1000, is_user_annotation=True), event("aten::mm")]
    assert bench_profile.busy(kernels) == 14


def test_places_that_wait_for_the_gpu():
    def waits():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    line = waits.__code__.co_firstlineno + 2
    assert bench_sweep.synchronisations(waits) == [f"{__file__}:{line}"]


@pytest.mark.parametrize(
    ("dense", "dropped", "megatron", "ours"),
    [((), (), 0, 0), ((1,), (1,), 1, 0), ((1,), (1, 2), 1, 1), ((), (2,), 0, 1), ((), "e", 0, 1)],
)
def test_waits_of_random_ltd_are_told_from_megatrons(monkeypatch, dense, dropped, megatron, ours):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waiting:
        shape = TINY

        def step(self, kept, size, samples, mark, passes):
            with passes:
                places = dense if kept == TINY.seq_length else dropped
                if modes[-1] == "error" and places:
                    raise RuntimeError(bench_sweep.SYNCHRONISES)
                for place in places if modes[-1] == "warn" and places != "e" else ():
                    warnings.warn_explicit(bench_sweep.SYNCHRONISES, UserWarning, "file", place)

    found = bench_sweep.check_synchronisation(Waiting(), 8, 2)
    assert (len(found["megatron"]), len(found["random_ltd"])) == (megatron, ours)
    assert modes[-1] == "default"
    assert ("error" in modes) == (not dense and dropped in ((), "e"))
    assert bench_sweep.waits({"synchronisation": [found]}) == bool(ours)


def _run_here(name: str, arguments: list[str]) -> int | str | None:
    """Be a tool; return its exit status."""
    path = ROOT / "benchmarks" / name
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    return 0


def run_forked(name: str, *arguments: str) -> tuple[int, str]:
    """Run a tool where torch and Megatron are imported; return its exit status and output."""
    (result,) = run_all(1, _run_here, name, list(arguments))
    return result["value"], result["output"]


def run_tool(name: str, *arguments: str) -> str:
    """Run a tool as its users do; return what it prints."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
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
    status, shown = run_forked(tool, "--from", str(path), "--plot")
    assert status == 0, shown
    assert facts["device"] in shown
    assert read(folder) == (results, table, png)
    return results["rows"]


def test_bench_ops(tmp_path):
    options = ("--quick", "--threads", "1", "--device", "cpu", "--plot")
    options += ("--micro-batch-size", "1", "2", "--shares", "0.75")
    shown = run_tool("bench_ops.py", *options, "--output", str(tmp_path))
    rows = check_files(tmp_path, "bench_ops.py")
    whats = ["gather", "scatter", "split", "exchange_", "merge_"]
    whats += ["rotary angles", "select_mask", "sample", "run, forward", "run, forward+backward"]
    assert list(dict.fromkeys(row["what"] for row in rows)) == whats
    ways = {bench_moves.TORCH, bench_moves.DEEPSPEED_LINES}
    run_rows = [row for row in rows if row["what"] == whats[-1]]
    for size in (1, 2):
        assert ways <= {row["way"] for row in run_rows if row["micro_batch_size"] == size}
    for row in run_rows:
        assert row["copy_gigabytes_per_second"] > 0
        assert math.isclose(row["rows_per_layer"], row["rows_expected"], rel_tol=0.05)
        assert len(row["seconds"]) == 2
        assert row["way"] in shown
    assert all(row["time_vs_torch"] == 1 for row in rows if row["way"] == bench_moves.TORCH)


def test_bench_training(tmp_path):
    options = ("--quick", "--threads", "1", "--num-layers", "6", "--grow-micro-batch", "2")
    options += ("--rounds", "1", "--profile", "--plot", "--kept", "4", "16", "36", "63")
    shown = run_tool("bench_training.py", *options, "--output", str(tmp_path))
    rows = check_files(tmp_path, "bench_training.py")
    assert "fixed micro-batch" in shown
    assert "grown micro-batch" in shown
    assert "torch's scaled_dot_product_attention; cross-entropy: unfused" in shown
    assert "a step: 2 micro-batches, 4 samples, Adam" in shown
    lengths = [(row["kept_tokens"], row["micro_batch_size"]) for row in rows]
    assert lengths == [(64, 2), (4, 2), (16, 2), (36, 2), (63, 2), (4, 4), (16, 4)]
    assert {row["attention"] for row in rows} == {"sdpa"}
    assert rows[0]["time_ratio"] == rows[0]["operation_ratio"] == 1
    assert rows[0]["saving_realised"] is None
    for row in rows[1:3]:
        saved = 1 - row["operation_ratio"]
        assert math.isclose(row["saving_realised"], (1 - row["time_ratio"]) / saved)
        passes = row["forward_milliseconds"] + row["backward_milliseconds"]
        assert row["host_milliseconds"] == pytest.approx(passes)
    check_costs(json.loads(next(tmp_path.glob("*.json")).read_text())["profile"], shown)


def check_costs(profile: dict, shown: str) -> None:
    """Check what a profile of a dense, a short and a half-length step says they cost."""
    assert profile["kept_tokens"] == [64, 4, 32]
    assert profile["operation_ratios"][0] == 1
    whole, *costs = profile["costs"]
    assert [cost["name"] for cost in costs] == list(bench_profile.COSTS)
    for i in range(3):
        parts = sum(cost["milliseconds"][i] for cost in costs)
        assert parts == pytest.approx(whole["milliseconds"][i], rel=0.02)
        assert sum(cost["shares"][i] for cost in costs) == pytest.approx(1, rel=0.02)
    ours, *others = costs
    assert ours["milliseconds"][0] == 0
    assert min(ours["milliseconds"][1:]) > 0
    assert min(ms for cost in others[:-1] for ms in cost["milliseconds"]) > 0
    for cost in costs:
        assert cost["name"] in shown


def test_bench_sweep(tmp_path):
    options = ("--quick", "--threads", "1", "--levels", "3", "--output", str(tmp_path))
    shown = run_tool("bench_sweep.py", *options)
    (path,) = tmp_path.glob("bench_sweep-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["kept_tokens"] for row in rows] == [4, 34, 64]
    assert all(row["first_milliseconds"] > 0 < row["milliseconds"] for row in rows)
    assert {row["allocation_retries"] for row in rows} == {None}
    assert "3 lengths: " in shown
    assert run_forked("bench_sweep.py", "--from", str(path)) == (0, shown)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bench_ops.py", ["--from", "no.json"], "no.json"),
        ("bench_ops.py", ["--quick", "--shares", "0"], "--shares between 0 and 1"),
        ("bench_training.py", ["--quick", "--kept", "64"], "--kept must be between 1 and s - 1"),
        ("bench_training.py", ["--quick", "--attention", "te"], "Transformer Engine cannot run"),
        (
            "bench_training.py",
            ["--quick", "--cross-entropy", "fused"],
            "--cross-entropy fused rounds its gradients to bfloat16: --dtype bfloat16",
        ),
        ("bench_sweep.py", ["--quick", "--sync-check"], "--sync-check needs a GPU"),
    ],
)
def test_what_cannot_be_measured(tool, arguments, message):
    status, output = run_forked(tool, *arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output
