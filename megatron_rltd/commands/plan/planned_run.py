"""A training run that has not happened: where it stands after each of its iterations."""

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_rltd.schedule import BatchSize, LayerTokenCost, Progress


@dataclass(frozen=True)
class Segment:
    """Steps in a row that are alike.

    Attributes:
        start: Where the run stands before the first of them.
        steps: How many.
        batch_size: Samples of each.
        kept: Tokens that a dropped layer keeps in each.
        layer_tokens: Of each.
    """

    start: Progress
    steps: int
    batch_size: int
    kept: int
    layer_tokens: int

    def after(self, steps: int) -> Progress:
        """Return where the run stands after that many of the steps."""
        return Progress(
            self.start.iteration + steps,
            self.start.samples + steps * self.batch_size,
            self.start.layer_tokens + steps * self.layer_tokens,
        )

    @property
    def end(self) -> Progress:
        """Where the run stands after all of the steps."""
        return self.after(self.steps)


def segments(counted: LayerTokenCost, batch_size: BatchSize, iterations: int) -> list[Segment]:
    """Return the steps of a run from its start, without going through them one by one.

    Args:
        counted: What its steps consume.
        iterations: Its length, at least 1.
    """
    found: list[Segment] = []
    here = Progress()
    while here.iteration < iterations:
        size = batch_size(here.samples)

        def is_other(progress: Progress, size: int = size) -> bool:
            return progress.iteration >= iterations or batch_size(progress.samples) != size

        end = counted.until(is_other, batch_size, here)
        lengths = counted.schedule.kept_lengths(
            end.iteration - here.iteration,
            size if counted.ramp_in_samples else 1,
            counted.position(here),
        )
        for kept, steps in lengths:
            found.append(Segment(here, steps, size, kept, size * counted.per_sample(kept)))
            here = found[-1].end
        assert here == end
    return found


@dataclass
class PlannedRun:
    """One run, from its first iteration to its last.

    Attributes:
        seq_length: In tokens.
        num_layers: L; in a HybridModel, groups of layers.
        segments: All of its steps, in order.
        flops: By Megatron's count, which takes causal attention to compute half of the matrix.
        full_attention_flops: The same with the whole matrix; None before Megatron 0.18, which does
            not count the two apart.
        make_scheduler: Returns Megatron's scheduler, on an optimizer of one group, at the start.
    """

    seq_length: int
    num_layers: int
    segments: list[Segment]
    flops: float
    full_attention_flops: float | None
    make_scheduler: Callable[[], Any]

    @property
    def end(self) -> Progress:
        """Where the run ends."""
        return self.segments[-1].end

    @property
    def raw_tokens(self) -> int:
        """The tokens that it reads."""
        return self.end.samples * self.seq_length

    def per_layer(self, progress: Progress) -> float:
        """Return the LayerTokens per layer consumed when it stands there."""
        return progress.layer_tokens / self.num_layers

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [segment.start.iteration for segment in self.segments]

    def at(self, iteration: int) -> Progress:
        """Return where the run stands after that many of its iterations."""
        segment = self.segments[max(0, bisect.bisect_left(self._starts, iteration) - 1)]
        return segment.after(iteration - segment.start.iteration)

    def first(self, reached: Callable[[Progress], bool], start: int = 1) -> Progress | None:
        """Return where `reached`, which stays true once it is, first holds after an iteration.

        Args:
            start: The first iteration to look at.
        """
        iterations = range(start, self.end.iteration + 1)
        index = bisect.bisect_left(iterations, True, key=lambda i: reached(self.at(i)))
        return self.at(iterations[index]) if index < len(iterations) else None

    @functools.cached_property
    def scheduler(self) -> Any:
        """Megatron's scheduler, moved by `learning_rate`."""
        return self.make_scheduler()

    def learning_rate(self, progress: Progress) -> float:
        """Return what Megatron logs as the learning rate when the run stands there."""
        if hasattr(self.scheduler, "layer_tokens"):  # under --layer-token-lr
            self.scheduler.layer_tokens = progress.layer_tokens
        else:
            self.scheduler.num_steps = progress.samples
        self.scheduler.step(0)
        return self.scheduler.optimizer.param_groups[0]["lr"]

    @functools.cached_property
    def warmup_end(self) -> Progress | None:
        """Where the warm-up is over; None if the run ends before."""

        def is_over(progress: Progress) -> bool:
            self.learning_rate(progress)
            return self.scheduler.num_steps >= self.scheduler.lr_warmup_steps

        return self.first(is_over)

    @functools.cached_property
    def minimum_from(self) -> Progress | None:
        """Where the learning rate has come down to its minimum; None if the run ends before."""
        lowest = self.scheduler.min_lr
        if self.warmup_end is None:
            return None
        return self.first(lambda p: self.learning_rate(p) <= lowest, self.warmup_end.iteration)

    @functools.cached_property
    def full_length_from(self) -> Progress | None:
        """Where it stands when the next step is the first that drops nothing; None if it ends."""
        starts = (segment.start for segment in self.segments if segment.kept == self.seq_length)
        return next(starts, None)

    @property
    def kept_lengths(self) -> list[int]:
        """The distinct kept lengths, ascending."""
        return sorted({segment.kept for segment in self.segments})

    @property
    def batch_sizes(self) -> list[tuple[Progress, int]]:
        """From where on which global batch size, in samples."""
        groups = groupby(self.segments, key=lambda segment: segment.batch_size)
        return [(next(alike).start, size) for size, alike in groups]
