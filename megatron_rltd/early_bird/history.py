"""The masks of all checks, as files beside the checkpoints: SAVE/early_bird/masks_0000500.pt.

The number is that of the iterations that the weights were trained for. So it is the mask that the
checkpoint of the same number gives. A file holds the whole model's mask and fits every layout.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.target import Target

FOLDER = "early_bird"
_FORMAT = 1
_NAME = re.compile(r"masks_(\d{7,})\.pt")


class HistoryError(ValueError):
    """A file of masks cannot be used. The message names it and the way out."""


def file_of(run: Path, iteration: int) -> Path:
    """Return where the mask of an iteration lies in a run's --save folder."""
    return run / FOLDER / f"masks_{iteration:07d}.pt"


def iterations(run: Path) -> list[int]:
    """Return the iterations that a run's folder has masks of, ascending."""
    found = [_NAME.fullmatch(path.name) for path in (run / FOLDER).glob("masks_*.pt")]
    return sorted(int(match[1]) for match in found if match)


def write(run: Path, mask: Mask, target: Target, interval: int) -> Path:
    """Write a whole mask; return the file. A process killed meanwhile leaves no half of it.

    Args:
        run: The --save folder of the run.
        mask: What a check would prune.
        target: What the mask is for.
        interval: Iterations between checks.
    """
    path = file_of(run, mask.iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "iteration": mask.iteration,
        "target": target.as_dict(),
        "interval": interval,
        "units": mask.units,
        "pruned": mask.pruned,
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def read(
    run: Path,
    iteration: int,
    target: Target,
    units: dict[str, int],
    interval: int | None = None,
) -> Mask:
    """Return the whole mask of an iteration.

    Args:
        run: The --save folder of the run.
        iteration: One of `iterations`.
        target: What the mask must be for.
        units: What the model must have, see `Target.units`.
        interval: Iterations between the checks that the mask must be of; None: any.

    Raises:
        HistoryError: The file is damaged, or was written for another target, model or interval.
    """
    path = file_of(run, iteration)
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        known = content["format"] == _FORMAT
        mask = Mask(content["iteration"], content["units"], content["pruned"])
        theirs = Target(**content["target"])
        between = content["interval"]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HistoryError(
            f"{path} cannot be read ({reason[:120]}): move it away; the search then starts with an "
            "empty window"
        ) from None
    if not known:
        raise HistoryError(f"{path} was written by another version: move {path.parent} away")
    if theirs != target or mask.units != units:
        raise HistoryError(
            f"{path} was taken for another ticket ({_described(theirs, mask.units)}), not for "
            f"{_described(target, units)}: give the same --early-bird options, use another --save, "
            f"or move {path.parent} away"
        )
    if interval not in (None, between):
        # Masks of different intervals are not comparable.
        raise HistoryError(
            f"{path} was taken with --early-bird-interval {between}, not {interval}: give the same "
            f"interval, use another --save, or move {path.parent} away"
        )
    return mask


def _described(target: Target, units: dict[str, int]) -> str:
    given = {name: value for name, value in target.as_dict().items() if value is not None}
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    return f"{options}; units of a layer: " + ", ".join(f"{k} {n}" for k, n in units.items())
