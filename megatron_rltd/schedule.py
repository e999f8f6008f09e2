"""How many tokens a dropped layer keeps, and their sum over a run. Exact integers, pure Python.

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

import bisect
import functools
from collections.abc import Callable, Iterator
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

    def kept_lengths(
        self, steps: int, stride: int = 1, start: int = 0
    ) -> Iterator[tuple[int, int]]:
        """Yield (k(t), number of steps in a row that have it) over t = start, start + stride, ...

        Args:
            steps: Number of training steps.
            stride: How far one step moves t: 1 if t counts steps, the global batch size if samples.
            start: t of the first step.
        """
        levels = _levels(self)
        first = 0
        for (_, kept), (after, _) in zip(levels, [*levels[1:], (None, 0)], strict=True):
            end = steps if after is None else min(steps, max(0, -(-(after - start) // stride)))
            if end > first:
                yield kept, end - first
            first = end

    def kept_token_sum(self, steps: int, stride: int = 1, start: int = 0) -> int:
        """Return the sum of k(t) over the steps of `kept_lengths`."""
        return sum(kept * n for kept, n in self.kept_lengths(steps, stride, start))


@functools.cache
def _levels(schedule: Schedule) -> list[tuple[int, int]]:
    return list(schedule.levels())


BatchSize = Callable[[int], int]
"""The samples of the next step, as a function of the samples consumed. It never shrinks."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps.

    Attributes:
        iteration: Steps done.
        samples: Samples consumed by them.
        layer_tokens: LayerTokens consumed by them.
    """

    iteration: int = 0
    samples: int = 0
    layer_tokens: int = 0


@dataclass(frozen=True)
class Step:
    """A training step, as `LayerTokenCost.step` makes it.

    Attributes:
        iteration: From 0.
        consumed_samples: Samples of all data-parallel ranks before the step.
        kept_tokens: k of its dropped layers.
        layer_tokens_per_sample: LayerTokens that one of its samples costs.
    """

    iteration: int
    consumed_samples: int
    kept_tokens: int
    layer_tokens_per_sample: int


@dataclass(frozen=True)
class LayerTokenCost:
    """What training steps cost in LayerTokens.

    Attributes:
        schedule: The kept length; its position counts samples if `ramp_in_samples`, else steps.
        num_layers: L.
        num_dropped: n.
    """

    schedule: Schedule
    num_layers: int
    num_dropped: int
    ramp_in_samples: bool = False

    @property
    def dense(self) -> int:
        """The LayerTokens of one sample if nothing is dropped."""
        return self.per_sample(self.schedule.seq_length)

    def per_sample(self, kept: int) -> int:
        """Return the LayerTokens of one sample if the dropped layers keep `kept` of its tokens."""
        full_layers = self.num_layers - self.num_dropped
        return self.schedule.seq_length * full_layers + kept * self.num_dropped

    def position(self, progress: Progress) -> int:
        """Return the schedule's position t of the next step."""
        return progress.samples if self.ramp_in_samples else progress.iteration

    def step(self, iteration: int, consumed_samples: int) -> Step:
        """Return the step of an iteration; `consumed_samples` were consumed before it."""
        position = self.position(Progress(iteration, consumed_samples))
        kept = self.schedule.kept_tokens(position)
        return Step(iteration, consumed_samples, kept, self.per_sample(kept))

    def after(self, steps: int, batch_size: int, start: Progress = Progress()) -> Progress:
        """Return where the run stands after `steps` more steps of `batch_size` samples."""
        stride = batch_size if self.ramp_in_samples else 1
        kept = self.schedule.kept_token_sum(steps, stride, self.position(start))
        tokens = batch_size * (steps * self.per_sample(0) + kept * self.num_dropped)
        return Progress(
            start.iteration + steps,
            start.samples + steps * batch_size,
            start.layer_tokens + tokens,
        )

    def until(
        self,
        reached: Callable[[Progress], bool],
        batch_size: BatchSize,
        start: Progress = Progress(),
    ) -> Progress:
        """Return where the run stands after the fewest steps that make `reached` true.

        Args:
            reached: Becomes true at some point and stays true.
            batch_size: Samples of each step.
        """
        progress = start
        while not reached(progress):
            size = batch_size(progress.samples)

            def is_last(steps: int, size: int = size, progress: Progress = progress) -> bool:
                # The last of the steps with this batch size.
                end = self.after(steps, size, progress)
                return reached(end) or batch_size(end.samples) != size

            high = 1
            while not is_last(high):
                high *= 2
            steps = bisect.bisect_left(range(high), True, lo=1, key=is_last)
            progress = self.after(steps, size, progress)
        return progress


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
