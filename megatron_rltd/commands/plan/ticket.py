"""What a run costs that searches for an Early-Bird ticket and goes on with it (docs/early_bird.md).

The model trains whole until the ticket is drawn; then the ticket trains until the run ends. Both
follow one schedule of kept tokens, batch sizes and learning rate.
"""

import bisect
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_rltd.commands.plan import flops
from megatron_rltd.commands.plan.planned_run import PlannedRun, Segment
from megatron_rltd.resolved_config import ResolvedConfig
from megatron_rltd.schedule import Progress

if TYPE_CHECKING:  # they import torch, which a plan does only after it has checked its options
    from megatron_rltd.early_bird.arguments import Options
    from megatron_rltd.early_bird.units import ModelShape

SHARES = (10, 20)  # percent of the run after which the ticket may be drawn


@dataclass(frozen=True)
class Draw:
    """A run whose ticket is drawn after a certain iteration.

    Attributes:
        when: In words.
        iteration: Iterations of the dense model.
        flops: Of search and ticket, with causal attention.
        full_attention_flops: The same with full attention; None before Megatron 0.18.
        from_scratch: Where a model of the ticket's size, trained from its start, stands when it has
            computed as much: the control of equal FLOPs.
    """

    when: str
    iteration: int
    flops: float
    full_attention_flops: float | None
    from_scratch: Progress


@dataclass(frozen=True)
class Ticket:
    """The ticket of a planned run.

    Attributes:
        dense: The model's sizes.
        kept: The ticket's.
        step: FLOPs of the dense model for a whole iteration that drops nothing, causal attention.
        ticket_step: Of the ticket.
        draws: Runs that draw it at different times; all have the iterations of the planned run.
    """

    dense: "ModelShape"
    kept: "ModelShape"
    step: float
    ticket_step: float
    draws: list[Draw]


def find_ticket(
    args: Any,
    resolved: ResolvedConfig | None,
    run: PlannedRun,
    make_segments: Callable[[int], list[Segment]],
) -> tuple[Ticket | None, list[str]]:
    """Return the ticket that a run searches for, and sentences about it.

    Without ``--early-bird`` there is neither. A pattern of single weights makes no smaller model.

    Args:
        args: Megatron's validated arguments.
        resolved: How the run drops tokens; None: it does not.
        run: It, as if no ticket were drawn.
        make_segments: Returns the steps of a run of so many iterations.

    Raises:
        ConfigError: The search does not fit into the run.
    """
    if not getattr(args, "early_bird", False):
        return None, []
    from megatron_rltd.early_bird.arguments import FLAG, PREFIX, options_of
    from megatron_rltd.early_bird.masks import STRUCTURED
    from megatron_rltd.early_bird.units import ModelShape

    options = options_of(args)
    if options.target.pattern != STRUCTURED:
        return None, [
            f"{PREFIX}pattern {options.target.pattern} masks single weights: no smaller model "
            "follows from it, and no FLOPs, time or memory are saved"
        ]
    last = run.end.iteration
    draws = {f"{share}% of the run": round(share / 100 * last) for share in SHARES}
    said = []
    if options.until is not None:
        latest = _latest_draw(options, run)
        if latest is None or latest >= last:
            said.append(
                f"WARNING: the run ends before the first check from {PREFIX}until "
                f"{options.until} on: no ticket may be drawn"
            )
        else:
            draws[f"{PREFIX}until {options.until}"] = latest
    dense = ModelShape.of(args)
    kept = options.target.kept(dense)
    small = _with_sizes(args, kept)

    def draw(when: str, iteration: int) -> Draw:
        before, after = _split(run.segments, iteration)
        parts = flops.of_segments(args, resolved, before), flops.of_segments(small, resolved, after)
        (causal, full), (more, more_full) = parts
        both = None if full is None or more_full is None else full + more_full
        total = causal + more
        return Draw(when, iteration, total, both, _reaches(small, resolved, total, make_segments))

    end = {run.seq_length: run.segments[-1].batch_size}
    ticket = Ticket(
        dense,
        kept,
        flops.of_samples(args, resolved, end),
        flops.of_samples(small, resolved, end),
        [draw(when, iteration) for when, iteration in draws.items() if 0 < iteration < last],
    )
    return ticket, [*said, f"only the part about {FLAG} takes a ticket into account"]


def _with_sizes(args: Any, shape: "ModelShape") -> Any:
    small = copy.copy(args)
    small.num_attention_heads = shape.num_attention_heads
    small.num_query_groups = shape.num_query_groups
    small.kv_channels = shape.kv_channels
    small.ffn_hidden_size = shape.ffn_hidden_size
    return small


def _latest_draw(options: "Options", run: PlannedRun) -> int | None:
    """Return after which iteration the run stops at the latest; None if it ends before.

    The step after iteration n checks the weights of n iterations, and ends before the run stops.
    """
    if run.warmup_end is None or options.until is None:
        return None
    # Without a warm-up, warmup_end still is the first iteration.
    warmup = run.warmup_end.iteration if run.scheduler.lr_warmup_steps else 0
    first = max(options.until, options.start, warmup, 1)
    return -(-first // options.interval) * options.interval + 1


def _split(steps: list[Segment], iteration: int) -> tuple[list[Segment], list[Segment]]:
    """Return the steps up to an iteration, and those after it."""
    before, after = [], []
    for segment in steps:
        n = min(max(iteration - segment.start.iteration, 0), segment.steps)
        if n:
            before.append(dataclasses.replace(segment, steps=n))
        if n < segment.steps:
            start, left = segment.after(n), segment.steps - n
            after.append(dataclasses.replace(segment, start=start, steps=left))
    return before, after


def _reaches(
    args: Any,
    resolved: ResolvedConfig | None,
    total: float,
    make_segments: Callable[[int], list[Segment]],
) -> Progress:
    """Return where a run stands that has computed at most `total` FLOPs."""

    def is_more(iterations: int) -> bool:
        return flops.of_segments(args, resolved, make_segments(iterations))[0] > total

    above = 1
    while not is_more(above):
        above *= 2
    iterations = bisect.bisect_left(range(above), True, lo=above // 2, key=lambda n: is_more(n))
    return make_segments(iterations - 1)[-1].end
