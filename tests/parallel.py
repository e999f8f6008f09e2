"""Run functions in real `torch.distributed` processes, and Megatron's training loop, for tests."""

import os
from pathlib import Path

from local_ranks import (
    RankError,
    Training,
    free_port,
    run,
    run_all,
    train,
    train_on_this_rank,
)

__all__ = [
    "ROOT",
    "RankError",
    "Training",
    "environment",
    "free_port",
    "run",
    "run_all",
    "train",
    "train_on_this_rank",
]

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Return the environment for a Python that uses this repository and the Megatron used here."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(ROOT), *(folder for folder in here if folder)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
