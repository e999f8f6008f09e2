"""Compare Megatron training runs from their TensorBoard folders: a table and a plot.

    python -m megatron_rltd compare dense=runs/dense/tensorboard random-LTD=runs/ltd/tensorboard \\
        --plot comparison.png

Each folder is the --tensorboard-dir of a run. No other option is needed. To see the savings, train
with --log-throughput --log-timers-to-tensorboard.

    python -m megatron_rltd compare --eval dense=eval/dense random-LTD=eval/ltd

compares the results of tools/evaluation/eval_zero_shot.sh. You can also give training runs before
--eval.

LayerTokens are the tokens that each layer processed, summed over layers. The comparison is iso-data
if runs read the same samples, and iso-compute if they processed the same LayerTokens.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from megatron_rltd.commands.compare import zero_shot_table
from megatron_rltd.commands.compare.plot import plot
from megatron_rltd.commands.compare.run_logs import (
    ACCURACY,
    ITERATION_TIME,
    SAMPLE_FLOPS,
    SAMPLES,
    VALIDATION,
    WARM_UP,
    LogError,
    LoggedRun,
    read_run,
    total_flops,
    total_seconds,
    validation,
)
from megatron_rltd.commands.text_table import aligned
from megatron_rltd.training import tags

ISO_COMPUTE_TOLERANCE = 0.01
LEAST_SAVING = 0.01  # below it the realised share would be noise
# Typical change of the iteration time from one log interval to the next.
LOUD = 0.05  # worth saying
TOO_LOUD = 0.25  # the machine was busy with other work: the wall-clock time means nothing
# Arguments that must agree for a difference between runs to be due to dropping.
SHARED = (
    "num_layers hybrid_layer_pattern hidden_size ffn_hidden_size num_attention_heads num_experts "
    "seq_length "
    "global_batch_size micro_batch_size tensor_model_parallel_size "
    "pipeline_model_parallel_size context_parallel_size recompute_granularity params_dtype fp8"
).split()
# {heading: (key of a row, format)}
COLUMNS = {
    "run": ("run", "{}"),
    "val. loss": ("validation_loss", "{:.4f}"),
    "at iteration": ("validation_iteration", "{:,}"),
    "samples": ("samples", "{:,}"),
    "LayerTokens": ("layer_tokens", ""),
    "LayerTokens per sample": ("layer_tokens_per_sample", "{:.1%}"),
    "compute saved": ("compute_saved", "{:.1%}"),
    "wall-clock saved": ("wall_clock_saved", "{:.1%}"),
    "saving realised": ("saving_realised", "{:.0%}"),
}
OF_CLASSIFIERS = {"val. accuracy": ("accuracy", "{:.2%}")}  # if a run logs it


def summarise(runs: dict[str, LoggedRun], baseline: str) -> list[dict[str, Any]]:
    """Return the rows of the table at full precision; None is unknown."""
    rows = [_row(name, run, runs[baseline]) for name, run in runs.items()]
    if any(run.points(ACCURACY) for run in runs.values()):
        rows = [row | {"accuracy": runs[row["run"]].last(ACCURACY)} for row in rows]
    return [{key: None if value != value else value for key, value in r.items()} for r in rows]


def jitter(run: LoggedRun) -> float:
    """Return the typical change of the iteration time between log intervals, as a share of it."""
    times = list(run.points(ITERATION_TIME).values())
    if len(times) < 2:
        return 0.0
    return median(abs(b - a) for a, b in pairwise(times)) / median(times)


def _row(name: str, run: LoggedRun, base: LoggedRun) -> dict[str, Any]:
    losses = validation(run)[1]
    samples, tokens, flops = run.last(SAMPLES), run.last(tags.LAYER_TOKENS), total_flops(run)
    seconds = total_seconds(run)
    same_part = run is not base and run.start == base.start
    quiet = max(jitter(run), jitter(base)) <= TOO_LOUD
    same_gpus = same_part and run.world_sizes == base.world_sizes and quiet
    saved = 1 - flops / total_flops(base) if same_part else math.nan
    faster = 1 - seconds / total_seconds(base) if same_gpus else math.nan
    of_base = tokens / base.last(tags.LAYER_TOKENS)
    return {
        "run": name,
        "validation_loss": next(reversed(losses.values()), math.nan),
        "validation_iteration": max(losses, default=math.nan),
        "iteration": max(run.points(SAMPLES)),
        "samples": samples,
        "layer_tokens": tokens,
        "layer_tokens_per_sample": of_base / (samples / base.last(SAMPLES)),
        "flops": flops,
        "seconds": seconds,
        "compute_saved": saved,
        "wall_clock_saved": faster,
        "saving_realised": faster / saved if saved >= LEAST_SAVING else math.nan,
        "iso_data": samples == base.last(SAMPLES),
        "iso_compute": abs(of_base - 1) <= ISO_COMPUTE_TOLERANCE,
    }


def verdict(rows: list[dict[str, Any]], baseline: str) -> str:
    """Return one line that says what each run has in common with the baseline."""
    said = {
        (True, True): "iso-data and iso-compute (same samples, same LayerTokens)",
        (True, False): "iso-data (same samples)",
        (False, True): f"iso-compute (LayerTokens within {ISO_COMPUTE_TOLERANCE:.0%})",
        (False, False): "neither iso-data nor iso-compute, so its savings mean little",
    }
    others = (row for row in rows if row["run"] != baseline)
    kinds = (f"{row['run']} is {said[row['iso_data'], row['iso_compute']]}" for row in others)
    return f"compared with {baseline}: " + "; ".join(kinds)


def notes(runs: dict[str, LoggedRun], baseline: str) -> list[str]:
    """Say how the numbers came about, and why some are missing or doubtful."""
    names: dict[str, list[str]] = {}
    for name, run in runs.items():
        for note in _notes(run, runs[baseline], baseline):
            names.setdefault(note, []).append(name)
    lines = [f"LayerTokens per sample and savings are relative to {baseline}"]
    if any(run.points(ITERATION_TIME) for run in runs.values()):
        lines.append(
            "wall-clock is training time without validation and checkpoints; the first log "
            "interval after each start is warm-up and counts at the pace of the next one"
        )
    return lines + [f"{', '.join(of)}: {note}" for note, of in names.items()]


def _notes(run: LoggedRun, base: LoggedRun, baseline: str) -> Iterator[str]:
    tag, losses = validation(run)
    times = run.points(ITERATION_TIME)
    if not losses:
        yield "no validation loss in the log: train with --eval-interval and --eval-iters"
    elif tag != VALIDATION:
        yield f"there are several validation sets; the table shows the loss '{tag}'"
    if not times or not run.points(SAMPLE_FLOPS):
        yield (
            "no iteration time or no throughput in the log: train with --log-timers-to-tensorboard "
            "and --log-throughput, and longer than --log-interval"
        )
    if not run.points(tags.LAYER_TOKENS) or not run.points(tags.KEPT_TOKENS):
        names = f"'{tags.LAYER_TOKENS}' or '{tags.KEPT_TOKENS}'"
        yield f"random-LTD is on, but {names} is not in the log"
    if times and times == run.points(WARM_UP):
        yield "only one log interval, so the time includes warm-up: use a smaller --log-interval"
    if jitter(run) > TOO_LOUD:
        yield (
            f"neighbouring log intervals differ by over {TOO_LOUD:.0%}: the machine was busy with "
            "other work, so the time means nothing"
        )
    elif jitter(run) > LOUD:
        yield f"neighbouring log intervals differ by over {LOUD:.0%}, so wall-clock is rough"
    if run.start != base.start:
        yield f"no savings: its log begins at iteration {run.start}, {baseline}'s at {base.start}"
    if run.world_sizes != base.world_sizes:
        yield "no wall-clock saved: the runs used different numbers of GPUs"
    pairs = {name: (run.args.get(name), base.args.get(name)) for name in SHARED}
    unequal = [
        f"{name} {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if unequal:
        yield f"differs from {baseline} in more than dropping: {'; '.join(unequal)}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table as people read it."""
    return [
        "-" if row[key] is None else form.format(row[key]) if form else _count(row[key])
        for key, form in columns_of(row).values()
    ]


