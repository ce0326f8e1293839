"""How every benchmark takes times: calls in turn, the clock named, paired ratios with the bound they are sure to keep.

On a shared machine wall time moves with what else runs, and much less so the ratio of two calls made one right after
the other on the same clock. So a figure is the median of such ratios, never a ratio of medians of different minutes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# thread: processor time of the calling thread, for one-threaded work. process: of all threads, the sum. wall: what a
# user waits, and the only one of the three that more threads make smaller.
CLOCKS: dict[str, Callable[[], float]] = {
    "thread": time.thread_time,
    "process": time.process_time,
    "wall": time.perf_counter,
}
DRAWS = 2000


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: str = "thread",
    seconds: float | None = None,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of each, made in turn; KeyError for a clock that is not in `CLOCKS`.

    Each is called once before. The order turns round every time, so that no call always finds the cache that the same
    other one left. Or `before` is called ahead of every one, untimed, and sees to that: then the order stays, and all
    have been left alone for equally long. `seconds` of wall time ends the rounds early, after three at the least.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    begun, collecting = time.perf_counter(), gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in names if before is not None or turn % 2 == 0 else names[::-1]:
                if before is not None:
                    before()
                begin = now()
                calls[name]()
                times[name].append(now() - begin)
            if seconds is not None and turn >= 2 and time.perf_counter() - begun > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return times


def interval(values: Sequence[float], draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap; the same for the same values."""
    held = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = held[picks].quantile(0.5, dim=1).quantile(ends).tolist()
    return low, high


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float]:
    """Median of the paired ratios and the lower end of its 95 % interval. ValueError where they do not pair up."""
    if len(numerator) != len(denominator) or not numerator:
        raise ValueError(f"{len(numerator)} and {len(denominator)} times do not pair up")
    found = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.median(found), interval(found)[0]
