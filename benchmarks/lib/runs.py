"""The runs of a study in a folder: noted when finished, locked while in training, of one size."""

import argparse
import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class StudyError(Exception):
    """Why the study cannot go on, in one sentence."""


def say(message: str) -> None:
    """Print at once."""
    print(message, flush=True)


def positive(text: str) -> int:
    """Return the whole number that an option gives, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


positive.__name__ = "whole number"  # what argparse calls it


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
