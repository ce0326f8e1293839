"""Fit every map of one site: all heads at once, each keeping what does best on rows held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.feature_maps import FeatureMap
from attnopt.fitted import HeadFit
from attnopt.fitting import closed, learned
from attnopt.fitting.hybrid import HeldOut
from attnopt.fitting.rows import Collected, Rows

# Keys that clusters, means and covariances are taken from.
KEYS = 2048
# By how much an expansion's s is shrunk: where s is often large, its square overstates what is rare.
STRENGTHS = (1.0, 0.7, 0.4)
# By how much random features shrink s, whose size their variance grows with exponentially, and how much broader than
# clusters the Gaussians around them are. On the demo model every one of these is the best for some heads: at strength 1
# alone the median head of the first layer is off by 0.65 of what dropping costs, with a choice by 0.14.
RANDOM_STRENGTHS = (1.0, 0.5, 0.25, 0.1)
BREADTHS = (1.0, 4.0, 16.0, 64.0)
# Of so many rows one is looked at for a level.
LEVEL = 3
Kept = list[tuple[str, FeatureMap, Tensor]]


class SiteFit:
    """The rows of one site, those of the last sequence held out; sink, windows: those that its maps are to serve."""

    def __init__(self, found: Collected, sink: int, windows: tuple[int, ...], seed: int) -> None:
        self.found, self.sink, self.windows = found, sink, windows
        self.scale, self.metric = found.scale, found.metric()
        self.train = found.rows[:-1]
        self.held_out = HeldOut(found.rows[-1], self.metric, self.scale, sink, windows)
        # A row's level has few numbers to be found: a part of the rows is enough.
        self.few = [Rows(part.q[:, ::LEVEL], part.at[::LEVEL], part.k, part.v) for part in self.train]
        self.generator = torch.Generator().manual_seed(seed)
        heads, kv_heads = found.rows[0].q.shape[0], found.rows[0].k.shape[0]
        self.queries = torch.cat([part.q for part in self.train], 1).float()
        keys = torch.cat([part.k for part in self.train], 1).float()
        keys = keys[:, torch.randperm(keys.shape[1], generator=self.generator)[:KEYS]]
        self.keys = keys.repeat_interleave(heads // kv_heads, 0)

    def error(self, map: FeatureMap) -> Tensor:
        """On the rows held out, float64 (H,)."""
        return self.held_out.error(map)

    def exponential(
        self, features: int, steps: int, progress: Callable[[int], None] | None = None
    ) -> tuple[FeatureMap, list[HeadFit]]:
        """Maps of `features` exponentials: random ones, centroids, and those that `steps` of training make of these."""
        made: Kept = []
        for strength in RANDOM_STRENGTHS:
            map = closed.random(self.queries, self.keys, self.scale, features, self.generator, strength)
            made += self._levelled("random", map)
        centres = closed.clusters(self.keys, features, self.generator)
        for breadth in BREADTHS:
            made += self._levelled("centroids", closed.centroids(self.keys, centres, self.scale, breadth))
        start, _ = best_of(made)
        if steps:
            trained = learned.trained(
                start, self.train, self.error, self.metric, self.scale, self.sink, self.windows, steps, self.generator,
                progress,
            )  # fmt: skip
            made.append(("learned", *trained))
        return best_of(made)

    def expansion(self, rank: int) -> tuple[FeatureMap, list[HeadFit]]:
        """Second-order expansions in `rank` directions."""
        made: Kept = []
        for strength in STRENGTHS:
            map = closed.expansion(self.queries, self.keys, self.scale, rank, strength)
            made += self._levelled("expansion", map)
        return best_of(made)

    def _levelled(self, method: str, map: FeatureMap) -> Kept:
        level = closed.levelled(map, self.few, self.scale, self.sink, self.windows[0])
        return [(method, m, self.error(m)) for m in (map, level)]


def best_of(made: Sequence[tuple[str, FeatureMap, Tensor]]) -> tuple[FeatureMap, list[HeadFit]]:
    """Per head the map with the least error; a head none of whose maps is finite gets one that is 0, and is refused."""
    errors = torch.stack([error.cpu().nan_to_num(nan=torch.inf) for _, _, error in made])
    finite = torch.stack([_finite(map).cpu() for _, map, _ in made])
    least, chosen = errors.masked_fill(~finite, torch.inf).min(0)
    maps = [map for _, map, _ in made]
    tensors = [torch.stack([maps[n].tensors[t][h] for h, n in enumerate(chosen.tolist())]) for t in range(8)]
    fits = []
    for head, (n, error) in enumerate(zip(chosen.tolist(), least.tolist(), strict=True)):
        if error == float("inf"):
            for x in tensors:
                x[head] = 0.0
            fits.append(HeadFit(made[n][0], 0.0, "no map of this head was finite on rows held out"))
        else:
            fits.append(HeadFit(made[n][0], error))
    return FeatureMap(maps[0].kind, *tensors), fits


def _finite(map: FeatureMap) -> Tensor:
    """bool (H,)."""
    return torch.stack([x.isfinite().reshape(map.heads, -1).all(1) for x in map.tensors]).all(0)
