"""The parts of a dense model's tensors that a ticket keeps, or sets to zero.

The optimizer's moments and main parameters have the names and shapes of the parameters they belong
to. So one function serves all of them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.units import (
    FFN,
    HEADS,
    MATRICES,
    ModelShape,
    groups_of_proj,
    groups_of_qkv,
    matrix_shapes,
    neurons_of_fc1,
)

LAYERS = "decoder.layers."
_ATTENTION, _MLP = f"{LAYERS}self_attention.", f"{LAYERS}mlp."
QKV = f"{_ATTENTION}linear_qkv."
PROJ = f"{_ATTENTION}linear_proj."
FC1 = f"{_MLP}linear_fc1."
FC2 = f"{_MLP}linear_fc2."
MODULES = dict(zip(MATRICES, (QKV, PROJ, FC1, FC2), strict=True))
_NORMS = (
    *(f"{QKV}layer_norm_", f"{FC1}layer_norm_"),
    *(f"{LAYERS}{norm}." for norm in ("input_layernorm", "pre_mlp_layernorm")),
    *(f"{_ATTENTION}{norm}." for norm in ("q_layernorm", "k_layernorm")),
)
# Parameters of a layer that no pruning touches.
WHOLE = tuple(f"{n}{kind}" for n in _NORMS for kind in ("weight", "bias"))
WHOLE += (f"{PROJ}bias", f"{FC2}bias")
SLICED = tuple(f"{name}{kind}" for name in (QKV, FC1) for kind in ("weight", "bias"))
SLICED += (f"{PROJ}weight", f"{FC2}weight")
PRUNED = tuple(f"{module}weight" for module in MODULES.values())


def name_in_layer(name: str) -> str | None:
    """Return the parameter that a checkpoint's tensor belongs to; None if it is in no layer.

    Args:
        name: Such as "decoder.layers.mlp.linear_fc1.weight", or with more before it.
    """
    _, found, rest = name.partition(LAYERS)
    return found + rest if found else None


def kept_units(mask: Mask, shape: ModelShape, layer_number: int) -> dict[str, Tensor]:
    """Return the units that a layer keeps, {kind: ascending int64}, for both kinds."""
    counts = {HEADS: shape.num_query_groups, FFN: shape.ffn_hidden_size}
    return {
        kind: (~mask.of_layer(kind, layer_number)).nonzero()[:, 0]
        if kind in mask.pruned
        else torch.arange(count)
        for kind, count in counts.items()
    }


def sliced(name: str, tensor: Tensor, kept: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Return the part of one layer's tensor that a ticket keeps; a copy.

    Args:
        name: Of `name_in_layer`: one of `SLICED` or `WHOLE`.
        tensor: Of one layer, whole, without the dimension of layers.
        kept: Of `kept_units`.
        shape: Of the dense model.
    """
    if name in WHOLE:
        return tensor.clone()
    if name.startswith(QKV):
        return groups_of_qkv(tensor, shape)[kept[HEADS]].flatten(0, 1)
    if name.startswith(PROJ):
        return groups_of_proj(tensor, shape)[:, kept[HEADS]].flatten(1, 2)
    if name.startswith(FC1):
        return neurons_of_fc1(tensor, shape)[:, kept[FFN]].flatten(0, 1)
    return tensor[:, kept[FFN]]


def zeroed(name: str, tensor: Tensor, mask: Tensor, shape: ModelShape) -> Tensor:
    """Return one layer's matrix with its pruned weights at zero; a copy.

    Args:
        name: Of `name_in_layer`: the weight of one of `units.MATRICES`.
        tensor: Of one layer, whole, without the dimension of layers.
        mask: Of all weights of the layer, see `masks.flat_weights`.
        shape: Of the model.
    """
    shapes = matrix_shapes(shape, tensor.shape[0 if name.startswith((PROJ, FC2)) else 1])
    sizes = [math.prod(shapes[matrix]) for matrix in MATRICES]
    own = MATRICES.index(next(m for m, module in MODULES.items() if name.startswith(module)))
    return tensor.masked_fill(mask.split(sizes)[own].view(tensor.shape), 0)


def expected_shape(name: str, shape: ModelShape, hidden_size: int) -> tuple[int, ...] | None:
    """Return the shape of one layer's tensor in a model; None if pruning does not touch it."""
    shapes = matrix_shapes(shape, hidden_size)
    known: dict[str, tuple[int, ...]] = {f"{MODULES[m]}weight": shapes[m] for m in MATRICES}
    # The biases of qkv and fc1 are pruned as their rows are.
    known |= {f"{module}bias": known[f"{module}weight"][:1] for module in (QKV, FC1)}
    return known.get(name)
