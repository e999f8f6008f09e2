"""One training run of the convergence study: Megatron's own loop in a process of its own.

A run has a folder: flags.json (what it was begun with), log.txt, tensorboard, checkpoints, and
after its end second_loss.txt, the loss on the second validation set.
"""

import ctypes
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, installed or not

import analysis
import torch
from arms import BATCH_SIZE, NUM_LAYERS, SEQ_LENGTH, Arm, flags, planned
from lib.runs import StudyError, say

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
    --min-lr 1e-5 --lr-decay-style cosine
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
""".split()
# Without the second flag, Megatron 0.19 fails under the first.
DATA_FLAGS = """
    --full-validation --multiple-validation-sets --tokenizer-type HuggingFaceTokenizer
    --no-create-attention-mask-in-dataloader --num-workers 0
""".split()
LOGGING_FLAGS = "--tensorboard-log-interval 1 --log-throughput --log-timers-to-tensorboard".split()


def run_flags(arm: Arm, steps: int, seed: int, lr: float, evaluations: int) -> list[str]:
    """Return all flags of a run but those that name files."""
    # Not a divisor of the steps, for Megatron evaluates once more when training is done.
    eval_interval = str(steps // evaluations + 1)
    intervals = ["--eval-interval", eval_interval, "--log-interval", str(max(1, steps // 50))]
    return [
        *(MODEL_FLAGS + TRAINING_FLAGS + DATA_FLAGS + LOGGING_FLAGS + intervals),
        *("--seed", str(seed), "--lr", str(lr), *flags(arm, steps)),
    ]


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
    if not torch.cuda.is_available():
        command.append("--cpu")
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
