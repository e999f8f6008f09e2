"""Run functions in real `torch.distributed` processes, and Megatron's training loop, for tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from local_ranks import RankError, Training, free_port, run, run_all, train

__all__ = ["RankError", "Training", "free_port", "run", "run_all", "train"]
