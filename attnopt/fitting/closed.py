"""Feature maps that need no training: what a head's queries and keys look like decides them.

    random      positive random features, orthogonal, around the mean key and the mean query
    centroids   one feature per cluster of keys: exp(scale q.c) times a share of each key in the clusters
    expansion   1 + s + s^2 / 2 of s = scale q.(k - mean key), cut down to the directions in which s varies most
    levelled    any of them with the level of its rows set by a ridge regression

All heads of a site at once; float64 inside. q (H, n, D) are sampled queries, k (H, m, D) sampled keys.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.feature_maps import FeatureMap
from attnopt.fitting.hybrid import AT_ONCE, Exact, approximate, exact
from attnopt.fitting.rows import Rows

LLOYD = 8
UNITY = 50
# Of a cluster, in units of the mean square of keys: exponents of this size are off by 2e-4 in float32.
SHARPEST = 3e3
# Of a row's level, relative to what a query's coordinates vary by: without it a head of 128 dimensions follows noise.
RIDGE = 1e-2


def random(
    q: Tensor, k: Tensor, scale: float, features: int, generator: torch.Generator, strength: float = 1.0
) -> FeatureMap:
    """exp(x.y) = E_w exp(w.x - |x|^2 / 2) exp(w.y - |y|^2 / 2), w normal, drawn in orthogonal blocks (Choromanski et
    al., arXiv:2009.14794, lemma 1 and section 2.4), x and y the centred q and k, scaled to be of one size: the variance
    grows with |x + y|^2, and what the centres contribute are exact factors of rows and of keys. What features see of
    a score is multiplied by `strength`, which is the variance's exponent too."""
    of_mean, scale = scale, scale * strength
    q, k, dim = q.double(), k.double(), q.shape[-1]
    middle, mu = q.mean(1), k.mean(1)
    size_q, size_k = ((x - c[:, None]).square().sum(-1).mean(-1).clamp(min=1e-12) for x, c in ((q, middle), (k, mu)))
    a = (size_k / size_q) ** 0.25
    drawn = torch.stack([_orthogonal(features, dim, generator) for _ in range(q.shape[0])]).to(q.device)
    root = math.sqrt(scale)
    wq, wk = drawn * (root * a)[:, None, None], drawn * (root / a)[:, None, None]
    cq, ck = scale * a.square() / 2, scale / a.square() / 2
    # Centred quantities written out in q and in k; the last factor of a key is that of the mean query.
    bq = -(wq * middle[:, None]).sum(-1) - (cq * middle.square().sum(-1))[:, None] - math.log(features)
    bk = -(wk * mu[:, None]).sum(-1) - (ck * mu.square().sum(-1) + scale * (middle * mu).sum(-1))[:, None]
    wq = wq + 2 * (cq[:, None] * middle)[:, None]
    wk = wk + (2 * ck[:, None] * mu + scale * middle)[:, None]
    return _map("exp", wq, bq, cq, wk, bk, ck, of_mean * mu, torch.zeros_like(cq))


