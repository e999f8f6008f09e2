"""What studies share: their options, how they end, and runs that are noted when finished."""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class StudyError(Exception):
    """Why the study cannot go on, in one sentence."""


def say(message: str) -> None:
    """Print at once."""
    print(message, flush=True)


def at_least(least: int) -> Callable[[str], int]:
    """Return how argparse reads a whole number that is not less."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "whole number"  # what argparse calls it
    return number


def add_options(parser: argparse.ArgumentParser, name: str, seeds: list[int]) -> None:
    """Add what every study has: --seeds, --folder, --results and --list.

    Args:
        parser: Of the study.
        name: Of its folder in runs/.
        seeds: By default.
    """
    add = parser.add_argument
    text = f"(default: {' '.join(map(str, seeds))})"
    add("--seeds", type=at_least(1), nargs="+", default=seeds, help=text)
    text = f"where finished runs and data go (default: runs/{name})"
    add("--folder", type=Path, default=ROOT / "runs" / name, help=text)
    add("--results", type=Path, help="where tables and plot go (default: FOLDER/results)")
    add("--list", action="store_true", help="print the arms and stop")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Return the options of a study: paths absolute, nothing twice in a list."""
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if isinstance(value, list):
            setattr(options, name, list(dict.fromkeys(value)))
    options.folder = options.folder.absolute()
    options.results = (options.results or options.folder / "results").absolute()
    return options


def finish(study: Callable[[], None], *errors: type[Exception]) -> int:
    """Train and compare; return the exit status.

    Args:
        study: Continues where it was stopped.
        errors: What ends it with one line, besides StudyError and OSError.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # shells have background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    expected: tuple[type[Exception], ...] = (StudyError, OSError, *errors)
    try:
        study()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except expected as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def check_same_size(folder: Path, size: Any) -> None:
    """Note the size of the runs in a folder, or check that it is the same.

    Args:
        folder: Made if it is not there.
        size: A dataclass of plain values.

    Raises:
        StudyError: It is another.
    """
    noted, wanted = folder / "size.json", dataclasses.asdict(size)
    if noted.exists() and json.loads(noted.read_text()) != wanted:
        raise StudyError(
            f"the runs in {folder} are of another size ({noted.name} there); remove it, or give "
            "another --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(wanted) + "\n")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process; say whether it was free."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def note(path: Path, run: dict[str, Any]) -> None:
    """Write a finished run, whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(run) + "\n")
    unfinished.rename(path)
