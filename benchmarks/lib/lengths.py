"""Which kept lengths a benchmark measures, and what they make of a whole schedule.

Shapes: s sequence length, b micro batch, k kept tokens, q increment.
"""

from collections.abc import Callable, Sequence

import numpy

from lib.common import Row
from megatron_rltd.schedule import LayerTokenCost, Schedule

STEPS, RAMP = 100_000, 70_000  # of the schedule; only their quotient matters
# In units of s/128, the increment of the paper's schedule. Powers of two fill the tiles that a GPU
# multiplies matrices in; those one increment above one of them fill the last tile least, and the
# others are multiples of 16 at s = 2048 but not of 128.
_POWERS, _ODD = (16, 32, 64, 96), (9, 33, 65, 73, 105, 115)


def paper_schedule(seq_length: int) -> Schedule:
    """Return the paper's schedule, for any sequence length."""
    return Schedule(seq_length, max(1, seq_length // 16), RAMP, max(1, seq_length // 128))


def default_lengths(schedule: Schedule) -> list[int]:
    """Return the lengths to measure: the first, the last before nothing is dropped, some others.

    For s = 2048: 128, 144, 256, 512, 528, 1024, 1040, 1168, 1536, 1680, 1840 and 2032.
    """
    s = schedule.seq_length
    lengths = {units * s // 128 for units in (*_POWERS, *_ODD)}
    lengths |= {schedule.min_tokens, s - schedule.increment}
    return sorted(kept for kept in lengths if schedule.min_tokens <= kept < s)


def shares(schedule: Schedule, steps: int) -> dict[int, float]:
    """Return the share of the steps that each kept length has."""
    return {kept: n / steps for kept, n in schedule.kept_lengths(steps)}


def sweep(schedule: Schedule, most: int | None) -> list[int]:
    """Return all kept lengths in the order of the schedule, at most so many, evenly spread."""
    levels = [kept for _, kept in schedule.levels()]
    if most is None or most >= len(levels):
        return levels
    if most < 2:
        return levels[:most]
    return [levels[i * (len(levels) - 1) // (most - 1)] for i in range(most)]


def over_schedule(
    schedule: Schedule, tokens: LayerTokenCost, cost: Callable[[int], int], rows: Sequence[Row]
) -> Row:
    """Return what is saved over a whole schedule, in theory and in time.

    Args:
        cost: Operations of a sample at a kept length.
        rows: Of the table, one for each kept length, the dense one included.
    """
    weights = shares(schedule, STEPS)
    dense = cost(schedule.seq_length)
    measured = sorted((row["operation_ratio"], row["time_ratio"]) for row in rows)
    theory = {kept: cost(kept) / dense for kept in weights}
    times = numpy.interp(list(theory.values()), *zip(*measured, strict=True))
    saved = 1 - sum(weights[kept] * theory[kept] for kept in weights)
    faster = 1 - sum(w * t for w, t in zip(weights.values(), times, strict=True))
    consumed = tokens.after(STEPS, 1).layer_tokens / (STEPS * tokens.dense)
    return {
        "layer_tokens_saved": 1 - consumed,
        "operations_saved": saved,
        "time_saved": float(faster),
        "saving_realised": float(faster) / saved,
    }
