"""What the tests of examples/gpt3_1.3b share: environment, stand-in for Python, log."""

import os
import re
import sys
from pathlib import Path

from tests.parallel import ROOT

FOLDER = ROOT / "examples" / "gpt3_1.3b"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*_*b*.sh"))
# Settings of the scripts, and what a batch system around the tests would have them take for theirs.
_SETTINGS = re.findall(r"^#   ([A-Z_, ]+?)  ", (FOLDER / "pretrain.sh").read_text(), re.MULTILINE)
SETTINGS = {"SCALE", "DRY_RUN", *re.findall("[A-Z_]+", " ".join(_SETTINGS))}

# A smoke test of less still: 20 iterations of 8 samples, of which 10 drop tokens.
TINY = {
    "SCALE": "smoke",
    "EXTRA_ARGS": "--hidden-size 64 --vocab-size 1023",
    "TOKENS": "180000000000",
    "MICRO_BATCH_SIZE": "2",
    "GLOBAL_BATCH_SIZE": "8",
}

# Stands in for Python: each start trains two iterations and saves, until there are six.
STUB = r"""#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT" \
  "$CUDA_DEVICE_MAX_CONNECTIONS $NCCL_DEBUG $SRUN_CPUS_PER_TASK"
case $STUB in
  fails) [ "$RANK" != 1 ] && exec sleep 60; exit 7 ;;
  is-stuck) exit 0 ;;
esac
[ "$RANK" = 0 ] || exit 0
tracker=$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt
mkdir -p "${tracker%/*}"
at=$(cat "$tracker" 2>/dev/null || echo 0)
[ "$at" -ge 6 ] || at=$((at + 2))
echo " [now] iteration $at/  6 | lm loss: 1.0E+00 |"
echo "$at" >"$tracker"
"""


def environment(**settings: str | Path) -> dict[str, str]:
    """Return the environment of a script with these settings and no others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SETTINGS and not name.startswith(("SLURM", "SBATCH", "SRUN", "NCCL", "CUDA"))
    }
    given = {name: str(value) for name, value in settings.items()}
    return {**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **given}


def stub_in(folder: Path) -> Path:
    """Write the stand-in for Python; return its path."""
    path = folder / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def iterations(log: Path) -> list[dict[str, float]]:
    """Return what each of Megatron's log lines says, in order, but for times."""
    found = []
    for line in log.read_text().splitlines():
        match = re.search(r"\] iteration +(\d+)/ +(\d+) \| (.*)", line)
        if match:
            values = dict(re.findall(r"([^|:]+?): +([-+.\dEe]+) \|", match[3]))
            numbers = {name.strip(): float(value) for name, value in values.items()}
            for name in [n for n in numbers if "time" in n or "throughput" in n]:
                del numbers[name]
            found.append({"iteration": int(match[1]), "of": int(match[2]), **numbers})
    return found
