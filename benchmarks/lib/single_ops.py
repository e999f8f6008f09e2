"""Each op of `megatron_rltd.tokens.ops` alone, forward, and what it is compared with.

Shapes: s sequence length, b micro batch, h hidden size, l layers, k kept tokens, d rotary size.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.moves import DEEPSPEED, DEEPSPEED_LINES, KERNELS, TORCH, Inputs, union_size
from lib.timing import Call
from megatron_rltd.model.kept import KeptTokens
from megatron_rltd.model.layer import gather_angles
from megatron_rltd.tokens import ops, reference

ROTARY = 128  # d
SEED = 1234


class Timed(NamedTuple):
    """What to time.

    Attributes:
        moved: Bytes that it reads and writes, but for indices; None if it is not about moving.
    """

    call: Call
    moved: int | None


def single_ops(
    inputs: Inputs, has_kernels: bool, module: Any
) -> Iterator[tuple[str, dict[str, Timed]]]:
    """Yield the name of each op and the ways to do it.

    Args:
        has_kernels: Whether there are compiled kernels for the device.
        module: DeepSpeed's, or None.
    """
    for name, ways in (*_moving(inputs), _rotary(inputs), _mask(inputs), _sample(inputs, module)):
        if not has_kernels:
            ways.pop(KERNELS)
        yield name, ways


def _moving(inputs: Inputs) -> Iterator[tuple[str, dict[str, Timed]]]:
    """Yield the ops on hidden states. They move the rows of a layer and of the next one."""
    indices, following = inputs.index_sets[:2]
    hidden, tokens = inputs.hidden, reference.gather(inputs.hidden, indices)
    arguments = {
        "gather": (hidden, indices),
        "scatter": (hidden, tokens, indices),
        "split": (hidden, indices),
        "exchange_": (hidden.clone(), tokens, indices, following),
        "merge_": (hidden.clone(), tokens, indices),
    }
    rows, kept = inputs.rows, indices.numel()
    union = union_size(indices, following, inputs.seq_length)
    # Rows copied in one pass, and by index_select, index_copy_ and clone.
    copied = {
        "gather": (kept, kept),
        "scatter": (rows, rows + kept),
        "split": (rows, rows + kept),
        "exchange_": (union, 2 * kept),
        "merge_": (kept, kept),
    }
    for name, (ours, torchs) in copied.items():
        call = functools.partial(getattr(torch.ops.megatron_rltd, name), *arguments[name])
        plain = functools.partial(getattr(reference, name), *arguments[name])
        yield (
            name,
            {
                KERNELS: Timed(call, 2 * ours * inputs.row_bytes),
                TORCH: Timed(plain, 2 * torchs * inputs.row_bytes),
            },
        )


def _rotary(inputs: Inputs) -> tuple[str, dict[str, Timed]]:
    """Rotary angles of the kept tokens' positions in all layers, [k, b, 1, d] of [s, 1, 1, d]."""
    sets, length = inputs.index_sets, inputs.seq_length
    angles = torch.randn(length, 1, 1, ROTARY, device=sets[0].device)
    kept = {number: KeptTokens(i, i, i, length) for number, i in enumerate(sets)}

    def one_by_one() -> None:
        for number, layer in kept.items():
            gather_angles(angles, {number: layer}, None, ops.find_library("torch"))

    moved = 2 * sum(indices.numel() for indices in sets) * ROTARY * angles.itemsize
    at_once = functools.partial(gather_angles, angles, kept, None, ops.find_library("auto"))
    return "rotary angles", {KERNELS: Timed(at_once, moved), TORCH: Timed(one_by_one, moved)}


def _mask(inputs: Inputs) -> tuple[str, dict[str, Timed]]:
    """Rows and columns of an attention mask [b, 1, s, s]."""
    indices = inputs.index_sets[0]
    batch, kept = indices.shape
    length = inputs.seq_length
    mask = torch.rand(batch, 1, length, length, device=indices.device) > 0.5

    def formulation() -> Tensor:
        # Sample by sample, as DeepSpeed does for encoders.
        samples = []
        for i in range(batch):
            index = indices[i].long()
            samples.append(mask[i : i + 1, :, index, :][:, :, :, index])
        return torch.cat(samples)

    ours = functools.partial(torch.ops.megatron_rltd.select_mask, mask, indices, indices)
    plain = functools.partial(reference.select_mask, mask, indices, indices)
    moved = 2 * batch * kept**2
    return "select_mask", {
        KERNELS: Timed(ours, moved),
        # Torch also selects whole rows first.
        TORCH: Timed(plain, moved + 2 * batch * kept * length),
        DEEPSPEED_LINES: Timed(formulation, None),
    }


def _sample(inputs: Inputs, module: Any) -> tuple[str, dict[str, Timed]]:
    """Which tokens all layers keep, [l, b, k]."""
    batch, kept = inputs.index_sets[0].shape
    device, length, layers = inputs.hidden.device, inputs.seq_length, len(inputs.index_sets)
    arguments = (SEED, inputs.layer_numbers, inputs.samples, length, kept, 1)

    def formulation() -> Tensor:
        weights = torch.ones(layers * batch, length, device=device)
        drawn = torch.multinomial(weights, kept).to(torch.int32)
        return drawn.view(layers, batch, kept).sort(-1).values

    ways = {
        KERNELS: Timed(functools.partial(torch.ops.megatron_rltd.sample, *arguments), None),
        TORCH: Timed(functools.partial(reference.sample, *arguments), None),
        DEEPSPEED_LINES: Timed(formulation, None),
    }
    if module is not None:

        def draw() -> Tensor:
            return module.gpt_sample_tokens(kept, length, batch, layers, device)[0]

        ways[DEEPSPEED] = Timed(draw, None)
    return "sample", ways
