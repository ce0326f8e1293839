"""sink_window: the head keeps the first keys and the last ones, by one rule for all lengths.

    window(N) = clamp(floor(alpha + beta * N), 1, N)        keep j < sink or i - j < window(N)

The elastic rule alpha + beta * N is MoA's (Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language
Model Compression", arXiv:2406.14909); the kept first keys are StreamingLLM's (Xiao et al., arXiv:2309.17453). The
sink is counted outside the window: a window of 128 beside 4 sinks keeps up to 132 keys.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.candidates import Candidate, Param, Params, refuse_span
from attnopt.ir import Choice, Refusal, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    import torch

    from attnopt.statistics import Grid, Observation

# Powers of two: at a power-of-two length they give the same few windows as constant ones, hence few kernel groups.
BETAS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
MOST_TOKENS = 1 << 30


class SinkWindow(Candidate):
    name = "sink_window"
    params = (
        Param("sink", int, 0, MOST_TOKENS),
        Param("alpha", int, -MOST_TOKENS, MOST_TOKENS),
        Param("beta", float, 0.0, 1.0, 1 / 64),
    )

    def space(self, grid: Grid, lengths: Sequence[int], own_window: int | None = None) -> list[Choice]:
        """Constant windows and constant fractions of the length, at each observed sink. Left out: what is dense at
        every length, what is narrower anywhere than the observed windows, and a second rule of equal windows."""
        found: dict[tuple[tuple[int, int], ...], Choice] = {}
        for sink in grid.sinks if own_window is None else [s for s in grid.sinks if s == 0]:
            for alpha, beta in [(w, 0.0) for w in grid.windows] + [(0, b) for b in BETAS]:
                params = {"sink": int(sink), "alpha": int(alpha), "beta": beta}
                spans = tuple(self.span(params, n, own_window) for n in lengths)
                narrow = any(w < min(grid.windows[0], n) for (_, w), n in zip(spans, lengths, strict=True))
                full = all(w >= _reach(n, s, own_window) for (s, w), n in zip(spans, lengths, strict=True))
                if not narrow and not full:
                    found.setdefault(spans, Choice.of(self.name, params))
        return list(found.values())

    def refuse(self, site: Site) -> Refusal | None:
        return refuse_span(site)

    def rule(self, params: Params) -> tuple[int, int, float]:
        return int(params["sink"]), int(params["alpha"]), float(params["beta"])

    def damage(
        self, observation: Observation, params: Params, length: int, own_window: int | None = None
    ) -> torch.Tensor:
        """Half the observed sum of t_i^2. Between two observed windows: linear in log(window), which lies above the
        usual convex decay; 0 where nothing is dropped. Never smaller for a smaller window, whatever the noise."""
        sink, window = self.span(params, length, own_window)
        reach = _reach(length, sink, own_window)
        if window >= reach:
            return observation.t2.new_zeros(observation.t2.shape[0])
        # Fewer sinks than asked for keep a subset of the keys: the nearest observed number below stands in.
        grid = observation.grid
        row = bisect_right(list(grid.sinks), sink) - 1
        if row < 0:
            raise ValueError(f"the profile holds no sink of {sink} or fewer tokens, only {list(grid.sinks)}")
        observed = [(int(w), observation.t2[:, row, c] / 2) for c, w in enumerate(grid.windows) if w < reach]
        # Window 0 keeps at most the sinks; ablation keeps nothing. It closes the grid below its first window.
        points = [(1, observation.ablation_t2 / 2)] if not observed or observed[0][0] > 1 else []
        points += [*observed, (reach, observation.t2.new_zeros(observation.t2.shape[0]))]
        return _interpolate(points, window)


def _reach(length: int, sink: int, own_window: int | None) -> int:
    """The smallest window that drops no key: the row N - 1 has N - sink keys outside the sink."""
    return max(length - sink, 1) if own_window is None else min(length, own_window)


def _interpolate(points: list[tuple[int, torch.Tensor]], window: int) -> torch.Tensor:
    """Value at `window`, linear in log(window), of the smallest non-increasing curve above `points` (ascending)."""
    values = [points[-1][1]]
    for _, value in reversed(points[:-1]):
        values.append(value.maximum(values[-1]))
    values.reverse()
    at = [w for w, _ in points]
    right = min(bisect_right(at, window), len(at) - 1)
    left = right - 1
    share = math.log(window / at[left]) / math.log(at[right] / at[left])
    return values[left] * (1 - share) + values[right] * share


CANDIDATES.register("sink_window")(SinkWindow())
