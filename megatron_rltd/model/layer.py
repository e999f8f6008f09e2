"""One layer of a Megatron model on kept tokens: sub-sample its arguments and call it.

The layer itself is Megatron's own and is not changed. A `block.LayerPlan` says what each layer of a
block keeps in one forward pass.

Shapes: s sequence length, b micro batch, h hidden size, d rotary size, k kept tokens,
c context-parallel size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.model.block import LayerPlan
from megatron_rltd.model.kept import KeptTokens
from megatron_rltd.model.latent_attention import at_true_positions
from megatron_rltd.model.packed import kept_packed_angles, kept_packed_seq_params
from megatron_rltd.tokens.ops import select_mask


def run_layer(layer: Any, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run a layer as its block called it, on kept tokens if a plan says so.

    Args:
        layer: A ``TransformerLayer``, or a recurrent layer of a ``HybridStack``.
        original: Its own forward.
        args, kwargs: What the block passes; ``packed_seq_params`` may be a `LayerPlan`.

    Returns:
        What the layer returns: (hidden states [s, b, h], context), or only the hidden states.

    Source: ``megatron/core/transformer/transformer_block.py:TransformerBlock.forward``,
    ``megatron/core/models/hybrid/hybrid_block.py:HybridStack.forward``.
    """
    plan = kwargs.get("packed_seq_params")
    if not isinstance(plan, LayerPlan):
        return original(*args, **kwargs)
    kwargs["packed_seq_params"] = plan.packed_seq_params
    if args:
        raise RuntimeError("random-LTD: a block must call its layers with keyword arguments")
    hidden_states = kwargs.pop("hidden_states")
    kept = plan.kept.get(layer.layer_number)
    if kept is not None:
        hidden_states = plan.borrowed.borrow(hidden_states, kept.rows)

    def run(hidden_states: Tensor) -> Any:
        if kept is None:
            return original(hidden_states=hidden_states, **kwargs)
        # Recomputation makes the masks of the kept tokens again. If they were stored for backward,
        # they could outweigh the hidden states that are not stored. Angles: `block.plan_angles`.
        is_ready = kwargs.get("rotary_pos_emb") is plan.rotary
        angles = plan.angles.get(layer.layer_number) if is_ready else None
        arguments = subsample(_read_by(layer, kwargs), kept, plan.library, angles)
        packed = plan.packed_seq_params

        def gather(own: Tensor) -> Tensor:
            return gather_angles(own, {0: kept}, packed, plan.library)[0]

        with at_true_positions(layer, kept, packed, gather):
            return original(hidden_states=hidden_states, **arguments)

    if layer.layer_number in plan.recomputed:
        from megatron.core import tensor_parallel

        distribute = layer.config.distribute_saved_activations
        output = tensor_parallel.checkpoint(run, distribute, hidden_states)
    else:
        output = run(hidden_states)
    crossed = plan.crossed.get(layer.layer_number)
    if crossed is not None:
        return _update_only(crossed, hidden_states, output)
    if kept is None:
        return output
    is_last = layer.layer_number in plan.ends
    if isinstance(output, tuple):
        return plan.borrowed.give_back(output[0], is_last), *output[1:]
    return plan.borrowed.give_back(output, is_last)


def _update_only(kept: KeptTokens, hidden_states: Tensor, output: Any) -> Any:
    """Return a layer's output, with the rows that are not kept as they were before the layer.

    Args:
        hidden_states: [s, b, h], the layer's input.
        output: What the layer returned for it.
    """
    after, *others = output if isinstance(output, tuple) else (output,)
    is_kept = torch.zeros(after.shape[:2], dtype=torch.bool, device=after.device)
    is_kept.scatter_(0, kept.rows.t().long(), True)
    after = torch.where(is_kept[..., None], after, hidden_states)
    return (after, *others) if isinstance(output, tuple) else after


