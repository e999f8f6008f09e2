"""What can be pruned from a GPT, and how important it is: from weights alone.

A unit is a query group (one K/V head with its query heads; with as many groups as heads, a head) or
a neuron of the FFN. Everything here takes the weights of one layer, whole, or as a rank of tensor
parallelism holds them: a rank has whole groups and whole neurons, in the order of the ranks.

The names of weights are Megatron's:

    linear_qkv   [groups * (heads per group + 2) * head size, hidden]   Q, K and V group by group
    linear_proj  [hidden, heads * head size]
    linear_fc1   [FFN, hidden]; gated: [2 * FFN, hidden], the gate first
    linear_fc2   [hidden, FFN]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEADS, FFN = "heads", "ffn"  # the two kinds of units
WEIGHTS = "weights"  # the kind of the patterns that prune single weights
MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPTModel, in Megatron's words.

    Attributes:
        num_layers: Transformer layers of the whole model.
        num_attention_heads: Query heads of a layer.
        num_query_groups: K/V heads of a layer.
        kv_channels: Size of a head.
        ffn_hidden_size: Neurons of a layer's FFN.
        gated: Whether the FFN has a gate, as with SwiGLU.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    gated: bool

    @classmethod
    def of(cls, args: Any) -> "ModelShape":
        """Return the sizes that validated Megatron arguments or a TransformerConfig say."""
        gated = getattr(args, "swiglu", False) or getattr(args, "gated_linear_unit", False)
        gated = gated or getattr(args, "quick_geglu", False)
        uses_groups = getattr(args, "group_query_attention", True)
        groups = args.num_query_groups if uses_groups else None
        heads = args.num_attention_heads
        size = args.kv_channels or args.hidden_size // heads
        neurons = args.ffn_hidden_size
        return cls(args.num_layers, heads, groups or heads, size, neurons, bool(gated))

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a K/V head."""
        return self.num_attention_heads // self.num_query_groups


def matrix_shapes(shape: ModelShape, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a layer's whole `MATRICES`.

    Args:
        shape: Of the model.
        hidden_size: Of the model.
    """
    heads = shape.num_attention_heads * shape.kv_channels
    rows = heads + 2 * shape.num_query_groups * shape.kv_channels
    neurons = shape.ffn_hidden_size
    return {
        "linear_qkv": (rows, hidden_size),
        "linear_proj": (hidden_size, heads),
        "linear_fc1": ((2 if shape.gated else 1) * neurons, hidden_size),
        "linear_fc2": (hidden_size, neurons),
    }


def groups_of_qkv(tensor: Tensor, shape: ModelShape) -> Tensor:
    """Return linear_qkv's weight or bias as [groups, (heads per group + 2) * head size, ...]."""
    rows = (shape.heads_per_group + 2) * shape.kv_channels
    return tensor.unflatten(0, (-1, rows))


def groups_of_proj(weight: Tensor, shape: ModelShape) -> Tensor:
    """Return linear_proj's weight as [hidden, groups, heads per group * head size]."""
    return weight.unflatten(1, (-1, shape.heads_per_group * shape.kv_channels))


def neurons_of_fc1(tensor: Tensor, shape: ModelShape) -> Tensor:
    """Return linear_fc1's weight or bias as [2, neurons, ...], gate first; ungated: [1, ...]."""
    return tensor.unflatten(0, (2 if shape.gated else 1, -1))


def _norm(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    # float64, so that a unit's norm does not depend on how many units the rank holds.
    return torch.linalg.vector_norm(tensor.detach(), dim=dim, dtype=torch.float64)


def importance(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Return the importance of a layer's units, {kind: float64 [units of this rank]}.

    A group: ‖its rows of V‖ · ‖its heads' columns of linear_proj‖. A neuron: ‖its row of
    linear_fc1‖ · ‖its column of linear_fc2‖; gated: ‖gate row‖ · ‖up row‖ · ‖column‖. The products
    do not change when one factor is scaled up and the other down, which leaves what the layer
    computes as it is.

    Args:
        weights: The four `MATRICES` of one layer, in any floating dtype.
        shape: Of the model.
    """
    values = groups_of_qkv(weights["linear_qkv"], shape)[:, -shape.kv_channels :]
    outputs = groups_of_proj(weights["linear_proj"], shape)
    rows = neurons_of_fc1(weights["linear_fc1"], shape)
    return {
        HEADS: _norm(values, (1, 2)) * _norm(outputs, (0, 2)),
        FFN: _norm(rows, 2).prod(0) * _norm(weights["linear_fc2"], 0),
    }


def random_importance(layer_number: int, shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Return random numbers in place of `importance`, on the CPU: the control of every ticket.

    Args:
        layer_number: Megatron's, from 1. Layers get different numbers.
        shape: Of the whole model.
        seed: The same seed gives the same numbers on any machine.
    """
    generator = _generator(layer_number, seed)
    units = {HEADS: shape.num_query_groups, FFN: shape.ffn_hidden_size}
    return {
        kind: torch.rand(count, generator=generator, dtype=torch.float64)
        for kind, count in units.items()
    }


def random_weights(
    layer_number: int, shape: ModelShape, seed: int, hidden_size: int
) -> dict[str, Tensor]:
    """Return random numbers in place of a layer's `MATRICES`, float32: the same for weights."""
    generator = _generator(layer_number, seed)
    shapes = matrix_shapes(shape, hidden_size)
    return {name: torch.rand(shapes[name], generator=generator) for name in MATRICES}


def _generator(layer_number: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + layer_number)
