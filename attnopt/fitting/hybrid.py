"""A head with soft-max over near keys and a feature map for the far ones, and how far it is from the head as it was.

    O_i = (sum_K e^{a_ij} v_j + sum_F W_ij v_j) / (sum_K e^{a_ij} + sum_F W_ij),    K = {j < s or i - j < w}, F the rest

The quadratic twin of what kernels run in chunks, over a few rows: for fitting, and differentiable at the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.feature_maps import FeatureMap, key_features, query_features
from attnopt.fitting.rows import Rows

# Below it a sum of weights counts as nothing; its logarithm keeps a gradient.
TINY = 1e-30
# Elements of (heads, rows, keys) worked on at a time.
AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Exact:
    """Of some heads h at M rows, float32: q (h, M, D); k, v (h, N, .); far bool (M, N); scores (h, M, N); of all keys
    lse (h, M) and out (h, M, Dv); near_lse, near_out of the near keys alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    far: Tensor
    scores: Tensor
    lse: Tensor
    out: Tensor
    near_lse: Tensor
    near_out: Tensor

    @property
    def weights(self) -> Tensor:
        """Soft-max weights of the far keys (h, M, N), 0 elsewhere."""
        return (self.scores - self.lse[..., None]).masked_fill(~self.far, -torch.inf).exp()


@dataclass(frozen=True, eq=False)
class Approximate:
    """With a map: weights W / exp(shift) (h, M, N) of far keys, shift and far_lse (h, M), out (h, M, Dv)."""

    weights: Tensor
    shift: Tensor
    far_lse: Tensor
    out: Tensor


def exact_at(rows: Rows, heads: Tensor, scale: float, sink: int, windows: Sequence[int]) -> list[Exact]:
    """The head itself, at the rows given, for each window; what does not depend on these is shared."""
    repeat = rows.q.shape[0] // rows.k.shape[0]
    q, k, v = rows.q[heads].float(), rows.k[heads // repeat].float(), rows.v[heads // repeat].float()
    i, j = rows.at[:, None], torch.arange(k.shape[1], device=k.device)
    causal = j <= i
    scores = scale * q @ k.mT
    whole = _parts(scores, causal, v)
    found = []
    for window in windows:
        near = causal & ((j < sink) | (i - j < window))
        found.append(Exact(q, k, v, causal & ~near, scores, *whole, *_parts(scores, near, v)))
    return found


def exact(rows: Rows, heads: Tensor, scale: float, sink: int, window: int) -> Exact:
    """The head itself, at the rows given."""
    return exact_at(rows, heads, scale, sink, (window,))[0]


def _parts(scores: Tensor, keep: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """lse (h, M) and out (h, M, Dv) of the keys kept."""
    masked = scores.masked_fill(~keep, -torch.inf)
    return masked.logsumexp(-1), masked.softmax(-1) @ v


def products(head: Exact, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """W / exp(shift) of all keys (h, M, N), and shift (h, M); the same for every window."""
    of_q, shift = query_features(head.q, map)
    return of_q @ key_features(head.k, map).mT, shift


def approximate(head: Exact, map: FeatureMap, made: tuple[Tensor, Tensor] | None = None) -> Approximate:
    """The head with `map`, which is of the same heads; made: its `products`, where they are there already."""
    weights, shift = products(head, map) if made is None else made
    weights = weights * head.far
    total = weights.sum(-1).clamp(min=TINY)
    far_lse = shift + total.log()
    share = torch.sigmoid(far_lse - head.near_lse)[..., None]
    out = torch.lerp(head.near_out, weights @ head.v / total[..., None], share)
    return Approximate(weights, shift, far_lse, out)


def squared_error(head: Exact, out: Tensor, metric: Tensor) -> Tensor:
    """|L^T (out - O)|^2 of every row (h, M)."""
    return ((out - head.out) @ metric).square().sum(-1)


def divergence(head: Exact, found: Approximate) -> Tensor:
    """KL of the head's weights from those with a map, over all keys, in nats, of every row (h, M): up to what does not
    depend on the map the cross-entropy of attention weights."""
    logs = found.weights.clamp(min=TINY).log() + found.shift[..., None]
    moved = (head.weights * (head.scores - logs)).sum(-1)
    return moved + torch.logaddexp(head.near_lse, found.far_lse) - head.lse


class HeldOut:
    """Rows that maps are judged by, and what their heads do exactly: computed once, for all maps."""

    @torch.no_grad()
    def __init__(self, rows: Rows, metric: Tensor, scale: float, sink: int, windows: Sequence[int]) -> None:
        self.metric, heads = metric, metric.shape[0]
        step = max(1, AT_ONCE // (rows.at.numel() * rows.k.shape[1]))
        self.groups = [torch.arange(first, min(first + step, heads)) for first in range(0, heads, step)]
        self.exact = [exact_at(rows, some, scale, sink, windows) for some in self.groups]
        self.dropped = torch.cat(
            [
                torch.stack([self._sum(head, head.near_out, some) for head in of_windows], -1)
                for some, of_windows in zip(self.groups, self.exact, strict=True)
            ]
        )

    def _sum(self, head: Exact, out: Tensor, some: Tensor) -> Tensor:
        return squared_error(head, out, self.metric[some]).double().sum(-1)

    @torch.no_grad()
    def error(self, map: FeatureMap) -> Tensor:
        """float64 (H,): the squared error of outputs relative to that of dropping the far keys, mean over windows.
        Where dropping changes nothing it is 1, nothing is to be gained there; what is not finite is worse than all."""
        sums = []
        for some, of_windows in zip(self.groups, self.exact, strict=True):
            of = map.of(some)
            made = products(of_windows[0], of)
            sums.append(
                torch.stack([self._sum(head, approximate(head, of, made).out, some) for head in of_windows], -1)
            )
        found = torch.where(self.dropped > 0, torch.cat(sums) / self.dropped.clamp(min=1e-300), 1.0)
        return found.mean(-1).nan_to_num(nan=torch.inf).cpu()
