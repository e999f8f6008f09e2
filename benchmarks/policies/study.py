"""Train small models whose dropped tokens are chosen by different policies, and compare them.

    python benchmarks/policies/study.py                        everything
    python benchmarks/policies/study.py --arms dense severe --tasks causal --seeds 6 7 8
    python benchmarks/policies/study.py --list                 the arms and their LayerTokens

Models are megatron-core's GPTModel and BertModel, on the CPU (or a GPU, where there is one) and on
real text, the Python standard library's source, of which no run reads all. Ctrl-C stops; the same
command continues, and does not train again what is finished. Start it several times at once to use
as many cores. RESULTS gets runs.csv, tables.md and study.png.

A seed decides initial weights, the order of the samples, the masked tokens and which tokens a draw
keeps. Arms of one seed are compared pair by pair.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

import torch
from lib import text
from lib.paired import Row, write_csv
from lib.runs import (
    StudyError,
    add_options,
    at_least,
    check_same_size,
    finish,
    lock,
    note,
    parse,
    say,
)

from policies import analysis, picture
from policies.arms import ARMS, LEVELS, SIZES, Size
from policies.samples import TASKS, read_texts

SEEDS = [1, 2, 3, 4, 5]


def sizes(options: argparse.Namespace) -> dict[str, Size]:
    """Return the size of the runs of each task."""
    changes = {"steps": options.steps} if options.steps else {}
    return {task: dataclasses.replace(SIZES[task], **changes) for task in options.tasks}


def names(options: argparse.Namespace) -> list[str]:
    """Return the arms to train."""
    return [arm for arm in ARMS if arm in options.arms or arm.split("/")[0] in options.arms]


def run_file(options: argparse.Namespace, task: str, arm: str, seed: int) -> Path:
    """Return where a finished run is noted."""
    return options.folder / task / f"{arm.replace('/', '-')}-seed-{seed}.json"


def train_one(task: str, name: str, size: Size, seed: int, texts: list[torch.Tensor]) -> Row:
    """Train and evaluate one arm; return its row.

    Args:
        texts: Tokens to train on, and of the two validation sets.

    Raises:
        StudyError: Its loss is no number.
    """
    from policies import training  # it imports Megatron, and adapts it to the CPU

    model, layer_tokens = training.train(task, ARMS[name], size, seed, texts[0])
    parts = [training.evaluate(model, task, size, held_out) for held_out in texts[1:]]
    if not math.isfinite(sum(parts)):
        raise StudyError(f"{task} {name}, seed {seed}: the loss is {sum(parts)}")
    of_run: Row = {"task": task, "arm": name, "seed": seed, "validation_loss": sum(parts) / 2}
    end = {
        "steps": size.steps,
        "samples": size.steps * size.batch_size,
        "layer_tokens": layer_tokens,
    }
    return of_run | dict(zip(text.VALIDATION_SETS, parts, strict=True)) | end


def train_all(options: argparse.Namespace) -> None:
    """Train every arm of every task on every seed, seed by seed, leaving out what is finished.

    A run that another process is training now is left to it.

    Raises:
        StudyError: The text is too short.
    """
    texts = {task: read_texts(task, options.folder / "data") for task in options.tasks}
    for task, size in sizes(options).items():
        check_same_size(options.folder / task, size)
        read, available = size.steps * size.batch_size, (len(texts[task][0]) - 1) // size.seq_length
        if read > available:
            raise StudyError(
                f"--steps {size.steps}: a {task} run reads {read} samples of the text's "
                f"{available}; take fewer steps"
            )
    runs = [
        (seed, task, name)
        for seed in options.seeds
        for task in options.tasks
        for name in names(options)
    ]
    for number, (seed, task, name) in enumerate(runs, start=1):
        path = run_file(options, task, name, seed)
        what = f"[{number}/{len(runs)}] seed {seed} {task} {name}"
        with lock(path.with_suffix(".lock")) as is_free:
            if not is_free:
                say(f"{what}: another process trains it")
                continue
            if path.exists():
                say(f"{what}: trained already")
                continue
            start = time.monotonic()
            row = train_one(task, name, sizes(options)[task], seed, texts[task])
            note(path, row)
        seconds = time.monotonic() - start
        say(f"{what}: validation loss {row['validation_loss']:.4f}, {seconds:.0f} s")


def finished(options: argparse.Namespace) -> list[Row]:
    """Return the rows of all finished runs of these options."""
    files = [
        run_file(options, task, name, seed)
        for task in options.tasks
        for name in names(options)
        for seed in options.seeds
    ]
    return [json.loads(path.read_text()) for path in files if path.exists()]


def write_results(options: argparse.Namespace) -> None:
    """Write tables and plot of all finished runs of these options."""
    if not (runs := finished(options)):
        say("no run is finished yet")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(options.results / "runs.csv", runs)
    tables = analysis.tables(runs)
    (options.results / "tables.md").write_text(tables)
    picture.draw(runs, options.results / "study.png")
    say(f"\n{tables}\nwrote {options.results}/: runs.csv, tables.md, study.png")


def listing(options: argparse.Namespace) -> str:
    """Return the arms with the share of a dense run's LayerTokens and their options."""
    size = next(iter(sizes(options).values()))
    lines = []
    for name in names(options):
        share = ARMS[name].layer_tokens(size) / ARMS["dense"].layer_tokens(size)
        config = ARMS[name].config(size)
        lines += [f"{name}: {share:.1%} of dense LayerTokens", f"    {config}"]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: both)")
    choices = [*ARMS, *LEVELS]
    help_text = "arms, or levels for all of their arms (default: all)"
    add("--arms", nargs="+", choices=choices, default=choices, metavar="ARM", help=help_text)
    steps = ", ".join(f"{task} {size.steps}" for task, size in SIZES.items())
    add("--steps", type=at_least(1), help=f"of every run (default: {steps})")
    add_options(parser, "policies", SEEDS)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Train and compare; return the exit status."""
    options = parse_args(argv)
    if options.list:
        print(listing(options))
        return 0

    def study() -> None:
        from lib.small_models import megatron  # it imports Megatron, and adapts it to the CPU

        with megatron():
            train_all(options)
        write_results(options)

    return finish(study, text.TextError)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="megatron|torch")
    sys.exit(main())
