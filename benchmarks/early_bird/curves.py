"""Mask distances while the dense model trains, and when each preset of the rule says "emerged"."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from lib.paired import Row

from early_bird import tickets
from early_bird.arms import INTERVALS, Size, warm_up
from megatron_rltd.early_bird import masks, search
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.rule import PRESETS, Rule
from megatron_rltd.early_bird.target import Target

STRUCTURED, UNSTRUCTURED, TWO_OF_FOUR = "structured", "unstructured p=0.5", "2:4"


def targets(size: Size) -> dict[str, Target]:
    """Return what is looked for in a dense run."""
    return {
        STRUCTURED: size.target(),
        UNSTRUCTURED: Target(masks.UNSTRUCTURED, ratio=0.5),
        TWO_OF_FOUR: Target(masks.TWO_OF_FOUR),
    }


class Watcher:
    """The masks of a dense run, at every check of the shorter interval."""

    def __init__(self, size: Size, steps: int):
        """Note a run's length.

        Args:
            size: Of the run.
            steps: Of it.
        """
        self._size, self._steps = size, steps
        self._every = [max(1, int(steps * interval)) for interval in INTERVALS]
        self._found: dict[str, list[Mask]] = {name: [] for name in targets(size)}

    def __call__(self, step: int, model: Any) -> None:
        """Take the masks after so many steps, if a check is due."""
        if any(step % every == 0 for every in self._every):
            for name, target in targets(self._size).items():
                self._found[name].append(tickets.mask_of(model, step, target, self._size))

    def rows(self) -> list[Row]:
        """Return a row for every check of each interval and kind of units."""
        return [
            row
            for interval, every in zip(INTERVALS, self._every, strict=True)
            for pattern, found in self._found.items()
            for row in rows_of(
                [mask for mask in found if mask.iteration % every == 0],
                {"interval": float(interval), "pattern": pattern},
                self._steps,
            )
        ]


def rows_of(found: list[Mask], first: Mapping[str, Any], steps: int) -> list[Row]:
    """Return what the checks of one interval and pattern say.

    A preset is asked from the end of the warm-up on, as `--early-bird-start` is by default.

    Args:
        found: Masks in the order of checks.
        first: The first columns.
        steps: Of the run.
    """
    rows: list[Row] = []
    start = warm_up(steps)
    for number, newest in enumerate(found):
        earlier = found[:number]
        all_before = search.check(newest, earlier, Rule(2, 0.0))
        allowed = [mask for mask in earlier if mask.iteration >= start]
        emerged = {
            preset: int(newest.iteration >= start and search.check(newest, allowed, rule).emerged)
            for preset, rule in PRESETS.items()
        }
        for kind in newest.units:
            previous = all_before.previous(kind)
            value = float("nan") if previous is None else previous
            rows.append(
                {
                    **first,
                    "kind": kind,
                    "step": newest.iteration,
                    "share_of_run": newest.iteration / steps,
                    "distance": value,
                    "share_of_chance": value / all_before.chance[kind],
                    "distance_to_last": masks.distance(newest, found[-1], kind),
                    **emerged,
                }
            )
    return rows


def first_emerged(rows: list[Row], interval: Fraction | float, pattern: str, preset: str) -> float:
    """Return the share of the run at which a preset first fires; nan if it never does.

    Args:
        rows: Of one seed and phase.
        interval: Between checks, as share of the run.
        pattern: One of `targets`.
        preset: Of `rule.PRESETS`.
    """
    fired = (
        row["share_of_run"]
        for row in rows
        if row["interval"] == float(interval) and row["pattern"] == pattern and row[preset]
    )
    return min(fired, default=float("nan"))
