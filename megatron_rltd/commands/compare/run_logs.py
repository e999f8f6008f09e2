"""Read the TensorBoard folder of a Megatron run: losses, samples, LayerTokens and time.

    run = read_run(Path("runs/dense/tensorboard"))
    run.last(tags.LAYER_TOKENS), total_flops(run), total_seconds(run)

Megatron writes its arguments there too, so the folder is enough. A restart adds an event file; all
files of a folder are one run. `command` compares runs and prints.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rltd.groups import split_pattern
from megatron_rltd.training import tags

# Megatron's tags (megatron/training/training.py:training_log, evaluate_and_print_results).
LOSS = "lm loss"
VALIDATION = "lm loss validation"
ACCURACY = "accuracy validation"  # of finetune_vit
BATCH_SIZE = "batch-size"
ITERATION_TIME = "iteration-time"
THROUGHPUT = "throughput"
VS_SAMPLES = " vs samples"
# Derived here.
SAMPLES = "samples consumed"
SAMPLE_FLOPS = "floating-point operations of a sample"
WARM_UP = "iteration-time with warm-up"

_NONE = "None"  # as text
_NUMBERS = ("seq_length", "num_layers", "world_size", "consumed_train_samples")

Points = dict[int, float]
"""{iteration: value}, ascending."""


class LogError(Exception):
    """What is wrong with a folder, in one sentence."""


@dataclass(frozen=True)
class LoggedRun:
    """What one start of the training script logged, or all starts of a run joined.

    Attributes:
        args: Megatron's arguments as text, at the latest start.
        start: Iteration before the first one logged; 0 unless it continues a checkpoint.
        start_samples: Samples consumed up to `start`.
        world_sizes: Numbers of GPUs of the starts.
        scalars: {tag: points}.
    """

    args: dict[str, str]
    start: int
    start_samples: int
    world_sizes: frozenset[int]
    scalars: dict[str, Points]

    def points(self, tag: str) -> Points:
        """Return the points of a tag; none if it was not logged."""
        return self.scalars.get(tag, {})

    def last(self, tag: str) -> float:
        """Return the last value of a tag; nan if it was not logged."""
        return next(reversed(self.points(tag).values()), math.nan)

    @property
    def drops(self) -> bool:
        """Whether the latest start was with random-LTD."""
        return self.args.get("random_ltd") == "True"


def read_run(folder: Path) -> LoggedRun:
    """Read a --tensorboard-dir.

    Raises:
        LogError: It does not hold a training run.
    """
    if not folder.is_dir():
        raise LogError(f"{folder} is not a folder; give the --tensorboard-dir of a run")
    try:
        files = [path for path in folder.iterdir() if "tfevents" in path.name]
        logs = [_read_events(path) for path in files]
        below = next(folder.rglob("*tfevents*"), None)
    except Exception as error:  # whatever TensorBoard raises on a file that is no log
        raise LogError(f"{folder} cannot be read: {error}") from error
    if not files:
        hint = f"did you mean {below.parent}?" if below else "give the --tensorboard-dir of a run"
        raise LogError(f"{folder} holds no TensorBoard event file; {hint}")
    logs = [log for log in logs if any(log.Tags().values())]
    starts = [_read_start(log) for log in sorted(logs, key=lambda log: log.FirstEventTimestamp())]
    starts = [start for start in starts if start.args]
    if not starts:
        raise LogError(f"{folder} holds no event file in which Megatron's arguments can be read")
    # A start that died before its first step replaces nothing.
    starts = [start for start in starts if start.points(SAMPLES)]
    if not starts:
        raise LogError(
            f"{folder} holds no training step yet: train longer, or use a smaller "
            "--tensorboard-log-interval"
        )
    return join(starts)


def _read_events(path: Path) -> Any:
    from tensorboard.backend.event_processing import event_accumulator

    keep_all = event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE
    return event_accumulator.EventAccumulator(str(path), keep_all).Reload()


def _read_start(log: Any) -> LoggedRun:
    """Return the start that wrote an event file; without args if it is none of Megatron's."""
    args, iteration = {}, 0
    for tag in log.Tags()["tensors"]:
        name, _, kind = tag.rpartition("/")
        if kind == "text_summary":
            event = log.Tensors(tag)[-1]
            args[name], iteration = event.tensor_proto.string_val[0].decode(), event.step
    if not all(args.get(name, "").isdigit() for name in _NUMBERS):
        return LoggedRun({}, 0, 0, frozenset(), {})
    scalars = {}
    for tag in log.Tags()["scalars"]:
        if tag.endswith(VS_SAMPLES):  # the same values again
            continue
        # Take the first value of an iteration. When training is done, Megatron validates once more
        # and then writes the loss on the test set under the tag of the validation loss.
        first = {event.step: event.value for event in reversed(log.Scalars(tag))}
        scalars[tag] = dict(sorted(first.items()))
    if BATCH_SIZE + VS_SAMPLES in log.Tags()["scalars"]:  # Megatron writes the two together
        both = zip(log.Scalars(BATCH_SIZE), log.Scalars(BATCH_SIZE + VS_SAMPLES), strict=False)
        scalars[SAMPLES] = {by_iteration.step: by_samples.step for by_iteration, by_samples in both}
    world_size = frozenset([int(args["world_size"])])
    return LoggedRun(args, iteration, int(args["consumed_train_samples"]), world_size, scalars)


