"""Samples of a tokenised text: blocks, in an order that a seed decides.

Shapes: n samples, s sequence length.
"""

from pathlib import Path

import torch
from torch import Tensor


def read_tokens(prefix: str) -> Tensor:
    """Return the tokens of a set that `text.prepare` wrote, int64."""
    data = bytearray(Path(f"{prefix}.bin").read_bytes())
    return torch.frombuffer(data, dtype=torch.int16).long()  # fewer than 2^15 tokens exist


def blocks(tokens: Tensor, seq_length: int) -> Tensor:
    """Return all whole samples of a text and the token after each, [n, s + 1] views."""
    return tokens.unfold(0, seq_length + 1, seq_length)


def order(count: int, seed: int) -> Tensor:
    """Return the numbers of `count` blocks in the order in which a seed reads them."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
