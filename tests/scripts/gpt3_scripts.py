"""What the tests of the scripts in examples/ share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import ROOT

FOLDER = ROOT / "examples" / "gpt3_1.3b"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*_*b*.sh"))
# Settings of the scripts, and what a batch system around the tests would have them take for theirs.
LIB = ROOT / "examples" / "lib"


def settings_of(*files: Path) -> set[str]:
    """Return the settings that the comments at the top of shell scripts explain."""
    found = [re.findall(r"^#   ([A-Z_, ]+?)  ", f.read_text(), re.MULTILINE) for f in files]
    return {"SCALE", "DRY_RUN", *re.findall("[A-Z_]+", " ".join(sum(found, [])))}


SETTINGS = settings_of(FOLDER / "pretrain.sh", LIB / "settings.sh")
_OF_ALL_EXAMPLES = settings_of(*(ROOT / "examples").glob("*/*.sh"))

# A smoke test of less still: 20 iterations of 8 samples, of which 10 drop tokens.
TINY = {
    "SCALE": "smoke",
    # Written at once, for the runs that are killed.
    "EXTRA_ARGS": "--hidden-size 64 --vocab-size 1023 --tensorboard-queue-size 1",
    "TOKENS": "180000000000",
    "MICRO_BATCH_SIZE": "2",
    "GLOBAL_BATCH_SIZE": "8",
}

# {tag of TensorBoard: relative tolerance between layouts}
COMPARED = {
    "lm loss": 1e-5,
    "grad-norm": 1e-5,
    "learning-rate": 0,
    "batch-size": 0,
    "random-ltd kept tokens": 0,
    "random-ltd layer tokens": 0,
}

# Stands in for Python: each start trains two iterations and saves, until there are six.
STUB = r"""#!/bin/bash
[ "$1" != -c ] || exit 1  # it has no APEX
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT" \
  "$CUDA_DEVICE_MAX_CONNECTIONS $NCCL_DEBUG $SRUN_CPUS_PER_TASK"
case $STUB in
  memory) echo "rank $RANK allocates by ${PYTORCH_CUDA_ALLOC_CONF-nothing}" ;;
  fails)  # once the other is there: what is to be killed must have been started
    if [ "$RANK" = 1 ]; then until [ -e "$RUN_DIR/there" ]; do sleep 0.1; done; exit 7; fi
    touch "$RUN_DIR/there"
    exec env --default-signal=USR2 sleep 600 ;;
  is-stuck) exit 0 ;;
esac
[ "$RANK" = 0 ] || exit 0
tracker=$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt
mkdir -p "${tracker%/*}"
at=$(cat "$tracker" 2>/dev/null || echo 0)
[ "$at" -ge 6 ] || at=$((at + 2))
echo " [now] iteration $at/  6 | lm loss: 1.0E+00 |"
echo "$at" >"$tracker"
if [ "$STUB" = late ] && [ -z "$SLURM_RESTART_COUNT" ]; then
  sleep 3  # as while Megatron is imported: deaf
  STUB=waits
fi
if [ "$STUB" = waits ] && [ -z "$SLURM_RESTART_COUNT" ]; then
  exec env --default-signal=USR2 bash -c "trap 'exit 0' USR2; while :; do sleep 0.1; done"
fi
"""


def environment(**settings: str | Path) -> dict[str, str]:
    """Return the environment of a script with these settings and no others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_ALL_EXAMPLES
        and not name.startswith(("SLURM", "SBATCH", "SRUN", "NCCL", "CUDA"))
    }
    given = {name: str(value) for name, value in settings.items()}
    return {**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **given}


def bash(name, *arguments, folder=FOLDER, cwd=ROOT, **settings):
    """Run a script to its end; return exit status, standard output and standard error."""
    result = subprocess.run(
        ["bash", str(folder / f"{name}.sh"), *arguments],
        cwd=cwd,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    return result.returncode, result.stdout, result.stderr


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """Return {flag: its values}."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in flags, word
            flags[word] = []
        elif flags:
            flags[list(flags)[-1]].append(word)
    return flags


def stub_in(folder: Path) -> Path:
    """Write the stand-in for Python; return its path."""
    path = folder / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def processes_with(path: Path) -> list[tuple[int, str]]:
    """Return (number, command) of the living processes that name a path.

    Each process of a run is in a group of its own.
    """
    # Without ww, ps cuts the commands off where it finds no terminal.
    listed = subprocess.run(["ps", "-ewwo", "pid=,stat=,args="], capture_output=True, text=True)
    rows = (line.split(None, 2) for line in listed.stdout.splitlines() if str(path) in line)
    return [(int(number), args) for number, state, args in rows if state[0] != "Z"]


def last_iteration(run: Path) -> int:
    """Return the iteration that a run has logged last; 0 if there is none."""
    log = run / "log.txt"
    found = re.findall(r"\] iteration +(\d+)/", log.read_text()) if log.exists() else []
    return int(found[-1]) if found else 0


def starts(run: Path) -> list[dict[int, dict[str, float]]]:
    """Return {iteration: {tag: value}} of each start of a run.

    From TensorBoard, because Megatron's second log line after a start is the mean of two.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found = []
    for file in sorted((run / "tensorboard").glob("events.*")):
        steps: dict[int, dict[str, float]] = {}
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in COMPARED:
                    steps.setdefault(event.step, {})[value.tag] = make_ndarray(value.tensor).item()
        found.append(steps)
    return found


def assert_same(steps: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    """Compare iterations of a run with the same ones of another; sums may differ in their order."""
    assert steps
    for iteration, values in steps.items():
        assert set(values) == set(COMPARED)
        for tag, tolerance in COMPARED.items():
            wanted = pytest.approx(expected[iteration][tag], rel=tolerance, abs=0)
            assert values[tag] == wanted, (iteration, tag)
