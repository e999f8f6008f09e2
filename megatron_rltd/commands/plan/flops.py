"""Megatron's own count of floating-point operations, for steps that have not been made."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_rltd.commands.plan.planned_run import Segment
from megatron_rltd.patching import versions
from megatron_rltd.resolved_config import ResolvedConfig


def of_segments(
    args: Any, resolved: ResolvedConfig | None, steps: Iterable[Segment]
) -> tuple[float, float | None]:
    """Return the FLOPs of steps if attention is causal, and if it is full.

    Causal attention computes half of the matrix in Megatron's count. Before 0.18, Megatron does not
    count attention apart; the second number is None then.

    Args:
        args: Megatron's, with the sizes of the model.
        resolved: How the run drops tokens; None: it does not.
        steps: Any steps of a run.
    """
    samples: collections.Counter[int] = collections.Counter()
    for segment in steps:
        samples[segment.kept] += segment.steps * segment.batch_size
    causal = of_samples(args, resolved, samples)
    if versions.release() < (0, 18):
        return causal, None
    # Megatron halves the squares of the sequence lengths.
    return causal, of_samples(args, resolved, samples, 2 * args.seq_length**2)


def of_samples(
    args: Any,
    resolved: ResolvedConfig | None,
    samples: Mapping[int, int],
    square: int | None = None,
) -> float:
    """Return the FLOPs of samples.

    Args:
        args: Megatron's, with the sizes of the model.
        resolved: How the run drops tokens; None: it does not.
        samples: By the kept length that they are trained with.
        square: The square of a sample's length that attention computes, if not Megatron's.
    """
    from megatron.training import training

    from megatron_rltd.training import metrics

    original = training.num_floating_point_operations.__wrapped__
    counts = []
    for kept, n in samples.items():
        squares = {} if square is None else {"seqlen_squared_sum_in_batch": n * square}
        if resolved:
            count = metrics.floating_point_operations(original, resolved, kept, args, n, **squares)
        else:
            count = original(args, n, **squares)
        counts.append(count)
    return math.fsum(counts)
