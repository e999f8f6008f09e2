"""tools/dev/gpu_check.sh as far as it goes without a GPU, and what it makes of its steps."""

import json
import os
import re
import shutil
import subprocess
import sys

import gpu_report
import pytest
import torch

from megatron_rltd.tokens import kernels
from tests.parallel import ROOT

SCRIPT = ROOT / "tools" / "dev" / "gpu_check.sh"


def test_losses_of_two_runs(tmp_path, capsys):
    line = " iteration {}/20 | lm loss: {} | grad norm: 1.0 |\n"
    logs = [tmp_path / f"{name}.log" for name in ("one", "other")]
    for log, last in zip(logs, ("2.0E+00", "2.002E+00"), strict=True):
        log.write_text(line.format(1, "4.0E+00") + line.format(2, last))
    assert gpu_report.main(["losses", *map(str, logs), "--tolerance", "2e-3"]) == 0
    assert "largest relative difference 0.001" in capsys.readouterr().out
    assert gpu_report.main(["losses", *map(str, logs), "--tolerance", "1e-4"]) == 1
    logs[1].write_text("")
    assert gpu_report.main(["losses", *map(str, logs), "--tolerance", "1"]) == 1
    logs[1].write_text(line.format(1, "4.0") + line.format(2, "nan"))
    assert gpu_report.main(["losses", *map(str, logs), "--tolerance", "1"]) == 1


@pytest.mark.parametrize(
    ("result", "status"), [("passed", 0), ("failed", 1), ("skipped", 0), ("to do", 1)]
)
def test_summary_of_gpu_check(tmp_path, monkeypatch, result, status):
    monkeypatch.setenv("MEGATRON_RLTD_TEST_SEED", "7")
    lines = f"build\tpassed\t30\t\nseed\t7\t\t\nop_tests\t{result}\t9\twhy\n"
    (tmp_path / "gpu_check.tsv").write_text(lines)
    (tmp_path / "op_tests.log").write_text("....\n2 failed, 5 passed, 1 skipped in 3.20s\n")
    assert gpu_report.main(["summary", *[str(tmp_path)] * 2, "--device", "cpu"]) == status
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["seed"] == 7
    assert results["machine"]["torch"] == torch.__version__
    assert [step["result"] for step in results["steps"]] == ["passed", result]
    assert results["steps"][1]["tests"] == "2 failed, 5 passed, 1 skipped in 3.20s"


def test_one_op():
    missing = kernels.missing_for("cpu")
    assert gpu_report.one_op("cpu") == (1 if missing else 0)


# Stands in for Python: builds an empty library, runs the summary, and writes down all else.
STUB = f"""#!/bin/bash
case "$*" in
  *" -c "* | "-c "*) echo without-gpu ;;
  *" summary "*) exec {sys.executable} "$@" ;;
  *"setup.py build_ext "*) mkdir -p "$4/megatron_rltd"; touch "$4/megatron_rltd/_C.so" ;;
esac
case "$*" in *" -c "* | *" summary "*) exit ;; esac
echo "$*" >>"$CALLS"
[ -z "$FAILS" ] || ! grep -q -- "$FAILS" <<<"$*"
"""


