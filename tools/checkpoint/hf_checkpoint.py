"""Megatron's distributed checkpoints, read and written whole by one process, without a model.

Parameters lie in them as whole tensors, cut up as the run's ranks held them; Megatron's own
``megatron.core.dist_checkpointing`` puts them together. A checkpoint of any layout is read, and one
written here is loaded on any.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hf_names import FAMILIES
from hf_weights import ConversionError
from torch import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's name of a checkpoint that was converted: without an iteration
# Of a layer.
WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
OF_MODEL = tuple("embedding. decoder. output_layer. mtp.".split())
OF_MODEL += tuple("encoder. lm_head. pooler. binary_head.".split())  # BERT's
OF_MODEL += tuple("conv1. class_token position_embeddings. final_layernorm. head.".split())  # ViT's
# A HybridModel's layers are stored one by one, a GPTModel's as one tensor of all layers.
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
_HYBRID_NORM, _GPT_NORM = "decoder.final_norm.", "decoder.final_layernorm."


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be a whole Megatron run of one process, on the CPU."""
    from megatron_rltd.cpu import adapter
    from megatron_rltd.patching import versions

    warnings.filterwarnings("ignore")
    versions.check_installed()
    ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ours["TORCHDYNAMO_DISABLE"] = "1"  # seconds of importing what is not needed
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, ours))
        if adapter.is_needed():
            stack.enter_context(adapter.enabled())  # before Megatron is imported
        import megatron.core.dist_checkpointing  # noqa: F401  registers what args may be made of

        logging.getLogger("megatron").setLevel(logging.ERROR)
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        stack.callback(torch.distributed.destroy_process_group)
        yield


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `path` if all goes well, and else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        for written in (scratch, *scratch.rglob("*")):  # mkdtemp and safetensors allow nobody else
            written.chmod(0o755 if written.is_dir() else 0o644)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find(load: Path, iteration: int | None) -> Path:
    """Return the folder of a checkpoint.

    Args:
        load: What a run has as --save, or the folder of one iteration.
        iteration: Which one; None: the latest.

    Raises:
        ConversionError: There is none of the distributed format.
    """
    if iteration is not None:
        folder = load / f"iter_{iteration:07d}"
    elif (load / TRACKER).is_file():
        latest = (load / TRACKER).read_text().strip()
        folder = load / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    else:
        folder = load
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in load.glob("iter_*"))) or "no iter_ folder"
        raise ConversionError(f"--load {load}: there is no {folder}; there is {there}")
    if not (folder / "metadata.json").is_file():
        raise ConversionError(
            f"--load {folder} is not a checkpoint of --ckpt-format torch_dist; give a run's --save "
            "folder. A run with another format writes this one after --ckpt-convert-format "
            "torch_dist --ckpt-convert-save FOLDER"
        )
    return folder


def stored_args(folder: Path) -> Any:
    """Return Megatron's arguments of the run that wrote a checkpoint.

    Raises:
        ConversionError: It holds none that can be read.
    """
    from megatron.core import dist_checkpointing

    with readable(folder):
        common = dist_checkpointing.load_common_state_dict(str(folder))
    args = common.get("args")
    if args is None or not hasattr(args, "layernorm_epsilon"):
        raise ConversionError(
            f"--load {folder} lacks arguments of Megatron 0.17 to 0.19; give a checkpoint of these"
        )
    return args


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a model's parameters, a layer's as [layers, ...].

    Names are those of a GPTModel; a HybridModel's parameters get them, too.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, own in _by_gpt_names(folder).items():
        first = tuple(next(iter(own.values())).global_shape)
        shapes[name] = (len(own), *first) if None not in own else first
    return shapes


def _by_gpt_names(folder: Path) -> dict[str, dict[int | None, Any]]:
    """Return {a GPTModel's name: {layer number or None: what dist_checkpointing knows}}."""
    found: dict[str, dict[int | None, Any]] = {}
    for own, tensor in _parameters(folder).items():
        number = _NUMBERED.match(own)
        name = _NUMBERED.sub("decoder.layers.", own).replace(_HYBRID_NORM, _GPT_NORM)
        found.setdefault(name, {})[int(number[1]) if number else None] = tensor
    return found


def _parameters(folder: Path) -> dict[str, Any]:
    """Return what dist_checkpointing knows of the model's parameters; the optimizer is left out."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(folder))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(OF_MODEL)}


def read(folder: Path, name: str) -> Tensor:
    """Return one parameter, whole, in the dtype that is stored, by its name of `tensor_shapes`.

    Raises:
        ConversionError: Its file is damaged or missing.
    """
    from megatron.core import dist_checkpointing

    stored = _by_gpt_names(folder)[name]
    wanted = {str(number): tensor for number, tensor in stored.items()}
    with readable(folder):
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    if None in stored:
        return loaded["None"].cpu()
    return torch.stack([loaded[number].cpu() for number in sorted(wanted, key=int)])


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what torch, pickle, Megatron or the file system raise into a ConversionError."""
    from torch.distributed.checkpoint import CheckpointException  # no Exception

    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConversionError(
            f"--load {folder} cannot be read, because a file is damaged or missing ({reason})"
        ) from None


def parse(flags: list[str], extra: Callable | None = None) -> Any:
    """Return Megatron's arguments for flags, checked and completed by Megatron.

    Args:
        extra: An ``extra_args_provider`` of Megatron's, which adds flags.
    """
    from megatron.training import arguments

    # What any machine has: they say how to compute, not what, and no run takes them over.
    anywhere = ["--transformer-impl", "local", "--no-persist-layer-norm"]
    anywhere += ["--no-gradient-accumulation-fusion", "--no-rope-fusion", "--micro-batch-size", "1"]
    before, sys.argv = sys.argv, ["pretrain_gpt.py", *anywhere, *flags]
    try:
        args = arguments.parse_args(extra)
        fusion = args.bias_gelu_fusion
        with contextlib.redirect_stdout(None):
            arguments.validate_args(args)
    finally:
        sys.argv = before
    # Whether the GELU is exact is part of the model, and not for `cpu` to decide.
    args.bias_gelu_fusion = fusion and args.add_bias_linear
    return args


def write(
    save: Path, family: str, args: Any, tensors: Iterable[tuple[str, int | None, Tensor]]
) -> Path:
    """Write a converted checkpoint and say that it is the latest; return its folder.

    Args:
        save: An empty folder.
        family: Of `hf_names.FAMILIES`.
        args: Megatron's arguments, to be stored.
        tensors: (name, layer from 0 or None, tensor).
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    stored_in = FAMILIES[family]
    folder = save / RELEASE
    folder.mkdir()
    model = {}
    for name, layer, tensor in tensors:
        if layer is None:
            model[name] = ShardedTensor.from_rank_offsets(name, tensor)
        else:
            offset = (0, layer, args.num_layers)
            part = ShardedTensor.from_rank_offsets(name, tensor, offset, prepend_axis_num=1)
            model[f"{name}.{layer}"] = part
    # Where Transformer Engine keeps FP8 scales: it asks for them on loading, and local layers, too.
    for module in WITH_EXTRA_STATE:
        name, layers = f"{stored_in.layers}.{module}._extra_state", (args.num_layers,)
        model |= {f"{name}.{i}": ShardedObject(name, None, layers, (i,)) for i in range(*layers)}
    for module in stored_in.with_extra_state:
        name = f"{module}._extra_state"
        model[name] = ShardedObject(name, None, (1,), (0,))
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (save / TRACKER).write_text(RELEASE)
    return folder
