"""What the runs of the study of policies say: tables with paired differences.

    python benchmarks/policies/analysis.py benchmarks/policies/results/runs.csv

prints the tables of a runs.csv again. See benchmarks/lib/paired.py for differences, intervals and
the correction for many questions.
"""

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

from policies.arms import ARMS, questions

LEVEL = 0.05


def by_task(runs: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each task."""
    return {task: [r for r in runs if r["task"] == task] for task in {r["task"]: 0 for r in runs}}


def answers(runs: list[Row]) -> list[tuple[str, str, str, str, list[float], float]]:
    """Return (task, arm, against, what, differences, chance) of all questions with runs.

    The chance is corrected for there being so many questions, those of all tasks together.
    """
    found = [
        (task, arm, against, what, values)
        for task, own in by_task(runs).items()
        for arm, against, what in questions()
        if (values := list(differences(own, arm, against).values()))
    ]
    corrected = holm([chance(values) for *_, values in found])
    return [(*each, value) for each, value in zip(found, corrected, strict=True)]


def verdict(values: list[float], corrected: float) -> str:
    """Say what the differences of an arm's loss from another's allow to be said."""
    mean, half = fmean(values), half_interval(values)
    if len(values) < 2:
        return "one seed: nothing"
    if abs(mean) <= half:
        return "the spread covers it"
    which = "lower loss" if mean < 0 else "higher loss"
    return which if corrected < LEVEL else f"{which}, if it were the only question"


def tables(runs: list[Row]) -> str:
    """Return the tables as markdown."""
    tasks = by_task(runs)
    heads = " | ".join(f"{task}: loss | LayerTokens" for task in tasks)
    lines = [f"| arm | seeds | {heads} |", "|---|--:" + "|--:" * 2 * len(tasks) + "|"]
    for arm in ARMS:
        cells, counts = [], []
        for own in tasks.values():
            losses = list(by_seed(own, arm).values())
            counts.append(len(losses))
            if not losses:
                cells += ["-", "-"]
                continue
            cells.append(f"{fmean(losses):.4f}")
            if len(losses) > 1:
                cells[-1] += f" ± {spread(losses):.4f}"
            base = list(by_seed(own, "dense", "layer_tokens").values())
            share = fmean(by_seed(own, arm, "layer_tokens").values()) / fmean(base) if base else 0
            cells.append(f"{share:.3f}" if base else "-")
        if any(counts):
            seeds = "/".join(str(count) for count in dict.fromkeys(counts))
            lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} |")
    lines += [
        "",
        "Loss in nats per predicted token over both validation sets, mean ± standard deviation "
        "over seeds. LayerTokens relative to dense.",
    ]
    asked = answers(runs)
    for task in tasks:
        lines += [
            "",
            f"| {task}: arm - compared with | seeds | difference | 95% interval | corrected p "
            "| says |",
            "|---|--:|--:|---|--:|---|",
        ]
        for of_task, arm, against, what, values, corrected in asked:
            if of_task == task:
                lines.append(
                    f"| {arm} - {against.split('/')[-1]}<br>{what} | {len(values)} | "
                    f"{fmean(values):+.4f} | {interval(values)} | {figure(corrected, '.3f')} | "
                    f"{verdict(values, corrected)} |"
                )
    lines += [
        "",
        f"p by Student's paired t test, corrected for all {len(asked)} questions with Holm's "
        "method.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the tables of a runs.csv."""
    if len(argv) != 1:
        print("usage: python analysis.py RUNS.csv", file=sys.stderr)
        return 2
    print(tables(read_csv(Path(argv[0]), ("task", "arm"))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
