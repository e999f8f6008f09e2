"""Small models on megatron-core in a loop of one's own: Megatron's state, samples, learning rate.

Import this before Megatron: without a GPU, it adapts Megatron to the CPU.

Shapes: b samples, s sequence length.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rltd.cpu import adapter

if not torch.cuda.is_available():
    ADAPTED = adapter.enable()  # before Megatron is imported

from megatron.core import parallel_state

EVALUATED = 16  # samples in a pass


@contextlib.contextmanager
def megatron() -> Iterator[None]:
    """Megatron's parallel state for this one process."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = f"file://{Path(folder) / 'store'}"
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Return the rate of a step: a linear warm-up, then a cosine to 1% of the peak.

    Args:
        step: From 0.
        steps: Of the whole run.
        peak: Reached when the warm-up ends.
        warm_up: Its steps, at least 1.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
