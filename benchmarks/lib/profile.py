"""Where the time of a training step goes, dense and with tokens dropped, by what it is spent on."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lib.common import Row, table
from lib.gpt import OPTIMIZER, Trainer

STEPS = {"cpu": 2, "cuda": 1}  # of each length, and one to warm up; the times are their means
ROWS = 16
OURS, GEMM, ATTENTION, LOSS, GRADIENTS, UPDATE, OTHER, IDLE = COSTS = (
    "random-LTD: row moves and sampling",
    "matrix products",
    "attention",
    "cross-entropy",
    "adding up gradients",
    "optimizer",
    "other: norms, activations, embedding",
    "idle (on a CPU: Python)",
)
# What is around an op decides first. Autograd functions have all that they do in them, and so do
# the nodes of the backward pass, which carry their names.
_AROUND = {
    OURS: r"^_(Split|Exchange|Merge|Gather|Scatter)(Tokens)?(Backward)?$|^megatron_rltd::",
    LOSS: r"CrossEntropy",
    UPDATE: f"^{OPTIMIZER}$",
    GRADIENTS: r"AccumulateGrad",
    ATTENTION: r"scaled_dot_product|ScaledDotProduct|FusedAttnFunc|FlashAttn|fused_attn",
}
# Then the op's own name and its kernel's. Batched products are those of unfused attention.
_ITSELF = {
    ATTENTION: r"aten::(baddbmm|bmm|_?softmax|_softmax_backward_data|masked_fill_?)$|fmha|flash|"
    r"cudnn.*sdpa|softmax_warp",
    GEMM: r"aten::(mm|addmm|matmul|linear)$|gemm|nvjet|cutlass|xmma|cublas|splitKreduce",
}
Times = dict[str, float]
# {heading: (key of a row, format)}
_COLUMNS = {
    "ms per step": ("name", ""),
    "dense": ("dense", ",.1f"),
    "k": ("kept", ",.1f"),
    "k/dense": ("ratio", ".2f"),
    "beyond theory": ("lost", "+,.1f"),
}


def _matching(patterns: dict[str, str], name: str) -> str | None:
    return next((cost for cost, pattern in patterns.items() if re.search(pattern, name)), None)


# Names are few, events many.
_around = functools.cache(functools.partial(_matching, _AROUND))
_itself = functools.cache(functools.partial(_matching, _ITSELF))


def spent_on(event: Any, kernel: str = "") -> str:
    """Return which of `COSTS` an event of the profiler, or a kernel that it started, belongs to.

    Args:
        event: With "name" and "cpu_parent", as torch's ``FunctionEvent`` has them.
        kernel: A GPU kernel's name.
    """
    around = event
    while around is not None:
        if cost := _around(around.name):
            return cost
        around = around.cpu_parent
    if "megatron_rltd" in kernel:
        return OURS
    return _itself(event.name) or _itself(kernel) or OTHER


def microseconds(events: Iterable[Any], is_gpu: bool) -> Iterator[tuple[str, str, float]]:
    """Yield (one of `COSTS`, name, microseconds) of what a profiler saw.

    Args:
        events: Its ``events()``.
        is_gpu: Whether to count kernels, each by the op that started it, or the ops themselves,
            each without what it calls.
    """
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if not is_gpu:
            if event.self_cpu_time_total:
                yield spent_on(event), event.name, event.self_cpu_time_total
            continue
        for kernel in event.kernels:
            # A range of our own appears a second time, as if it were a kernel.
            if kernel.name != event.name:
                yield spent_on(event, kernel.name), kernel.name, kernel.duration


def busy(events: Iterable[Any]) -> float:
    """Return for how many microseconds at least one kernel ran."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    total, until = 0.0, float("-inf")
    for start, end in kernels:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def spent(
    trainer: Trainer, kept: int, samples: int, now: Callable[[], float]
) -> tuple[Times, Times]:
    """Return the microseconds of a step at a kept length by `COSTS`, and by op or kernel.

    Both hold the whole "step". On a GPU it is one without the profiler, which slows the launches
    but not the kernels, and `IDLE` is what it takes longer than the GPU is busy. On the CPU `IDLE`
    is what no op accounts for: Python.
    """
    is_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    costs: Times = defaultdict(float)
    names: Times = defaultdict(float)

    def step() -> float:
        size = trainer.shape.micro_batch_size
        return 1e6 * trainer.timed_step(kept, size, samples, now)["step"]

    if not is_gpu:
        # What the profiler keeps lies between the step's tensors, which then need new pages.
        torch.ones(1 << 28)
    alone = step() if is_gpu else None
    with profile(activities=activities) as profiler:
        whole = step()
    events = profiler.events()
    for cost, name, duration in microseconds(events, is_gpu):
        costs[cost] += duration
        names[OURS if cost == OURS else name] += duration
    worked = busy(events) if is_gpu else sum(costs.values())
    whole = whole if alone is None else alone
    for counted in (costs, names):
        counted |= {"step": whole, IDLE: max(0.0, whole - worked)}
    return costs, names


