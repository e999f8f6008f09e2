"""What the runs of the convergence study say: rows and tables with paired differences.

    python benchmarks/convergence/analysis.py benchmarks/convergence/results/runs.csv

prints the tables of a runs.csv again. The numbers of a run come from its TensorBoard folder, by the
functions of megatron_rltd/commands/compare/run_logs.py.

Differences between arms and their intervals are those of benchmarks/lib/paired.py.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

from arms import ARMS, QUESTIONS
from lib.paired import (
    Row,
    by_seed,
    differences,
    figure,
    half_interval,
    interval,
    read_csv,
    spread,
)

from megatron_rltd.commands.compare.run_logs import (
    SAMPLES,
    LoggedRun,
    Points,
    read_run,
    total_flops,
    validation,
)
from megatron_rltd.training import tags

SECOND_LOSS = "second_loss.txt"  # in a run's folder
VALIDATION_PARTS = ("validation_a", "validation_b")


def validation_losses(run: LoggedRun) -> Points:
    """Return the losses on the validation set that is evaluated during training."""
    return validation(run)[1]


def read_all(folders: dict[tuple[str, int], Path]) -> tuple[list[Row], list[Row]]:
    """Return a row for each run and one for each of its evaluations.

    Args:
        folders: Those of the runs by (arm, seed).

    Raises:
        LogError: One of them is not that of a run.
    """
    runs, curves = [], []
    for (arm, seed), folder in folders.items():
        run = read_run(folder / "tensorboard")
        losses = validation_losses(run)
        end = max(run.points(SAMPLES))
        parts = [losses[end], float((folder / SECOND_LOSS).read_text())]
        of_run: Row = {"arm": arm, "seed": seed}
        runs.append(
            of_run
            | {"validation_loss": fmean(parts)}
            | dict(zip(VALIDATION_PARTS, parts, strict=True))
            | {
                "iterations": end,
                "samples": int(run.last(SAMPLES)),
                "layer_tokens": int(run.last(tags.LAYER_TOKENS)),
                "flops": total_flops(run),
            }
        )
        for iteration, loss in losses.items():
            at = {
                "iteration": iteration,
                "samples": int(run.points(SAMPLES)[iteration]),
                "layer_tokens": int(run.points(tags.LAYER_TOKENS)[iteration]),
            }
            curves.append(of_run | at | {"validation_a": loss})
    return runs, curves


def verdict(values: Iterable[float], text_noise: float = 0.0) -> str:
    """Say what the differences of an arm's loss from another's allow to be said.

    Args:
        values: One for each seed.
        text_noise: What `evaluation_noise` returns. All seeds share the validation text, so that
            their spread does not show it.
    """
    values = list(values)
    mean, half = fmean(values), half_interval(values)
    if math.isnan(half):
        return "one seed: nothing"
    if abs(mean) <= half:
        return "the spread covers it"
    if abs(mean) <= 2 * text_noise:
        return "may be due to the validation text"
    return "lower loss" if mean < 0 else "higher loss"


def evaluation_noise(runs: list[Row]) -> float:
    """Return the standard error that the choice of validation text gives one difference.

    The loss is the mean of two sets of different files: half of what a difference on one set
    deviates from that on the other. Root mean square over all questions and seeds.
    """
    squares = []
    for arm, against, _ in QUESTIONS:
        a, b = (differences(runs, arm, against, part) for part in VALIDATION_PARTS)
        squares += [((a[seed] - b[seed]) / 2) ** 2 for seed in a]
    return math.sqrt(fmean(squares)) if squares else math.nan


def seed_noise(runs: list[Row]) -> float:
    """Return the standard deviation of differences over seeds, root mean square over questions."""
    spreads = [spread(differences(runs, arm, base).values()) for arm, base, _ in QUESTIONS]
    squares = [value**2 for value in spreads if not math.isnan(value)]
    return math.sqrt(fmean(squares)) if squares else math.nan


def tables(runs: list[Row]) -> str:
    """Return the tables as markdown."""
    lines = ["| arm | seeds | validation loss | samples | LayerTokens | FLOPs |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    base = {key: by_seed(runs, "dense", key).values() for key in ("layer_tokens", "flops")}
    for arm in (name for name in ARMS if by_seed(runs, name)):
        losses = by_seed(runs, arm).values()
        samples = fmean(by_seed(runs, arm, "samples").values())
        shares = [
            f"{fmean(by_seed(runs, arm, key).values()) / fmean(dense):.3f}" if dense else "-"
            for key, dense in base.items()
        ]
        loss = f"{fmean(losses):.4f}"
        if len(losses) > 1:
            loss += f" ± {spread(losses):.4f}"
        lines += [f"| {arm} | {len(losses)} | {loss} | {samples:,.0f} | {' | '.join(shares)} |"]
    lines += [
        "",
        "Loss in nats per token over both validation sets, mean ± standard deviation over seeds. "
        "LayerTokens and FLOPs relative to dense.",
        "",
        "| arm - compared with | per seed | mean | standard deviation | 95% interval | says |",
        "|---|---|--:|--:|---|---|",
    ]
    for arm, against, what in QUESTIONS:
        found = differences(runs, arm, against)
        if not found:
            continue
        values = list(found.values())
        each = ", ".join(f"{value:+.4f}" for value in values)
        lines.append(
            f"| {arm} - {against}<br>{what} | {each} | {fmean(values):+.4f} | "
            f"{figure(spread(values))} | {interval(values)} | "
            f"{verdict(values, evaluation_noise(runs))} |"
        )
    lines += [
        "",
        f"Spread of a difference over seeds: {figure(seed_noise(runs))}. Standard error that the "
        f"choice of validation text gives a difference: {figure(evaluation_noise(runs))}.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the tables of a runs.csv."""
    if len(argv) != 1:
        print("usage: python analysis.py RUNS.csv", file=sys.stderr)
        return 2
    print(tables(read_csv(Path(argv[0]))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