def join(starts: list[LoggedRun]) -> LoggedRun:
    """Join the starts of a run, oldest first.

    Each start replaces what was logged beyond the checkpoint that it continues. The first log
    interval of a start contains compilation, autotuning and cold caches, so its time is ignored.
    Its iterations count at the pace of the next interval.
    """
    joined: defaultdict[str, Points] = defaultdict(dict)
    for start in starts:
        for tag, points in joined.items():
            joined[tag] = {i: value for i, value in points.items() if i <= start.start}
        for tag, points in _with_derived(start).items():
            joined[tag] |= points
    joined[ITERATION_TIME] = joined[ITERATION_TIME] or joined[WARM_UP]
    if all(start.points(tags.LAYER_TOKENS) for start in starts if start.drops):
        joined[tags.LAYER_TOKENS] = _with_dense(
            joined[tags.LAYER_TOKENS], joined[SAMPLES], starts[-1].args
        )
    else:
        joined[tags.LAYER_TOKENS] = {}
    world_sizes = frozenset().union(*(start.world_sizes for start in starts))
    return LoggedRun(starts[-1].args, starts[0].start, starts[0].start_samples, world_sizes, joined)


def _with_derived(start: LoggedRun) -> dict[str, Points]:
    """Return the scalars of one start with what follows from them and from its arguments."""
    times, speeds = start.points(ITERATION_TIME), start.points(THROUGHPUT)
    first = min(times, default=None)
    full_length = dict.fromkeys(start.points(SAMPLES), float(start.args["seq_length"]))
    (world_size,) = start.world_sizes
    ends = [i for i in times if i in speeds]
    # Megatron counts the last global batch of a log interval and takes it for all of them.
    batches = at_or_after(start.points(BATCH_SIZE), ends)
    flops = [speeds[i] * 1e12 * times[i] * world_size for i in ends]
    return start.scalars | {
        tags.KEPT_TOKENS: start.points(tags.KEPT_TOKENS) if start.drops else full_length,
        SAMPLE_FLOPS: {i: n / batch for i, n, batch in zip(ends, flops, batches, strict=True)},
        WARM_UP: {i: seconds for i, seconds in times.items() if i == first},
        ITERATION_TIME: {i: seconds for i, seconds in times.items() if i != first},
    }


def _with_dense(logged: Points, samples: Points, args: dict[str, str]) -> Points:
    """Return LayerTokens consumed, samples counting as dense where random-LTD logged nothing."""
    pattern = args.get("hybrid_layer_pattern", _NONE)
    layers = int(args["num_layers"]) if pattern == _NONE else len(split_pattern(pattern))
    dense = int(args["seq_length"]) * layers
    total = before = 0.0
    points: Points = {}
    for iteration, consumed in samples.items():
        total = logged.get(iteration, total + (consumed - before) * dense)
        before, points[iteration] = consumed, total
    return points


def at_or_after(points: Points, iterations: Iterable[int]) -> list[float]:
    """Return for each iteration the first value logged from it on, else the last."""
    at, values = list(points), list(points.values())
    return [values[min(bisect_left(at, i), len(at) - 1)] for i in iterations]


def total_flops(run: LoggedRun) -> float:
    """Return the floating-point operations of the logged iterations; nan if unknown.

    The operations of a sample depend only on the kept length, which is logged for each iteration.
    Between the lengths for which Megatron reported them they are interpolated. Outside of these the
    nearest length counts.
    """
    import numpy as np

    kept, samples, flops = (run.points(tag) for tag in (tags.KEPT_TOKENS, SAMPLES, SAMPLE_FLOPS))
    if not kept or not flops:
        return math.nan
    known = defaultdict(list)
    for length, value in zip(at_or_after(kept, flops), flops.values(), strict=True):
        known[length].append(value)
    lengths = sorted(known)
    means = [fmean(known[length]) for length in lengths]
    each = np.interp(at_or_after(kept, samples), lengths, means)
    return float(np.dot(each, _increments(samples.values(), run.start_samples)))


def total_seconds(run: LoggedRun) -> float:
    """Return the training time of the logged iterations; nan if unknown."""
    samples, times = run.points(SAMPLES), run.points(ITERATION_TIME)
    if not times:
        return math.nan
    counts = _increments(samples, run.start)
    return sum(n * seconds for n, seconds in zip(counts, at_or_after(times, samples), strict=True))


def _increments(values: Iterable[float], before: float) -> list[float]:
    """Return by how much each value exceeds the one before."""
    return [b - a for a, b in pairwise([before, *values])]


def validation(run: LoggedRun) -> tuple[str, Points]:
    """Return tag and points of the validation loss, of the first set if there are several."""
    tag = min((tag for tag in run.scalars if tag.startswith(VALIDATION)), default=VALIDATION)
    return tag, run.points(tag)