def columns_of(row: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the columns of a table with such a row."""
    return COLUMNS | (OF_CLASSIFIERS if "accuracy" in row else {})


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else f"{number / 1e9:,.3f} B"


def table(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """Return the table, aligned; names to the left, numbers to the right."""
    return aligned([list(columns_of(rows[0])), *(cells(row) for row in rows)], markdown)


def named_folders(texts: list[str], least: int = 2) -> dict[str, Path]:
    """Return {name: folder} of NAME=FOLDER or FOLDER.

    Raises:
        LogError: There are fewer than `least`, or two of one name.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            whole = Path(text).absolute()
            name, folder = (whole.parent if whole.name == "tensorboard" else whole).name, text
        if name in folders:
            raise LogError(f"two runs are called {name}; name each one as NAME=FOLDER")
        folders[name] = Path(folder)
    if len(folders) < least:
        raise LogError("give two or more runs, each as NAME=FOLDER")
    return folders


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the files asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rltd compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER", help="a run's --tensorboard-dir")
    text = "outputs of tools/evaluation/eval_zero_shot.sh"
    parser.add_argument("--eval", nargs="+", default=[], metavar="NAME=FOLDER", help=text)
    parser.add_argument("--baseline", metavar="NAME", help="compare with this run (the first)")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--csv", type=Path, metavar="CSV", help="write the table at full precision")
    parser.add_argument("--json", type=Path, metavar="JSON", help="write the table and notes")
    options = parser.parse_args(argv)
    try:
        printed: list[str] = []
        result: dict[str, Any] = {}
        if options.runs or not options.eval:
            printed, result = compare(options)
        elif options.baseline or options.plot or options.csv:
            raise LogError(
                "--baseline, --plot and --csv are for training runs: give their folders too"
            )
        if options.eval:
            folders = named_folders(options.eval, least=1)
            found = {n: zero_shot_table.read_evaluation(f) for n, f in folders.items()}
            result["evaluation"] = zero_shot_table.result(found)
            remarks = result["evaluation"]["notes"]
            printed += [zero_shot_table.table(found, options.markdown), _list(remarks)]
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    except (LogError, OSError, ModuleNotFoundError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(*printed, sep="\n\n")
    return 0


def compare(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Compare training runs, write the files asked for; return what to print and JSON's content.

    Raises:
        LogError: The runs cannot be compared.
    """
    folders = named_folders(options.runs)
    baseline = options.baseline or next(iter(folders))
    if baseline not in folders:
        raise LogError(f"--baseline {baseline} is not one of the runs: {', '.join(folders)}")
    runs = {name: read_run(folder) for name, folder in folders.items()}
    rows, remarks = summarise(runs, baseline), notes(runs, baseline)
    if options.plot:
        remarks.append(f"{options.plot} shows the {plot(runs, options.plot)}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    said = verdict(rows, baseline)
    result = {"verdict": said, "notes": remarks, "runs": rows}
    return [table(rows, options.markdown), said, _list(remarks)], result


def _list(remarks: list[str]) -> str:
    return "\n".join(f"- {remark}" for remark in remarks)


if __name__ == "__main__":
    sys.exit(main())
