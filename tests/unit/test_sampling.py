import math

import pytest
import torch

from megatron_rltd.tokens.sampling import kept_indices, philox4x32, priorities

SEED = 0x0123_4567_89AB_CDEF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known-answer vectors published with Philox4x32-10 (Random123).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def plain_philox(counter, key):
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def plain_kept(seed, layer, sample, s, k, strata):
    """The definition in `sampling`, token by token on Python integers."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    kept, n = [], s // strata
    for j in range(strata):
        ranked = []
        for position in range(j * n, (j + 1) * n):
            words = plain_philox((position // 2, layer, sample & 0xFFFFFFFF, sample >> 32), key)
            high, low = words[2 * (position % 2) : 2 * (position % 2) + 2]
            ranked.append((((high << 32) | low) >> 1, position))
        kept += sorted(position for _, position in sorted(ranked)[: k // strata])
    return kept


@pytest.mark.parametrize(
    ("s", "k", "strata"), [(12, 4, 1), (12, 4, 4), (13, 5, 1), (16, 16, 2), (24, 6, 3), (1, 1, 1)]
)
def test_kept_indices_follow_the_definition(s, k, strata):
    layers, samples = [2, 3, 17], [0, 5, 2**32 - 1, 2**32, 2**40 + 3]
    got = kept_indices(SEED, torch.tensor(layers), torch.tensor(samples), s, k, strata)
    assert got.dtype == torch.int32
    expected = [[plain_kept(SEED, n, i, s, k, strata) for i in samples] for n in layers]
    assert got.tolist() == expected


def test_ties_go_to_the_lower_position(monkeypatch):
    monkeypatch.setattr(
        "megatron_rltd.tokens.sampling.priorities",
        lambda seed, layers, samples, s: torch.zeros(len(layers), len(samples), s).long(),
    )
    got = kept_indices(SEED, torch.tensor([2]), torch.tensor([0]), 8, 4, 2)
    assert got.tolist() == [[[0, 1, 4, 5]]]


def test_ranks_and_batches_do_not_matter():
    layers, samples = torch.arange(2, 6), torch.arange(100, 108)
    whole = kept_indices(SEED, layers, samples, 64, 16, 4)
    for i, n in enumerate(layers):
        for j, sample in enumerate(samples):
            alone = kept_indices(SEED, n[None], sample[None], 64, 16, 4)
            assert torch.equal(alone[0, 0], whole[i, j])
    assert not torch.equal(whole, kept_indices(SEED + 1, layers, samples, 64, 16, 4))


def test_no_generator_is_touched():
    before = torch.get_rng_state()
    kept_indices(SEED, torch.tensor([2]), torch.tensor([0]), 64, 16)
    assert torch.equal(before, torch.get_rng_state())


def test_every_subset_is_equally_likely():
    samples = torch.arange(35_000)
    kept = kept_indices(SEED, torch.tensor([2]), samples, 7, 3)[0]
    codes = (1 << kept.long()).sum(-1)
    subsets, counts = codes.unique(return_counts=True)
    assert len(subsets) == math.comb(7, 3)
    expected = len(samples) / len(subsets)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 34 degrees of freedom: mean 34, standard deviation 8.2.
    assert chi2 < 34 + 4 * 8.2


@pytest.mark.parametrize("other", ["layer", "sample", "high sample", "seed", "stratum"])
def test_draws_are_independent(other):
    s, k, rows = 64, 16, 4000
    layers, samples = torch.tensor([3]), torch.arange(rows)
    a = kept_indices(SEED, layers, samples, s, k)[0]
    if other == "stratum":
        pair = kept_indices(SEED, layers, samples, 2 * s, 2 * k, 2)[0]
        a, b = pair[:, :k], pair[:, k:] - s
    else:
        b = kept_indices(
            SEED + (other == "seed"),
            layers + (other == "layer"),
            samples + {"sample": 1, "high sample": 2**32}.get(other, 0),
            s,
            k,
        )[0]
    overlap = (a[:, :, None] == b[:, None, :]).sum((1, 2)).double()
    # Two independent k-subsets of s share k*k/s on average (hypergeometric).
    mean = k * k / s
    variance = k * (k / s) * (1 - k / s) * (s - k) / (s - 1)
    assert abs(overlap.mean() - mean) < 4 * math.sqrt(variance / rows)
    assert abs(overlap.var() / variance - 1) < 0.15


def test_each_position_is_kept_equally_often():
    kept = kept_indices(SEED, torch.arange(1, 5), torch.arange(2000), 64, 16, 4)
    counts = kept.flatten().bincount(minlength=64).double()
    expected = 8000 * 16 / 64
    deviation = math.sqrt(8000 * 0.25 * 0.75)
    assert (counts - expected).abs().max() < 4.5 * deviation


def test_priorities_have_63_bits():
    values = priorities(SEED, torch.tensor([2]), torch.arange(500), 65)
    assert values.shape == (1, 500, 65)
    assert values.min() >= 0
    assert values.max() > 2**62
    assert len(values.unique()) == values.numel()
