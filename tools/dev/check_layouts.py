"""Compare random-LTD on parallel layouts with the same training in one process.

    python tools/dev/check_layouts.py                                  a quick subset, minutes
    python tools/dev/check_layouts.py --layouts TP2+SPxPP2 CP4 --models llama moe
    python tools/dev/check_layouts.py --features recompute-block+bf16 documents
    python tools/dev/check_layouts.py --all --models bert
    python tools/dev/check_layouts.py --all --with-plain --markdown docs/layouts.md
    python tools/dev/check_layouts.py --list                           all names

Every row is a layout, a model and features; rows are the product of the names given. Each runs in
real processes on the CPU, through Megatron's own unmodified training loop, and starts from a
checkpoint that one process made. Its number is the largest relative difference of the training
loss over the steps. What comes after -- goes to every run:

    python tools/dev/check_layouts.py --layouts TP2 -- --num-layers 12

The exit status is 1 if a row is over its limit or failed, 2 for a wrong option.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import layout_data
import layout_matrix as matrix
import layout_report as report
import layout_runs as runs
import local_ranks


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the options; `extra` is what stands after --."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layouts", nargs="+", metavar="NAME", help="such as TP2+SPxPP2 (default: a few)")
    add("--models", nargs="+", metavar="NAME", help="(default: rope)")
    add("--features", nargs="+", metavar="NAME", help="such as clip+bf16 (default: none)")
    add("--all", action="store_true", help="run the whole matrix, or its rows of --models")
    add("--list", action="store_true", help="print all names and the matrix, run nothing")
    add("--steps", type=int, default=4, metavar="N", help="steps to compare (default: 4)")
    add("--with-plain", action="store_true", help="measure plain Megatron too, in every row")
    text = "a pretrain_gpt.py, others' scripts beside it (default: those of megatron_rltd)"
    add("--script", default="pretrain_gpt", metavar="PATH", help=text)
    text = "flags for the layouts' runs only, not for the one in one process"
    add("--layout-flags", default="", metavar="'FLAGS'", help=text)
    add("--timeout", type=float, default=300, metavar="S", help="for one run (default: 300)")
    add("--markdown", type=Path, metavar="FILE", help="write the result as a page")
    options = parser.parse_args(argv[:split])
    options.extra = argv[split + 1 :]
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.all and (options.layouts or options.features):
        parser.error("--all takes no --layouts and --features")
    if options.script != "pretrain_gpt" and not Path(options.script).is_file():
        parser.error(f"--script: there is no file {options.script}")
    return options


def chosen_rows(options: argparse.Namespace) -> list[matrix.Row]:
    """Return the rows that the options ask for.

    Raises:
        UnknownName: They name something that is none of the tables'.
    """
    if options.all:
        rows = list(matrix.blocks(matrix.MATRIX))
        for name in options.models or ():
            matrix.check_name("--models", name, matrix.MODELS)
        return [row for row in rows if not options.models or row.model in options.models]
    if not (options.layouts or options.models or options.features):
        return list(matrix.blocks(matrix.QUICK))
    return matrix.rows(
        options.layouts or matrix.QUICK[0][0].split(),
        options.models or ["rope"],
        options.features or [matrix.NONE],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the rows and print them one by one; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_args(argv)
    try:
        rows = chosen_rows(options)
    except matrix.UnknownName as error:
        print(f"check_layouts: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(report.names())
        return 0
    script = options.script
    if Path(script).is_file():
        folder = Path(script).resolve().parent
        # A clone of Megatron-LM holds the Megatron to run with.
        local_ranks.start_server(folder if (folder / "megatron").is_dir() else None)
    local_ranks.TIMEOUT_S = options.timeout
    columns = report.Columns(rows)
    print(columns.heading(), flush=True)
    results, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        versions = layout_data.prepare(folder, any(row.model == matrix.BERT for row in rows))
        all_runs = runs.Runs(
            folder, script, options.steps, shlex.join(options.extra), options.layout_flags
        )
        for row in rows:
            results.append(all_runs.compare(row, options.with_plain))
            print(columns.line(results[-1]), flush=True)
    minutes = (time.monotonic() - start) / 60
    print(report.summary(results))
    if options.markdown:
        command = shlex.join(["python", "tools/dev/check_layouts.py", *argv])
        options.markdown.write_text(report.page(results, command, versions, minutes))
    return 1 if any(result.verdict in runs.WRONG for result in results) else 0


if __name__ == "__main__":
    # An ordinary exit, so that the ranks end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
