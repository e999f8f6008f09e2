"""Present the CPU to Megatron as its device.

Megatron assumes CUDA. If there is no CUDA device and you ask for the CPU, `enable` replaces the
symbols of the table `PATCHES`. The unmodified training loop then runs on the CPU over gloo, under
every parallelism, with the same arithmetic as on a GPU. It is for laptops and tests; it makes
nothing fast.

    from megatron_rltd.cpu import adapter
    with adapter.enabled():          # or: applied = adapter.enable(); ...; applied.revert()
        ...                          # Megatron

Shapes below: s sequence, b micro batch, n heads, d head size, c context-parallel size.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _device

from megatron_rltd.config import ConfigError, RankConfigError
from megatron_rltd.cpu import modules
from megatron_rltd.cpu.model_patches import MODEL
from megatron_rltd.cpu.modules import CPU, Stream
from megatron_rltd.patching import versions
from megatron_rltd.patching.mechanism import AppliedPatches, Patch, apply

# What Megatron asks a device: its compute capability, for decisions that do not matter on a CPU.
PROPERTIES = types.SimpleNamespace(name="cpu", major=9, minor=0, multi_processor_count=1)

# Megatron flags whose default does not work without a GPU, and the value that does.
CPU_ARGUMENTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "mla_down_proj_fusion": False,
    "no_persist_layer_norm": True,
    "cross_entropy_loss_fusion": False,
    "use_flash_attn": False,
}


def is_needed() -> bool:
    """Return whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def why_no_training() -> str | None:
    """Return why Megatron cannot train on the CPU in this environment, or None if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    return (
        "Transformer Engine is installed here, so Megatron uses it, and it needs a GPU: to train "
        "on the CPU, use an environment without it (tools/environment.sh makes one)"
    )


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.split(":")[0] == "cuda"
    )


def _on_cpu(original):
    """Create a tensor on the CPU if the caller asks for "cuda" or pinned memory."""

    @functools.wraps(original)
    def create(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return create


def _tensor_to(original):
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *(CPU if _is_cuda(a) else a for a in args), **kwargs)

    return to


def _tensor_type(original):
    """Name a tensor's type as on CUDA: Megatron's optimizer sorts parameters by that name."""

    @functools.wraps(original)
    def type_(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_


def _allow_no_cuda(original):
    @functools.wraps(original)
    def initialize_megatron(*args, **kwargs):
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


def _set_arguments(original):
    """Set, before Megatron validates them, the flags of `CPU_ARGUMENTS`."""

    @functools.wraps(original)
    def validate_args(args, *rest, **kwargs):
        refuse_layers(args)
        changed = set_arguments(args)
        if changed and int(os.environ.get("RANK", "0")) == 0:
            text = f"these Megatron arguments are changed for the CPU: {', '.join(changed)}"
            print(f"megatron_rltd: {text}", flush=True)
        return original(args, *rest, **kwargs)

    return validate_args


# Symbols of a hybrid layer pattern that have no code for a CPU in Megatron, and what they need.
GPU_LAYERS = {
    "M": "Mamba's layers, which run only the kernels of mamba-ssm",
    "D": "DeepSeek's sparse attention, which runs only the kernels of fast-hadamard-transform",
}


def refuse_layers(args: Any) -> None:
    """Raise ConfigError for the layers of a HybridModel that cannot run on a CPU.

    Until Megatron 0.17 the pattern is of another flag, and both may have a default.
    """
    for flag in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        pattern = getattr(args, flag, None) or ""
        problems = [
            f"--{flag.replace('_', '-')} {pattern} with --cpu: {symbol} stands for {layers}: train "
            f"on a GPU, or try the run on the CPU without {symbol} (* - E + and G train there)"
            for symbol, layers in GPU_LAYERS.items()
            if symbol in pattern
        ]
        if problems:
            raise ConfigError(problems)


def set_arguments(args: Any) -> list[str]:
    """Set the flags that Megatron needs on a CPU; return what changed, one "name=value" each."""
    changed = []
    for name, value in CPU_ARGUMENTS.items():
        if hasattr(args, name) and getattr(args, name) != value:
            setattr(args, name, value)
            changed.append(f"{name}={value}")
    return changed


def _returns(value: Any):
    """Return a patch wrapper whose replacement ignores its arguments and returns `value`."""
    return lambda original: lambda *args, **kwargs: value


def _is(value: Any):
    """Return a patch wrapper that replaces the original by `value`."""
    return lambda original: value


def _torch_cuda(name: str, wrapper: Any, reason: str) -> Patch:
    # torch's own modules keep their copies: they call them only where CUDA exists.
    return Patch(f"torch.cuda:{name}", wrapper, reason, copies=("torch",))


_RANDOM = "megatron.core.tensor_parallel.random"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_LITERAL = 'Megatron asks for "cuda" by name'
_NO_DEVICE = "there is no CUDA device to ask"
_IN_ORDER = "a CPU runs everything in order"
_RNG = "the CPU's generator is the device's generator"
_EQUAL_SHARES = "gloo gathers and scatters only equal shares; experts under TP have unequal ones"
_ADAM = "counts steps per group; the distributed optimizer cannot resume without that"

# The functions that Megatron asks for a tensor on "cuda" by that name.
FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("as_tensor", "tensor", "zeros", "empty_like", "full_like", "ones_like", "zeros_like"),
)

PATCHES: tuple[Patch, ...] = (
    *(Patch(f"torch:{f}", _on_cpu, _LITERAL, copies=("torch",)) for f in FACTORIES),
    Patch("torch:Tensor.to", _tensor_to, _LITERAL),
    Patch("torch:Tensor.cuda", _is(lambda tensor, *args, **kwargs: tensor), _NO_DEVICE),
    Patch("torch:Tensor.pin_memory", _is(lambda tensor, *args, **kwargs: tensor), _NO_DEVICE),
    Patch("torch:Tensor.type", _tensor_type, "Megatron sorts parameters by CUDA type names"),
    _torch_cuda("current_device", _returns(CPU), _NO_DEVICE),
    _torch_cuda("device_count", _returns(1), "Megatron skips parallelism if it is 0"),
    _torch_cuda("get_device_properties", _returns(PROPERTIES), _NO_DEVICE),
    _torch_cuda("set_device", _returns(None), _NO_DEVICE),
    _torch_cuda("synchronize", _returns(None), _IN_ORDER),
    _torch_cuda("current_stream", _returns(Stream()), _IN_ORDER),
    _torch_cuda("default_stream", _returns(Stream()), _IN_ORDER),
    _torch_cuda("stream", _is(lambda stream: stream or Stream()), _IN_ORDER),
    _torch_cuda("Stream", _is(Stream), _IN_ORDER),
    _torch_cuda("Event", _is(Stream), _IN_ORDER),
    _torch_cuda("manual_seed", _is(torch.manual_seed), _RNG),
    _torch_cuda("get_rng_state", _is(lambda device=None: torch.get_rng_state()), _RNG),
    _torch_cuda("set_rng_state", _is(lambda s, device=None: torch.set_rng_state(s)), _RNG),
    Patch(f"{_RANDOM}:_get_cuda_rng_state", _is(lambda *a, **k: torch.get_rng_state()), _RNG),
    Patch(f"{_RANDOM}:_set_cuda_rng_state", _is(lambda s, *a, **k: torch.set_rng_state(s)), _RNG),
    Patch("torch.utils.data.dataloader:DataLoader.__iter__", modules.data_loader_iter, _RNG),
    Patch(
        "megatron.training.training:initialize_megatron",
        _allow_no_cuda,
        "it asserts that CUDA is available unless allow_no_cuda",
        parameters=("allow_no_cuda",),
        copies=("megatron.training.initialize", "megatron.training"),
    ),
    Patch(
        "megatron.training.arguments:validate_args",
        _set_arguments,
        "the flags that need a GPU are switched off before Megatron checks them",
        copies=("megatron.training.initialize",),
    ),
    Patch(
        "megatron.training.initialize:validate_args",
        _set_arguments,
        "the same in Megatron 0.17, where this module holds and calls a copy",
        copies=("megatron.training.arguments",),
        before=(0, 18),
    ),
    Patch(
        "megatron.training.training:set_jit_fusion_options",
        _returns(None),
        "draws from the generator of the initial weights here, so TP layouts would differ",
        copies=("megatron.training.initialize",),
    ),
    *MODEL,
    Patch(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        modules.gather_along_first_dim,
        _EQUAL_SHARES,
        parameters=("input_", "group", "output_split_sizes"),
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        modules.reduce_scatter_along_first_dim,
        _EQUAL_SHARES,
        parameters=("input_", "group", "input_split_sizes"),
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        modules.maybe_move_tensor_to_cpu,
        "leaves split sizes as tensors when nothing is on CUDA",
        parameters=("tensor", "as_numpy", "record_stream"),
        copies=("megatron.core.transformer.moe.moe_utils",),
    ),
    Patch(
        "megatron.core.pipeline_parallel.p2p_communication:_p2p_ops",
        modules.p2p_ops,
        "Megatron 0.17 frees a pipeline stage's output while gloo may still be sending it",
        parameters=("tensor_send_prev", "tensor_send_next"),
        before=(0, 18),
    ),
    Patch(
        "megatron.core.optimizer:Adam",
        _is(modules.GroupStepAdam),
        _ADAM,
        copies=("torch", "transformer_engine", _DISTRIBUTED_OPTIMIZER),
    ),
    Patch("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", _is(False), _ADAM),
    Patch(
        f"{_DISTRIBUTED_OPTIMIZER}:Adam",
        _is(modules.GroupStepAdam),
        _ADAM,
        # Both are Transformer Engine's where that is installed.
        copies=("torch", "transformer_engine", "megatron.core.optimizer"),
    ),
    Patch(f"{_DISTRIBUTED_OPTIMIZER}:HAVE_APEX_OR_TE", _is(True), _ADAM),
    Patch(f"{_DISTRIBUTED_OPTIMIZER}:USING_APEX_OPTIMIZER", _is(True), _ADAM),
)


def enable() -> AppliedPatches:
    """Make the CPU Megatron's device in this process.

    Sets two environment variables if they are unset: ``CUDA_DEVICE_MAX_CONNECTIONS=1``, which
    Megatron asserts, and ``TORCHDYNAMO_DISABLE=1``, because compiling Megatron's small fused
    functions for a CPU takes longer than it saves.

    Raises:
        RankConfigError: A CUDA device is available.
        PatchError: A symbol of `PATCHES` is missing or different.
    """
    if not is_needed():
        raise RankConfigError(
            [
                "--cpu works only if no CUDA device is visible: omit --cpu and MEGATRON_RLTD_CPU, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES="
            ]
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron says at import that it found neither Transformer Engine nor Apex; here it never does.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|transformer-engine|Apex|absl)")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Megatron warns when drawing for the device moves the CPU's generator; here they are one.
    logging.getLogger(_RANDOM).addFilter(_not_about_rng)
    # At its first use, torch remembers which functions `torch.device("meta")` acts on. These must
    # be its own functions, because ours call them.
    _device._device_constructors()
    return apply(versions.rows_for_release(PATCHES))


def _not_about_rng(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


@contextlib.contextmanager
def enabled() -> Iterator[AppliedPatches]:
    """`enable` for the length of a with-statement."""
    applied = enable()
    try:
        yield applied
    finally:
        applied.revert()
