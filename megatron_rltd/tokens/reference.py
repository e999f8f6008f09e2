"""Choosing and moving tokens in plain torch: what `ops` and every kernel are tested against.

Shapes: s sequence length on this rank, b micro batch, h hidden size, k kept tokens on this rank.
Hidden states are [s, b, h] as in Megatron; kept indices are [b, k] int32, distinct and ascending
in each row. Any dtype, any device, never synchronises with it.

`split`, `exchange` and `merge` move the rows of a run of dropped layers through a private buffer:
rows that the current layer keeps are in its tokens and arbitrary in the buffer.
"""

import torch
from torch import Tensor

from megatron_rltd.tokens.sampling import kept_indices


def flat_rows(indices: Tensor) -> Tensor:
    """Return the rows of [s*b, h] that indices [b, k] name, [k*b] int32 in the order of [k, b]."""
    batch = indices.size(0)
    samples = torch.arange(batch, device=indices.device, dtype=indices.dtype)
    return (indices.t() * batch + samples).flatten()


def gather(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Return the kept rows [k, b, h] of hidden_states [s, b, h]; no view of anything.

    Megatron frees or shards the storage of a layer's input under recomputation and pipelining, and
    insists that no other tensor shares it (``megatron/core/utils.py:assert_viewless_tensor``).
    """
    _, batch, width = hidden_states.shape
    kept = hidden_states.new_empty(indices.size(1), batch, width)
    if hidden_states.stride(1) == 0:  # one table for all samples, which reshape would copy
        rows, index = hidden_states[:, 0], indices.t().flatten()
    else:
        rows, index = hidden_states.reshape(-1, width), flat_rows(indices)
    torch.index_select(rows, 0, index, out=kept.view(-1, width))
    return kept


def scatter_(hidden_states: Tensor, tokens: Tensor, indices: Tensor) -> None:
    """Write tokens [k, b, h] to the kept rows of hidden_states [s, b, h], which is contiguous."""
    width = hidden_states.size(-1)
    rows = flat_rows(indices).to(torch.int64)  # index_copy_ takes no int32
    if hidden_states.itemsize == 1:  # and no FP8
        hidden_states, tokens = hidden_states.view(torch.uint8), tokens.view(torch.uint8)
    hidden_states.view(-1, width).index_copy_(0, rows, tokens.reshape(-1, width))


def scatter(hidden_states: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """Return hidden_states [s, b, h] with its kept rows replaced by tokens [k, b, h]."""
    result = hidden_states.clone(memory_format=torch.contiguous_format)
    scatter_(result, tokens, indices)
    return result


def split(hidden_states: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept rows [k, b, h] and a new buffer [s, b, h] that holds the other rows."""
    return gather(hidden_states, indices), hidden_states.clone(
        memory_format=torch.contiguous_format
    )


def exchange_(buffer: Tensor, tokens: Tensor, indices: Tensor, next_indices: Tensor) -> Tensor:
    """Put tokens back into the buffer and return the rows that the next layer keeps.

    Args:
        buffer: [s, b, h] contiguous; written.
        tokens: [k, b, h], the rows of `indices`.
        indices: [b, k].
        next_indices: [b, m].

    Returns:
        [m, b, h].
    """
    scatter_(buffer, tokens, indices)
    return gather(buffer, next_indices)


def merge_(buffer: Tensor, tokens: Tensor, indices: Tensor) -> None:
    """Put tokens [k, b, h] back into the buffer [s, b, h], which is then whole."""
    scatter_(buffer, tokens, indices)


def sample(
    seed: int,
    layer_numbers: Tensor,
    samples: Tensor,
    seq_length: int,
    kept_tokens: int,
    strata: int,
) -> Tensor:
    """Return `kept_indices`; the seed may be given as a signed 64-bit integer."""
    return kept_indices(seed % 2**64, layer_numbers, samples, seq_length, kept_tokens, strata)


def select_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows [b, i] and columns [b, j] of a mask [b, a, s or 1, s]: [b, a, i or 1, j]."""
    heads = mask.size(1)
    if mask.size(2) > 1:
        index = rows.long()[:, None, :, None]
        mask = mask.gather(2, index.expand(-1, heads, -1, mask.size(3)))
    index = columns.long()[:, None, None, :]
    return mask.gather(3, index.expand(-1, heads, mask.size(2), -1))
