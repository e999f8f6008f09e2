"""The example loop on megatron-core, as its docstring runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.parallel import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_core_loop.py"


def losses_of(*launcher_and_options: str) -> list[tuple[str, str, str]]:
    """Run the example; return the loss, kept tokens and learning rate of its steps."""
    launcher = [o for o in launcher_and_options if o.startswith(("-m", "--n", "--master", "torch"))]
    options = [o for o in launcher_and_options if o not in launcher]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), "--cpu", "--steps", "5", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return re.findall(
        r"step +\d+  loss ([\d.]+)  kept tokens (\d+)  learning rate (\S+)", result.stdout
    )


def test_a_loop_of_ones_own():
    alone = losses_of()
    assert [int(kept) for _, kept, _ in alone] == [32, 64, 96, 128, 128]
    assert float(alone[-1][0]) < float(alone[0][0]) - 0.3
    assert [rate for *_, rate in alone][-1] == "1.00e-05"
    ranks = ["-mtorch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    assert losses_of(*ranks, "--tensor-parallel=2") == alone
    staged = losses_of(*ranks, "--pipeline-parallel=2")  # with other initial weights
    assert [kept for _, kept, _ in staged] == [kept for _, kept, _ in alone]
    assert float(staged[-1][0]) < float(staged[0][0]) - 0.3
