"""How far apart the masks of a run were: those of its search, or those of its checkpoints."""

import re
from pathlib import Path
from typing import Any

import hf_checkpoint
from hf_weights import ConversionError
from ticket_checkpoint import Dense, target_of

from megatron_rltd.early_bird import history
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.rule import PRESETS, Rule
from megatron_rltd.early_bird.search import Check, check
from megatron_rltd.early_bird.target import Target


def show(options: Any) -> None:
    """Print, and draw if asked to, the distances between the masks of a run.

    Args:
        options: Of draw_ticket.py.

    Raises:
        ConversionError: The run has no two masks.
        HistoryError: A file of masks is damaged or for another ticket.
    """
    newest = Dense(hf_checkpoint.find(options.load, options.iteration))
    target = target_of(options, newest)
    units = target.units(newest.shape, newest.args.hidden_size)
    rule = rule_of(options, newest.args)
    searched = [n for n in history.iterations(options.load) if n <= newest.iteration]
    if searched:
        taken = [history.read(options.load, n, target, units) for n in searched]
        print(f"masks of the search in {options.load / history.FOLDER}")
    else:
        taken = _of_checkpoints(options.load, newest, target)
        print(f"masks of the checkpoints in {options.load}, after the warm-up")
    if len(taken) < 2:
        raise ConversionError(
            f"--history needs two masks, but {options.load} has {len(taken)}: search with a "
            "smaller --early-bird-interval, or keep more checkpoints after the warm-up"
        )
    checks = [check(mask, taken[:i], rule) for i, mask in enumerate(taken)]
    print(table(checks, rule))
    if isinstance(options.history, Path):
        picture(checks, rule, options.history)
        print(f"picture: {options.history}")


def rule_of(options: Any, args: Any) -> Rule:
    """Return the rule that the options say, or else that of the search that the run was."""
    preset = PRESETS[options.preset or "early-bird"]
    if options.preset is None and getattr(args, "early_bird", False):
        preset = Rule(args.early_bird_window, args.early_bird_threshold)
    window = preset.window if options.window is None else options.window
    threshold = preset.threshold if options.threshold is None else options.threshold
    return Rule(window, threshold)


def _of_checkpoints(load: Path, newest: Dense, target: Target) -> list[Mask]:
    folders = [path for path in load.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    taken = []
    for folder in sorted(folders, key=lambda path: int(path.name[5:])):
        if int(folder.name[5:]) > newest.iteration:
            continue
        dense = Dense(hf_checkpoint.find(folder, None))
        dense.require_model_of(newest)
        if dense.is_past_warm_up():
            taken.append(dense.mask(target))
    return taken


def table(checks: list[Check], rule: Rule) -> str:
    """Return the distances as text, with what the rule says."""
    kinds = list(checks[0].distances)
    heads = [f"{kind:>8} {'chance':>7} {'window':>7}" for kind in kinds]
    lines = ["iteration  " + "  ".join(heads)]
    for found in checks:
        cells = []
        for kind in kinds:
            before, largest = found.previous(kind), found.largest(kind)
            if before is None or largest is None:
                cells.append(f"{'-':>8} {'-':>7} {'-':>7}")
                continue
            chance = found.chance[kind]
            share = f"{before / chance:7.2f}" if chance else f"{'-':>7}"
            cells.append(f"{before:8.4f} {share} {largest:7.4f}")
        lines.append(f"{found.iteration:9}  " + "  ".join(cells))
    lines.append(
        "Columns: distance to the mask before it; the same as a share of what two random masks are "
        f"apart; the largest to the last {rule.window - 1}."
    )
    first = next((found.iteration for found in checks if found.emerged), None)
    says = f"W = {rule.window}, threshold {rule.threshold:g}"
    if first is None:
        lines.append(f"{says}: no ticket has emerged")
    else:
        after = [found.iteration for found in checks if not found.emerged]
        lost = [n for n in after if n > first]
        lines.append(
            f"{says}: a ticket has emerged at iteration {first}"
            + (f", but not at iteration {', '.join(map(str, lost))}" if lost else "")
        )
    lines.append("Masks that are taken closer to each other differ less: see docs/early_bird.md.")
    return "\n".join(lines)


def picture(checks: list[Check], rule: Rule, path: Path) -> None:
    """Draw the distances to the mask before, as shares of the distance of random masks.

    Raises:
        ConversionError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConversionError(
            f"--history {path} needs matplotlib: install it, or give --history alone"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for kind in checks[0].distances:
        points = [(c.iteration, c.distances[kind][0]) for c in checks if c.distances[kind]]
        (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=kind)
        chance = checks[0].chance[kind]
        axes.axhline(
            chance, linestyle=":", color=line.get_color(), label=f"{kind}: two random masks"
        )
    axes.axhline(rule.threshold, color="black", linewidth=0.8, label="threshold")
    axes.set(xlabel="iteration", ylabel="mask distance to the check before", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
