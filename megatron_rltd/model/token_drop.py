"""A run: neighbouring dropped layers that pass the hidden states on through one private buffer.

The hidden state stays where it is; layers borrow rows and give them back.

    H ── split ──> x ─ layer i ─> y ── exchange ──> x' ─ layer i+1 ─> y' ── merge ──> H'
           └─────> buffer ─────────────────┴───────────> buffer ──────────────┘

Between the layers of a run the caller holds the buffer in the place of the hidden states: rows
that the last layer kept are arbitrary in it. Nobody else may look at it or keep it.

Shapes: s sequence length on this rank, b micro batch, h hidden size, k kept tokens on this rank.
"""

from torch import Tensor

from megatron_rltd.tokens.ops import exchange_tokens, merge_tokens, split_tokens


class Run:
    """The state of a run between two of its layers.

    Use `enter` and `leave` in turn, once for each layer; `leave` with ``last=True`` ends the run,
    after which a new one may begin.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._tokens: Tensor | None = None
        self._indices: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._buffer is not None

    def enter(self, hidden_states: Tensor, indices: Tensor) -> Tensor:
        """Return the rows that the next layer keeps, [k, b, h].

        Args:
            hidden_states: [s, b, h]: the real ones if the run begins here, otherwise exactly what
                the previous `leave` returned.
            indices: [b, k] int32, rows on this rank.

        Raises:
            RuntimeError: Something replaced the buffer between two layers.
        """
        if not self.is_open:
            tokens, self._buffer = split_tokens(hidden_states, indices)
        elif hidden_states is not self._buffer:
            raise RuntimeError(
                "random-LTD: something replaced the hidden states between two dropped layers; "
                "choose --random-ltd-layers so that they are not neighbours"
            )
        else:
            tokens, self._buffer = exchange_tokens(
                self._buffer, self._tokens, self._indices, indices
            )
            self._tokens = None
        self._indices = indices
        return tokens

    def leave(self, tokens: Tensor, last: bool) -> Tensor:
        """Take a layer's output [k, b, h]; return what stands for the hidden states, [s, b, h].

        Args:
            last: Whether the run ends here; only then the result is the real hidden states.
        """
        if not last:
            self._tokens = tokens
            return self._buffer
        hidden_states = merge_tokens(self._buffer, tokens, self._indices)
        self._buffer = self._indices = None
        return hidden_states
