"""Multi-latent attention on kept tokens: the rotary angles that it makes itself.

An ordinary attention gets its rotary angles from the model. Multi-latent attention asks a module of
its own for the angles of positions 0, 1, 2, ... of its input. While a dropped layer runs, in
forward and in recomputation, that module gives those of the true positions instead.

Shapes: k kept tokens, c context-parallel size, b micro batch, d rotary size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from megatron_rltd.model.kept import KeptTokens


@contextlib.contextmanager
def at_true_positions(
    layer: Any, kept: KeptTokens, packed: Any, gather: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within it, a layer's multi-latent attention, if it has one, rotates by the true positions.

    Args:
        layer: A layer of a block.
        kept: What it keeps.
        packed: The ``PackedSeqParams`` of all tokens, or None.
        gather: Returns the kept tokens' angles, [k/c, b, 1, d], of those of all positions.

    Source: ``multi_latent_attention.py:MLASelfAttention.get_query_key_value_tensors`` in
    ``megatron/core/transformer``.
    """
    rotary = getattr(getattr(layer, "self_attention", None), "rotary_pos_emb", None)
    if rotary is None:
        yield
        return
    original = rotary.forward

    def forward(max_seq_len: int, **kwargs: Any) -> Any:
        # Megatron asks for as many angles as there are tokens; in packed sequences, for those of
        # the longest document.
        length = kept.length if packed is None else max_seq_len
        found = original(length, **kwargs)
        if isinstance(found, tuple):  # YaRN also gives the scale of the angles' sine and cosine
            return gather(found[0]), *found[1:]
        return gather(found)

    rotary.forward = forward  # on this instance only; it is no other layer's
    try:
        yield
    finally:
        del rotary.forward
