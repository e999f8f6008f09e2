"""Time training steps of a GPT at several kept lengths against dense ones, in one process.

    python benchmarks/bench_training.py                      on the GPU, else the CPU: a small GPT
    python benchmarks/bench_training.py --preset gpt3-1.3b   GPT-3 1.3B on one GPU, b = 8
    python benchmarks/bench_training.py --profile            what a step's time goes into
    python benchmarks/bench_training.py --from RESULTS.json --plot      show and draw them again

The steps go in turn: dense, one of each kept length, dense, and so on; each has several
micro-batches, for one optimizer step after a single micro-batch would weigh more than in training.
In theory a step takes a time proportional to its floating-point operations; the share of the saving
realised is

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
from collections.abc import Callable
from typing import Any

import torch
from lib import profile
from lib.attention import DESCRIBED, is_causal_only
from lib.common import BenchmarkError, Row, add_options, chosen_device, machine, run, table
from lib.gpt import PARTS, Shape, Trainer, has_fused_gradients, one_process, operations
from lib.lengths import default_lengths, over_schedule, paper_schedule
from lib.model_options import add_model_options, chosen_shape, trainer_of
from lib.plots import draw_training
from lib.timing import CPU_TIME, KEPT_MEMORY, interleaved, keep_freed_memory, ratio, spread

from megatron_rltd.schedule import LayerTokenCost

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
    "host": ("host_milliseconds", ",.1f"),
    "LayerTokens": ("layer_token_ratio", ".3f"),
    "operations": ("operation_ratio", ".3f"),
    "time": ("time_ratio", ".3f"),
    "realised": ("saving_realised", ".0%"),
    "without optimizer": ("saving_realised_without_optimizer", ".0%"),
    "peak GiB": ("peak_gib", ".1f"),
}


def rows_of(
    times: dict[tuple[int, int], list[dict[str, float]]],
    peaks: dict[tuple[int, int], float],
    shape: Shape,
    tokens: LayerTokenCost,
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
        medians = {f"{p}_milliseconds": 1e3 * spread(column(key, p))[0] for p in (*PARTS, "host")}
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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results, as `bench_common.write_results` takes them, and those of the schedule."""
    device = chosen_device(options)
    shape, facts = chosen_shape(options, device), machine(device)
    schedule = paper_schedule(shape.seq_length)
    lengths = sorted(set(options.kept or default_lengths(schedule)))
    if not lengths or lengths[0] < 1 or lengths[-1] >= shape.seq_length:
        raise BenchmarkError(f"--kept must be between 1 and s - 1 = {shape.seq_length - 1}")
    rounds = options.rounds or (2 if options.quick else 7)
    samples = shape.micro_batch_size * options.micro_batches
    notes = [KEPT_MEMORY] if device.type == "cpu" and keep_freed_memory() else []
    notes += [CPU_TIME] if options.cpu_time else []
    with one_process(device):
        trainer = trainer_of(options, shape, lengths[0], device)
        tokens = LayerTokenCost(schedule, shape.num_layers, trainer.dropped)
        is_causal = is_causal_only(options.attention)
        cost = functools.partial(operations, shape, dropped=trainer.dropped, is_causal=is_causal)
        now = time.process_time if options.cpu_time else time.perf_counter
        keys = keys_of(trainer, lengths, options.micro_batches)
        steps = {key: functools.partial(trainer.timed_step, *key, samples, now) for key in keys}
        peaks = {}
        if device.type == "cuda":
            peaks = {key: peak(step) for key, step in steps.items()}
        times = interleaved(steps, lambda step: step(), rounds, WARM_UP)
        extra = {}
        if options.profile:
            short, middle = lengths[0], max(lengths[0], shape.seq_length // 2)
            compared = sorted({short, middle})
            extra["profile"] = profile.measure(trainer, compared, samples, now, cost)
    rows = rows_of(times, peaks, shape, tokens, cost)
    for row in rows:
        row |= {"attention": options.attention, "cross_entropy": options.cross_entropy}
    by_length = {row["kept_tokens"]: row for row in rows[: len(lengths) + 1]}
    notes += [
        f"layers: {DESCRIBED[options.attention]}; cross-entropy: {options.cross_entropy}; weight "
        f"gradients added up {'where they are computed' if has_fused_gradients() else 'apart'}",
        f"a step: {options.micro_batches} micro-batches, {samples} samples, Adam; 'time' is the "
        "median of ratios to dense, round by round",
        "operations: matrix products with the output layer, attention "
        + ("without its masked half" if is_causal else "whole, as these layers compute it"),
    ]
    if device.type == "cuda":
        notes.append("host: until the forward and backward passes were given to the GPU, in ms")
    over = {"fixed micro-batch": over_schedule(schedule, tokens, cost, list(by_length.values()))}
    if len(rows) > len(by_length):
        by_length |= {row["kept_tokens"]: row for row in rows[len(by_length) :]}
        grown_rows = list(by_length.values())
        over["grown micro-batch"] = over_schedule(schedule, tokens, cost, grown_rows)
    settings = dataclasses.asdict(shape) | {"rounds": rounds, "samples": samples}
    settings |= {"micro_batches": options.micro_batches, "dropped_layers": trainer.dropped}
    settings |= {key: getattr(options, key) for key in ("backend", "attention", "cross_entropy")}
    return {
        "machine": facts,
        "settings": settings,
        "notes": notes,
        "rows": rows,
        "schedule": over,
        **extra,
    }


def keys_of(trainer: Trainer, lengths: list[int], micro_batches: int) -> list[tuple[int, int]]:
    """Return the (kept length, micro-batch) to measure, dense first, grown micro-batches last.

    Args:
        micro_batches: Of a step.
    """
    shape = trainer.shape
    keys = [(kept, shape.micro_batch_size) for kept in (shape.seq_length, *lengths)]
    joined = {kept: trainer.joined(kept, micro_batches) for kept in lengths}
    return keys + [(kept, n * shape.micro_batch_size) for kept, n in joined.items() if n > 1]


def peak(step: Callable[[], Any]) -> float:
    """Return the peak memory of a step on the GPU, in GiB."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def show(results: dict[str, Any]) -> None:
    """Print the table and what is saved over the schedule."""
    sizes = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    print(f"{sizes}\n\n{table(COLUMNS, results['rows'])}\n\nover the paper's schedule, saved:")
    for name, over in results["schedule"].items():
        parts = (f"{key.removesuffix('_saved')} {value:.1%}" for key, value in over.items())
        print(f"  {name}: {', '.join(parts)}".replace("_", " "))
    if "profile" in results:
        print(f"\n{profile.described(results['profile'])}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds="7, after two that do not count")
    add_model_options(parser)
    parser.add_argument("--kept", type=int, nargs="+", metavar="K", help="kept lengths to measure")
    parser.add_argument(
        "--grow-micro-batch",
        type=int,
        default=1,
        metavar="TIMES",
        help="also measure short kept lengths in passes of several micro-batches, up to so many, "
        "as --random-ltd-grow-micro-batch does",
    )
    parser.add_argument(
        "--profile", action="store_true", help="what a step's time goes into: dense, short, k = s/2"
    )
    return run("bench_training", parser.parse_args(argv), measure, show, draw_training)


if __name__ == "__main__":
    sys.exit(main())
