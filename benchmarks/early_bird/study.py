"""Train small GPTs dense, as tickets and as the controls of tickets, and compare them.

    python benchmarks/early_bird/study.py                      everything
    python benchmarks/early_bird/study.py --arms dense ticket random --seeds 6 7 8
    python benchmarks/early_bird/study.py --list               the arms, their steps and FLOPs

Models are megatron-core's GPTModel, on the CPU (or a GPU, where there is one) and on real text, the
Python standard library's source, of which no run reads all; tuning goes on with torch's C++
headers. Ctrl-C stops; the same command continues, and does not train again what is finished. Start
it several times at once to use as many cores: each process takes seeds that no other has. RESULTS
gets runs.csv, distances.csv, tables.md and study.png.

A seed decides initial weights, the order of the samples and random choices. Arms of one seed are
compared pair by pair.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

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

from early_bird.arms import ALL, ARMS, EQUAL_STEPS, PRETRAINING, TUNING, Arm, Size, plan

SEEDS = [1, 2, 3]


def size_of(options: argparse.Namespace) -> Size:
    """Return the size of all runs."""
    size = Size()
    if options.steps:
        tuning = max(1, options.steps * size.tuning_steps // size.steps)
        size = dataclasses.replace(size, steps=options.steps, tuning_steps=tuning)
    return size


def run_file(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return where a finished run is noted."""
    return options.folder / f"{arm.replace('/', '-').replace(':', '-')}-seed-{seed}.json"


def is_watched(arm: Arm) -> bool:
    """Return whether mask distances are noted: in the dense runs."""
    return arm.units == ALL and arm.budget == EQUAL_STEPS


def train_one(name: str, seed: Any) -> dict[str, Any]:
    """Train and evaluate one arm; return its row and those of its mask distances.

    Args:
        name: Of the arm.
        seed: A `training.Seed`.

    Raises:
        StudyError: Its loss is no number.
    """
    from early_bird import curves, training  # they import Megatron

    arm, size = ARMS[name], seed.size
    own = plan(arm, size)
    parts_at_draw = [math.nan] * 2
    drawn = watcher = None
    if own.before:
        drawn = seed.drawn(arm)
        parts_at_draw = seed.after_draw(arm, drawn)
    elif is_watched(arm):
        watcher = curves.Watcher(size, own.after)
        before = seed.at_draw(ARMS["ticket"] if arm.phase == PRETRAINING else _TUNING_TICKET)
        parts_at_draw = training.losses(before, size, seed.texts[arm.phase])
    trained = seed.train(arm, drawn, watcher)
    if arm == ARMS["dense"]:
        seed.keep(trained)
    parts = training.losses(trained, size, seed.texts[arm.phase])
    if not math.isfinite(sum(parts)):
        raise StudyError(f"{name}, seed {seed.number}: the loss is {sum(parts)}")
    row: Row = {"arm": name, "seed": seed.number, "validation_loss": sum(parts) / 2}
    row |= dict(zip(text.VALIDATION_SETS, parts, strict=True))
    row |= {"loss_at_draw": sum(parts_at_draw) / 2, "steps_before_draw": own.before}
    row |= {"steps_after_draw": own.after, "flops": own.flops}
    first = {"phase": arm.phase, "seed": seed.number}
    distances = [first | each for each in watcher.rows()] if watcher else []
    return {"run": row, "distances": distances}


_TUNING_TICKET = ARMS["tuning/ticket"]


def train_all(options: argparse.Namespace) -> None:
    """Train every arm on every seed, leaving out what is finished.

    A seed that another process is training now is left to it.

    Raises:
        StudyError: The text is too short.
    """
    from early_bird import training  # it imports Megatron, and adapts it to the CPU

    size = size_of(options)
    check_same_size(options.folder, size)
    texts = training.read_texts(options.folder / "data")
    check_one_pass(options, size, {phase: len(own.train) for phase, own in texts.items()})
    count = len(options.seeds) * len(options.arms)
    number = 0
    for seed_number in options.seeds:
        with lock(options.folder / f"seed-{seed_number}.lock") as is_free:
            if not is_free:
                say(f"seed {seed_number}: another process trains it")
                number += len(options.arms)
                continue
            kept = options.folder / f"dense-seed-{seed_number}.pt"
            seed = training.Seed(size, seed_number, texts, kept)
            for name in options.arms:
                number += 1
                what = f"[{number}/{count}] seed {seed_number} {name}"
                path = run_file(options, name, seed_number)
                if path.exists():
                    say(f"{what}: trained already")
                    continue
                start = time.monotonic()
                found = train_one(name, seed)
                note(path, found)
                seconds, loss = time.monotonic() - start, found["run"]["validation_loss"]
                say(f"{what}: validation loss {loss:.4f}, {seconds:.0f} s")


def check_one_pass(options: argparse.Namespace, size: Size, tokens: dict[str, int]) -> None:
    """Check that no run reads a text twice.

    Raises:
        StudyError: One does.
    """
    for phase in (PRETRAINING, TUNING):
        of_phase = [ARMS[name] for name in options.arms if ARMS[name].phase == phase]
        read = size.batch_size * max((plan(arm, size).schedule for arm in of_phase), default=0)
        available = (tokens[phase] - 1) // size.seq_length
        if read > available:
            raise StudyError(
                f"--steps {size.steps}: a run reads {read} samples of the {phase} text's "
                f"{available}; take fewer steps"
            )


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is noted of all finished runs of these options."""
    files = [run_file(options, name, seed) for name in options.arms for seed in options.seeds]
    return [json.loads(path.read_text()) for path in files if path.exists()]


def write_results(options: argparse.Namespace) -> None:
    """Write tables and plot of all finished runs of these options."""
    from early_bird import analysis, picture

    if not (found := finished(options)):
        say("no run is finished yet")
        return
    runs = [each["run"] for each in found]
    distances = [row for each in found for row in each["distances"]]
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(options.results / "runs.csv", runs)
    if distances:
        write_csv(options.results / "distances.csv", distances)
    tables = analysis.tables(runs, distances)
    (options.results / "tables.md").write_text(tables)
    picture.draw(runs, distances, options.results / "study.png")
    say(f"\n{tables}\nwrote {options.results}/: runs.csv, distances.csv, tables.md, study.png")


def listing(options: argparse.Namespace) -> str:
    """Return the arms with their steps and the share of the dense run's FLOPs."""
    size, lines = size_of(options), []
    for name in options.arms:
        own = plan(ARMS[name], size)
        dense = plan(Arm(phase=ARMS[name].phase), size).flops
        before = f"{own.before} dense steps, a draw, " if own.before else ""
        lines.append(f"{name}: {before}{own.after} steps, {own.flops / dense:.1%} of dense FLOPs")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(default: all)")
    help_text = f"of the dense run; all other lengths follow (default: {Size.steps})"
    add("--steps", type=at_least(1), help=help_text)
    add_options(parser, "early_bird", SEEDS)
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
