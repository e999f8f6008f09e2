"""Which tokens a dropped layer keeps: a pure function of (seed, layer, sample, position).

No generator state is read, advanced, stored or communicated, so every rank, every recomputation
and every restart gets the same tokens, whatever the parallel layout. This file is the definition;
a kernel must equal it bit for bit.

Priority of a position: Philox4x32-10 (Salmon et al., SC'11) with

    key      (seed mod 2^32, seed div 2^32)
    counter  (position div 2, layer number, sample mod 2^32, sample div 2^32)

Of its four output words x0..x3 an even position takes (x0, x1), an odd one (x2, x3); the priority
is the upper 63 bits of the 64-bit number whose high word is the first of the pair.

Selection: the sequence is cut into S equal strata; in each the k/S positions with the smallest
(priority, position) are kept. Kept indices are int32 and ascending.

Shapes: l layers, b samples, s sequence length, k kept tokens, S strata.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW32 = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (high, low) 32-bit words of the 64-bit products a*b.

    torch has no unsigned 64-bit multiplication, so b is split into 16-bit halves; every
    intermediate stays below 2^49.
    """
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10.

    Args:
        counter: Four int64 tensors of words in 0..2^32-1 that broadcast together.
        key: Two words.

    Returns:
        Four int64 tensors of words in 0..2^32-1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def priorities(seed: int, layer_numbers: Tensor, samples: Tensor, seq_length: int) -> Tensor:
    """Return the priority of every position.

    Args:
        seed: 0..2^64-1.
        layer_numbers: [l] int64, from 1.
        samples: [b] int64, the global index of each sample in the training run.
        seq_length: s.

    Returns:
        [l, b, s] int64 in 0..2^63-1.
    """
    pairs = torch.arange((seq_length + 1) // 2, device=samples.device)
    words = philox4x32(
        (
            pairs,
            layer_numbers[:, None, None],
            (samples & _LOW32)[None, :, None],
            (samples >> 32)[None, :, None],
        ),
        (seed & _LOW32, seed >> 32),
    )
    even = (words[0] << 31) | (words[1] >> 1)
    odd = (words[2] << 31) | (words[3] >> 1)
    return torch.stack([even, odd], dim=-1).flatten(-2)[..., :seq_length]


def kept_indices(
    seed: int,
    layer_numbers: Tensor,
    samples: Tensor,
    seq_length: int,
    kept_tokens: int,
    strata: int = 1,
) -> Tensor:
    """Return the positions that each layer keeps of each sample.

    Args:
        seed: 0..2^64-1.
        layer_numbers: [l] int64.
        samples: [b] int64, global sample indices.
        seq_length: s, a multiple of `strata`.
        kept_tokens: k <= s, a multiple of `strata`.
        strata: S.

    Returns:
        [l, b, k] int32, ascending along the last dimension, on the device of `samples`.
    """
    length, kept = seq_length // strata, kept_tokens // strata
    ranked = priorities(seed, layer_numbers, samples, seq_length).unflatten(-1, (strata, length))
    # A stable sort breaks ties by position.
    chosen = ranked.argsort(dim=-1, stable=True)[..., :kept].sort(dim=-1).values
    starts = torch.arange(0, seq_length, length, device=samples.device)[:, None]
    return (chosen + starts).flatten(-2).to(torch.int32)
