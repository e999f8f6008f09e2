"""One Megatron transformer layer on kept tokens: sub-sample its arguments and call it.

The layer itself is Megatron's, whole. `MicroBatch` says what each layer of a block keeps of one
micro-batch; it reaches the layers in the place of ``packed_seq_params``, the one argument that
``TransformerBlock`` hands to them untouched both in forward and in recomputation.

Shapes: s sequence length, b micro batch, h hidden size, d rotary size, k kept tokens,
c context-parallel size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.model.packed import kept_packed_angles, kept_packed_seq_params
from megatron_rltd.model.token_drop import Run
from megatron_rltd.tokens.ops import gather_tokens, select_mask


@dataclass(frozen=True)
class KeptTokens:
    """What one layer keeps of a micro-batch. All int32 and ascending in each row.

    Attributes:
        rows: [b, k on this rank], rows of this rank's hidden states.
        local: [b, k/c], positions in the part of the sequence that the context-parallel rank
            holds, in its own order; all of its tensor-parallel ranks'.
        positions: [b, k], positions in the whole sequence.
        length: Tokens of that sequence.

    Packed samples, laid end to end, are one sequence here: b is 1, k and length are of all.
    """

    rows: Tensor
    local: Tensor
    positions: Tensor
    length: int


@dataclass
class MicroBatch:
    """What the layers of one block need to know of one micro-batch.

    Attributes:
        packed_seq_params: The block's own argument, for the layers that are not dropped.
        kept: Layer number to its kept tokens; a layer that is absent processes all.
        run_ends: Numbers of the dropped layers that give back real hidden states.
        recomputed: Numbers of the layers to checkpoint here, around the kept tokens only.
        rotary: The block's own ``rotary_pos_emb``, if `angles` holds what is made of it.
        angles: Layer number to the kept tokens' ``rotary_pos_emb``.
        run: The open run, if the last dropped layer was none of `run_ends`.
    """

    packed_seq_params: Any
    kept: dict[int, KeptTokens]
    run_ends: frozenset[int]
    recomputed: frozenset[int] = frozenset()
    rotary: Any = None
    angles: dict[int, Any] = field(default_factory=dict)
    run: Run = field(default_factory=Run)


def forward(layer: Any, original: Callable, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Run a layer as its block called it, on kept tokens if its micro-batch says so.

    Args:
        layer: A ``TransformerLayer``.
        original: Its own forward.
        args, kwargs: What the block passes; ``packed_seq_params`` may be a `MicroBatch`.

    Returns:
        What the layer returns: (hidden states [s, b, h], context).

    Source: ``megatron/core/transformer/transformer_block.py:TransformerBlock.forward``.
    """
    micro_batch = kwargs.get("packed_seq_params")
    if not isinstance(micro_batch, MicroBatch):
        return original(*args, **kwargs)
    kwargs["packed_seq_params"] = micro_batch.packed_seq_params
    if args:
        raise RuntimeError("random-LTD: a block must call its layers with keyword arguments")
    hidden_states = kwargs.pop("hidden_states")
    kept = micro_batch.kept.get(layer.layer_number)
    if kept is not None:
        hidden_states = micro_batch.run.enter(hidden_states, kept.rows)

    def run(hidden_states: Tensor) -> tuple[Tensor, Any]:
        # Masks of the kept tokens are made anew in recomputation: kept for backward, they could
        # outweigh the hidden states that are not stored. Angles: `block.plan_angles`.
        arguments = kwargs
        if kept is not None:
            is_ready = kwargs.get("rotary_pos_emb") is micro_batch.rotary
            angles = micro_batch.angles.get(layer.layer_number) if is_ready else None
            arguments = subsample(kwargs, kept, angles)
        return original(hidden_states=hidden_states, **arguments)

    if layer.layer_number in micro_batch.recomputed:
        from megatron.core import tensor_parallel

        distribute = layer.config.distribute_saved_activations
        tokens, context = tensor_parallel.checkpoint(run, distribute, hidden_states)
    else:
        tokens, context = run(hidden_states)
    if kept is not None:
        tokens = micro_batch.run.leave(tokens, layer.layer_number in micro_batch.run_ends)
    return tokens, context


# What a dropped layer cannot take.
_UNSUPPORTED = {
    "context": "cross-attention",
    "context_mask": "cross-attention",
    "attention_bias": "an attention bias",
    "rotary_pos_cos": "rotary tables for inference",
    "rotary_pos_sin": "rotary tables for inference",
    "rotary_pos_cos_sin": "rotary tables for inference",
    "inference_context": "inference",
}


def check_arguments(arguments: dict[str, Any], config: Any) -> None:
    """Raise RuntimeError if a block's arguments have no meaning for a subset of the tokens.

    Args:
        arguments: What the block was called with.
        config: Its ``TransformerConfig``.
    """
    for name, what in _UNSUPPORTED.items():
        if arguments.get(name) is not None:
            raise RuntimeError(f"random-LTD: dropped layers cannot run with {what} ({name})")
    packed = arguments.get("packed_seq_params")
    if packed is None:
        return
    what = "dropped layers cannot run with packed sequences"
    if packed.qkv_format != "thd":
        raise RuntimeError(f"random-LTD: {what} in the format {packed.qkv_format}, only in thd")
    if config.context_parallel_size > 1:
        raise RuntimeError(f"random-LTD: {what} and context parallelism")
    if arguments.get("rotary_pos_emb") is not None and config.apply_rope_fusion:
        raise RuntimeError(f"random-LTD: {what} and fused rotary embeddings: --no-rope-fusion")


