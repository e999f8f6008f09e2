"""Packed sequences (THD) on kept tokens.

Megatron lays the samples of a micro-batch end to end as one row of b * s tokens, and
``PackedSeqParams`` says where documents begin in it. Kept tokens are drawn for each sample as
always, then laid end to end in the same way. A document begins where its kept tokens begin. It may
have none.

Shapes: t = b * s tokens of the row, k kept tokens of a sample, n documents, d rotary size.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor


def kept_packed_seq_params(packed: Any, positions: Tensor, length: int) -> Any:
    """Return the ``PackedSeqParams`` of the kept tokens.

    The longest document's length is not changed, because an upper bound is enough. The values that
    only Mamba layers read are omitted, because Megatron waits for the GPU to make them.

    Args:
        packed: ``PackedSeqParams`` in the format "thd"; offsets are [n + 1] int32.
        positions: [1, b * k] int32, ascending.
        length: t.

    Source: ``megatron/core/packed_seq_params.py``.
    """
    changes: dict[str, Any] = {}
    made: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
    for side in ("q", "kv"):
        offsets = getattr(packed, f"cu_seqlens_{side}")
        padded = getattr(packed, f"cu_seqlens_{side}_padded")
        key = id(offsets), id(padded)  # Megatron gives the same ones for queries and keys
        if key not in made:
            made[key] = _kept_offsets(offsets, padded, positions)
        changes[f"cu_seqlens_{side}"], changes[f"cu_seqlens_{side}_padded"] = made[key]
    names = {field.name for field in dataclasses.fields(packed)}
    changes |= dict.fromkeys(names & {"total_tokens", "seq_idx"})
    if "tokens_per_sample" in names and packed.tokens_per_sample is not None:
        changes["tokens_per_sample"] = packed.tokens_per_sample * positions.size(1) // length
    return dataclasses.replace(packed, **changes)


def kept_packed_angles(angles: Tensor, packed: Any, positions: Tensor, length: int) -> Tensor:
    """Return the rotary angles of each kept token's position in its document, [b * k, 1, 1, d].

    If there are as many rows of angles as tokens, Megatron takes them as the tokens' own. Otherwise
    it takes them as those of positions 0, 1, 2, ..., counted from the start of each document
    (``megatron/core/models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd``).

    Args:
        angles: [t, 1, 1, d] or [longest document, 1, 1, d].
        positions: [1, b * k] int32, ascending.
        length: t.
    """
    rows = positions[0].long()
    if angles.size(0) != length:
        padded = packed.cu_seqlens_q_padded
        offsets = packed.cu_seqlens_q if padded is None else padded
        document = torch.searchsorted(offsets[1:], positions[0], right=True)
        rows = rows - offsets[document].long()
    return angles.index_select(0, rows)


def _kept_offsets(
    offsets: Tensor, padded: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the offsets of the kept tokens' documents and, if given, those with padding."""
    if padded is None or padded is offsets:
        # If both are the same tensor, Transformer Engine knows that nothing is padded.
        kept = _kept_before(offsets, positions)
        return kept, None if padded is None else kept
    # Padding follows each document: a document begins at its padded offset and ends with its
    # tokens.
    begin = _kept_before(padded, positions)
    end = _kept_before(padded[:-1] + offsets.diff(), positions)
    lengths = (end - begin[:-1]).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(lengths, (1, 0)), begin


def _kept_before(offsets: Tensor, positions: Tensor) -> Tensor:
    """Return how many kept positions lie before each offset, [n] int32."""
    return torch.searchsorted(positions[0], offsets.to(positions.dtype), out_int32=True)
