"""Random layerwise token dropping (random-LTD, arXiv 2211.11586) for Megatron-core and Megatron-LM.

The public names below are imported on first use, so that ``import megatron_rltd`` costs nothing
and imports neither torch nor Megatron.
"""

import importlib
from typing import Any

__version__ = "0.4.0"

_PUBLIC = {
    "RandomLTD": "model.random_ltd",
    "RandomLTDConfig": "config",
    "ConfigError": "config",
    "LayerTokenScheduler": "training.learning_rate",
    "LayerTokenCost": "schedule",
    "Schedule": "schedule",
    "add_arguments": "training.arguments",
    "gather_tokens": "tokens.ops",
    "join_micro_batches": "model.micro_batches",
    "scatter_tokens": "tokens.ops",
    "kept_indices": "tokens.sampling",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"megatron_rltd.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'megatron_rltd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
