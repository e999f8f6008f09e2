"""What Megatron lacks to continue a run of ``--optimizer sgd`` from a distributed checkpoint.

Before it loads an optimizer's state, Megatron creates it by a function that it has for Adam only
(``megatron/core/optimizer/__init__.py``). For SGD it calls None.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_rltd.patching import mechanism
from megatron_rltd.patching.mechanism import AppliedPatches, Patch


def create_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Create the momentum of each parameter, zero, as the first step would find it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _with_momentum(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self, optimizer, config, init_state_fn=None):
        original(self, optimizer, config, init_state_fn or create_momentum)

    return init


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.optimizer.optimizer:MegatronOptimizer.__init__",
        _with_momentum,
        "with --optimizer sgd, Megatron cannot load the momentum of a distributed checkpoint",
        parameters=("optimizer", "config", "init_state_fn"),
    ),
)


def use() -> AppliedPatches:
    """Let Megatron load the momentum, and say what is replaced."""
    applied = mechanism.apply(PATCHES)
    if os.environ.get("RANK", "0") == "0":
        print(f"finetune_vit: replaced symbols\n{mechanism.describe(applied.patches)}", flush=True)
    return applied
