"""Masks from a model that trains, on any parallel layout: the same bits on every rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_rltd.config import ModelError
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.target import Parallel, Target
from megatron_rltd.early_bird.units import MATRICES, ModelShape


class Ranks:
    """What the ranks of a run agree on by communicating.

    Attributes:
        tensor: Those that share a layer.
    """

    def __init__(self, device: torch.device):
        """Use Megatron's groups.

        Args:
            device: Of the tensors to communicate.
        """
        from megatron.core import parallel_state

        self._state, self._device = parallel_state, device
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.tensor = Parallel(self._tensor.size(), self._join, self._add_up)

    def _join(self, tensor: Tensor, dim: int) -> Tensor:
        if self._tensor.size() == 1:
            return tensor
        sent = tensor.contiguous()
        is_mask = sent.dtype == torch.bool
        sent = sent.to(torch.uint8) if is_mask else sent
        parts = [torch.empty_like(sent) for _ in range(self._tensor.size())]
        torch.distributed.all_gather(parts, sent, group=self._tensor)
        joined = torch.cat(parts, dim)
        return joined.bool() if is_mask else joined

    def _add_up(self, counts: Tensor) -> Tensor:
        if self._tensor.size() > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=self._tensor)
        return counts

    def add_over_stages(self, counts: list[int]) -> list[int]:
        """Return counts, added over the pipeline stages."""
        if self._pipeline.size() == 1:
            return counts
        sent = torch.tensor(counts, dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(sent, group=self._pipeline)
        return sent.tolist()

    def whole(self, mask: Mask) -> Mask | None:
        """Return the mask of all stages' layers on the first rank, None on all others."""
        state = self._state
        if state.get_data_parallel_rank(with_context_parallel=True) or self._tensor.rank():
            return None
        if self._pipeline.size() == 1:
            return mask
        is_first = self._pipeline.rank() == 0
        parts: list[Any] | None = [None] * self._pipeline.size() if is_first else None
        first = torch.distributed.get_global_rank(self._pipeline, 0)
        torch.distributed.gather_object(mask.pruned, parts, dst=first, group=self._pipeline)
        if parts is None:
            return None
        pruned = {
            kind: dict(sorted(layer for part in parts for layer in part[kind].items()))
            for kind in mask.units
        }
        return Mask(mask.iteration, mask.units, pruned)

    def require_equal(self, mask: Mask) -> None:
        """Raise ModelError on all ranks if replicas of the model have found different masks."""
        digest = [0]  # a stage may have no layers
        digest += [
            int((bits.long() * (torch.arange(len(bits)) % 65521 + 1)).sum())
            for of_layers in mask.pruned.values()
            for bits in of_layers.values()
        ]
        values = torch.tensor([digest, [-n for n in digest]], device=self._device)
        torch.distributed.all_reduce(values, op=ReduceOp.MAX, group=self._replicas)
        differs = self.any(bool((values[0] != -values[1]).any()))
        if differs:
            raise ModelError(
                "early-bird: data-parallel ranks hold different weights, so that they find "
                "different masks; nothing can be concluded from these. Please report this, with "
                "the command line"
            )

    def any(self, is_true: bool) -> bool:
        """Return whether it is true on any rank of the run."""
        value = torch.tensor([int(is_true)], device=self._device)
        torch.distributed.all_reduce(value, op=ReduceOp.MAX)
        return bool(value.item())

    @staticmethod
    def from_first(value: Any) -> Any:
        """Return an object of the first rank, on all ranks."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


def layers_of(model: Any) -> dict[int, Mapping[str, Tensor]]:
    """Return {layer_number: its four matrices} of this rank's model chunks.

    Args:
        model: A GPTModel, wrapped or not, or the list of chunks of a pipeline stage.

    Raises:
        ModelError: It is not a GPTModel, or its layers have other parts.
    """
    from megatron.core.models.gpt import GPTModel

    found: dict[int, Mapping[str, Tensor]] = {}
    for chunk in model if isinstance(model, list | tuple) else [model]:
        while hasattr(chunk, "module") and not isinstance(chunk, GPTModel):
            chunk = chunk.module
        if not isinstance(chunk, GPTModel):
            raise ModelError(
                f"early-bird: a ticket is looked for in a GPTModel, not in a {type(chunk).__name__}"
            )
        for layer in chunk.decoder.layers:
            matrices = {}
            for name in MATRICES:
                part = layer.self_attention if name in MATRICES[:2] else layer.mlp
                weight = getattr(getattr(part, name, None), "weight", None)
                if weight is None or weight.dim() != 2:
                    raise ModelError(
                        f"early-bird: layer {layer.layer_number} ({type(layer).__name__}) has no "
                        f"{name} whose weight is one matrix"
                    )
                matrices[name] = weight
            found[layer.layer_number] = matrices
    return found


def take_mask(
    iteration: int,
    layers: Mapping[int, Mapping[str, Tensor]],
    target: Target,
    shape: ModelShape,
    hidden_size: int,
    tensor_parallel: Parallel,
) -> Mask:
    """Return the mask of this pipeline stage's layers.

    Args:
        iteration: That the weights were trained for.
        layers: Of `layers_of`.
        target: What the ticket keeps.
        shape: Of the whole model.
        hidden_size: Of the model.
        tensor_parallel: The ranks that share these layers.
    """
    units = target.units(shape, hidden_size)
    pruned: dict[str, dict[int, Tensor]] = {kind: {} for kind in units}
    for number in sorted(layers):
        bits = target.mask_of_layer(layers[number], shape, tensor_parallel)
        for kind, packed in bits.items():
            pruned[kind][number] = packed
    return Mask(iteration, units, pruned)
