"""The tokens that the dropped layers of a block keep in one forward pass, drawn all at once.

Shapes: s sequence length, b samples of a pass, k kept tokens, c context-parallel size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rltd.resolved_config import ResolvedConfig
from megatron_rltd.schedule import Step
from megatron_rltd.tokens.policies import Draw, Policy
from megatron_rltd.tokens.shards import (
    OnDevice,
    context_parallel_strata,
    positions_end_to_end,
    rows_of_strata,
    sequence_parallel_strata,
)


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that one layer keeps in a forward pass. All int32, ascending in each row.

    Attributes:
        rows: [b, k on this rank], rows of this rank's hidden states.
        local: [b, k/c], positions in the part of the sequence that the context-parallel rank
            holds, in its own order; those of all its tensor-parallel ranks.
        positions: [b, k], positions in the whole sequence.
        length: Tokens of that sequence.

    Packed samples, laid end to end, are one sequence here: b is 1, k and length count them all.
    """

    rows: Tensor
    local: Tensor
    positions: Tensor
    length: int


@dataclass(frozen=True)
class Pass:
    """One of the forward passes of a step.

    Attributes:
        index: From 0.
        micro_batches: How many of the run's micro-batches each pass of the step takes.
    """

    index: int
    micro_batches: int = 1


def draw_kept(
    resolved: ResolvedConfig,
    library: Any,
    policy: Policy,
    step: Step,
    which: Pass,
    layer_numbers: tuple[int, ...],
    hidden_states: Tensor,
    is_packed: bool,
    groups: Any,
    on_device: OnDevice,
) -> dict[int, KeptTokens]:
    """Return layer number to kept tokens for the dropped layers of a block.

    Args:
        library: From `ops.find_library`.
        policy: Who chooses.
        layer_numbers: Numbers of the block's dropped layers.
        hidden_states: [s on this rank, b, h], or [b * s, 1, h] if `is_packed`.
        groups: The block's ``ProcessGroupCollection``.
        on_device: From `shards.cached_on_device`.

    Raises:
        RuntimeError: The hidden states do not have the resolved length.
    """
    from megatron.core.utils import get_pg_rank, get_pg_size

    if not layer_numbers:
        return {}
    model, strata, length = resolved.model, resolved.strata, resolved.model.seq_length
    rows, batch = hidden_states.shape[:2]
    samples = _count_samples(resolved, rows, batch, is_packed)
    indices = sample_indices(
        step,
        which,
        samples,
        get_pg_rank(groups.dp),
        get_pg_size(groups.dp),
        resolved.config.shared_indices,
        hidden_states.device,
        on_device,
    )
    draw = Draw(
        resolved.seed,
        on_device(layer_numbers, hidden_states.device, torch.int64),
        tuple(map(resolved.dropped_layers.index, layer_numbers)),
        indices,
        length,
        step.kept_tokens,
        strata,
    )
    positions = policy.choose(library, draw)
    if 1 < positions.size(1) < samples:  # shared within each micro-batch of the pass
        positions = positions.repeat_interleave(samples // positions.size(1), dim=1)
    if is_packed:
        positions = positions_end_to_end(positions, samples, length)
        strata, length = strata * samples, length * samples
    held = context_parallel_strata(strata, get_pg_rank(groups.cp), get_pg_size(groups.cp))
    local = rows_of_strata(positions, held, length, strata, on_device)
    rows_of_rank = local
    if model.sequence_parallel_size > 1:
        held = sequence_parallel_strata(held, get_pg_rank(groups.tp), model.sequence_parallel_size)
        rows_of_rank = rows_of_strata(positions, held, length, strata, on_device)
    if rows_of_rank.size(1) != batch:
        rows_of_rank = rows_of_rank.expand(-1, batch, -1).contiguous()
    drawn = [KeptTokens(*each, length) for each in zip(rows_of_rank, local, positions, strict=True)]
    # Layers that keep the same tokens get the very same tensors: `block.BorrowedRows`.
    return dict(zip(layer_numbers, drawn * (len(layer_numbers) // len(drawn)), strict=True))


def _count_samples(resolved: ResolvedConfig, rows: int, batch: int, is_packed: bool) -> int:
    model = resolved.model
    expected = model.seq_length // model.sequence_parallel_size // model.context_parallel_size
    samples = rows // expected if is_packed else batch
    if samples < 1 or rows != (expected * samples if is_packed else expected):
        raise RuntimeError(
            f"random-LTD: hidden states have {rows} rows on this rank, but --seq-length "
            f"{model.seq_length} gives {expected} for a sample; variable lengths do not work, "
            "for another constant length use attach(seq_length=...)"
        )
    return samples


def sample_indices(
    step: Step,
    which: Pass,
    samples: int,
    rank: int,
    ranks: int,
    shared: bool,
    device: torch.device,
    on_device: OnDevice,
) -> Tensor:
    """Return the global indices of the samples of a pass, [b] int64.

    Megatron's order: micro-batch by micro-batch, and within each the data-parallel ranks in turn
    (``megatron/training/datasets/data_samplers.py:MegatronPretrainingSampler``).

    Args:
        samples: b.
        rank, ranks: The data-parallel rank and size.
        shared: Whether all samples of a micro-batch keep the same tokens. Then only the index of
            the first sample of each micro-batch is returned.
    """
    size, rest = divmod(samples, which.micro_batches)
    if rest:
        raise RuntimeError(
            f"random-LTD: {samples} samples do not fill a pass of {which.micro_batches} "
            "micro-batches evenly"
        )
    start = step.consumed_samples + (which.index * which.micro_batches * ranks + rank) * size
    drawn = 1 if shared else size
    offsets = (i * ranks * size + j for i in range(which.micro_batches) for j in range(drawn))
    return on_device(tuple(offsets), device, torch.int64) + start
