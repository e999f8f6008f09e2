"""Draw the study of Early-Bird tickets: loss against FLOPs, differences, and mask distances."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from lib.paired import Row, by_seed, half_interval

from early_bird.analysis import answers, name_of
from early_bird.arms import ARMS, INTERVALS, PRETRAINING, TUNING

# Okabe and Ito.
COLOURS = {
    "dense": "#000000",
    "ticket": "#0072B2",
    "random": "#D55E00",
    "small": "#009E73",
    "rewind": "#CC79A7",
}
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
GREY = "#999999"


def draw(runs: list[Row], distances: list[Row], path: Path) -> None:
    """Draw final losses against FLOPs, each question's differences, and the distances, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10), layout="constrained")
    panels = figure.subplots(2, 2)
    _losses(panels[0, 0], [row for row in runs if ARMS[row["arm"]].phase == PRETRAINING])
    _differences(panels[0, 1], runs)
    for axes, phase in zip(panels[1], (PRETRAINING, TUNING), strict=True):
        _distances(axes, phase, [row for row in distances if row["phase"] == phase])
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, format="png", dpi=80)


def _losses(axes: Any, runs: list[Row]) -> None:
    """Draw each seed and the mean of each arm's final loss against FLOPs."""
    means = {arm: fmean(by_seed(runs, arm).values()) for arm in {row["arm"]: 0 for row in runs}}
    losses = [row["validation_loss"] for row in runs]
    apart = (max(losses) - min(losses)) / 30 if losses else 0
    labels: dict[bool, float] = {}  # the highest so far, of dense's FLOPs and of the ticket's
    cheapest = min((row["flops"] for row in runs), default=0)
    for arm in sorted(means, key=means.__getitem__):
        own = [row for row in runs if row["arm"] == arm]
        colour = COLOURS.get(arm.split("-")[0], GREY)
        flops = own[0]["flops"] / 1e12
        values = [row["validation_loss"] for row in own]
        axes.plot([flops] * len(values), values, "o", color=colour, alpha=0.3, markersize=4)
        axes.plot(flops, means[arm], "_", color=colour, markersize=18)
        group = own[0]["flops"] > 1.1 * cheapest
        at = labels[group] = max(means[arm], labels.get(group, 0.0) + apart)
        axes.annotate(
            arm, (flops, at), (12, -3), textcoords="offset points", fontsize=8, color=colour
        )
    axes.margins(x=0.25)
    axes.set(xlabel="FLOPs of the run (10^12)", ylabel="validation loss (nats per token)")
    axes.set_title("final loss: each seed and the mean", fontsize=10)


def _differences(axes: Any, runs: list[Row]) -> None:
    """Draw each question's differences seed by seed, their mean and its 95% interval."""
    names = []
    for arm, against, what, values, _ in answers(runs):
        at, half = len(names), half_interval(values)
        at_draw = ", at the draw" if what == "just after the draw" else ""
        names.append(f"{arm} - {against}{at_draw}")
        axes.plot(values, [at] * len(values), "o", color=CURVES[0], alpha=0.5, markersize=4)
        width = None if math.isnan(half) else half
        axes.errorbar(fmean(values), at, xerr=width, fmt="|", color=CURVES[0], capsize=3)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="difference of validation loss; left of 0: the first arm is better")
    axes.set_title("paired differences: each seed, mean, 95% interval", fontsize=10)


def _distances(axes: Any, phase: str, rows: list[Row]) -> None:
    """Draw the mean distance to the check before, as share of chance, at each interval."""
    kinds = list({(row["pattern"], row["kind"]): 0 for row in rows})
    for (pattern, kind), colour in zip(kinds, CURVES, strict=False):
        for interval, dashes in zip(map(float, INTERVALS), ("-", "--"), strict=True):
            found: dict[float, list[float]] = {}
            for row in rows:
                if (row["pattern"], row["kind"], row["interval"]) == (pattern, kind, interval):
                    found.setdefault(row["share_of_run"], []).append(row["share_of_chance"])
            at = [share for share in sorted(found) if not math.isnan(sum(found[share]))]
            label = f"{name_of(pattern, kind)}, check every {interval:.0%}"
            axes.plot(at, [fmean(found[x]) for x in at], dashes, color=colour, label=label)
    axes.set(xlabel="share of the run", ylabel="distance to the check before / chance level")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.set_title(f"mask distances in {phase}, dense run, mean over seeds", fontsize=10)
    if rows:
        axes.legend(frameon=False, fontsize=8)
