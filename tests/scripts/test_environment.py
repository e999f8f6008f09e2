"""tools/environment.sh, with Pythons that only pretend."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Answers the questions of environment.sh and writes down what it is told to do.
FAKE_PYTHON = """#!/bin/bash
echo "$0 $*" >>"{log}"
case "$*" in
  --version) echo "Python 3.12.99" ;;
  "-c import sys, venv"*) exit {status} ;;
  -) cat >/dev/null; [ -e "$(dirname "$0")/complete" ] || printf '%s\\n' {missing} ;;
  "-m venv"*)
    venv="${{@: -1}}"; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"
    touch "$venv/bin/complete" ;;
  "- tabulate") cat >/dev/null; [ -e "$(dirname "$0")/tabulate" ] || echo tabulate ;;
  "-m pip install"*tabulate) touch "$(dirname "$0")/tabulate"; exit {pip} ;;
  "-m pip list"*) echo "torch==2.99.0a0+container" ;;
  "-m pip install"*) exit {pip} ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A machine on which python3 is too old, and nothing else is on PATH."""
    for name in ("bin", "home", "venv"):
        (tmp_path / name).mkdir()
    for tool in "bash cat cksum cp dirname flock grep mkdir tail touch".split():
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    fake_python(tmp_path, "bin/python3", status=1)
    return tmp_path


def fake_python(machine, path, status=0, missing="torch tensorboard", pip=0):
    file = machine / path
    file.parent.mkdir(parents=True, exist_ok=True)
    log = machine / "log"
    file.write_text(FAKE_PYTHON.format(status=status, missing=missing, log=log, pip=pip))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def source(machine, before="", **variables):
    """Source environment.sh; return exit status, the PYTHON it chose, what it said and did."""
    environment = {
        "PATH": str(machine / "bin"),
        "HOME": str(machine / "home"),
        "MEGATRON_RLTD_VENV": str(machine / "venv"),
        **variables,
    }
    script = f'{before}source "{ROOT}/tools/environment.sh" && printf "%s\\n" "$PYTHON"'
    result = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = machine / "log"
    done = log.read_text() if log.exists() else ""
    return result.returncode, result.stdout.strip(), result.stderr, done


def test_no_python_is_one_clear_error(machine):
    status, python, said, _ = source(machine)
    assert (status, python) == (1, "")
    assert "no Python 3.12 or newer with venv was found" in said
    for way in ("apt-get install python3.12", "pyenv install 3.12", "conda create", "PYTHON="):
        assert way in said


def test_a_python_that_is_asked_for_must_do(machine):
    status, _, said, _ = source(machine, PYTHON="/usr/bin/false")
    assert status == 1
    assert "PYTHON=/usr/bin/false is not Python 3.12 or newer" in said


@pytest.mark.parametrize(
    ("path", "variables"),
    [
        ("bin/python3.12", {}),
        ("bin/python3.13", {}),
        ("pyenv/versions/3.12.1/bin/python3", {"PYENV_ROOT": "pyenv"}),
        ("home/.pyenv/versions/3.13.0/bin/python3", {}),
        ("conda/bin/python3", {"CONDA_PREFIX": "conda"}),
    ],
)
def test_where_a_python_is_found(machine, path, variables):
    base = fake_python(machine, path)
    variables = {name: str(machine / value) for name, value in variables.items()}
    status, python, said, done = source(machine, **variables)
    assert status == 0, said
    assert python == str(machine / "venv/bin/python")
    assert f"{base} -m venv {machine}/venv" in done
    assert said.count("\n") == 1
    assert "with Python 3.12.99, once, about 3 minutes and 5 GB" in said


def test_a_pyenv_shim_that_fails_is_passed_over(machine):
    fake_python(machine, "bin/python3.12", status=127)
    base = fake_python(machine, "home/.pyenv/versions/3.12.1/bin/python3")
    status, _, _, done = source(machine)
    assert status == 0
    assert f"{base} -m venv" in done


def test_new_environments_get_the_tested_versions(machine):
    fake_python(machine, "bin/python3.12")
    *_, done = source(machine)
    pip = [line for line in done.splitlines() if "pip install" in line]
    assert f"-c {ROOT}/constraints.txt torch megatron-core[training]>=0.17,<0.20" in pip[0]
    assert "--no-deps --no-build-isolation" in pip[1]
    assert f"-e {ROOT}" in pip[1]


def test_a_torch_that_is_there_stays(machine):
    # An NGC container: Python with torch, without Megatron.
    fake_python(machine, "bin/python3", missing="megatron-core tensorboard")
    status, python, said, done = source(machine)
    assert status == 0
    assert python == str(machine / "venv/bin/python")
    assert "-m venv --system-site-packages" in done
    assert f"-c {machine}/venv/installed.txt torch" in done
    assert (machine / "venv/installed.txt").read_text() == "torch==2.99.0a0+container\n"
    assert "torch stays as it is" in said


def test_a_complete_python_is_used_as_it_is(machine):
    python3 = fake_python(machine, "bin/python3", missing="")
    (machine / "bin/complete").touch()
    status, python, said, done = source(machine)
    assert (status, python, said) == (0, "python3", "")
    assert "venv" not in done.replace("import sys, venv", "")
    assert source(machine, PYTHON=str(python3))[1] == str(python3)


def test_the_second_start_sets_up_nothing(machine):
    fake_python(machine, "bin/python3.12")
    source(machine)
    (machine / "log").unlink()
    status, python, said, done = source(machine)
    assert (status, python, said) == (0, str(machine / "venv/bin/python"), "")
    assert "-m pip" not in done


def test_what_a_script_needs_beyond_is_added_once(machine):
    fake_python(machine, "bin/python3.12")
    source(machine)
    (machine / "log").unlink()
    extras = "extras=(tabulate); "
    status, python, said, done = source(machine, before=extras)
    assert (status, python) == (0, str(machine / "venv/bin/python"))
    assert (
        said
        == f"megatron_rltd: adding tabulate to {machine}/venv (log: {machine}/venv/extras.log)\n"
    )
    assert f"pip install --no-cache-dir -c {ROOT}/constraints.txt tabulate" in done
    (machine / "log").unlink()
    status, _, said, done = source(machine, before=extras)
    assert (status, said) == (0, "")
    assert "-m pip" not in done


def test_other_requirements_are_installed_again(machine):
    fake_python(machine, "bin/python3.12")
    source(machine)
    (machine / "venv/ready").write_text("an older list\n")
    (machine / "log").unlink()
    assert "-m pip install" in source(machine)[3]


def test_a_failed_set_up_is_not_taken_for_done(machine):
    fake_python(machine, "bin/python3.12", pip=1)
    status, _, said, _ = source(machine)
    assert status == 1
    assert f"setting up failed; the whole log is {machine}/venv/setup.log" in said
    assert not (machine / "venv/ready").exists()
    fake_python(machine, "bin/python3.12")
    assert source(machine)[0] == 0


def test_this_python_is_complete():
    # What the tests run in is what the script would use.
    script = f'source "{ROOT}/tools/environment.sh" && printf "%s\\n" "$PYTHON"'
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == sys.executable
