"""Time training steps of a GPT at several kept lengths against dense ones, in one process.

    python tools/bench_training.py                          on the GPU, else the CPU: a small GPT
    python tools/bench_training.py --preset gpt3-1.3b       GPT-3 1.3B on one GPU
    python tools/bench_training.py --profile                where a step's time goes
    python tools/bench_training.py --from benchmarks/results/bench_training-amd-epyc.json --plot

The steps go in turn: dense, one of each kept length, dense, and so on. In theory a step takes a
time proportional to its floating-point operations; the share of the saving realised is

    (1 - time relative to dense) / (1 - operations relative to dense)

for each kept length and over a whole schedule, the paper's (arXiv 2211.11586): from s/16 kept
tokens, in increments of s/128, to s after 70% of the steps. Its times between those measured are
interpolated linearly in the operations.

Shapes: s sequence length, b micro batch, k kept tokens.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_profile
import numpy
import torch
from bench_common import BenchmarkError, Row, add_options, chosen_device, machine, run, table
from bench_gpt import (
    DTYPES,
    LOCAL,
    PARTS,
    PRESETS,
    TRANSFORMER_ENGINE,
    Shape,
    Trainer,
    implementation,
    one_process,
    operations,
)
from bench_plots import draw_training
from bench_timing import CPU_TIME, KEPT_MEMORY, interleaved, keep_freed_memory, ratio, spread

from megatron_rltd.ops import BACKENDS
from megatron_rltd.schedule import LayerTokens, Schedule

STEPS, RAMP = 100_000, 70_000  # of the schedule; only their quotient matters
WARM_UP = 2  # rounds
LEAST_SAVING = 0.02  # below it the share realised is a quotient of noise
# {heading: (key of a row, format)}
COLUMNS = {
    "k": ("kept_tokens", ","),
    "k/s": ("share", ".3f"),
    "b": ("micro_batch_size", ","),
    "ms": ("milliseconds", ",.1f"),
    "quartiles": ("quartiles", ""),
    "forward": ("forward_milliseconds", ",.1f"),
    "backward": ("backward_milliseconds", ",.1f"),
    "optimizer": ("optimizer_milliseconds", ",.1f"),
    "LayerTokens": ("layer_token_ratio", ".3f"),
    "operations": ("operation_ratio", ".3f"),
    "time": ("time_ratio", ".3f"),
    "realised": ("saving_realised", ".0%"),
    "without optimizer": ("saving_realised_without_optimizer", ".0%"),
    "peak GiB": ("peak_gib", ".1f"),
}


def paper_schedule(shape: Shape) -> Schedule:
    """Return the paper's schedule, for any sequence length."""
    s = shape.seq_length
    return Schedule(s, max(1, s // 16), RAMP, max(1, s // 128))


def default_lengths(schedule: Schedule) -> list[int]:
    """Return the lengths to measure: the first, the last before nothing is dropped, some others."""
    s = schedule.seq_length
    lengths = {schedule.min_tokens, s // 8, s // 4, s // 2, 3 * s // 4, s - schedule.increment}
    return sorted(kept for kept in lengths if schedule.min_tokens <= kept < s)


def grown_micro_batch(shape: Shape, tokens: LayerTokens, kept: int, limit: int) -> int:
    """Return the largest micro-batch that has no more LayerTokens than a dense one.

    Args:
        limit: It is at most so many times the dense one, and a power of two times it.
    """
    factor = 1
    while 2 * factor <= limit and 2 * factor * tokens.per_sample(kept) <= tokens.dense:
        factor *= 2
    return factor * shape.micro_batch_size


def shares(schedule: Schedule, steps: int) -> dict[int, float]:
    """Return the share of the steps that each kept length has."""
    levels = [(first, kept) for first, kept in schedule.levels() if first < steps]
    ends = [first for first, _ in levels[1:]] + [steps]
    return {kept: (end - first) / steps for (first, kept), end in zip(levels, ends, strict=True)}


def over_schedule(
    schedule: Schedule, tokens: LayerTokens, cost: Callable[[int], int], rows: Sequence[Row]
) -> Row:
    """Return what is saved over a whole schedule, in theory and in time.

    Args:
        cost: Operations of a sample at a kept length.
        rows: Of the table, one for each kept length, the dense one included.
    """
    weights = shares(schedule, STEPS)
    dense = cost(schedule.seq_length)
    measured = sorted((row["operation_ratio"], row["time_ratio"]) for row in rows)
    theory = {kept: cost(kept) / dense for kept in weights}
    times = numpy.interp(list(theory.values()), *zip(*measured, strict=True))
    saved = 1 - sum(weights[kept] * theory[kept] for kept in weights)
    faster = 1 - sum(w * t for w, t in zip(weights.values(), times, strict=True))
    consumed = tokens.after(STEPS, 1).layer_tokens / (STEPS * tokens.dense)
    return {
        "layer_tokens_saved": 1 - consumed,
        "operations_saved": saved,
        "time_saved": float(faster),
        "saving_realised": float(faster) / saved,
    }


def rows_of(
    times: dict[tuple[int, int], list[dict[str, float]]],
    peaks: dict[tuple[int, int], float],
    shape: Shape,
    tokens: LayerTokens,
    cost: Callable[[int], int],
) -> list[Row]:
    """Return the table, a row for each (kept length, micro-batch)."""
    dense_key = (shape.seq_length, shape.micro_batch_size)

    def column(key: tuple[int, int], *parts: str) -> list[float]:
        return [sum(step[part] for part in parts) for step in times[key]]

    def realised(key: tuple[int, int], saved: float, *parts: str) -> float | None:
        if saved < LEAST_SAVING:
            return None
        return (1 - ratio(column(key, *parts), column(dense_key, *parts))) / saved

    rows = []
    for key in times:
        kept, micro_batch_size = key
        median, lower, upper = (1e3 * value for value in spread(column(key, "step")))
        saved = 1 - cost(kept) / cost(shape.seq_length)
        medians = {f"{p}_milliseconds": 1e3 * spread(column(key, p))[0] for p in PARTS}
        rows.append(
            {
                "kept_tokens": kept,
                "share": kept / shape.seq_length,
                "micro_batch_size": micro_batch_size,
                "milliseconds": median,
                "quartiles": f"{lower:,.1f}-{upper:,.1f}",
                **medians,
                "layer_token_ratio": tokens.per_sample(kept) / tokens.dense,
                "operation_ratio": 1 - saved,
                "time_ratio": ratio(column(key, "step"), column(dense_key, "step")),
                "saving_realised": realised(key, saved, "step"),
                "saving_realised_without_optimizer": realised(key, saved, "forward", "backward"),
                "peak_gib": peaks.get(key),
                "seconds": column(key, "step"),
            }
        )
    return rows


def chosen_shape(options: argparse.Namespace) -> Shape:
    """Return the preset with what the options change."""
    preset = PRESETS["tiny" if options.quick else options.preset]
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(preset, **given)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results, as `bench_common.write_results` takes them, and those of the schedule."""
    device = chosen_device(options)
    if device.type == "cpu" and torch.cuda.is_available():
        raise BenchmarkError("--device cpu: Megatron runs on the CPU only where there is no GPU")
    shape, facts = chosen_shape(options), machine(device)
    if shape.dtype not in DTYPES:
        raise BenchmarkError(f"--dtype {shape.dtype} must be one of {', '.join(DTYPES)}")
    schedule = paper_schedule(shape)
    lengths = sorted(set(options.kept or default_lengths(schedule)))
    if not lengths or lengths[0] < 1 or lengths[-1] >= shape.seq_length:
        raise BenchmarkError(f"--kept must be between 1 and s - 1 = {shape.seq_length - 1}")
    rounds = options.rounds or (2 if options.quick else 7)
    samples = shape.micro_batch_size * options.grow_micro_batch
    notes = [KEPT_MEMORY] if device.type == "cpu" and keep_freed_memory() else []
    notes += [CPU_TIME] if options.cpu_time else []
    with one_process(device):
        trainer = Trainer(shape, lengths[0], device, options.backend)
        tokens = LayerTokens(schedule, shape.num_layers, trainer.dropped)
        is_causal = implementation() == TRANSFORMER_ENGINE
        cost = functools.partial(operations, shape, dropped=trainer.dropped, is_causal=is_causal)
        keys = [(kept, shape.micro_batch_size) for kept in (shape.seq_length, *lengths)]
        for kept in lengths:
            grown = grown_micro_batch(shape, tokens, kept, options.grow_micro_batch)
            if grown > shape.micro_batch_size:
                keys.append((kept, grown))
        now = time.process_time if options.cpu_time else time.perf_counter
        steps = {key: functools.partial(trainer.timed_step, *key, samples, now) for key in keys}
        peaks: dict[tuple[int, int], float] = {}
        if device.type == "cuda":
            for key, step in steps.items():
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[key] = torch.cuda.max_memory_allocated() / 2**30
        times = interleaved(steps, lambda step: step(), rounds, WARM_UP)
        extra = {}
        if options.profile:
            half = max(lengths[0], shape.seq_length // 2)
            extra["profile"] = bench_profile.profile(trainer, half, samples, now, cost)
    rows = rows_of(times, peaks, shape, tokens, cost)
    by_length = {row["kept_tokens"]: row for row in rows[: len(lengths) + 1]}
    notes += [
        f"layers: {_LAYERS[implementation()]}",
        f"a step: {samples} samples, Adam; 'time' is the median of ratios to dense, round by round",
        "operations: matrix products with the output layer, attention "
        + ("without its masked half" if is_causal else "whole, as these layers compute it"),
    ]
    over = {"fixed micro-batch": over_schedule(schedule, tokens, cost, list(by_length.values()))}
    if len(rows) > len(by_length):
        by_length |= {row["kept_tokens"]: row for row in rows[len(by_length) :]}
        grown_rows = list(by_length.values())
        over["grown micro-batch"] = over_schedule(schedule, tokens, cost, grown_rows)
    settings = dataclasses.asdict(shape) | {"rounds": rounds, "samples": samples}
    settings |= {"dropped_layers": trainer.dropped, "backend": options.backend}
    return {
        "machine": facts,
        "settings": settings,
        "notes": notes,
        "rows": rows,
        "schedule": over,
        **extra,
    }


_LAYERS = {
    LOCAL: "Megatron's local ones, plain torch, since Transformer Engine cannot be imported",
    TRANSFORMER_ENGINE: "Transformer Engine's",
}


def show(results: dict[str, Any]) -> None:
    """Print the table and what is saved over the schedule."""
    sizes = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    print(f"{sizes}\n\n{table(COLUMNS, results['rows'])}\n\nover the paper's schedule, saved:")
    for name, over in results["schedule"].items():
        parts = (f"{key.removesuffix('_saved')} {value:.1%}" for key, value in over.items())
        print(f"  {name}: {', '.join(parts)}".replace("_", " "))
    if "profile" in results:
        print(f"\n{bench_profile.described(results['profile'])}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds="7, after two that do not count")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes (small)")
    for field in dataclasses.fields(Shape):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, help="instead of the preset's")
    parser.add_argument("--kept", type=int, nargs="+", metavar="K", help="kept lengths to measure")
    parser.add_argument(
        "--grow-micro-batch",
        type=int,
        default=1,
        metavar="TIMES",
        help="a step is so many micro-batches; also measure short kept lengths in fewer, larger "
        "ones, of at most a dense one's LayerTokens",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="random-LTD's (auto)")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, k = s/2")
    return run("bench_training", parser.parse_args(argv), measure, show, draw_training)


if __name__ == "__main__":
    sys.exit(main())
