"""Where the time of a training step goes, with tokens dropped and without."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from bench_common import Row, table
from bench_gpt import Trainer
from torch.profiler import ProfilerActivity

STEPS = 3  # of each length; the times are their means
ROWS = 16
OURS = "random-LTD"
# What the profiler calls our part of a step: autograd functions with all in them, and the ops that
# are called outside these.
_OUR_CALLS = {"_Split", "_Exchange", "_Merge"}
_OUR_CALLS |= {f"{name}Backward" for name in _OUR_CALLS}
_OUR_CALLS |= {f"megatron_rltd::{name}" for name in ("sample", "gather", "select_mask")}
# {heading: (key of a row, format)}
_COLUMNS = {
    "ms per step": ("name", ""),
    "dense": ("dense", ",.1f"),
    "k": ("kept", ",.1f"),
    "k/dense": ("ratio", ".2f"),
    "beyond theory": ("lost", "+,.1f"),
}


def milliseconds(
    trainer: Trainer, kept: int, samples: int, now: Callable[[], float]
) -> Counter[str]:
    """Return the milliseconds of a step at a kept length, by what they went into.

    On the CPU by op, without what it calls; on a GPU by kernel. `OURS` is all of random-LTD, and
    "other" is what no op accounts for: Python, and where the GPU waits.
    """
    is_gpu = trainer.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    size = trainer.shape.micro_batch_size
    spent: Counter[str] = Counter()
    for _ in range(STEPS):
        if not is_gpu:
            # What the profiler keeps lies between the step's tensors, which then need new pages.
            torch.ones(1 << 28)
        with torch.profiler.profile(activities=[activity]) as profiler:
            spent["step"] += round(1e6 * trainer.timed_step(kept, size, samples, now)["step"])
        for event in profiler.key_averages():
            if is_gpu and "megatron_rltd" in event.key:
                spent[OURS] += event.self_device_time_total
            elif is_gpu:
                spent[event.key] += event.self_device_time_total
            elif event.key in _OUR_CALLS:
                spent[OURS] += event.cpu_time_total
            elif not event.key.startswith("megatron_rltd::"):
                spent[event.key] += event.self_cpu_time_total
    spent["other"] = spent["step"] - sum(n for name, n in spent.items() if name != "step")
    return Counter({name: us / 1e3 / STEPS for name, us in spent.items()})


def profile(
    trainer: Trainer,
    kept: int,
    samples: int,
    now: Callable[[], float],
    cost: Callable[[int], int],
) -> dict[str, Any]:
    """Return what a step with dropped tokens spends beyond its share of the operations.

    Args:
        kept: k.
        now: The clock of the CPU.
        cost: Operations of a sample at a kept length.

    Returns:
        "kept_tokens", "operation_ratio" and "rows", in milliseconds, the largest losses first.
    """
    full = trainer.shape.seq_length
    dense, sparse = (milliseconds(trainer, length, samples, now) for length in (full, kept))
    share = cost(kept) / cost(full)
    rows: list[Row] = [
        {
            "name": name[:60],
            "dense": dense[name],
            "kept": sparse[name],
            "ratio": sparse[name] / dense[name] if dense[name] else None,
            "lost": sparse[name] - share * dense[name],
        }
        for name in dense | sparse
    ]
    rows.sort(key=lambda row: (row["name"] != "step", row["name"] != OURS, -abs(row["lost"])))
    return {"kept_tokens": kept, "operation_ratio": share, "rows": rows[:ROWS]}


def described(result: dict[str, Any]) -> str:
    """Return what `profile` returned as a table."""
    return (
        f"a step's time at k = {result['kept_tokens']} and dense, by the profiler, and how much "
        f"more it is than the operations' share, {result['operation_ratio']:.3f}, of the dense "
        f"one:\n\n{table(_COLUMNS, result['rows'])}"
    )
