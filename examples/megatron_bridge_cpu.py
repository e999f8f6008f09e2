"""Megatron-Bridge without a GPU, for `megatron_bridge.py --cpu`; no GPU run needs this.

Three things stop Megatron-Bridge on a machine without a GPU, even where Megatron itself runs on our
CPU device: it asserts CUDA, it warms up fused functions that nothing uses here, and its LoRA layers
(`megatron/bridge/peft/lora_layers.py`) import Transformer Engine as soon as anything of
Megatron-Bridge is imported. `enable` answers the import with an empty module, until Megatron-Bridge
is imported. No model here has a LoRA layer, and a use of that module is an AttributeError.
"""

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

from megatron_rltd.cpu import adapter
from megatron_rltd.patching.mechanism import Patch, apply
from megatron_rltd.pretrain import compiled_helper


def layer_spec(config: Any) -> Any:
    """Return Megatron's layers without Transformer Engine, with weights that suit the CPU device.

    Megatron-Bridge has just set `use_cpu_initialization` to False, whatever the recipe says.
    """
    from megatron.bridge.models.gpt_provider import local_layer_spec

    config.use_cpu_initialization = True
    return local_layer_spec(config)


# Arguments of a model provider whose defaults need a GPU.
MODEL: dict[str, Any] = dict(
    transformer_layer_spec=layer_spec,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    cross_entropy_loss_fusion=False,
    bias_dropout_fusion=False,
)

_SETUP = "megatron.bridge.training.setup"
PATCHES = (
    Patch(
        f"{_SETUP}:initialize_megatron",
        lambda original: functools.partial(original, allow_no_cuda=True),
        "it asserts that CUDA is available unless allow_no_cuda",
        parameters=("allow_no_cuda",),
        copies=("megatron",),
    ),
    Patch(
        f"{_SETUP}:set_jit_fusion_options",
        lambda original: lambda *args: None,
        "draws from the generator of the initial weights here",
        copies=("megatron",),
    ),
)


def enable() -> None:
    """Make the CPU the device of Megatron and Megatron-Bridge in this process."""
    problem = adapter.why_no_training()
    if problem:
        raise SystemExit(problem)
    adapter.enable()
    # It would print a traceback for everything that Transformer Engine does not have here.
    logging.getLogger("megatron.bridge.utils.import_utils").disabled = True
    # Megatron finds that there is no Transformer Engine before anything stands in for it.
    import megatron.core.models.gpt
    import megatron.core.optimizer

    with _stand_in_for_transformer_engine():
        import megatron.bridge  # noqa: F401
    # Megatron-Bridge would run make, and a wheel of megatron-core has no Makefile.
    compiled_helper.use(even_in_clone=False)
    apply(PATCHES)


@contextlib.contextmanager
def _stand_in_for_transformer_engine() -> Iterator[None]:
    package: Any = types.ModuleType("transformer_engine")
    package.pytorch = types.ModuleType("transformer_engine.pytorch")
    package.pytorch.ops = types.SimpleNamespace(Sequential=object)  # named in type hints
    package.pytorch.Linear = type("Linear", (), {})  # a base class, up to Megatron-Bridge 0.5
    package.pytorch.__getattr__ = _refuse
    modules = {module.__name__: module for module in (package, package.pytorch)}
    sys.modules |= modules
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _refuse(name: str) -> None:
    raise ImportError(f"Transformer Engine is not installed, and {name} needs it")
