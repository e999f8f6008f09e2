"""The plan of one forward pass through a block of layers, and the rows that its layers borrow.

The plan is made when the block's forward starts, and it travels with the pass. It says what each
layer keeps, where real hidden states are needed in between, and which layers are checkpointed one
by one around their kept tokens, not by the block around the whole hidden states.

The hidden state stays where it is; layers borrow rows of it and give them back.

    H ── split ──> x ─ layer i ─> y ── exchange ──> x' ─ layer i+1 ─> y' ── merge ──> H'
           └─────> buffer ─────────────────┴───────────> buffer ──────────────┘

Layers of one group (`megatron_rltd.groups`) keep the same tokens: between them, nothing moves.

Shapes: s sequence length on this rank, b micro batch, h hidden size, k kept tokens on this rank.
"""

import dataclasses
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rltd.config import ModelError
from megatron_rltd.model.kept import KeptTokens
from megatron_rltd.tokens.ops import exchange_tokens, merge_tokens, split_tokens


class BorrowedRows:
    """The rows that neighbouring dropped layers borrow, between two of them.

    Call `borrow` and `give_back` in turn, once for each layer. `give_back` with ``last=True`` ends
    the row of neighbours; then a new one may begin. In between, the caller holds the private buffer
    in place of the hidden states. Rows that the last layer kept are arbitrary in it. Nobody else
    may read or keep it.
    """

    def __init__(self, library: Any) -> None:
        """Begin with nothing borrowed.

        Args:
            library: Of `megatron_rltd.tokens.ops.find_library`.
        """
        self._library = library
        self._buffer: Tensor | None = None
        self._tokens: Tensor | None = None
        self._indices: Tensor | None = None

    def borrow(self, hidden_states: Tensor, indices: Tensor) -> Tensor:
        """Return the rows that the next layer keeps, [k, b, h].

        Args:
            hidden_states: [s, b, h]: the real ones if nothing is borrowed, otherwise exactly what
                the previous `give_back` returned.
            indices: [b, k] int32, rows on this rank. The tensor that the previous layer had means
                the same rows, and these then stay as they are.

        Raises:
            RuntimeError: Something replaced the buffer between two layers.
        """
        if self._buffer is None or self._indices is None:
            tokens, self._buffer = split_tokens(self._library, hidden_states, indices)
        elif hidden_states is not self._buffer or self._tokens is None:
            raise RuntimeError(
                "random-LTD: something replaced the hidden states between two dropped layers: "
                "remove it, or choose --random-ltd-layers so that they are not neighbours; layers "
                "of one group of a HybridModel always are, so leave that group out"
            )
        elif indices is self._indices:
            tokens, self._tokens = self._tokens, None
        else:
            tokens, self._buffer = exchange_tokens(
                self._library, self._buffer, self._tokens, self._indices, indices
            )
            self._tokens = None
        self._indices = indices
        return tokens

    def give_back(self, tokens: Tensor, last: bool) -> Tensor:
        """Take a layer's output [k, b, h]; return what stands for the hidden states, [s, b, h].

        Args:
            last: Whether no neighbour follows. Only then is the result the real hidden states.
        """
        assert self._buffer is not None and self._indices is not None
        if not last:
            self._tokens = tokens
            return self._buffer
        hidden_states = merge_tokens(self._library, self._buffer, tokens, self._indices)
        self._buffer = self._indices = None
        return hidden_states


class LayerPlan(PackedSeqParams):
    """What the layers of one block need to know of one forward pass.

    It reaches them in place of ``packed_seq_params``. Only this argument goes from
    ``TransformerBlock`` and ``HybridStack`` to their layers unchanged, both in forward and in
    recomputation. So the plan is a ``PackedSeqParams``, with the attributes of the block's own.

    Attributes:
        packed_seq_params: The block's own argument or None, for the layers that do not drop.
        kept: Layer number to its kept tokens; a layer that is absent processes all tokens.
        crossed: Layer number to kept tokens, for layers that process all tokens, so that kept ones
            attend to dropped ones, but change only the kept ones (TokenBypass).
        ends: Numbers of the dropped layers that give back real hidden states.
        recomputed: Numbers of the layers to checkpoint here, around the kept tokens only.
        rotary: The block's own ``rotary_pos_emb``, if `angles` was made from it.
        angles: Layer number to the kept tokens' ``rotary_pos_emb``.
        library: What implements the ops.
        borrowed: The rows that are on loan between two layers.
    """

    def __init__(
        self,
        packed_seq_params: PackedSeqParams | None,
        kept: dict[int, KeptTokens],
        ends: frozenset[int],
        recomputed: frozenset[int],
        library: Any,
    ):
        # Not through the base class: it would compute values of the packed sequences again.
        for field in dataclasses.fields(PackedSeqParams):
            setattr(self, field.name, getattr(packed_seq_params, field.name, field.default))
        self.packed_seq_params = packed_seq_params
        self.kept = kept
        self.crossed: dict[int, KeptTokens] = {}
        self.ends = ends
        self.recomputed = recomputed
        self.rotary: Any = None
        self.angles: dict[int, Any] = {}
        self.library = library
        self.borrowed = BorrowedRows(library)


