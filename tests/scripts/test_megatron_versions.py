"""tools/dev/test_megatron_versions.sh, with a Python and releases that only pretend."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from megatron_rltd.patching import versions

ROOT = Path(__file__).parents[2]

# Has all that environment.sh asks for, installs empty folders unless OFFLINE, finds the first
# release on its path or else FOUND, and passes tests on all releases but those in FAILING.
FAKE_PYTHON = """#!/bin/bash
release=$(basename "${PYTHONPATH%%:*}")
case "$*" in
  "-"|"- "*) if grep -q newest_of_each_minor; then shift; echo 0.17.1 "$@"; fi ;;
  "-m pip install"*) echo "$*" >>"$LOG"; [ -z "${OFFLINE:-}" ] && mkdir "${@: -2:1}" ;;
  *megatron_version*) echo "${FOUND:-$release}" ;;
  "-m pytest"*)
    echo "$release: $*" >>"$LOG"
    if [[ " ${FAILING:-} " == *" $release "* ]]; then
      printf 'FAILED tests/megatron/test_layer.py::test_x\\n=== 1 failed in 2s ===\\n'; exit 1
    fi
    echo "=== 3 passed in 2s ===" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Run the script with environment variables and arguments: (status, printed, said, done)."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"

    def run(*arguments, **variables):
        log.write_text("")
        result = subprocess.run(
            ["bash", ROOT / "tools" / "dev" / "test_megatron_versions.sh", *arguments],
            env={
                "PATH": os.environ["PATH"],
                "PYTHON": str(python),
                "MEGATRON_RLTD_VENV": str(tmp_path / "venv"),
                "LOG": str(log),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        return result.returncode, result.stdout, result.stderr, log.read_text().splitlines()

    return run


def test_each_release_is_installed_once_and_tested(script, tmp_path):
    status, printed, said, done = script("0.18.0")
    assert status == 0, said
    assert printed == (
        "megatron-core 0.17.1:  3 passed in 2s \nmegatron-core 0.18.0:  3 passed in 2s \n"
    )
    for version, line in zip(("0.17.1", "0.18.0"), done[::2], strict=True):
        folder = tmp_path / "venv-megatron" / version
        assert f"--no-deps --target {folder}.part megatron-core=={version}" in line
        assert folder.is_dir()
    tested = [line.partition(": -m pytest ")[::2] for line in done[1::2]]
    assert [version for version, _ in tested] == ["0.17.1", "0.18.0"]
    for name in tested[0][1].split():
        assert (ROOT / name).exists()
    assert len(tested[0][1].split()) >= 4
    again = script("0.18.0")
    assert again[:2] == (status, printed)
    assert not [line for line in again[3] if "pip" in line]


def test_a_failure_is_shown_and_the_others_still_run(script):
    status, printed, said, _ = script("0.18.0", FAILING="0.17.1")
    assert status == 1
    assert "FAILED tests/megatron/test_layer.py::test_x" in said
    assert "megatron-core 0.17.1:  1 failed in 2s" in printed
    assert "megatron-core 0.18.0:  3 passed in 2s" in printed


def test_another_megatron_on_the_path_is_an_error(script):
    status, printed, said, done = script(FOUND="0.19.2")
    assert (status, printed) == (1, "")
    assert "wanted megatron-core 0.17.1, Python finds 0.19.2" in said
    assert not [line for line in done if "-m pytest" in line]


def test_a_failed_download_is_not_taken_for_a_release(script, tmp_path):
    assert script(OFFLINE="1")[0] != 0
    assert not (tmp_path / "venv-megatron" / "0.17.1").exists()
    assert script()[0] == 0


def test_the_newest_of_each_minor(monkeypatch):
    stored = {"a": {"0.17.0": "", "0.19.10": "", "0.19.9": ""}, "b": {"0.17.1": ""}}
    monkeypatch.setattr(versions, "known_fingerprints", lambda: stored)
    assert versions.tested_versions() == ["0.17.0", "0.17.1", "0.19.9", "0.19.10"]
    assert versions.newest_of_each_minor() == ["0.17.1", "0.19.10"]


def test_every_supported_minor_is_tested():
    minors = [version.rpartition(".")[0] for version in versions.newest_of_each_minor()]
    (major, first), (_, end) = versions.OLDEST, versions.NEWER_THAN_TESTED
    assert minors == [f"{major}.{minor}" for minor in range(first, end)]
