"""Draw tickets: masks by the package's functions, and the smaller state that they leave.

Nothing is chosen, measured or cut here by other functions than those of `--early-bird` and
draw_ticket.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from early_bird.arms import LARGEST_REMOVED, NORM, Arm, Size
from megatron_rltd.early_bird import slices
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.model import layers_of, take_mask
from megatron_rltd.early_bird.target import Parallel, Target
from megatron_rltd.early_bird.units import ModelShape, importance

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class State:
    """A training that can go on.

    Attributes:
        shape: Of the model.
        step: The next one, which decides samples and learning rate.
        weights: {name: parameter}.
        moments: {name: AdamW's state}; empty: fresh.
    """

    shape: ModelShape
    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def mask_of(model: Any, step: int, target: Target, size: Size) -> Mask:
    """Return what a target prunes of a model after so many steps, as `--early-bird` would."""
    return take_mask(step, layers_of(model), target, size.dense(), size.hidden_size, Parallel())


def choose(units: str, model: Any, step: int, size: Size, seed: int) -> Mask:
    """Return the mask of a structured ticket.

    Args:
        units: NORM, RANDOM or LARGEST_REMOVED.
        model: Dense.
        step: That it was trained for.
        seed: Of a random choice.
    """
    target, shape = size.target(), size.dense()
    if units == NORM:
        return mask_of(model, step, target, size)
    pruned: dict[str, dict[int, Tensor]] = {kind: {} for kind in target.units(shape, 0)}
    for number, weights in layers_of(model).items():
        if units == LARGEST_REMOVED:
            of_units = {kind: -value for kind, value in importance(weights, shape).items()}
            bits = target.least(of_units, shape)
        else:
            bits = target.random_mask_of_layer(number, shape, seed, size.hidden_size)
        for kind, packed in bits.items():
            pruned[kind][number] = packed
    return Mask(step, target.units(shape, 0), pruned)


def cut(state: State, mask: Mask, size: Size) -> State:
    """Return what a mask leaves of a dense state, with the moments of what is kept."""
    shape = size.dense()
    kept = {
        number: slices.kept_units(mask, shape, number) for number in range(1, size.num_layers + 1)
    }

    def sliced(name: str, tensor: Tensor) -> Tensor:
        found = _LAYER.match(name)
        if found is None or tensor.dim() == 0:  # AdamW's count of steps has no units
            return tensor.clone()
        own = slices.name_in_layer(_LAYER.sub(slices.LAYERS, name))
        return slices.sliced(own, tensor, kept[int(found[1]) + 1], shape)

    weights = {name: sliced(name, weight) for name, weight in state.weights.items()}
    moments = {
        name: {key: sliced(name, moment) for key, moment in own.items()}
        for name, own in state.moments.items()
    }
    return State(size.ticket(), state.step, weights, moments)


def weight_masks(arm: Arm, model: Any, size: Size, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, bool mask of what is pruned) of all matrices of single weights.

    A random mask is that of random magnitudes.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weights in layers_of(model).values():
        looked_at = weights
        if arm.units != NORM:
            looked_at = {
                name: torch.randn(weight.shape, generator=generator).to(weight.device)
                for name, weight in weights.items()
            }
        masks = arm.target(size).matrix_masks(looked_at)
        found += [(weights[name], mask) for name, mask in masks.items()]
    return found
