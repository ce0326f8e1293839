"""What a profile says of a longer text than it saw: the same statistics, carried on.

A window that lost nothing at the profiled length may lose much at twice that, and a plan must not be told otherwise.
Per token, of an observation of length n carried on to N:

    w <= n / 2    rows past the n-th lose what the rows past the w-th lost on average: the mean over rows w to n
    w >  n / 2    as much as the same share of the text does at n: w / N of it, since no row saw far enough

Text of the planned length is better: on the demo model, planned for 4096 tokens at half of the pairs, see
docs/planner.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
from torch import Tensor

from attnopt.statistics import Observation

# Sums over rows of what a candidate drops; all are carried on alike.
CARRIED = ("t2", "delta", "mass")


def carried_on(observation: Observation, length: int) -> Observation:
    """An observation of one text of `length` tokens, longer than the observed one's."""
    seen, tokens = observation.length, observation.tokens
    if length <= seen or not tokens:
        raise ValueError(f"{length} tokens are no more than the {seen} that were observed")
    sums = {
        name: _carried(observation.sums[name] / tokens, observation.grid.windows, seen, length) * length
        for name in CARRIED
        if name in observation.sums
    }
    if "ablation_t2" in observation.sums:
        sums["ablation_t2"] = observation.ablation_t2 / tokens * length
    return Observation(observation.heads, observation.grid, length, length, 1, sums)


def _carried(lost: Tensor, windows: tuple[int, ...], seen: int, length: int) -> Tensor:
    """Per token at `length`, from what is lost per token at `seen`; (H, S, W)."""
    columns = []
    for n, window in enumerate(windows):
        if 2 * window <= seen:
            steady = lost[..., n] * seen / (seen - window)
            columns.append((lost[..., n] * seen + steady * (length - seen)) / length)
        elif window < length:
            columns.append(_at(lost, windows, seen, window * seen / length))
        else:
            columns.append(torch.zeros_like(lost[..., n]))
    return torch.stack(columns, -1)


def _at(lost: Tensor, windows: tuple[int, ...], seen: int, window: float) -> Tensor:
    """What a window between the observed ones loses, linear in its logarithm; nothing at the whole length."""
    points = [w for w in windows if w < seen]
    right = bisect_left(points, window)
    if right == 0:
        return lost[..., 0]
    end = points[right] if right < len(points) else seen
    value = lost[..., right] if right < len(points) else torch.zeros_like(lost[..., 0])
    share = math.log(window / points[right - 1]) / math.log(end / points[right - 1])
    return lost[..., right - 1] * (1 - share) + value * share
