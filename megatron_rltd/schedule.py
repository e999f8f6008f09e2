"""How many tokens a dropped layer keeps, and what that adds up to. Exact integers, pure Python.

Monotonic sequence length growth (MSLG, arXiv 2211.11586): the kept length grows during the ramp
until nothing is dropped.

    k(t) = min(s, max(k0, floor_q(k0 + (s - k0) * (t / T) ** (1 / r))))

    s   sequence length            t  position: training step from 0, or samples consumed
    k0  kept tokens at the start   T  ramp length, in the unit of t
    q   increment; floor_q rounds down to a multiple of it
    r   root degree; 1 grows linearly

LayerTokens are the tokens of every layer summed: a sample costs s*(L - n) + k*n with n of L layers
dropped, a dense sample s*L.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The kept length as a function of the position t.

    Attributes:
        seq_length: s, in tokens.
        min_tokens: k0, in tokens, 1..s.
        ramp_length: T > 0; None keeps k0 throughout (the ablation without MSLG).
        increment: q > 0, in tokens.
        root_degree: r > 0.
    """

    seq_length: int
    min_tokens: int
    ramp_length: int | None
    increment: int = 1
    root_degree: int = 1

    def kept_tokens(self, position: int) -> int:
        """Return k(t), in tokens.

        The root is taken of integers: floor(a * (t/T)^(1/r)) is the r-th root of a^r * t // T.
        """
        if self.ramp_length is None:
            return self.min_tokens
        span = self.seq_length - self.min_tokens
        grown = integer_root(
            span**self.root_degree * position // self.ramp_length, self.root_degree
        )
        kept = (self.min_tokens + grown) // self.increment * self.increment
        return min(self.seq_length, max(self.min_tokens, kept))

    def first_position(self, kept: int) -> int | None:
        """Return the smallest t with k(t) >= kept, or None if there is none."""
        if kept <= self.min_tokens:
            return 0
        if self.ramp_length is None or kept > self.seq_length:
            return None
        # The rounded value reaches `kept` when the unrounded one reaches the multiple of q above.
        target = -(-kept // self.increment) * self.increment - self.min_tokens
        span = self.seq_length - self.min_tokens
        return -(-(target**self.root_degree) * self.ramp_length // span**self.root_degree)

    def levels(self) -> Iterator[tuple[int, int]]:
        """Yield (first t, kept tokens) of every kept length that occurs, in order."""
        position, kept = 0, self.kept_tokens(0)
        while True:
            yield position, kept
            later = self.first_position(kept + 1)
            if later is None:
                return
            position, kept = later, self.kept_tokens(later)

    def kept_token_sum(self, steps: int, stride: int = 1) -> int:
        """Return the sum of k(t) over t = 0, stride, 2*stride, ... for `steps` steps.

        Args:
            steps: Number of training steps.
            stride: How far one step moves t: 1 if t counts steps, the global batch size if samples.
        """
        levels = list(self.levels())
        total = 0
        for (start, kept), after in zip(levels, [*levels[1:], None], strict=True):
            first = min(steps, -(-start // stride))
            end = steps if after is None else min(steps, -(-after[0] // stride))
            total += kept * (end - first)
        return total


def layer_tokens(seq_length: int, kept: int, num_layers: int, num_dropped: int) -> int:
    """Return the LayerTokens of one sample of which `num_dropped` layers keep `kept` tokens."""
    return seq_length * (num_layers - num_dropped) + kept * num_dropped


def consumed_layer_tokens(
    schedule: Schedule,
    steps: int,
    batch_size: int,
    num_layers: int,
    num_dropped: int,
    stride: int = 1,
) -> int:
    """Return the LayerTokens of the first `steps` steps of `batch_size` samples each."""
    full = schedule.seq_length * (num_layers - num_dropped) * steps
    return batch_size * (full + num_dropped * schedule.kept_token_sum(steps, stride))


def steps_for_layer_tokens(
    schedule: Schedule,
    budget: int,
    batch_size: int,
    num_layers: int,
    num_dropped: int,
    stride: int = 1,
) -> int:
    """Return the fewest steps that consume at least `budget` LayerTokens."""

    def consumed(steps: int) -> int:
        return consumed_layer_tokens(schedule, steps, batch_size, num_layers, num_dropped, stride)

    high = 1
    while consumed(high) < budget:
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        if consumed(middle) < budget:
            low = middle + 1
        else:
            high = middle
    return low


def integer_root(value: int, degree: int) -> int:
    """Return the largest integer whose `degree`-th power is at most `value` >= 0."""
    if degree == 1 or value < 2:
        return value
    low, high = 0, 1 << -(-value.bit_length() // degree)
    while low < high:
        middle = (low + high + 1) // 2
        if middle**degree <= value:
            low = middle
        else:
            high = middle - 1
    return low
