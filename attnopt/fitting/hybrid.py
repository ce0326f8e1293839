"""A head with soft-max over near keys and a feature map for the far ones, and how far it is from the head as it was.

    O_i = (sum_K e^{a_ij} v_j + sum_F W_ij v_j) / (sum_K e^{a_ij} + sum_F W_ij),    K = {j < s or i - j < w}, F the rest

The quadratic twin of what kernels run in chunks, over a few rows: for fitting, and differentiable at the map.
"""

from __future__ import annotations

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


def exact(rows: Rows, heads: Tensor, scale: float, sink: int, window: int) -> Exact:
    """The head itself, at the rows given."""
    repeat = rows.q.shape[0] // rows.k.shape[0]
    q, k, v = rows.q[heads].float(), rows.k[heads // repeat].float(), rows.v[heads // repeat].float()
    i, j = rows.at[:, None], torch.arange(k.shape[1], device=k.device)
    causal = j <= i
    near = causal & ((j < sink) | (i - j < window))
    scores = scale * q @ k.mT
    parts = []
    for keep in (causal, near):
        masked = scores.masked_fill(~keep, -torch.inf)
        parts += [masked.logsumexp(-1), masked.softmax(-1) @ v]
    return Exact(q, k, v, causal & ~near, scores, *parts)


def approximate(head: Exact, map: FeatureMap) -> Approximate:
    """The head with `map`, which is of the same heads."""
    of_q, shift = query_features(head.q, map)
    weights = (of_q @ key_features(head.k, map).mT) * head.far
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


@torch.no_grad()
def held_out_error(
    rows: list[Rows], map: FeatureMap, metric: Tensor, scale: float, sink: int, windows: tuple[int, ...]
) -> Tensor:
    """float64 (H,): the squared error of outputs relative to that of dropping the far keys, mean over windows. Where
    dropping changes nothing it is 1: nothing is to be gained there."""
    heads = map.heads
    sums = torch.zeros(2, len(windows), heads, dtype=torch.float64)
    for part in rows:
        step = max(1, AT_ONCE // (part.at.numel() * part.k.shape[1]))
        for first in range(0, heads, step):
            some = torch.arange(first, min(first + step, heads))
            of = map.of(some)
            for n, window in enumerate(windows):
                head = exact(part, some, scale, sink, window)
                for m, out in enumerate((approximate(head, of).out, head.near_out)):
                    sums[m, n, some] += squared_error(head, out, metric[some]).double().sum(-1).cpu()
    found = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-300), 1.0)
    # What is not finite is worse than anything.
    return found.mean(0).nan_to_num(nan=torch.inf)
