"""The curves of training runs beside one another, for compare."""

import math
from itertools import batched
from pathlib import Path
from statistics import fmean

from megatron_rltd.commands.compare.run_logs import (
    LOSS,
    LoggedRun,
    Points,
    at_or_after,
    validation,
)
from megatron_rltd.training import tags

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito
DASHES = "- -- -. :".split()


def loss_curves(runs: dict[str, LoggedRun]) -> tuple[str, dict[str, Points]]:
    """Return what the loss panels show: the validation loss if every run logged it."""
    curves = {name: validation(run)[1] for name, run in runs.items()}
    if all(curves.values()):
        return "validation loss", curves
    curves = {name: run.points(LOSS) for name, run in runs.items()}
    size = max(1, min(map(len, curves.values())) // 50)
    for name, points in curves.items():
        blocks = [block for block in batched(points.items(), size) if len(block) == size]
        curves[name] = {block[-1][0]: fmean(loss for _, loss in block) for block in blocks}
    return f"training loss, mean of each {size} logged iterations", curves


def plot(runs: dict[str, LoggedRun], path: Path) -> str:
    """Draw loss by iteration, loss by LayerTokens and kept tokens as PNG; say which loss."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loss, curves = loss_curves(runs)
    quantity, _, how = loss.partition(", ")
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_iteration, by_tokens, kept_tokens = panels = figure.subplots(1, 3)
    most = max(
        filter(math.isfinite, (run.last(tags.LAYER_TOKENS) for run in runs.values())), default=1
    )
    exponent = int(math.log10(most)) // 3 * 3
    for i, (name, run) in enumerate(runs.items()):
        points, tokens, kept = (
            curves[name],
            run.points(tags.LAYER_TOKENS),
            run.points(tags.KEPT_TOKENS),
        )
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        marked = style | {"marker": "o" if len(points) <= 40 else "", "markersize": 3}
        by_iteration.plot(points.keys(), points.values(), label=name, **marked)
        if tokens:
            at = [value / 10**exponent for value in at_or_after(tokens, points)]
            by_tokens.plot(at, points.values(), **marked)
        kept_tokens.plot(kept.keys(), kept.values(), **style)
    # On the scale of the whole curve, its steep start, what follows would be flat.
    late = [v for curve in curves.values() for i, v in curve.items() if i >= max(curve) / 5]
    late = [v for v in late if math.isfinite(v)]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        for axes in (by_iteration, by_tokens):
            axes.set_ylim(min(late) - margin, max(late) + margin)
    for axes in panels:
        axes.set(xlabel="iteration", xlim=(0, None))
        axes.set_ylabel(f"{quantity} (nats per token)\n{how}".strip())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=axes is not by_tokens))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    by_tokens.set_xlabel(f"LayerTokens ($10^{{{exponent}}}$)")
    kept_tokens.set(ylabel="kept tokens per sequence", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False)
    figure.savefig(path, format="png", dpi=120)
    return loss
