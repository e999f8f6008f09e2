"""Draw the study of policies: paired differences, a panel for each task."""

import math
from pathlib import Path
from statistics import fmean

from lib.paired import Row, half_interval

from policies.analysis import answers, by_task

# Okabe and Ito.
COLOURS = {"mild": "#0072B2", "medium": "#009E73", "severe": "#D55E00"}


def draw(runs: list[Row], path: Path) -> None:
    """Draw each question's differences seed by seed, their mean and its 95% interval, as PNG."""
    from matplotlib.figure import Figure

    asked, tasks = answers(runs), list(by_task(runs))
    rows = max(1, max(sum(task == each[0] for each in asked) for task in tasks))
    figure = Figure(figsize=(7 * len(tasks), 1.5 + 0.33 * rows), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        own = [each for each in asked if each[0] == task]
        for at, (_, arm, _, _, values, _) in enumerate(own):
            colour, half = COLOURS[arm.split("/")[0]], half_interval(values)
            axes.plot(values, [at] * len(values), "o", color=colour, alpha=0.4, markersize=4)
            width = None if math.isnan(half) else half
            axes.errorbar(
                fmean(values), at, xerr=width, fmt="|", color=colour, markersize=12, capsize=3
            )
        labels = [f"{arm} - {against.split('/')[-1]}" for _, arm, against, *_ in own]
        axes.set_yticks(range(len(own)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="#999999", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set(xlabel="difference of validation loss; left of 0: the first arm is better")
        axes.set_title(f"{task} language models: each seed, mean, 95% interval", fontsize=10)
    figure.savefig(path, format="png", dpi=90)
