"""Times of calls that are to be compared, measured in turn in one process.

A time means little on its own: what is compared goes round by round, and is reported as ratios.
`torch.utils.benchmark` and Triton's ``do_bench`` time one thing after another, so that a machine
that slows down meanwhile would decide.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

FLUSHED_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # twice the last-level cache of most
# The GPU is kept busy for so many cycles, some 10 ms, before what is timed: all of it is queued
# when it begins, so that gaps between launches stay out of the time.
BUSY_CYCLES = 20_000_000


KEPT_MEMORY = "freed memory is kept, as on a GPU: no time goes into new pages"


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, as torch does on a GPU; return whether it will.

    Otherwise each large tensor is new pages from the kernel, whose first touch takes longer than
    the copying that is to be measured.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(arena_max, 1)])


CPU_TIME = "one thread's own time, without what others on this machine took"


def device_seconds(call: Call, device: torch.device, now: Callable[[], float]) -> float:
    """Return how long the device works on a call, with cold caches.

    On a GPU without the launches, unless these outlast `BUSY_CYCLES`.

    Args:
        now: The clock on a CPU.
    """
    if device not in _flushed:
        size = FLUSHED_BYTES[device.type]
        _flushed[device] = torch.empty(size, dtype=torch.uint8, device=device)
    _flushed[device].zero_()
    if device.type != "cuda":
        began = now()
        call()
        return now() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def launch_seconds(call: Call, device: torch.device, times: int = 5) -> float | None:
    """Return the median time that a CPU needs to give a call to the GPU; None without one."""
    if device.type != "cuda":
        return None
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


_flushed: dict[torch.device, torch.Tensor] = {}


def interleaved[Key: Hashable, Time](
    calls: Mapping[Key, Call], clock: Callable[[Call], Time], rounds: int, warm_up: int = 1
) -> dict[Key, list[Time]]:
    """Return what a clock says of every call in each round.

    Args:
        calls: What to compare.
        clock: Calls one and returns the time.
        rounds: How often. Every second one goes backwards, so that no call always comes after the
            same other.
        warm_up: Rounds before, which do not count.
    """
    times: dict[Key, list[Time]] = {key: [] for key in calls}
    for number in range(-warm_up, rounds):
        for key in list(calls)[:: -1 if number % 2 else 1]:
            time_of_call = clock(calls[key])
            if number >= 0:
                times[key].append(time_of_call)
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return middle, lower, upper


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median over rounds of a time relative to another of the same round."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))