def _read_by(layer: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's arguments without those that only attention reads, if it has none."""
    from megatron.core.transformer.identity_op import IdentityOp

    if not isinstance(getattr(layer, "self_attention", None), IdentityOp):
        return arguments
    return {**arguments, "attention_mask": None, "rotary_pos_emb": None}


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
        raise RuntimeError(f"random-LTD: {what} and fused rotary embeddings: add --no-rope-fusion")


def subsample(
    arguments: dict[str, Any], kept: KeptTokens, library: Any, angles: Any = None
) -> dict[str, Any]:
    """Return a layer's arguments for the kept tokens, without the hidden states.

    Args:
        library: What implements the ops.
        angles: The new ``rotary_pos_emb``, if it is already known.
    """
    result = dict(arguments)
    packed = arguments.get("packed_seq_params")
    if packed is not None:
        result["packed_seq_params"] = kept_packed_seq_params(packed, kept.positions, kept.length)
    if arguments.get("rotary_pos_emb") is not None:
        if angles is None:
            angles = gather_angles(arguments["rotary_pos_emb"], {0: kept}, packed, library)[0]
        result["rotary_pos_emb"] = angles
    if arguments.get("attention_mask") is not None:
        result["attention_mask"] = kept_mask(arguments["attention_mask"], kept, library)
    if arguments.get("padding_mask") is not None:
        result["padding_mask"] = kept_padding(arguments["padding_mask"], kept, library)
    return result


def gather_angles(
    rotary: Any, kept: dict[int, KeptTokens], packed: Any, library: Any
) -> dict[int, Any]:
    """Return ``rotary_pos_emb`` for the kept tokens of every layer, gathered at once.

    Kept tokens have the angles of their true positions. Not differentiable: angles are not weights.

    Args:
        rotary: The block's ``rotary_pos_emb``: angles [s/c, 1 or b, 1, d] (packed: see
            `packed.kept_packed_angles`), or a tuple of queries' and keys' (or local and global)
            angles, some of which may be None.
        kept: Layer number to its kept tokens.
        packed: The block's ``PackedSeqParams`` or None.
        library: What implements the ops.

    Returns:
        Layer number to the same with [k/c, b, 1, d]: one set of angles for each sample, or
        [k/c, 1, 1, d] if the samples keep the same tokens. Views of one tensor.
    """
    layers = list(kept.values())
    gathered: dict[int, Tensor] = {}

    def gather(angles: Tensor) -> Tensor:
        if packed is not None:
            positions = torch.cat([layer.positions for layer in layers]).view(1, -1)
            of_all = kept_packed_angles(angles, packed, positions, layers[0].length)
            return of_all.unflatten(0, (len(layers), -1))
        batch = angles.size(1)
        if len(layers) == 1:  # one op less
            local = layers[0].local
            batch = max(batch, local.size(0))
            table = angles.squeeze(2).expand(-1, batch, -1)
            return library.gather(table, local.expand(batch, -1))[None, :, :, None]
        rows = torch.stack([layer.local.t() for layer in layers])  # [l, k/c, b or 1]
        if batch > 1:
            rows = rows * batch + torch.arange(batch, dtype=rows.dtype, device=rows.device)
        of_all = angles.flatten(0, 2).index_select(0, rows.flatten())
        return of_all.view(*rows.shape, 1, angles.size(-1))

    def of_layer(number: int, angles: Tensor) -> Tensor:
        if id(angles) not in gathered:  # queries and keys may share theirs
            gathered[id(angles)] = gather(angles)
        return gathered[id(angles)][number]

    return {
        name: _map_angles(rotary, functools.partial(of_layer, number))
        for number, name in enumerate(kept)
    }


def _map_angles(rotary: Any, function: Callable) -> Any:
    if isinstance(rotary, (tuple, list)):
        return tuple(None if angles is None else function(angles) for angles in rotary)
    return function(rotary)


def kept_mask(mask: Tensor, kept: KeptTokens, library: Any) -> Tensor:
    """Return the rows and columns of an attention mask that belong to kept tokens.

    Args:
        mask: Bool, True where masked: [b or 1, 1, s/c or 1, s].
        library: What implements the ops.

    Returns:
        [b, 1, k/c or 1, k].
    """
    batch = max(kept.positions.size(0), mask.size(0))
    mask = mask.expand(batch, -1, -1, -1)
    rows, columns = (index.expand(batch, -1) for index in (kept.local, kept.positions))
    return select_mask(library, mask, rows, columns)


def kept_padding(mask: Tensor, kept: KeptTokens, library: Any) -> Tensor:
    """Return the columns of a padding mask [b, s on this rank] that belong to kept tokens."""
    columns = kept.rows.expand(mask.size(0), -1)
    return select_mask(library, mask[:, None, None], columns, columns)[:, 0, 0]


def fused_rotary(original: Callable, t: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply rotary angles that differ between samples, with a kernel that takes one set for all.

    The kernel looks up angles by row, so samples are laid out as more rows.

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
