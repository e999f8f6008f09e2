"""Train small GPTs dense and with random-LTD, each arm on several seeds, and compare them.

    python benchmarks/convergence/study.py                       3 seeds, 9 arms, about an hour
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
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import analysis
import picture
import text
from arms import (
    ARMS,
    BATCH_SIZE,
    FEWEST_STEPS,
    NUM_LAYERS,
    SEQ_LENGTH,
    Arm,
    flags,
    planned,
)
from run_logs import LogError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 800
SEEDS = [1, 2, 3]
EVALUATIONS = 4  # of the dense run, the one at its end included
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOG_LINES = 15

MODEL_FLAGS = f"""
    --num-layers {NUM_LAYERS} --hidden-size 96 --num-attention-heads 3
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion
""".split()
TRAINING_FLAGS = f"""
    --micro-batch-size {BATCH_SIZE} --global-batch-size {BATCH_SIZE}
    --lr 2e-3 --min-lr 1e-5 --lr-decay-style cosine
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
""".split()
# Without the second flag, Megatron 0.19 fails under the first.
DATA_FLAGS = """
    --full-validation --multiple-validation-sets --tokenizer-type HuggingFaceTokenizer
    --no-create-attention-mask-in-dataloader --num-workers 0
""".split()
LOGGING_FLAGS = "--tensorboard-log-interval 1 --log-throughput --log-timers-to-tensorboard".split()


class StudyError(Exception):
    """Why the study cannot go on, in one sentence."""


def say(message: str) -> None:
    """Print at once."""
    print(message, flush=True)


def run_flags(arm: Arm, steps: int, seed: int, evaluations: int = EVALUATIONS) -> list[str]:
    """Return all flags of a run but those that name files."""
    # Not a divisor of the steps, for Megatron evaluates once more when training is done.
    eval_interval = str(steps // evaluations + 1)
    intervals = ["--eval-interval", eval_interval, "--log-interval", str(max(1, steps // 50))]
    return [
        *(MODEL_FLAGS + TRAINING_FLAGS + DATA_FLAGS + LOGGING_FLAGS + intervals),
        *("--seed", str(seed), *flags(arm, steps)),
    ]


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


def is_finished(run: Path, arm: Arm, steps: int) -> bool:
    """Return whether a run has saved its last step."""
    saved = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return saved.exists() and saved.read_text().strip() == str(planned(arm, steps).iteration)


def check_same_flags(run: Path, wanted: list[str]) -> None:
    """Note the flags of a run, or check that it was begun with the same.

    Raises:
        StudyError: It was begun with others.
    """
    noted = run / "flags.json"
    if noted.exists() and json.loads(noted.read_text()) != wanted:
        raise StudyError(
            f"{run} was begun with other flags (flags.json there); remove it, or give another "
            "--folder"
        )
    run.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(wanted) + "\n")


def train(run: Path, arm: Arm, steps: int, words: list[str]) -> None:
    """Train until the end of a run and say where it got.

    Raises:
        StudyError: Training failed.
        KeyboardInterrupt: It was stopped, and has saved.
    """
    start = time.monotonic()
    places = ["--tensorboard-dir", str(run / "tensorboard"), "--save", str(run / "checkpoints")]
    stops = ["--save-interval", "1000000000", "--exit-signal-handler", "--exit-signal", "SIGINT"]
    launch(run, "log.txt", [*words, *places, *stops])
    if not is_finished(run, arm, steps):  # it heard a signal of its own
        raise KeyboardInterrupt
    loss = analysis.validation_losses(analysis.read_run(run / "tensorboard"))
    say(f"    validation loss {list(loss.values())[-1]:.4f}, {time.monotonic() - start:.0f} s")


def evaluate(run: Path, words: list[str]) -> None:
    """Note the loss of a finished run on the second validation set.

    Megatron's --skip-train does it, which logs to no TensorBoard folder.

    Raises:
        StudyError: It failed.
    """
    (run / "evaluation.txt").unlink(missing_ok=True)
    launch(run, "evaluation.txt", [*words, "--skip-train"])
    found = re.search(r"on validation set \| lm loss value: (\S+)", _text(run / "evaluation.txt"))
    if not found:
        raise StudyError(f"Megatron logged no validation loss in {run / 'evaluation.txt'}")
    (run / analysis.SECOND_LOSS).write_text(f"{float(found[1])}\n")


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def launch(run: Path, log_name: str, words: list[str]) -> None:
    """Run Megatron on a run's checkpoints, if there are any.

    Raises:
        StudyError: It failed.
        KeyboardInterrupt: It was stopped.
    """
    command = [sys.executable, "-m", "megatron_rltd", "pretrain_gpt", *words]
    command += ["--load", str(run / "checkpoints")]
    with (run / log_name).open("a") as log:
        # A session of its own, so that a terminal's Ctrl-C comes from here only.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            say("stopping after this step, saving ...")
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if status:
        print(*_text(run / log_name).splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
        raise StudyError(f"Megatron failed; the whole log is {run / log_name}")


def _die_with_parent() -> None:
    """Have the kernel end this process when the study is killed: two must not train one run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Return where a run keeps its log, TensorBoard folder and checkpoint."""
    return options.folder / f"{options.steps}-steps" / f"{arm}-seed-{seed}"


def train_all(options: argparse.Namespace) -> None:
    """Train every arm on every seed, seed by seed, leaving out what is finished."""
    train_prefix, validation_prefixes, tokenizer = text.prepare(options.folder / "data")
    check_one_pass(train_prefix, options.arms, options.steps)
    paths = [
        "--train-data-path",
        train_prefix,
        "--data-cache-path",
        str(options.folder / "data" / "cache"),
    ]
    paths += ["--tokenizer-model", str(tokenizer)]
    first, second = (["--valid-data-path", prefix] for prefix in validation_prefixes)
    pairs = [(seed, name) for seed in options.seeds for name in options.arms]
    for number, (seed, name) in enumerate(pairs, start=1):
        arm, run = ARMS[name], run_folder(options, name, seed)
        what = f"[{number}/{len(pairs)}] seed {seed} {name}"
        wanted = run_flags(arm, options.steps, seed, options.evaluations)
        check_same_flags(run, wanted)
        if is_finished(run, arm, options.steps):
            say(f"{what}: trained already")
        else:
            say(f"{what}: {planned(arm, options.steps).iteration} steps (log: {run / 'log.txt'})")
            train(run, arm, options.steps, [*wanted, *paths, *first])
        if not (run / analysis.SECOND_LOSS).exists():
            evaluate(run, [*wanted, *paths, *second])


def write_results(options: argparse.Namespace) -> None:
    """Write tables, curves and plot of all runs of these options."""
    folders = {
        (name, seed): run_folder(options, name, seed)
        for name in options.arms
        for seed in options.seeds
    }
    runs, curves = analysis.read_all(folders)
    analysis.write_csv(options.results / "runs.csv", runs)
    analysis.write_csv(options.results / "curves.csv", curves)
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

    def whole(least: int) -> Any:
        def number(text: str) -> int:
            value = int(text)
            if value < least:
                raise argparse.ArgumentTypeError(f"{text} is less than {least}")
            return value

        number.__name__ = "whole number"  # what argparse calls it
        return number

    add = parser.add_argument
    add("--seeds", type=whole(1), nargs="+", default=SEEDS, help="(default: 1 2 3)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(default: all)")
    help_text = "of the dense run; all other lengths follow (default: %(default)s)"
    add("--steps", type=whole(FEWEST_STEPS), default=STEPS, help=help_text)
    help_text = "of the validation loss during the dense run (default: %(default)s)"
    add("--evaluations", type=whole(1), default=EVALUATIONS, help=help_text)
    help_text = "where runs and data go (default: runs/convergence)"
    add("--folder", type=Path, default=ROOT / "runs" / "convergence", help=help_text)
    help_text = "where tables and plot go (default: FOLDER/results)"
    add("--results", type=Path, help=help_text)
    add("--list", action="store_true", help="print the arms and stop")
    options = parser.parse_args(argv)
    for name in ("seeds", "arms"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    options.folder = options.folder.absolute()
    options.results = (options.results or options.folder / "results").absolute()
    return options


def main(argv: list[str] | None = None) -> int:
    """Train and compare; return the exit status."""
    options = parse_args(argv)
    if options.list:
        print(listing(options.steps))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        train_all(options)
        write_results(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except (StudyError, text.TextError, LogError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
