"""Differences between arms of a study, taken seed by seed, and the files of its runs.

Arms of one seed read the same samples in the same order. A difference between two of them is taken
for each seed and then averaged; its interval is Student's, at 95%, over the seeds.
"""

import csv
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]

# Student's 97.5% quantile by degrees of freedom; beyond the last it is taken, for it is larger.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write rows at full precision."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, words: Collection[str] = ("arm",)) -> list[Row]:
    """Return the rows of `write_csv`.

    Args:
        words: Columns that hold no numbers.
    """
    with path.open(newline="") as file:
        return [
            {key: value if key in words else _number(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(text: str) -> float | int:
    return float(text) if "." in text or "e" in text or text == "nan" else int(text)


def by_seed(runs: list[Row], arm: str, key: str = "validation_loss") -> dict[int, Any]:
    """Return a column of an arm's runs."""
    return {row["seed"]: row[key] for row in runs if row["arm"] == arm}


def differences(
    runs: list[Row], arm: str, against: str, key: str = "validation_loss"
) -> dict[int, float]:
    """Return by how much an arm's value exceeds another's, for the seeds that both have."""
    ours, theirs = by_seed(runs, arm, key), by_seed(runs, against, key)
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def spread(values: Iterable[float]) -> float:
    """Return the sample standard deviation; nan of fewer than two values."""
    values = list(values)
    return stdev(values) if len(values) > 1 else math.nan


def half_interval(values: Iterable[float]) -> float:
    """Return half the width of the mean's 95% interval; nan of fewer than two values."""
    values = list(values)
    if len(values) < 2:
        return math.nan
    return STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / math.sqrt(len(values))


def chance(values: Sequence[float]) -> float:
    """Return how probable a mean at least so far from 0 is, if 0 is true: Student's t test.

    nan of fewer than two values. The density is integrated by Simpson's rule, after t = tan(angle),
    which makes it a power of the cosine.
    """
    if len(values) < 2:
        return math.nan
    if not (deviation := stdev(values)):
        return 0.0 if fmean(values) else 1.0
    degrees = len(values) - 1
    t = abs(fmean(values)) / deviation * math.sqrt(len(values))

    def area(start: float, parts: int = 2000) -> float:
        step = (math.pi / 2 - start) / parts
        at = [math.cos(start + i * step) ** (degrees - 1) for i in range(parts + 1)]
        return step / 3 * (at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2]))

    return area(math.atan(t / math.sqrt(degrees))) / area(0.0)


def holm(chances: Sequence[float]) -> list[float]:
    """Return the chances of several questions, corrected for there being several (Holm's method).

    Below 0.05, at most one study in twenty has even one such question of which 0 is true.
    """
    ordered = sorted((value, i) for i, value in enumerate(chances) if not math.isnan(value))
    corrected, least = [math.nan] * len(chances), 0.0
    for rank, (value, i) in enumerate(ordered):
        least = max(least, min(1.0, value * (len(ordered) - rank)))
        corrected[i] = least
    return corrected


def figure(value: float, form: str = ".4f") -> str:
    """Return a number as text, "-" for nan."""
    return "-" if math.isnan(value) else format(value, form)


def interval(values: Sequence[float]) -> str:
    """Return the mean's 95% interval as text, "-" for fewer than two values."""
    mean, half = fmean(values), half_interval(values)
    return "-" if math.isnan(half) else f"{mean - half:+.4f} to {mean + half:+.4f}"
