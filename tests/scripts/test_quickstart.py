"""The README's first command, at four steps, with Ctrl-C in between."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.sh"
CTRL_C = str(ROOT / "tests" / "ctrl_c")


def start(folder, *arguments, **variables):
    """Start the quickstart in a process group of its own, as a terminal would."""
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--folder", str(folder), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(group: int) -> list[str]:
    """Return the living processes of a process group, zombies left out."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def all_end(group: int) -> bool:
    """Wait for the processes of a group to end; return whether they did."""
    for _ in range(600):
        if not processes_of(group):
            return True
        time.sleep(0.1)
    return False


def test_quickstart_survives_ctrl_c(tmp_path):
    quickstart = start(tmp_path, "--steps", "6", PYTHONPATH=CTRL_C)
    output = quickstart.communicate(timeout=600)[0]
    assert quickstart.returncode == 130, output
    assert "stopping after this step" in output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert all_end(quickstart.pid)
    saved = tmp_path / "dense-6" / "checkpoints" / "latest_checkpointed_iteration.txt"
    stopped_at = int(saved.read_text())
    assert stopped_at == 2

    again = start(tmp_path, "--steps", "6")
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    assert "tokenising" not in output
    steps = [int(n) for n in re.findall(r"dense +step (\d+)/6", output)]
    assert min(steps) > stopped_at
    assert max(steps) == 6
    kept = [int(k) for k in re.findall(r"kept tokens +(\d+)", output)]
    assert kept[0] == 32 < kept[-1]
    rows = re.findall(r"^(dense|random-LTD) +([\d.]+) +6 +48 +([\d,]+) ", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["dense", "random-LTD"]
    assert rows[0][2] == f"{48 * 256 * 8:,}"
    picture = tmp_path / "quickstart.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000

    # A third time there is nothing left to train.
    third = start(tmp_path, "--steps", "6")
    output = third.communicate(timeout=600)[0]
    assert third.returncode == 0
    assert output.count("trained already") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "--steps many is not a number"),
        (["--steps", "2"], "--steps 2 is too few to compare"),
        (["--steps"], "--steps needs a value"),
        (["--setps", "9"], "unknown option --setps"),
    ],
)
def test_wrong_options(tmp_path, arguments, message):
    result = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"quickstart: {message}" in result.stderr