def measure(
    trainer: Trainer,
    lengths: list[int],
    samples: int,
    now: Callable[[], float],
    cost: Callable[[int], int],
) -> dict[str, Any]:
    """Return what steps spend their time on, dense and at some kept lengths.

    Args:
        lengths: The kept ones. Of the last, the largest losses are listed by op or kernel.
        now: The clock of the CPU.
        cost: Operations of a sample at a kept length.

    Returns:
        "kept_tokens" and "operation_ratios" of the lengths, dense first; "costs": rows of
        milliseconds and shares of the step, for each; "rows": what a step at the last length spends
        beyond its share of the operations, by op or kernel, the largest first.
    """
    full = trainer.shape.seq_length
    by_cost: list[Times] = [defaultdict(float) for _ in (full, *lengths)]
    by_name: list[Times] = [defaultdict(float) for _ in (full, *lengths)]
    steps = STEPS[trainer.device.type]
    for number in range(-1, steps):
        for i, kept in enumerate((full, *lengths)):
            found = spent(trainer, kept, samples, now)
            for total, microseconds_of in zip((by_cost[i], by_name[i]), found, strict=True):
                for name, us in microseconds_of.items() if number >= 0 else ():
                    total[name] += us / 1e3 / steps
    ratios = [cost(kept) / cost(full) for kept in (full, *lengths)]
    costs = [
        {
            "name": name,
            "milliseconds": [found[name] for found in by_cost],
            "shares": [found[name] / found["step"] for found in by_cost],
        }
        for name in ("step", *COSTS)
    ]
    dense, sparse = by_name[0], by_name[-1]
    rows: list[Row] = [
        {
            "name": name[:60],
            "dense": dense[name],
            "kept": sparse[name],
            "ratio": sparse[name] / dense[name] if dense[name] else None,
            "lost": sparse[name] - ratios[-1] * dense[name],
        }
        for name in dense | sparse
    ]
    rows.sort(key=lambda row: (row["name"] != "step", row["name"] != OURS, -abs(row["lost"])))
    return {
        "kept_tokens": [full, *lengths],
        "operation_ratios": ratios,
        "costs": costs,
        "rows": rows[:ROWS],
    }


def described(result: dict[str, Any]) -> str:
    """Return what `measure` returned as two tables."""
    lengths, ratios = result["kept_tokens"], result["operation_ratios"]
    columns, rows = {"ms per step": ("name", "")}, []
    for kept in lengths:
        columns |= {
            f"k = {kept}": (f"ms {kept}", ",.1f"),
            f"share {kept}": (f"share {kept}", ".1%"),
        }
    for kept in lengths[1:]:
        columns[f"beyond theory {kept}"] = (f"lost {kept}", "+,.1f")
    for cost in result["costs"]:
        row: Row = {"name": cost["name"]}
        for i, kept in enumerate(lengths):
            row[f"ms {kept}"], row[f"share {kept}"] = cost["milliseconds"][i], cost["shares"][i]
            row[f"lost {kept}"] = cost["milliseconds"][i] - ratios[i] * cost["milliseconds"][0]
        rows.append(row)
    shares = ", ".join(f"{ratio:.3f}" for ratio in ratios[1:])
    return (
        "what a step's time goes into, by the profiler, and how much more it is than the "
        f"operations' share, {shares}, of the dense one:\n\n{table(columns, rows)}\n\n"
        f"the same at k = {lengths[-1]} by op or kernel, the largest differences:\n\n"
        f"{table(_COLUMNS, result['rows'])}"
    )