def _orthogonal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Normal vectors (count, dim), orthogonal in blocks of `dim`."""
    blocks = []
    for _ in range(math.ceil(count / dim)):
        block = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        sizes = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=-1)
        blocks.append(torch.linalg.qr(block).Q.mT * sizes[:, None])
    return torch.cat(blocks)[:count]


def clusters(k: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """Centres of keys, float64 (H, F, D): k-means of a few rounds."""
    k = k.double()
    heads, count, dim = k.shape
    chosen = torch.stack([torch.randperm(count, generator=generator)[:features] for _ in range(heads)]).to(k.device)
    # Of fewer keys than features some stand for two.
    chosen = chosen[:, torch.arange(features) % chosen.shape[1]]
    centres = k.gather(1, chosen[..., None].expand(-1, -1, dim)).clone()
    for _ in range(LLOYD):
        nearest = _distances(k, centres).argmin(-1)
        members = torch.zeros(heads, features, 1, dtype=k.dtype, device=k.device)
        members.scatter_add_(1, nearest[..., None], torch.ones_like(k[..., :1]))
        sums = torch.zeros_like(centres).scatter_add_(1, nearest[..., None].expand(-1, -1, dim), k)
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)
    return centres


def centroids(k: Tensor, centres: Tensor, scale: float, breadth: float = 1.0) -> FeatureMap:
    """exp(scale q.k) where k is near a centre c is exp(scale q.c): keys are shared out to clusters (Vyas et al., "Fast
    transformers with clustered attention", arXiv:2007.04825) by Gaussians around the centres whose weights are such
    that a key's shares add up to one, as nearly as they can. Their variance is that of clusters times `breadth`: in
    many dimensions narrow ones leave most keys out."""
    k, dim = k.double(), k.shape[-1]
    distances = _distances(k, centres)
    width = breadth * distances.amin(-1).mean(-1) / dim
    # Narrower Gaussians would be differences of exponents too large for float32.
    width = width.maximum(k.square().sum(-1).mean(-1) / (2 * SHARPEST)).clamp(min=1e-30)
    shares = (-distances / (2 * width[:, None, None])).clamp(min=-80).exp()
    # Non-negative least squares of shares.x = 1, by multiplicative updates (Lee and Seung, 2001).
    gram, wanted = shares.mT @ shares, shares.sum(1)
    weights = torch.ones_like(wanted)
    for _ in range(UNITY):
        weights = weights * wanted / (gram @ weights[..., None])[..., 0].clamp(min=1e-300)
    weights = weights.clamp(min=1e-6)
    ck = 1 / (2 * width)
    wk = 2 * ck[:, None, None] * centres
    bk = -ck[:, None] * centres.square().sum(-1) + weights.log()
    mu, nothing = k.mean(1), torch.zeros_like(width)
    wq = scale * (centres - mu[:, None])
    return _map("exp", wq, torch.zeros_like(bk), nothing, wk, bk, ck, scale * mu, nothing)


def _distances(k: Tensor, centres: Tensor) -> Tensor:
    """Squared, (H, m, F)."""
    return torch.cdist(k, centres).square()


def expansion(q: Tensor, k: Tensor, scale: float, rank: int, strength: float = 1.0) -> FeatureMap:
    """The `rank` directions that keep most of scale q.(k - mu): with C_q = E[q q^T] and C_k the covariance of keys, the
    leading singular vectors of C_q^(1/2) C_k^(1/2). s is multiplied by `strength`."""
    q, k = q.double(), k.double()
    mu = k.mean(1)
    centred = k - mu[:, None]
    (root_q, inverse_q), (root_k, inverse_k) = (_roots(x.mT @ x / x.shape[1]) for x in (q, centred))
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    factor = (scale * strength * s[:, None, :rank]).sqrt()
    wq, wk = ((inverse_q @ u[..., :rank] * factor).mT, (inverse_k @ vh.mT[..., :rank] * factor).mT)
    bk = -(wk * mu[:, None]).sum(-1)
    nothing = torch.zeros_like(mu[:, 0])
    return _map("taylor", wq, torch.zeros_like(bk), nothing, wk, bk, nothing, scale * mu, nothing)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Its square root, and the inverse of that where it is more than nothing."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-9 * values[:, -1:].clamp(min=1e-300)
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=1e-150), 0.0)
    return vectors * root[:, None] @ vectors.mT, vectors * inverse[:, None] @ vectors.mT


@torch.no_grad()
def levelled(map: FeatureMap, rows: list[Rows], scale: float, sink: int, window: int) -> FeatureMap:
    """`map` with u and u0 moved by a ridge regression on queries of how far the logarithm of a row's far sum is off,
    rows weighted by what that moves: m (1 - m) at a far mass of m."""
    dim = map.wq.shape[-1]
    gram = torch.zeros(map.heads, dim + 1, dim + 1, dtype=torch.float64)
    wanted = torch.zeros(map.heads, dim + 1, dtype=torch.float64)
    for part in rows:
        step = max(1, AT_ONCE // (part.at.numel() * part.k.shape[1]))
        for first in range(0, map.heads, step):
            some = torch.arange(first, min(first + step, map.heads))
            head = exact(part, some, scale, sink, window)
            off, weight = _level(head, map.of(some))
            x = torch.cat((head.q, torch.ones_like(head.q[..., :1])), -1).double()
            weighted = x * weight[..., None]
            gram[some] += (weighted.mT @ x).cpu()
            wanted[some] += (weighted * off[..., None]).sum(1).cpu()
    total = gram[:, -1, -1].clamp(min=1e-30)
    ridge = RIDGE * gram[:, :dim, :dim].diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    penalty = torch.diag_embed(torch.cat((ridge[:, None].expand(-1, dim), (1e-6 * total)[:, None]), -1))
    found = torch.linalg.solve(gram + penalty, wanted[..., None])[..., 0].to(map.u)
    return replace(map, u=map.u + found[:, :dim], u0=map.u0 + found[:, dim])


def _level(head: Exact, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """How far the logarithm of each row's far sum is off, and the row's weight, float64 (h, M)."""
    mass = head.weights.sum(-1).double()
    off = head.lse + mass.clamp(min=1e-20).log() - approximate(head, map).far_lse
    weight = mass * (1 - mass).clamp(min=0)
    return torch.where(weight > 0, off.double(), 0.0), weight


def _map(kind: str, *tensors: Tensor) -> FeatureMap:
    wq, bq, cq, wk, bk, ck, u, u0 = (x.float() for x in tensors)
    return FeatureMap(kind, wq, bq, cq, wk, bk, ck, u, u0)
