"""Plots of the benchmarks, from what their JSON files hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import moves
from lib.common import Row

# Okabe and Ito.
COLOURS = {
    moves.KERNELS: "#0072B2",
    moves.IN_PLACE: "#56B4E9",
    moves.TORCH: "#009E73",
    moves.DEEPSPEED_LINES: "#E69F00",
    moves.DEEPSPEED: "#D55E00",
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def _title(results: dict[str, Any], *names: str) -> str:
    settings = ", ".join(f"{name} {results['settings'][name]}" for name in names)
    return f"{results['machine']['device']}: {settings}".replace("_", " ")


def draw_ops(results: dict[str, Any], path: Path) -> None:
    """Draw rows moved, time and speed of a run against the kept share, at the largest b."""
    rows = [row for row in results["rows"] if row["what"] == "run, forward+backward"]
    size = max(row["micro_batch_size"] for row in rows)
    rows = [row for row in rows if row["micro_batch_size"] == size]
    figure, (moved, times, speed) = _figure(3)

    def curve(axes: Any, way: str, value: Callable[[Row], Any], **style: Any) -> None:
        points = [(row["share"], value(row)) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), color=COLOURS[way], **style)

    for way in dict.fromkeys(row["way"] for row in rows):
        curve(moved, way, lambda row: row["rows_per_layer"], marker="o", linestyle="", label=way)
        curve(moved, way, lambda row: row["rows_expected"], linewidth=1)
        curve(times, way, lambda row: row["time_vs_deepspeed_formulation"], marker="o")
        curve(speed, way, lambda row: row["share_of_copy"], marker="o")
    moved.set_ylabel("rows moved per layer (s * b)\ndots: counted, lines: expected")
    times.set_ylabel("time relative to DeepSpeed's formulation")
    speed.set_ylabel("bytes per second relative to a copy")
    for axes in (moved, times, speed):
        axes.set(xlabel="kept share k/s", xlim=(0, 1), ylim=(0, None))
    title = _title(results, "seq_length", "hidden_size", "num_layers", "dtype")
    figure.suptitle(f"{title}, micro batch size {size}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png", dpi=120)


def draw_training(results: dict[str, Any], path: Path) -> None:
    """Draw time against operations, and the share of the saving realised."""
    size = results["settings"]["micro_batch_size"]
    rows = sorted(results["rows"], key=lambda row: row["share"])
    kinds = {
        "fixed micro-batch": [row for row in rows if row["micro_batch_size"] == size],
        "grown micro-batch": [row for row in rows if row["micro_batch_size"] != size],
    }
    figure, (times, realised) = _figure(2)
    times.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="in theory")
    for (name, of_kind), colour in zip(kinds.items(), (BLUE, ORANGE), strict=True):
        if not of_kind:
            continue
        style = {"color": colour, "marker": "o", "linewidth": 1}
        points = [(row["operation_ratio"], row["time_ratio"]) for row in of_kind]
        times.plot(*zip(*points, strict=True), **style, label=name)
        sparse = [row for row in of_kind if row["saving_realised"] is not None]
        points = [(row["share"], row["saving_realised"]) for row in sparse]
        realised.plot(*zip(*points, strict=True), **style)
    times.set(xlabel="operations relative to dense", ylabel="time of a step relative to dense")
    times.set(xlim=(0, 1.05), ylim=(0, None))
    realised.set(xlabel="kept share k/s", ylabel="share of the saving realised")
    realised.set(xlim=(0, 1), ylim=(0, None))
    realised.axhline(1, color=GREY, linewidth=1)
    names = ("num_layers", "hidden_size", "seq_length", "samples", "dtype")
    figure.suptitle(_title(results, *names), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=120)
