"""Train through all kept lengths of the schedule in order and say what each new one costs.

    python benchmarks/bench_sweep.py --preset gpt3-1.3b --sync-check     GPT-3 1.3B on one GPU
    python benchmarks/bench_sweep.py --quick                             tiny, to see that it works
    python benchmarks/bench_sweep.py --levels 20                         20 of them, evenly spread

A run of the paper's schedule has 121 kept lengths, each new to the GPU's libraries, to the memory
that torch keeps and to functions that were compiled for other shapes. Of each length two steps are
taken: what the first takes longer than the second is what a new length costs, and beside it stand
how often torch compiled anew, and how often it gave all its free memory back to find room.
With --sync-check steps are also run under torch.cuda.set_sync_debug_mode: Python must not wait for
the GPU anywhere between the start of the forward and the end of the backward pass.

Shapes: s sequence length, b micro batch, k kept tokens.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lib.attention import DESCRIBED
from lib.common import BenchmarkError, Row, add_options, chosen_device, machine, run, table
from lib.gpt import Trainer, one_process
from lib.lengths import paper_schedule, sweep
from lib.model_options import add_model_options, chosen_shape, trainer_of
from lib.timing import CPU_TIME, KEPT_MEMORY, keep_freed_memory

WARM_UP = 2  # dense steps
SYNCHRONISES = "called a synchronizing CUDA operation"
# {heading: (key of a row, format)}
COLUMNS = {
    "k": ("kept_tokens", ","),
    "first, ms": ("first_milliseconds", ",.1f"),
    "second": ("milliseconds", ",.1f"),
    "host": ("host_milliseconds", ",.1f"),
    "GPU": ("gpu_milliseconds", ",.1f"),
    "compiled": ("compilations", ","),
    "retries": ("allocation_retries", ","),
    "peak GiB": ("peak_gib", ".1f"),
    "reserved": ("reserved_gib", ".1f"),
}


def compilations() -> int:
    """Return how many graphs torch has compiled in this process, for any shapes."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def memory() -> Row:
    """Return what torch's allocator on the GPU has done so far; None each without one."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("allocation_retries", "peak_gib", "reserved_gib"))
    stats = torch.cuda.memory_stats()
    return {
        "allocation_retries": stats["num_alloc_retries"],
        "peak_gib": stats["allocated_bytes.all.peak"] / 2**30,
        "reserved_gib": stats["reserved_bytes.all.current"] / 2**30,
    }


def measure_level(trainer: Trainer, kept: int, samples: int, now: Callable[[], float]) -> Row:
    """Return the row of one kept length: two steps at it, and what they did."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size, compiled = trainer.shape.micro_batch_size, compilations()
    first, second = (trainer.timed_step(kept, size, samples, now) for _ in range(2))
    is_gpu = trainer.device.type == "cuda"
    return {
        "kept_tokens": kept,
        "first_milliseconds": 1e3 * first["step"],
        "milliseconds": 1e3 * second["step"],
        "host_milliseconds": 1e3 * second["host"],
        # Of the passes, from the first kernel to the end of the last, gaps included.
        "gpu_milliseconds": 1e3 * (second["forward"] + second["backward"]) if is_gpu else None,
        "compilations": compilations() - compiled,
        **memory(),
    }


