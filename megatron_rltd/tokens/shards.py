"""Which part of a sequence a rank holds under sequence and context parallelism, as strata.

A stratum is one of S equal contiguous slices of the sequence. With S a multiple of `fewest_strata`
every rank's rows are whole strata, so that it keeps exactly its share of the kept tokens without
asking anyone. Plain integers; knows nothing of torch or Megatron.

Layouts (Megatron-core):
    context parallel   rank r of c holds chunks r and 2c-1-r of 2c equal chunks, in this order
                       (``megatron/core/utils.py:get_batch_on_this_cp_rank``)
    sequence parallel  rank r of t holds the r-th of t equal slices of what its CP rank holds
                       (``megatron/core/tensor_parallel/mappings.py:_split_along_first_dim``)
"""


def fewest_strata(sequence_parallel_size: int = 1, context_parallel_size: int = 1) -> int:
    """Return the smallest S for which every rank of a layout holds whole strata."""
    chunks = 2 * context_parallel_size if context_parallel_size > 1 else 1
    return chunks * sequence_parallel_size


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
