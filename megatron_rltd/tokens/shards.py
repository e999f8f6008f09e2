"""Which rows of a sequence a rank holds under sequence and context parallelism.

A stratum is one of S equal contiguous slices of the sequence. If S is a multiple of
`resolved_config.fewest_strata`, the rows of every rank are whole strata. Each rank then keeps
exactly its share of the kept tokens without communication. Every mapping from positions to a rank's
rows is here.

Layouts (Megatron-core):
    context parallel   rank r of c holds chunks r and 2c-1-r of 2c equal chunks, in this order
                       (``megatron/core/utils.py:get_batch_on_this_cp_rank``)
    sequence parallel  rank r of t holds the r-th of t equal slices of what its CP rank holds
                       (``megatron/core/tensor_parallel/mappings.py:_split_along_first_dim``)
    packed             the samples of a micro-batch end to end, as one sequence

Shapes: l layers, b samples, k kept tokens, S strata.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

OnDevice = Callable[[tuple[int, ...], torch.device, torch.dtype], Tensor]
"""Returns numbers as a tensor on a device, as `cached_on_device` makes it."""


def cached_on_device(distinct: int = 256) -> OnDevice:
    """Return a function that copies numbers to a device once.

    A copy to a GPU waits until the GPU has done all its work.

    Args:
        distinct: The largest number of tuples to remember.
    """

    @functools.lru_cache(maxsize=distinct)
    def on_device(numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, device=device, dtype=dtype)

    return on_device


def context_parallel_strata(strata: int, rank: int, size: int) -> list[int]:
    """Return the strata that a context-parallel rank holds, in its local row order.

    Args:
        strata: S, a multiple of ``fewest_strata(1, size)``.
        rank: Context-parallel rank.
        size: Context-parallel size.
    """
    if size == 1:
        return list(range(strata))
    chunk = strata // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return [*range(first, first + chunk), *range(second, second + chunk)]


def sequence_parallel_strata(strata: list[int], rank: int, size: int) -> list[int]:
    """Return the strata that a sequence-parallel rank holds, of those its CP rank holds."""
    share = len(strata) // size
    return strata[rank * share : (rank + 1) * share]


def rows_of_strata(
    positions: Tensor, held: list[int], seq_length: int, strata: int, on_device: OnDevice
) -> Tensor:
    """Return the rows of the kept positions in some strata if a rank holds only those, in order.

    Args:
        positions: [l, b, k] int32, the same number in each of `strata` strata.
        held: The strata held, in the order in which they are held.

    Returns:
        [l, b, k * len(held) / strata] int32.
    """
    if held == list(range(strata)):
        return positions
    length = seq_length // strata
    shifts = tuple((row - stratum) * length for row, stratum in enumerate(held))
    index = on_device(tuple(held), positions.device, torch.int64)
    shift = on_device(shifts, positions.device, positions.dtype)
    chosen = positions.unflatten(-1, (strata, -1)).index_select(2, index)
    return chosen.add_(shift[:, None]).flatten(-2)


def positions_end_to_end(positions: Tensor, samples: int, seq_length: int) -> Tensor:
    """Return kept positions of samples as positions in the row that holds them end to end.

    Args:
        positions: [l, b or 1, k] int32.
        samples: b.

    Returns:
        [l, 1, b * k] int32, ascending.
    """
    first = torch.arange(samples, dtype=torch.int32, device=positions.device) * seq_length
    return (positions + first[:, None]).flatten(1)[:, None]