def synchronisations(call: Callable[[], Any]) -> list[str]:
    """Return where a call waits for the GPU, as "file:line", each place once, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    places = [f"{w.filename}:{w.lineno}" for w in caught if SYNCHRONISES in str(w.message)]
    return list(dict.fromkeys(places))


@contextlib.contextmanager
def debugged(mode: str) -> Iterator[None]:
    """Have torch "warn" of, or raise an "error" at, whatever waits for the GPU."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_synchronisation(trainer: Trainer, kept: int, samples: int) -> Row:
    """Return where the passes of a step that drops tokens wait for the GPU.

    Two places count apart: where a dense step waits too, Megatron itself does. If it does nowhere,
    a whole forward and backward pass has to get through under "error" as well.

    Returns:
        "kept_tokens"; "megatron" and "random_ltd", places as "file:line".
    """
    size, full = trainer.shape.micro_batch_size, trainer.shape.seq_length

    def step(length: int, mode: str) -> None:
        trainer.step(length, size, samples, lambda part: None, passes=debugged(mode))

    step(full, "default")  # whatever is made once is not a wait in each step
    step(kept, "default")
    megatrons = synchronisations(lambda: step(full, "warn"))
    found = synchronisations(lambda: step(kept, "warn"))
    ours = [place for place in found if place not in megatrons]
    if not found:
        try:
            step(kept, "error")
        except RuntimeError as error:
            if SYNCHRONISES not in str(error):
                raise
            ours = [str(error).splitlines()[0]]
    return {"kept_tokens": kept, "megatron": megatrons, "random_ltd": ours}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results, as `bench_common.write_results` takes them, and of the check."""
    device = chosen_device(options)
    if options.sync_check and device.type != "cuda":
        raise BenchmarkError("--sync-check needs a GPU: nothing waits for a CPU")
    shape, facts = chosen_shape(options, device), machine(device)
    lengths = sweep(paper_schedule(shape.seq_length), options.levels)
    samples = shape.micro_batch_size * options.micro_batches
    now = time.process_time if options.cpu_time else time.perf_counter
    notes = [KEPT_MEMORY] if device.type == "cpu" and keep_freed_memory() else []
    notes += [CPU_TIME] if options.cpu_time else []
    extra = {}
    with one_process(device):
        trainer = trainer_of(options, shape, lengths[0], device)
        size = shape.micro_batch_size
        for _ in range(WARM_UP):
            trainer.timed_step(shape.seq_length, size, samples, now)
        rows = [measure_level(trainer, kept, samples, now) for kept in lengths]
        if options.sync_check:
            checked = [lengths[0], lengths[len(lengths) // 2]]
            extra["synchronisation"] = [
                check_synchronisation(trainer, kept, samples) for kept in checked
            ]
    notes += [
        f"layers: {DESCRIBED[options.attention]}; cross-entropy: {options.cross_entropy}",
        "first and second: steps in a row at a length that is new; compiled: graphs, in them; "
        "retries: how often all cached memory was given back to find room, so far",
        f"PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}",
    ]
    settings = dataclasses.asdict(shape) | {"samples": samples, "levels": len(lengths)}
    settings |= {key: getattr(options, key) for key in ("backend", "attention", "cross_entropy")}
    return {"machine": facts, "settings": settings, "notes": notes, "rows": rows, **extra}


def show(results: dict[str, Any]) -> None:
    """Print the table, its sums and what the check found."""
    rows = results["rows"]
    sizes = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    print(f"{sizes}\n\n{table(COLUMNS, rows)}\n")
    new = sum(row["first_milliseconds"] - row["milliseconds"] for row in rows)
    whole = sum(row["milliseconds"] for row in rows)
    print(
        f"{len(rows)} lengths: {whole:,.0f} ms a step each, {new:,.0f} ms more the first time, "
        f"{sum(row['compilations'] for row in rows)} graphs compiled"
    )
    if rows[-1]["allocation_retries"] is not None:
        print(f"allocation retries: {rows[-1]['allocation_retries']}")
    for check in results.get("synchronisation", []):
        for whose in ("megatron", "random_ltd"):
            places = ", ".join(check[whose]) or "nowhere"
            print(f"k = {check['kept_tokens']}: {whose} waits for the GPU {places}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw nothing: a sweep is a table."""
    raise BenchmarkError("--plot: a sweep has no plot")


def waits(results: dict[str, Any]) -> bool:
    """Return whether random-LTD waits for the GPU somewhere."""
    return any(check["random_ltd"] for check in results.get("synchronisation", []))


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; return the exit status, 1 if random-LTD waits for the GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds="not used: two steps of each length")
    add_model_options(parser)
    parser.add_argument("--levels", type=int, metavar="N", help="of the schedule's (all)")
    parser.add_argument("--sync-check", action="store_true", help="that Python never waits")
    shown: list[dict[str, Any]] = []

    def show_and_keep(results: dict[str, Any]) -> None:
        shown.append(results)
        show(results)

    status = run("bench_sweep", parser.parse_args(argv), measure, show_and_keep, draw)
    return status or int(any(map(waits, shown)))


if __name__ == "__main__":
    sys.exit(main())
