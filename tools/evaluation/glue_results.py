"""Metrics of GLUE's tasks, and tables of them over seeds and learning rates."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_data.corpus import InputError

SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman")
OF_NUMBERS = ("pearson", "spearman")  # the labels are numbers, not classes
RESULTS = "results.json"


def score(metric: str, predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Return a metric in percent, as tables of GLUE have it.

    Args:
        predicted, labels: Classes from 0, or scores. F1 is that of class 1 of two.
    """
    import numpy as np

    ours: np.ndarray = np.asarray(predicted, float)
    theirs: np.ndarray = np.asarray(labels, float)
    if metric == "accuracy":
        return 100 * float((ours == theirs).mean())
    if metric == "f1":
        right = float(((ours == 1) & (theirs == 1)).sum())
        found = float((ours == 1).sum() + (theirs == 1).sum())
        return 200 * right / found if found else 0.0
    if metric == "matthews":
        kinds = np.union1d(ours, theirs)
        ours, theirs = ((values[:, None] == kinds).astype(float) for values in (ours, theirs))
    if metric == "spearman":
        ours, theirs = ranks(ours), ranks(theirs)
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    spread = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return 100 * float((ours * theirs).sum()) / spread if spread else 0.0


def ranks(values: Any) -> Any:
    """Return the rank of each value; equal ones share the mean of theirs."""
    import numpy as np

    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def by_rate(results: dict[str, Any], metric: str) -> dict[float, list[float]]:
    """Return {learning rate: a metric of each seed}."""
    found: dict[float, list[float]] = {}
    for run in results["runs"]:
        found.setdefault(run["learning_rate"], []).append(run[metric])
    return found


def best(results: dict[str, Any]) -> tuple[float, list[float]]:
    """Return the learning rate with the highest median of the first metric, and its seeds'."""
    rates = by_rate(results, results["setting"]["metric"][0])
    return max(rates.items(), key=lambda item: statistics.median(item[1]))


def report(results: dict[str, Any]) -> str:
    """Return the table of one task, a row for each learning rate."""
    lines = []
    for metric in results["setting"]["metric"]:
        lines.append(f"{metric:13}  median    mean ± deviation   seeds")
        for rate, values in by_rate(results, metric).items():
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            middle = f"{statistics.median(values):8.2f}"
            lines.append(
                f"{rate:<13g}{middle}   {statistics.mean(values):6.2f} ± {deviation:.2f}"
                f"{len(values):12}"
            )
    rate, values = best(results)
    first = results["setting"]["metric"][0]
    lines.append(f"best learning rate by median {first}: {rate:g}, {statistics.median(values):.2f}")
    return "\n".join(lines)


def table(models: list[str]) -> str:
    """Return the table of several models, a row for each task.

    Raises:
        InputError: A folder holds no results.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        name, _, folder = model.partition("=")
        files = sorted(Path(folder).glob(f"*/{RESULTS}"))
        if not files:
            raise InputError(f"{folder}: there is no TASK/{RESULTS} in it")
        found[name] = {file.parent.name: json.loads(file.read_text()) for file in files}
    tasks = sorted({task for results in found.values() for task in results})
    rows = [["task", "metric", *found]]
    medians: dict[str, list[float]] = {name: [] for name in found}
    for task in tasks:
        row = [task, next(r[task] for r in found.values() if task in r)["setting"]["metric"][0]]
        for name, results in found.items():
            if task not in results:
                row.append("-")
                continue
            rate, values = best(results[task])
            medians[name].append(statistics.median(values))
            row.append(f"{medians[name][-1]:.2f} ({len(values)} x {rate:g})")
        rows.append(row)
    means = [f"{statistics.mean(v):.2f}" if len(v) == len(tasks) else "-" for v in medians.values()]
    rows.append(["mean", "", *means])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
