"""Draw the convergence study: loss curves with their spread over seeds, and paired differences."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import ARMS, QUESTIONS
from lib.paired import Row, differences, half_interval

# Okabe and Ito; the dashes tell arms apart without colours.
STYLES = {
    "dense": ("#000000", "-"),
    "dense-short": ("#000000", ":"),
    "ltd-same-data": ("#0072B2", "--"),
    "ltd-same-data-plain-lr": ("#56B4E9", "-."),
    "ltd-same-compute": ("#D55E00", "-"),
    "ltd-same-compute-plain-lr": ("#E69F00", "-."),
    "ltd-same-compute-strata": ("#CC79A7", "--"),
    "ltd-short": ("#D55E00", ":"),
    "constant-same-data": ("#009E73", "-."),
    "dense-long-warm-up": ("#999999", "-"),
}
MAIN = ("dense", "dense-short", "ltd-same-data", "ltd-same-compute", "ltd-short")
LATE = 0.3  # the curve's share that does not decide the scale: its steep start


def draw(runs: list[Row], curves: list[Row], path: Path) -> None:
    """Draw as PNG.

    Args:
        runs: A row for each run.
        curves: A row for each evaluation of each run.
    """
    from matplotlib.figure import Figure

    present = {row["arm"] for row in curves}
    main = [arm for arm in MAIN if arm in present]
    others = [arm for arm in ARMS if arm in present and arm not in MAIN[:2]]
    figure = Figure(figsize=(13, 9), layout="constrained")
    (by_samples, by_tokens), (variants, paired) = figure.subplots(2, 2)
    _curves(by_samples, curves, main, "samples")
    _curves(by_tokens, curves, main, "layer_tokens")
    _curves(variants, curves, others, "layer_tokens")
    by_samples.set_title("dense and random-LTD, by samples read")
    by_tokens.set_title("the same, by LayerTokens processed")
    variants.set_title("random-LTD and its variants, by LayerTokens processed")
    _differences(paired, runs)
    figure.savefig(path, format="png", dpi=90)


def _curves(axes: Any, curves: list[Row], arms: list[str], key: str) -> None:
    """Draw means over seeds as lines, least to most as bands."""
    shown: list[float] = []
    for arm in arms:
        found: defaultdict[int, list[Row]] = defaultdict(list)
        for row in curves:
            if row["arm"] == arm:
                found[row["iteration"]].append(row)
        points = sorted(found.items())
        x = [rows[0][key] for _, rows in points]
        losses = [[row["validation_a"] for row in rows] for _, rows in points]
        colour, dashes = STYLES[arm]
        means = [fmean(each) for each in losses]
        axes.plot(x, means, color=colour, linestyle=dashes, marker="o", markersize=3, label=arm)
        axes.fill_between(
            x, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.15
        )
        late = (each for at, each in zip(x, losses, strict=True) if at >= LATE * x[-1])
        shown += [loss for each in late for loss in each]
    margin = 0.05 * (max(shown) - min(shown)) if shown else 0
    if margin:
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    label = {"samples": "samples", "layer_tokens": "LayerTokens"}[key]
    axes.set(xlabel=label, ylabel="loss on validation set a (nats per token)", xlim=(0, None))
    _tidy(axes)
    if arms:
        axes.legend(frameon=False, fontsize=8)


def _differences(axes: Any, runs: list[Row]) -> None:
    """Draw each question's differences seed by seed, their mean and its 95% interval."""
    names = []
    for arm, against, _ in QUESTIONS:
        values = list(differences(runs, arm, against).values())
        if not values:
            continue
        at, half = len(names), half_interval(values)
        names.append(f"{arm}\n- {against}")
        colour = STYLES[arm][0]
        axes.plot(values, [at] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.errorbar(
            fmean(values),
            at,
            xerr=None if math.isnan(half) else half,
            fmt="|",
            color=colour,
            markersize=14,
            capsize=3,
        )
    axes.axvline(0, color="#999999", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="difference of final validation loss; left of 0: the first arm is better")
    axes.set_title("paired differences: each seed, mean, 95% interval")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
