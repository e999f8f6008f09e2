"""What the runs of the study of Early-Bird tickets say: tables with paired differences.

    python benchmarks/early_bird/analysis.py benchmarks/early_bird/results

prints the tables of a folder of results again. See benchmarks/lib/paired.py for differences,
intervals and the correction for many questions.
"""

import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

from lib.paired import (
    Row,
    by_seed,
    chance,
    differences,
    figure,
    half_interval,
    holm,
    interval,
    read_csv,
    spread,
)

from early_bird.arms import ARMS, INTERVALS, QUESTIONS, TUNING, WARM_UP
from early_bird.curves import STRUCTURED, first_emerged
from megatron_rltd.early_bird.rule import PRESETS

LEVEL = 0.05
AT_DRAW = "loss_at_draw"
# Asked of the loss just after the draw, before any step of what it left.
AT_DRAW_QUESTIONS = [
    ("ticket", "random"),
    ("unstructured", "unstructured-random"),
    ("tuning/ticket", "tuning/random"),
    ("tuning/ticket", "tuning/largest-removed"),
    ("tuning/ticket", "tuning/dense"),
]
WORDS = ("arm", "phase", "pattern", "kind")  # columns of words
SHOWN = (0.08, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of a run at which the table shows distances


def answers(runs: list[Row]) -> list[tuple[str, str, str, list[float], float]]:
    """Return (arm, against, what, differences, chance) of all questions with runs.

    The chance is corrected for there being so many questions.
    """
    asked = [(*each, "validation_loss") for each in QUESTIONS]
    asked += [(arm, against, "just after the draw", AT_DRAW) for arm, against in AT_DRAW_QUESTIONS]
    found = [
        (arm, against, what, values)
        for arm, against, what, key in asked
        if (values := list(differences(runs, arm, against, key).values()))
    ]
    corrected = holm([chance(values) for *_, values in found])
    return [(*each, value) for each, value in zip(found, corrected, strict=True)]


def verdict(values: list[float], corrected: float) -> str:
    """Say what the differences of an arm's loss from another's allow to be said."""
    if len(values) < 2:
        return "one seed: nothing"
    mean = fmean(values)
    if abs(mean) <= half_interval(values):
        return "the spread covers it"
    which = "lower loss" if mean < 0 else "higher loss"
    return which if corrected < LEVEL else f"{which}, if it were the only question"


def _with_spread(values: list[float]) -> str:
    if not values or any(map(math.isnan, values)):
        return "-"
    text = f"{fmean(values):.4f}"
    return f"{text} ± {spread(values):.4f}" if len(values) > 1 else text


def of_arms(runs: list[Row]) -> list[str]:
    """Return the table of the arms."""
    lines = ["| arm | seeds | steps | FLOPs | loss just after the draw | loss at the end |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    dense = {row["arm"]: row["flops"] for row in runs if row["arm"].endswith("dense")}
    for arm in ARMS:
        own = [row for row in runs if row["arm"] == arm]
        if not own:
            continue
        before, after = own[0]["steps_before_draw"], own[0]["steps_after_draw"]
        base = dense.get("tuning/dense" if ARMS[arm].phase == TUNING else "dense")
        lines.append(
            f"| {arm} | {len(own)} | {f'{before} + {after}' if before else after} | "
            f"{f'{own[0]["flops"] / base:.3f}' if base else '-'} | "
            f"{_with_spread(list(by_seed(runs, arm, AT_DRAW).values()))} | "
            f"{_with_spread(list(by_seed(runs, arm).values()))} |"
        )
    return [
        *lines,
        "",
        "Loss in nats per predicted token over both validation sets, mean ± standard deviation "
        "over seeds. FLOPs relative to the dense run of the phase, the search included. Dense runs "
        "have no draw: theirs is the loss at that step.",
    ]


def of_differences(runs: list[Row]) -> list[str]:
    """Return the table of the questions."""
    asked = answers(runs)
    lines = ["| arm - compared with | seeds | difference | 95% interval | corrected p | says |"]
    lines.append("|---|--:|--:|---|--:|---|")
    lines += [
        f"| {arm} - {against}<br>{what} | {len(values)} | {fmean(values):+.4f} | "
        f"{interval(values)} | {figure(corrected, '.3f')} | {verdict(values, corrected)} |"
        for arm, against, what, values, corrected in asked
    ]
    end = f"p by Student's paired t test, corrected for all {len(asked)} questions with Holm's"
    return [*lines, "", f"{end} method."]


def _series(distances: list[Row]) -> dict[tuple[str, float, str, str], list[Row]]:
    """Return the rows of each phase, interval, pattern and kind."""
    found: dict[tuple[str, float, str, str], list[Row]] = {}
    for row in distances:
        key = (row["phase"], row["interval"], row["pattern"], row["kind"])
        found.setdefault(key, []).append(row)
    return found


def name_of(pattern: str, kind: str) -> str:
    """Return what a curve is called."""
    return f"structured, {kind}" if pattern == STRUCTURED else pattern


def _over_time(rows: list[Row], key: str) -> str:
    """Return the cells of a column and its share of the chance level at some shares of a run."""
    cells = []
    for share in SHOWN:
        at = [row for row in rows if abs(row["share_of_run"] - share) < 1e-9]
        known = at and not any(math.isnan(row[key]) for row in at)
        # Every mask of a kind prunes the same share, so that one row tells the chance level.
        level = {row["distance"] / row["share_of_chance"] for row in rows if row["distance"] > 0}
        value = fmean(row[key] for row in at) if known else math.nan
        cells.append(f"{value:.3f} ({value / max(level):.2f})" if known and level else "-")
    return " | ".join(cells)


def of_distances(distances: list[Row]) -> list[str]:
    """Return the tables of the distances to the check before and to the last, means over seeds."""
    heads = " | ".join(f"{share:.0%}" for share in SHOWN)
    lines = [f"| phase, check every | mask | {heads} |", "|---|---|" + "--:|" * len(SHOWN)]
    to_last = [f"| phase | mask | {heads} |", lines[1]]
    for (phase, every, pattern, kind), rows in _series(distances).items():
        name = name_of(pattern, kind)
        lines.append(f"| {phase}, {every:.0%} | {name} | {_over_time(rows, 'distance')} |")
        if every == float(INTERVALS[0]):
            to_last.append(f"| {phase} | {name} | {_over_time(rows, 'distance_to_last')} |")
    said = "(share of the chance level), at a share of the run."
    lines += ["", f"Distance to the check before {said}", ""]
    return [*lines, *to_last, "", f"Distance to the mask of the run's end {said}"]


def of_rule(distances: list[Row]) -> list[str]:
    """Return the table of when each preset fires first."""
    heads = " | ".join(PRESETS)
    lines = [f"| phase, check every | pattern | {heads} |", "|---|---|" + "---|" * len(PRESETS)]
    for phase in {row["phase"]: 0 for row in distances}:
        own = [row for row in distances if row["phase"] == phase]
        seeds = list({row["seed"]: 0 for row in own})
        for every in map(float, INTERVALS):
            for pattern in {row["pattern"]: 0 for row in own}:
                cells = []
                for preset in PRESETS:
                    fired = [
                        first_emerged([r for r in own if r["seed"] == seed], every, pattern, preset)
                        for seed in seeds
                    ]
                    cells.append(
                        ", ".join("never" if math.isnan(at) else f"{at:.0%}" for at in fired)
                    )
                lines.append(f"| {phase}, {every:.0%} | {pattern} | {' | '.join(cells)} |")
    lines += [
        "",
        "Share of the run at which a preset first says that the ticket has emerged, seed by seed. "
        f"Checks count from the end of the warm-up on, {float(WARM_UP):.0%} of the run.",
    ]
    return lines


def tables(runs: list[Row], distances: list[Row]) -> str:
    """Return the tables as markdown."""
    lines = [*of_arms(runs), "", *of_differences(runs)]
    if distances:
        lines += ["", *of_distances(distances), "", *of_rule(distances)]
    return "\n".join([*lines, ""])


def read_results(folder: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows of runs.csv and distances.csv."""
    distances = folder / "distances.csv"
    return (
        read_csv(folder / "runs.csv", WORDS),
        read_csv(distances, WORDS) if distances.exists() else [],
    )


def main(argv: list[str]) -> int:
    """Print the tables of a folder of results."""
    if len(argv) != 1:
        print("usage: python analysis.py RESULTS", file=sys.stderr)
        return 2
    print(tables(*read_results(Path(argv[0]))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
