"""Train small GPTs dense and with random-LTD, each arm on several seeds, and compare them.

    python benchmarks/convergence/study.py                       3 seeds, 10 arms, about an hour
    python benchmarks/convergence/study.py --seeds 5 6 7         on other seeds
    python benchmarks/convergence/study.py --arms dense ltd-same-compute --steps 2000
    python benchmarks/convergence/study.py --list                what each arm is trained with

Each run is `python -m megatron_rltd pretrain_gpt ...`: Megatron's own loop on the CPU (or a GPU,
where there is one) and on real text, the Python standard library's source, of which no run reads
all. Ctrl-C stops after the step in progress and saves; the same command continues, and does not
train again what is finished. RESULTS gets runs.csv, curves.csv, study.png and tables.md.

A seed decides initial weights, the order of the samples and which tokens are dropped. Arms of one
seed read the same samples in the same order, so that they are compared pair by pair.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

import analysis
import picture
import training
from arms import ARMS, BATCH_SIZE, FEWEST_STEPS, SEQ_LENGTH, flags, planned
from lib import text
from lib.paired import write_csv
from lib.runs import StudyError, add_options, at_least, finish, parse, say

from megatron_rltd.commands.compare.run_logs import LogError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 500
SEEDS = [1, 2, 3]
LR = 1e-3  # of 5e-4, 1e-3 and 2e-3 the best for the dense run
EVALUATIONS = 3  # of the dense run, the one at its end included


def check_one_pass(prefix: str, names: list[str], steps: int) -> None:
    """Check that no run reads the text twice.

    Megatron shuffles several epochs together, so that runs of different lengths would no longer
    read the same samples in the same order.

    Raises:
        StudyError: One does.
    """
    samples, name = max((planned(ARMS[name], steps).samples, name) for name in names)
    tokens = Path(f"{prefix}.bin").stat().st_size // text.TOKEN_BYTES
    available = (tokens - 1) // SEQ_LENGTH
    if samples > available:
        raise StudyError(
            f"--steps {steps}: {name} reads {samples} samples of the text's {available}; take "
            "fewer steps, or leave that arm out"
        )


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return where a run keeps its log, TensorBoard folder and checkpoint."""
    return options.folder / f"{options.steps}-steps" / f"{arm}-seed-{seed}"


def train_all(options: argparse.Namespace) -> None:
    """Train every arm on every seed, seed by seed, leaving out what is finished."""
    train_prefix, validation_prefixes, tokenizer = text.prepare(options.folder / "data")
    check_one_pass(train_prefix, options.arms, options.steps)
    paths = ["--train-data-path", train_prefix, "--tokenizer-model", str(tokenizer)]
    paths += ["--data-cache-path", str(options.folder / "data" / "cache")]
    first, second = (["--valid-data-path", prefix] for prefix in validation_prefixes)
    pairs = [(seed, name) for seed in options.seeds for name in options.arms]
    for number, (seed, name) in enumerate(pairs, start=1):
        arm, run = ARMS[name], run_folder(options, name, seed)
        what = f"[{number}/{len(pairs)}] seed {seed} {name}"
        wanted = training.run_flags(arm, options.steps, seed, options.lr, options.evaluations)
        training.check_same_flags(run, wanted)
        if training.is_finished(run, arm, options.steps):
            say(f"{what}: trained already")
        else:
            say(f"{what}: {planned(arm, options.steps).iteration} steps (log: {run / 'log.txt'})")
            training.train(run, arm, options.steps, [*wanted, *paths, *first])
        if not (run / analysis.SECOND_LOSS).exists():
            training.evaluate(run, [*wanted, *paths, *second])


def write_results(options: argparse.Namespace) -> None:
    """Write tables, curves and plot of all runs of these options."""
    folders = {
        (name, seed): run_folder(options, name, seed)
        for name in options.arms
        for seed in options.seeds
    }
    runs, curves = analysis.read_all(folders)
    write_csv(options.results / "runs.csv", runs)
    write_csv(options.results / "curves.csv", curves)
    tables = analysis.tables(runs)
    (options.results / "tables.md").write_text(tables)
    picture.draw(runs, curves, options.results / "study.png")
    say(f"\n{tables}\nwrote {options.results}/: runs.csv, curves.csv, tables.md, study.png")


def listing(steps: int) -> str:
    """Return the arms with their lengths and the flags that set them apart."""
    lines = [f"lengths for --steps {steps}, batch {BATCH_SIZE}, sequence {SEQ_LENGTH}"]
    for name, arm in ARMS.items():
        end = planned(arm, steps)
        length = f"{end.iteration} steps, {end.layer_tokens:,} LayerTokens"
        lines += ["", f"{name}: {length}", f"    {' '.join(flags(arm, steps))}"]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(default: all)")
    help_text = "of the dense run; all other lengths follow (default: %(default)s)"
    add("--steps", type=at_least(FEWEST_STEPS), default=STEPS, help=help_text)
    help_text = "peak learning rate, of all arms (default: %(default)s)"
    add("--lr", type=float, default=LR, help=help_text)
    help_text = "of the validation loss during the dense run (default: %(default)s)"
    add("--evaluations", type=at_least(1), default=EVALUATIONS, help=help_text)
    add_options(parser, "convergence", SEEDS)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Train and compare; return the exit status."""
    options = parse_args(argv)
    if options.list:
        print(listing(options.steps))
        return 0
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )

    def study() -> None:
        options.results.mkdir(parents=True, exist_ok=True)
        train_all(options)
        write_results(options)

    return finish(study, text.TextError, LogError)


if __name__ == "__main__":
    sys.exit(main())
