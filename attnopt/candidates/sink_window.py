"""sink_window: the head keeps the first keys and the last ones, by one rule for all lengths.

    window(N) = clamp(floor(alpha + beta * N), 1, N)        keep j < sink or i - j < window(N)

The elastic rule alpha + beta * N is MoA's (Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language
Model Compression", arXiv:2406.14909); the kept first keys are StreamingLLM's (Xiao et al., arXiv:2309.17453). The
sink is counted outside the window: a window of 128 beside 4 sinks keeps up to 132 keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnopt.candidates import Candidate, Param, Params, refuse_span
from attnopt.ir import Choice, Refusal, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
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
        return _curve(observation, sink, length, own_window).at([window])[:, 0]

    def damages(
        self, observation: Observation, choices: Sequence[Choice], length: int, own_window: int | None = None
    ) -> torch.Tensor:
        spans = [self.span(dict(c.params), length, own_window) for c in choices]
        found = observation.t2.new_empty(observation.t2.shape[0], len(spans))
        for sink in {s for s, _ in spans}:
            columns = [c for c, (s, _) in enumerate(spans) if s == sink]
            windows = [spans[c][1] for c in columns]
            found[:, columns] = _curve(observation, sink, length, own_window).at(windows)
        return found


def _reach(length: int, sink: int, own_window: int | None) -> int:
    """The smallest window that drops no key: the row N - 1 has N - sink keys outside the sink."""
    return max(length - sink, 1) if own_window is None else min(length, own_window)


@dataclass(frozen=True, eq=False)
class _Curve:
    """Damage over the window: windows (P,) ascending, values (heads, P) not increasing. The last damages nothing."""

    windows: list[int]
    values: torch.Tensor

    def at(self, windows: Sequence[int]) -> torch.Tensor:
        """Linear in log(window) between the points, (heads, len(windows))."""
        here, wanted = (torch.tensor(w, dtype=torch.float64).log2() for w in (self.windows, list(windows)))
        right = torch.searchsorted(here, wanted, right=True).clamp(1, len(self.windows) - 1)
        left = right - 1
        share = ((wanted - here[left]) / (here[right] - here[left])).clamp(max=1.0).to(self.values.dtype)
        return self.values[:, left] * (1 - share) + self.values[:, right] * share


def _curve(observation: Observation, sink: int, length: int, own_window: int | None) -> _Curve:
    """The smallest non-increasing curve above what was observed with `sink`, up to where no key is dropped."""
    reach = _reach(length, sink, own_window)
    nothing = observation.t2.new_zeros(observation.t2.shape[0])
    if reach == 1:
        return _Curve([1, 2], observation.t2.new_zeros(observation.t2.shape[0], 2))
    # Fewer sinks than asked for keep a subset of the keys: the nearest observed number below stands in.
    grid = observation.grid
    row = bisect_right(list(grid.sinks), sink) - 1
    if row < 0:
        raise ValueError(f"the profile holds no sink of {sink} or fewer tokens, only {list(grid.sinks)}")
    observed = [(int(w), observation.t2[:, row, c] / 2) for c, w in enumerate(grid.windows) if w < reach]
    # Window 0 keeps at most the sinks; ablation keeps nothing. It closes the grid below its first window.
    points = [(1, observation.ablation_t2 / 2)] if not observed or observed[0][0] > 1 else []
    points += [*observed, (reach, nothing)]
    values = torch.stack([value for _, value in points], 1)
    return _Curve([w for w, _ in points], values.flip(1).cummax(1).values.flip(1))


CANDIDATES.register("sink_window")(SinkWindow())
