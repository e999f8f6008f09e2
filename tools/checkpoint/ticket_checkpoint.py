"""Read masks from Megatron's distributed checkpoints, and write the ticket of one as another."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_checkpoint
import torch
from hf_weights import ConversionError
from torch import Tensor

from megatron_rltd.early_bird import slices
from megatron_rltd.early_bird.masks import STRUCTURED, Mask
from megatron_rltd.early_bird.refusals import find_refused
from megatron_rltd.early_bird.target import TICKET, Target
from megatron_rltd.early_bird.units import MATRICES, WEIGHTS, ModelShape

_OPTIMIZER = "optimizer."
_STATE = "optimizer.state."
_MOMENTS = (f"{_STATE}exp_avg", f"{_STATE}momentum")
_FLAT = "optimizer.distributed."
_COMMON = "common_state"  # Megatron 0.19 stores the common state as an object, too


class Dense:
    """The checkpoint of a dense GPTModel.

    Attributes:
        folder: Of its iteration.
        args: Megatron's arguments of the run that wrote it.
        shape: Of the model.
        iteration: How many iterations it was trained for.
    """

    def __init__(self, folder: Path):
        """Check that a ticket of the checkpoint can be drawn.

        Raises:
            ConversionError: It cannot.
        """
        self.folder = folder
        self.args = hf_checkpoint.stored_args(folder)
        problems = find_refused(self.args)
        if problems:
            raise ConversionError(f"no ticket can be drawn from {folder}: " + "; ".join(problems))
        self.shape = ModelShape.of(self.args)
        self._tensors, self._objects = _contents(folder)
        self._check_names()

    def _check_names(self) -> None:
        for name, tensor in self._tensors.items():
            own = slices.name_in_layer(name)
            if own is None:
                continue
            shape = tuple(tensor.global_shape)
            expected = slices.expected_shape(own, self.shape, self.args.hidden_size)
            if own not in (*slices.WHOLE, *slices.SLICED):
                raise ConversionError(
                    f"{self.folder} holds {name}, which is no weight of a layer of a dense GPTModel"
                )
            if expected and shape != (self.shape.num_layers, *expected):
                raise ConversionError(
                    f"{self.folder} holds {name} of the shape {shape}, but its arguments say "
                    f"{(self.shape.num_layers, *expected)}"
                )
        for name in (f"{module}weight" for module in slices.MODULES.values()):
            if name not in self._tensors:
                raise ConversionError(f"{self.folder} holds no {name}: it is not of a GPTModel")

    def require_optimizer(self) -> None:
        """Raise ConversionError, with the way out, if its optimizer's state cannot be cut."""
        if any(name.startswith(_FLAT) for name in self._tensors):
            raise ConversionError(
                f"{self.folder} holds the state of the distributed optimizer in flat buffers, in "
                "which no unit can be found: continue the run for one iteration with "
                "--dist-ckpt-optim-fully-reshardable and --save, then draw from that checkpoint"
            )
        if not any(name.startswith(_STATE) for name in self._tensors):
            raise ConversionError(
                f"{self.folder} holds no state of the optimizer (--no-save-optim?), so that the "
                "ticket could not continue the run, not with --reset-optimizer either: draw from a "
                "checkpoint that has it"
            )

    def require_model_of(self, other: "Dense") -> None:
        """Raise ConversionError unless a mask of the other checkpoint fits this one."""
        if (self.shape, self.args.hidden_size) != (other.shape, other.args.hidden_size):
            raise ConversionError(
                f"{self.folder} and {other.folder} hold models of different sizes: "
                "--weights-iteration must name a checkpoint of the same dense model"
            )

    @property
    def common(self) -> dict[str, Any]:
        """What the checkpoint holds besides tensors and ranks' objects."""
        from megatron.core import dist_checkpointing

        with hf_checkpoint.readable(self.folder):
            return dist_checkpointing.load_common_state_dict(str(self.folder))

    @property
    def iteration(self) -> int:
        """How many iterations it was trained for."""
        return self.common["iteration"]

    def is_past_warm_up(self) -> bool:
        """Return whether the learning rate has ended its warm-up."""
        scheduler = self.common.get("opt_param_scheduler") or {}
        return scheduler.get("num_steps", 0) >= scheduler.get("lr_warmup_steps", 0)

    def read(self, name: str) -> Tensor:
        """Return a tensor, whole, in the stored dtype."""
        from megatron.core import dist_checkpointing

        wanted = {name: self._tensors[name]}
        with hf_checkpoint.readable(self.folder):
            loaded = dist_checkpointing.load(
                wanted, str(self.folder), validate_access_integrity=False
            )
        return loaded[name].cpu()

    def mask(self, target: Target, seed: int | None = None) -> Mask:
        """Return the mask of a target from the weights of the model.

        Args:
            target: What to keep.
            seed: Draw a random mask of as many units instead.
        """
        units = target.units(self.shape, self.args.hidden_size)
        pruned: dict[str, dict[int, Tensor]] = {kind: {} for kind in units}
        weights = {}
        if seed is None:
            weights = {name: self.read(f"{slices.MODULES[name]}weight") for name in MATRICES}
        for layer in range(self.shape.num_layers):
            if seed is None:
                own = {name: tensor[layer] for name, tensor in weights.items()}
                bits = target.mask_of_layer(own, self.shape)
            else:
                bits = target.random_mask_of_layer(
                    layer + 1, self.shape, seed, self.args.hidden_size
                )
            for kind, packed in bits.items():
                pruned[kind][layer + 1] = packed
        return Mask(self.iteration, units, pruned)

    def ticket_args(self, target: Target, mask: Mask, signal: str) -> Any:
        """Return Megatron's arguments of the ticket: those of the run, but smaller."""
        args = copy.copy(self.args)
        kept = target.kept(self.shape)
        args.num_attention_heads = kept.num_attention_heads
        if getattr(args, "group_query_attention", False):
            args.num_query_groups = kept.num_query_groups
        args.kv_channels = kept.kv_channels  # else Megatron takes hidden size / heads
        args.ffn_hidden_size = kept.ffn_hidden_size
        args.early_bird = False
        args.early_bird_emerged = 0
        setattr(args, TICKET, {**target.as_dict(), "signal": signal, "mask": mask.iteration})
        return args

    def write_ticket(
        self,
        save: Path,
        target: Target,
        mask: Mask,
        signal: str = "norm",
        reset_optimizer: bool = False,
    ) -> Path:
        """Write the ticket of this checkpoint's weights, and say that it is the latest.

        Args:
            save: An empty folder.
            target: What to keep.
            mask: Which units; of this checkpoint or of another one of the same model.
            signal: How the units were chosen, to be stored.
            reset_optimizer: Start with fresh moments.

        Returns:
            The folder of the iteration.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        state = self.common
        metadata = state.pop("content_metadata", None)
        state["args"] = self.ticket_args(target, mask, signal)
        if reset_optimizer:
            _restart(state.get("optimizer"))
        folder = save / f"iter_{state['iteration']:07d}"
        folder.mkdir()
        for name, layer, tensor in self._ticket_tensors(mask, reset_optimizer):
            if layer is None:
                state[name] = ShardedTensor.from_rank_offsets(name, tensor)
            else:
                offset = (0, layer, self.shape.num_layers)
                part = ShardedTensor.from_rank_offsets(name, tensor, offset, prepend_axis_num=1)
                state[f"{name}/{layer}"] = part
        state |= self._read_objects()
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        (save / hf_checkpoint.TRACKER).write_text(str(state["iteration"]))
        return folder

    def _read_objects(self) -> dict[str, Any]:
        """Return what ranks stored for themselves, such as random states, to be saved again."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        with hf_checkpoint.readable(self.folder):
            loaded = dist_checkpointing.load(
                dict(self._objects), str(self.folder), validate_access_integrity=False
            )
        return {
            name: ShardedObject(known.key, loaded[name], known.global_shape, known.global_offset)
            for name, known in self._objects.items()
        }

    def _ticket_tensors(
        self, mask: Mask, reset_optimizer: bool
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (name, layer from 0 or None, tensor) of all that the ticket keeps."""
        layers = range(self.shape.num_layers)
        kept = [slices.kept_units(mask, self.shape, layer + 1) for layer in layers]
        for name in self._tensors:
            tensor = self.read(name)
            if reset_optimizer and name.startswith(_MOMENTS):
                tensor.zero_()
            own = slices.name_in_layer(name)
            if own is None:
                yield name, None, tensor
                continue
            is_zeroed = own in slices.PRUNED and not name.startswith(_MOMENTS)
            for layer in layers:
                if WEIGHTS not in mask.pruned:
                    part = slices.sliced(own, tensor[layer], kept[layer], self.shape)
                elif is_zeroed:
                    bits = mask.of_layer(WEIGHTS, layer + 1)
                    part = slices.zeroed(own, tensor[layer], bits, self.shape)
                else:
                    part = tensor[layer].clone()
                yield name, layer, part


def _contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what dist_checkpointing knows of a checkpoint's tensors, and of its ranks' objects."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    with hf_checkpoint.readable(folder):
        everything = serialization.load_sharded_metadata(str(folder))
        tensors = serialization.load_tensors_metadata(str(folder))
    objects = {
        name: value
        for name, value in everything.items()
        if isinstance(value, ShardedObject) and value.key != _COMMON
    }
    return tensors, objects


def _restart(optimizer: Any) -> None:
    """Set the steps that Adam corrects its moments by to 0, wherever a state dict holds them."""
    if isinstance(optimizer, dict):
        for name, value in optimizer.items():
            if name in ("step", "common_step"):
                optimizer[name] = torch.zeros_like(value) if torch.is_tensor(value) else 0
            else:
                _restart(value)
    elif isinstance(optimizer, list):
        for value in optimizer:
            _restart(value)


def target_of(options: Any, dense: Dense) -> Target:
    """Return what a ticket keeps: what the options say, or else the search that the run was.

    Raises:
        ConversionError: Nobody says it, or it does not fit the model.
    """
    names = ("pattern", "num_attention_heads", "ffn_hidden_size", "ratio")
    given = {name: getattr(options, name) for name in names}
    target = Target(**{**given, "pattern": given["pattern"] or STRUCTURED})
    if all(value is None for value in given.values()):
        target = Target.searched_by(dense.args)
    problems = target.problems(dense.shape, 1, "--")
    if problems:
        raise ConversionError("; ".join(problems))
    return target


def require_pruned(mask: Mask, target: Target) -> None:
    """Raise ConversionError if a mask of single weights prunes none."""
    if WEIGHTS in mask.pruned and not mask.count(WEIGHTS):
        raise ConversionError(
            f"--ratio {target.ratio} prunes no weight, because more than that is zero already: "
            "give a larger one"
        )


def block_parameters(shape: ModelShape, hidden_size: int) -> int:
    """Return the parameters of all layers' matrices."""
    heads = 2 * (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels
    neurons = (3 if shape.gated else 2) * shape.ffn_hidden_size
    return shape.num_layers * hidden_size * (heads + neurons)