def subsample(arguments: dict[str, Any], kept: KeptTokens, angles: Any = None) -> dict[str, Any]:
    """Return a layer's arguments, but for the hidden states, as they are for the kept tokens.

    Args:
        angles: What ``rotary_pos_emb`` becomes, if it is known already.
    """
    result = dict(arguments)
    packed = arguments.get("packed_seq_params")
    if packed is not None:
        result["packed_seq_params"] = kept_packed_seq_params(packed, kept.positions, kept.length)

    def kept_rotary(angles: Tensor) -> Tensor:
        if packed is not None:
            return kept_packed_angles(angles, packed, kept.positions, kept.length)
        return kept_angles(angles, kept.local)

    if angles is None:
        angles = _of_each(arguments.get("rotary_pos_emb"), kept_rotary)
    if angles is not None:
        result["rotary_pos_emb"] = angles
    if arguments.get("attention_mask") is not None:
        result["attention_mask"] = kept_mask(arguments["attention_mask"], kept)
    if arguments.get("padding_mask") is not None:
        result["padding_mask"] = kept_padding(arguments["padding_mask"], kept)
    return result


def _of_each(rotary: Any, function: Callable) -> Any:
    """Apply a function to ``rotary_pos_emb``: angles, or a tuple of queries' and keys' (or local
    and global) angles, some of which may be None.
    """
    if isinstance(rotary, (tuple, list)):
        return tuple(None if angles is None else function(angles) for angles in rotary)
    return None if rotary is None else function(rotary)


def angles_of_layers(rotary: Any, kept: dict[int, KeptTokens], packed: Any) -> dict[int, Any]:
    """Return what ``rotary_pos_emb`` is for the kept tokens of every layer, gathered at once.

    Args:
        rotary: The block's ``rotary_pos_emb``, as `subsample` takes it.
        kept: Layer number to its kept tokens.
        packed: Its ``PackedSeqParams`` or None.

    Returns:
        Layer number to what `subsample` makes of it, views of one tensor.
    """
    layers = list(kept.values())
    gathered: dict[int, Tensor] = {}

    def gather(angles: Tensor) -> Tensor:
        if packed is not None:
            positions = torch.cat([layer.positions for layer in layers]).view(1, -1)
            of_all = kept_packed_angles(angles, packed, positions, layers[0].length)
            return of_all.unflatten(0, (len(layers), -1))
        rows = torch.stack([layer.local.t() for layer in layers])  # [l, k/c, b or 1]
        batch = angles.size(1)
        if batch > 1:
            rows = rows * batch + torch.arange(batch, dtype=rows.dtype, device=rows.device)
        of_all = angles.flatten(0, 2).index_select(0, rows.flatten())
        return of_all.view(*rows.shape, 1, angles.size(-1))

    def of_layer(number: int, angles: Tensor) -> Tensor:
        if id(angles) not in gathered:  # queries and keys may share theirs
            gathered[id(angles)] = gather(angles)
        return gathered[id(angles)][number]

    return {
        name: _of_each(rotary, functools.partial(of_layer, number))
        for number, name in enumerate(kept)
    }


def kept_angles(angles: Tensor, local: Tensor) -> Tensor:
    """Return the rotary angles of the kept tokens' true positions.

    Args:
        angles: [s/c, 1 or b, 1, d].
        local: [b or 1, k/c].

    Returns:
        [k/c, b, 1, d]: one set of angles for each sample, or [k/c, 1, 1, d] if the samples keep
        the same tokens.
    """
    batch = max(angles.size(1), local.size(0))
    table = angles.squeeze(2).expand(-1, batch, -1)
    return gather_tokens(table, local.expand(batch, -1)).unsqueeze(2)


def kept_mask(mask: Tensor, kept: KeptTokens) -> Tensor:
    """Return the rows and columns of an attention mask that belong to kept tokens.

    Args:
        mask: Bool, True where masked: [b or 1, 1, s/c or 1, s].

    Returns:
        [b, 1, k/c or 1, k].
    """
    batch = max(kept.positions.size(0), mask.size(0))
    mask = mask.expand(batch, -1, -1, -1)
    return select_mask(mask, kept.local.expand(batch, -1), kept.positions.expand(batch, -1))


def kept_padding(mask: Tensor, kept: KeptTokens) -> Tensor:
    """Return the columns of a padding mask [b, s on this rank] that belong to kept tokens."""
    columns = kept.rows.expand(mask.size(0), -1)
    return select_mask(mask[:, None, None], columns, columns)[:, 0, 0]


def fused_rotary(original: Callable, t: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply rotary angles that differ between samples with a kernel that takes one set for all.

    The kernel looks angles up by row, so samples are laid out as further rows.

    Args:
        original: ``fused_apply_rotary_pos_emb`` of Megatron: t [s, b, n, d'], freqs [s, 1, 1, d].
        t: [k, b, n, d'].
        freqs: [k, 1 or b, 1, d].
    """
    if freqs.size(1) == 1:
        return original(t, freqs, *args, **kwargs)
    rows = t.size(0) * t.size(1)
    flat = t.reshape(rows, 1, *t.shape[2:])
    angles = freqs.reshape(rows, 1, 1, freqs.size(-1))
    return original(flat, angles, *args, **kwargs).view_as(t)
