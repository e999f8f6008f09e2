"""Time choosing and moving tokens: compiled kernels, plain torch, and DeepSpeed's way of doing it.

    python benchmarks/bench_ops.py                    on the GPU, else the CPU
    python benchmarks/bench_ops.py --micro-batch-size 1 4 8 16 --shares 0.06 0.5 0.95
    python benchmarks/bench_ops.py --quick --plot     tiny, to see that it works
    python benchmarks/bench_ops.py --from benchmarks/results/bench_ops-MACHINE.json --plot

First each op alone, forward; then what a run of layers does, forward and with backward, with
nothing between the moves. All that is compared is measured in turn in one process, beside a copy of
as many bytes.

Shapes: s sequence length, b micro batch, h hidden size, l layers, k kept tokens.
"""

import argparse
import functools
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lib.common import BenchmarkError, Row, add_options, chosen_device, machine, run, table
from lib.moves import (
    DEEPSPEED_LINES,
    TORCH,
    Inputs,
    Move,
    check,
    deepspeed,
    expected_rows,
    moves,
    random_inputs,
    rows_copied,
)
from lib.plots import draw_ops
from lib.single_ops import Timed, single_ops
from lib.timing import (
    CPU_TIME,
    KEPT_MEMORY,
    Call,
    device_seconds,
    interleaved,
    keep_freed_memory,
    launch_seconds,
    ratio,
    spread,
)
from torch import Tensor

from megatron_rltd.tokens import kernels

SHARES, QUICK_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9), (0.25, 0.75)
DTYPES = ("float32", "bfloat16", "float16")
FORWARD, BOTH = "forward", "forward+backward"
RUN = "run"
# {kind: default of each of SIZE_NAMES}. The hidden states are larger than the caches.
SIZES = {
    "cpu": (2048, [4], 2048, 22, "float32", 7),
    "cuda": (2048, [16], 2048, 22, "bfloat16", 30),
    "quick": (256, [2], 64, 4, "float32", 2),
}
SIZE_NAMES = "seq_length micro_batch_size hidden_size num_layers dtype rounds".split()
# {heading: (key of a row, format)}
COLUMNS = {
    "what": ("what", ""),
    "b": ("micro_batch_size", ""),
    "k/s": ("share", ".2f"),
    "way": ("way", ""),
    "rows moved per layer": ("rows_per_layer", ".2f"),
    "expected": ("rows_expected", ".2f"),
    "ms": ("milliseconds", ",.3f"),
    "vs torch": ("time_vs_torch", ".2f"),
    "vs DeepSpeed formulation": ("time_vs_deepspeed_formulation", ".2f"),
    "GB/s": ("gigabytes_per_second", ",.1f"),
    "of a copy's": ("share_of_copy", ".0%"),
    "copy, GB/s": ("copy_gigabytes_per_second", ",.1f"),
    "launches, ms": ("launch_milliseconds", ",.3f"),
}