@pytest.fixture
def check(tmp_path):
    """Return a function that runs the script with the stand-in: status, output, what it called."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments: str, **settings: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MEGATRON_RLTD_")}
        places = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "BUNDLE": tmp_path / "bundle"}
        named = {"PYTHON": stub, "CALLS": calls, "FAILS": "", **places, **settings}
        result = subprocess.run(
            ["bash", str(SCRIPT), "--without-gpu", *arguments],
            env={**kept, **{name: str(value) for name, value in named.items()}},
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stdout + result.stderr, calls.read_text().splitlines()

    return run


def test_what_passed_is_not_run_again(check, tmp_path):
    status, output, calls = check("1", FAILS="-m pytest")
    assert (status, "failed: op_tests" in output) == (1, True), output
    assert [re.sub(r".*?(\S+\.py|pytest).*", r"\1", call) for call in calls] == [
        *("setup.py", "tools/dev/gpu_report.py", "pytest")
    ]
    assert re.search(r"^memcheck +skipped +0 s +no GPU$", output, re.MULTILINE)
    first = re.findall(r"TEST_SEED=(\d+)", output)
    status, output, calls = check("1")
    assert (status, "nothing failed" in output) == (0, True), output
    assert len(calls) == 1
    assert "pytest" in calls[0]
    assert re.findall(r"TEST_SEED=(\d+)", output) == first
    assert check("1")[2] == []
    # The results are elsewhere, or the machine is another one.
    assert len(check("1", OUT=str(tmp_path / "other"))[2]) == 3
    assert len(check("1", FRESH="1")[2]) == 3
    shutil.rmtree(tmp_path / "work")
    assert "setup.py" in " ".join(check("1")[2])
    names = {line.split("\t")[0] for line in (tmp_path / "out/gpu_check.tsv").open()}
    assert names == {"build", "one_op", "op_tests", "memcheck", "racecheck", "seed"}


def test_all_parts_in_their_order(check):
    status, output, calls = check()
    assert status == 0, output
    steps = re.findall(r"^(\w+) +(?:passed|skipped) ", output, re.MULTILINE)
    assert steps == [
        *("build", "one_op", "op_tests", "memcheck", "racecheck"),
        *("deepspeed_kernels", "bench_ops", "training_first", "training_second"),
        *("gpt_dense", "gpt_full_length", "gpt_full_length_is_dense"),
        *("gpt_dropping", "gpt_dropping_torch", "gpt_kernels_are_torch"),
        *("sweep_expandable", "sweep_plain"),
    ]
    assert [n for n in re.findall(r"^part (\d)$", output, re.MULTILINE)] == list("1234")


def test_nothing_runs_without_kernels(check):
    status, output, calls = check("2", "3", FAILS="one-op")
    assert status == 1
    assert "bench" not in " ".join(calls)
    assert "failed: one_op" in output


def test_wheels_are_installed_once(check, tmp_path):
    (tmp_path / "bundle").mkdir()
    wheel = tmp_path / "bundle" / "some-1.0-py3-none-any.whl"
    wheel.touch()
    (tmp_path / "work" / "site.part").mkdir(parents=True)  # what pip would make
    installs = [call for call in check("1")[2] if "pip install" in call]
    assert len(installs) == 1
    assert installs[0].endswith(str(wheel))
    assert "--no-index" in installs[0]
    assert not [call for call in check("1", FRESH="1")[2] if "pip install" in call]


@pytest.mark.parametrize("argument", ["5", "--gpu", "part"])
def test_parts_that_do_not_exist(check, argument):
    status, output, _ = check(argument)
    assert (status, output) == (
        2,
        f"gpu_check: {argument} is no part (1 to 4) and not --without-gpu\n",
    )


@pytest.mark.parametrize(("size", "status"), [(1000, 0), (60_000_001, 1)])
def test_wheels_to_carry_along_have_a_limit(tmp_path, size, status):
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/bash\n[ "$3" = download ] || exit 1\nwhile [ "$1" != --dest ]; do shift; done\n'
        f'truncate -s {size} "$2/megatron_core.whl"\n'
    )
    stub.chmod(0o755)
    folder = tmp_path / "bundle"
    result = subprocess.run(
        ["bash", str(SCRIPT.parent / "gpu_bundle.sh"), str(folder)],
        env={**os.environ, "PYTHON": str(stub)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stderr
    assert "has no torch to make a wheel of DeepSpeed with; it is left out" in result.stderr
    if status:
        assert re.search(rf"{folder} has \d+ bytes, more than 60000000", result.stderr)
    else:
        assert "1 wheels" in result.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_shellcheck_has_nothing_to_say():
    scripts = map(str, SCRIPT.parent.glob("*.sh"))
    result = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_needs_a_gpu(tmp_path):
    result = subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "no GPU that torch can use; --without-gpu" in result.stderr
    assert not (tmp_path / "out").exists()
