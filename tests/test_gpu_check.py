"""tools/gpu_check.sh as far as it goes without a GPU, and what it makes of its steps."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.parallel import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import gpu_report


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


@pytest.mark.parametrize(("result", "status"), [("passed", 0), ("failed", 1), ("skipped", 0)])
def test_summary_of_gpu_check(tmp_path, monkeypatch, result, status):
    monkeypatch.setenv("MEGATRON_RLTD_TEST_SEED", "7")
    (tmp_path / "steps").write_text(f"build\tpassed\t30\t\nop_tests\t{result}\t9\twhy\n")
    (tmp_path / "op_tests.log").write_text("....\n2 failed, 5 passed, 1 skipped in 3.20s\n")
    assert gpu_report.main(["summary", *[str(tmp_path)] * 2, "--device", "cpu"]) == status
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["seed"] == 7
    assert results["machine"]["torch"] == torch.__version__
    assert results["steps"][1]["tests"] == "2 failed, 5 passed, 1 skipped in 3.20s"
    with (tmp_path / "gpu_check.csv").open(newline="") as file:
        assert [row["result"] for row in csv.DictReader(file)] == ["passed", result]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_needs_a_gpu(tmp_path):
    result = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh")],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "no GPU that torch can use; --without-gpu" in result.stderr
    assert not (tmp_path / "out").exists()
