import pytest

from megatron_rltd.resolved_config import fewest_strata
from megatron_rltd.tokens.shards import (
    context_parallel_strata,
    sequence_parallel_strata,
)

LAYOUTS = [(tp, cp) for tp in (1, 2, 3, 4) for cp in (1, 2, 4)]


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
@pytest.mark.parametrize("factor", [1, 3])
def test_ranks_hold_what_megatron_gives_them(tp, cp, factor):
    strata = factor * fewest_strata(tp, cp)
    length = 2  # tokens in a stratum
    sequence = list(range(strata * length))
    held = []
    for cp_rank in range(cp):
        # Megatron's get_batch_on_this_cp_rank: chunks r and 2c-1-r of 2c.
        if cp > 1:
            size = len(sequence) // (2 * cp)
            chunks = [sequence[i * size : (i + 1) * size] for i in range(2 * cp)]
            local = chunks[cp_rank] + chunks[2 * cp - 1 - cp_rank]
        else:
            local = sequence
        mine = context_parallel_strata(strata, cp_rank, cp)
        assert [j * length + i for j in mine for i in range(length)] == local
        for tp_rank in range(tp):
            share = len(local) // tp
            rows = local[tp_rank * share : (tp_rank + 1) * share]
            shard = sequence_parallel_strata(mine, tp_rank, tp)
            assert [j * length + i for j in shard for i in range(length)] == rows
            held += shard
    assert sorted(held) == list(range(strata))


def test_fewest_strata():
    assert fewest_strata() == 1
    assert fewest_strata(sequence_parallel_size=4) == 4
    assert fewest_strata(context_parallel_size=2) == 4
    assert fewest_strata(2, 4) == 16