def copies(like: Tensor, moved: int) -> Call:
    """Return a call that copies, reading and writing `moved` bytes in all, as large as `like`."""
    source = like.view(torch.uint8).flatten()
    target = _target(source.numel(), source.device)
    whole, rest = divmod(moved // 2, source.numel())

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy


@functools.cache
def _target(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def compare(options: argparse.Namespace, like: Tensor, ways: Mapping[str, Timed]) -> list[Row]:
    """Return for each way its times, alone and against the others and a copy."""
    calls: dict[Any, Call] = {way: timed.call for way, timed in ways.items()}
    for timed in ways.values():
        if timed.moved:
            calls[timed.moved] = copies(like, timed.moved)
    now = time.process_time if options.cpu_time else time.perf_counter
    clock = functools.partial(device_seconds, device=options.device, now=now)
    seconds = interleaved(calls, clock, options.rounds)
    rows = []
    for way, (call, moved) in ways.items():
        median, lower, upper = spread(seconds[way])
        launches = launch_seconds(call, options.device)
        against = {
            key: ratio(seconds[way], seconds[other]) if other in seconds else None
            for key, other in (
                ("time_vs_torch", TORCH),
                ("time_vs_deepspeed_formulation", DEEPSPEED_LINES),
            )
        }
        rows.append(
            {
                "way": way,
                "milliseconds": median * 1e3,
                "milliseconds_lower_quartile": lower * 1e3,
                "milliseconds_upper_quartile": upper * 1e3,
                **against,
                "bytes": moved,
                "gigabytes_per_second": moved / median / 1e9 if moved else None,
                "share_of_copy": ratio(seconds[moved], seconds[way]) if moved else None,
                "copy_gigabytes_per_second": moved / spread(seconds[moved])[0] / 1e9
                if moved
                else None,
                "launch_milliseconds": launches * 1e3 if launches else None,
                "seconds": seconds[way],
            }
        )
    return rows


def run_of(move: Move, inputs: Inputs, upstream: Tensor, which: str) -> Call:
    """Return a call that moves the tokens of a run of layers that do nothing."""
    start = inputs.hidden.detach().requires_grad_()

    def call() -> None:
        output = move(start, inputs.index_sets, lambda tokens: tokens)
        if which == BOTH:
            torch.autograd.grad(output, start, upstream)

    return call


def measure_share(
    options: argparse.Namespace, hidden: Tensor, share: float, module: Any
) -> list[Row]:
    """Return the rows of the table for one kept share."""
    kept = max(1, round(share * options.seq_length))
    inputs = random_inputs(hidden, options.num_layers, kept)
    has_kernels = kernels.missing_for(options.device.type) is None
    rows: list[Row] = []
    for name, ways in single_ops(inputs, has_kernels, module):
        for row in compare(options, hidden, ways):
            rows.append({"what": name, "rows_per_layer": None, "rows_expected": None} | row)
    run_ways = moves(has_kernels, module)
    check(run_ways, inputs)
    upstream = torch.randn_like(hidden)
    for which in (FORWARD, BOTH):
        timed, moved = {}, {}
        for way, move in run_ways.items():
            forward, backward = rows_copied(way, inputs)
            moved[way] = 2 * (forward + backward * (which == BOTH))
            timed[way] = Timed(run_of(move, inputs, upstream, which), moved[way] * inputs.row_bytes)
        for row in compare(options, hidden, timed):
            way = row["way"]
            counted = {
                "what": f"{RUN}, {which}",
                "rows_per_layer": moved[way] / inputs.rows / options.num_layers,
                "rows_expected": expected_rows(way, inputs.share, options.num_layers)
                if which == BOTH
                else None,
            }
            rows.append(counted | row)
    shared = {"micro_batch_size": hidden.size(1), "share": share, "kept_tokens": kept}
    return [shared | row for row in rows]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results, as `bench_common.write_results` takes them."""
    options.device = chosen_device(options)
    sizes = SIZES["quick" if options.quick else options.device.type]
    for name, value in zip(SIZE_NAMES, sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.shares = options.shares or (QUICK_SHARES if options.quick else SHARES)
    if options.num_layers < 2 or not all(0 < share <= 1 for share in options.shares):
        raise BenchmarkError("--num-layers must be 2 or more and --shares between 0 and 1")
    facts = machine(options.device)
    dtype = getattr(torch, options.dtype)
    module, why = deepspeed(options.device, dtype, options.seq_length, options.hidden_size)
    notes = [
        "a row moved is one of [s, b, h] read or written, in units of s * b rows; counted from the "
        "index sets, backward included where there is one; expected is its mean",
        "times are medians with cold caches; ratios, of the same round, and so is the share of a "
        "copy's speed, that of a copy of as many bytes",
    ]
    if options.device.type == "cpu" and keep_freed_memory():
        notes.append(KEPT_MEMORY)
    if options.cpu_time:
        notes.append(CPU_TIME)
    if why:
        notes.append(f"without DeepSpeed: {why}")
    torch.manual_seed(0)
    rows = []
    for size in options.micro_batch_size:
        shape = (options.seq_length, size, options.hidden_size)
        hidden = torch.randn(shape, device=options.device).to(dtype)
        for share in options.shares:
            rows += measure_share(options, hidden, share, module)
    order = list(dict.fromkeys(row["what"] for row in rows))
    rows.sort(key=lambda row: order.index(row["what"]))  # and within, as they were measured
    settings = {name: getattr(options, name) for name in [*SIZE_NAMES, "quick"]}
    return {"machine": facts, "settings": settings, "notes": notes, "rows": rows}


def show(results: dict[str, Any]) -> None:
    """Print a table of the ops alone, a line for each way to do one, and a table of the runs."""
    sizes = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    runs = [row for row in results["rows"] if row["what"].startswith(RUN)]
    single: dict[tuple, Row] = {}
    for row in results["rows"][: -len(runs)]:
        key = {name: row[name] for name in ("what", "way", "micro_batch_size")}
        line = single.setdefault(tuple(key.values()), key)
        line[row["share"]] = f"{row['milliseconds']:,.3f} ({row['time_vs_torch']:.2f})"
    lines = list(single.values())
    names = {key: name for name, (key, _) in COLUMNS.items()}
    columns = {names.get(key, f"k/s {key}"): (key, "") for key in lines[0]}
    print(f"{sizes}\n\neach op alone, ms and (relative to torch):\n\n{table(columns, lines)}")
    print(f"\na run of layers:\n\n{table(COLUMNS, runs)}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds="7; on a GPU 30")
    parser.add_argument("--shares", type=float, nargs="+", metavar="P", help="kept shares k/s")
    parser.add_argument("--seq-length", type=int, help="2048")
    parser.add_argument("--micro-batch-size", type=int, nargs="+", metavar="B", help="4; GPU: 16")
    parser.add_argument("--hidden-size", type=int, help="2048")
    parser.add_argument("--num-layers", type=int, help="of a run (22)")
    parser.add_argument("--dtype", choices=DTYPES, help="float32; on a GPU bfloat16")
    return run("bench_ops", parser.parse_args(argv), measure, show, draw_ops)


if __name__ == "__main__":
    sys.exit(main())