def check_layers(block: Any, is_hybrid: bool = False) -> None:
    """Check that every layer of a block is a transformer layer, and that none is attached yet.

    Args:
        is_hybrid: Whether it is a ``HybridStack``, in which other layers may stand.

    Raises:
        ModelError: A layer fails the check.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    if "forward" in vars(block):
        raise ModelError("random-LTD: this model is already attached; call detach() first")
    for layer in () if is_hybrid else block.layers:
        if not isinstance(layer, TransformerLayer):
            raise ModelError(
                f"random-LTD: layer {layer.layer_number} is a {type(layer).__name__}, not a "
                "TransformerLayer"
            )


def plan_recomputation(
    block: Any, kept: dict[int, KeptTokens], rows: int
) -> tuple[frozenset[int], bool]:
    """Decide where a block's layers are checkpointed under full recomputation.

    Megatron stores the hidden states, s rows, once for each group of layers. If every layer is
    checkpointed by itself, a dropped one stores k rows; this is done if it stores less in all.

    Returns:
        Numbers of the layers to checkpoint one by one, and whether Megatron checkpoints groups
        instead. Then the hidden states between layers must be the real ones.
    """
    config = block.config
    if config.recompute_granularity != "full":
        return frozenset(), False
    if config.fp8 or getattr(config, "fp4", None):
        return frozenset(), True
    layers = list(block.layers)
    if config.recompute_method == "block":
        layers, group = layers[: config.recompute_num_layers], 1
    else:
        group = config.recompute_num_layers
    stored = sum(
        kept[n.layer_number].rows.size(1) if n.layer_number in kept else rows for n in layers
    )
    if stored > rows * -(-len(layers) // group):
        return frozenset(), True
    return frozenset(n.layer_number for n in layers), False


def plan_angles(
    rotary: Any, kept: dict[int, KeptTokens], hidden_states: Tensor, recomputed: bool
) -> bool:
    """Decide whether the rotary angles of all dropped layers are gathered at once.

    That is one gather for a pass, not one for each layer, and the angles of all layers live equally
    long. If layers are recomputed, the angles live until then, next to the hidden states of the
    kept tokens. So they are gathered at once only if both together take no more memory than the
    hidden states of all tokens. A step that drops nothing then still needs the most memory.
    Otherwise each layer gathers its own angles, and gathers them again in recomputation.

    Args:
        rotary: The block's ``rotary_pos_emb``: None, angles or a tuple of them.
        hidden_states: [s, b, h], rows of this rank.
        recomputed: Whether any layer is recomputed as a whole.
    """
    given = rotary if isinstance(rotary, (tuple, list)) else (rotary,)
    tables = {id(table): table for table in given if table is not None}.values()
    if not kept or not tables or not recomputed:
        return bool(kept and tables)
    layer = next(iter(kept.values()))  # all keep equally many
    samples, tokens = layer.local.shape
    angles = sum(tokens * max(samples, t.size(1)) * t.size(-1) * t.itemsize for t in tables)
    rows, batch, width = hidden_states.shape
    dropped_rows = rows - layer.rows.size(1)
    return angles <= dropped_rows * batch * width * hidden_states.itemsize


def plan_ends(
    block: Any, dropped: set[int], extracted: Iterable[int], grouped: bool
) -> frozenset[int]:
    """Return the dropped layers after which the hidden states must be the real ones.

    These are the last of each row of neighbours, and any layer whose output something else reads.
    """
    ends = set()
    layers = list(block.layers)  # none, if a pipeline stage is embedding or loss only
    for layer, after in zip_longest(layers, layers[1:]):
        number = layer.layer_number
        if number in dropped and (
            after is None
            or after.layer_number not in dropped
            or grouped
            or number - 1 in extracted
            or _is_watched(layer)
            or _is_watched(after)
        ):
            ends.add(number)
    return frozenset(ends)


def _is_watched(layer: torch.nn.Module) -> bool:
    """Return whether something other than Megatron's own hooks sees a layer's input or output."""
    forward = getattr(layer.forward, "func", None)
    if getattr(forward, "__module__", "") != "megatron_rltd.model.layer":
        return True  # replaced after `attach`, for example by a profiler
    hooks = [
        *layer._forward_hooks.values(),
        *layer._forward_pre_hooks.values(),
        *layer._backward_hooks.values(),
        *layer._backward_pre_hooks.values(),
        *torch.nn.modules.module._global_forward_hooks.values(),
        *torch.nn.modules.module._global_forward_pre_hooks.values(),
        *torch.nn.modules.module._global_backward_hooks.values(),
        *torch.nn.modules.module._global_backward_pre_hooks.values(),
    ]
    # Megatron's DDP gathers parameters in hooks that never look at their arguments.
    return any(
        not getattr(h, "__module__", "").startswith("megatron.core.distributed") for h in hooks
    )
