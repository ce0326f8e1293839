"""What the tests of linear far parts share: maps, inputs, tables."""

from __future__ import annotations

import torch

from attnopt.feature_maps import FeatureMap, shapes

RANK = {"exp": 24, "taylor": 5}
# Of eight query heads: the served ones, and the sink and window of each of all.
HEADS = 8
SERVED = (0, 2, 3, 4, 7)
SINKS, WINDOWS = (4, 0, 0, 4, 3, 9, 1, 70), (32, 7, 1, 32, 2**30, 50, 3, 5)


def maps(kind: str, heads: int, dim: int, seed: int = 0, rank: int = 0) -> FeatureMap:
    """Maps that do not cancel out: of exponents around 1, with a mean key and a constant."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], size: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    wide = shapes(heads, rank or RANK[kind], dim)
    size = {"wq": dim**-0.5, "wk": dim**-0.5, "bq": 0.3, "bk": 0.3, "cq": 0.02, "ck": 0.02, "u": 0.1, "u0": 0.5}
    return FeatureMap(kind, *(normal(shape, size[name]) for name, shape in wide.items()))


def inputs(length, dtype=torch.float32, batch=2, kv_heads=4, dim=16, dim_v=24):
    """q (B, 8, N, D), k (B, G, N, D), v (B, G, N, Dv), physically tokens first."""
    generator = torch.Generator().manual_seed(length + kv_heads)

    def normal(heads, width):
        return torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)

    return normal(HEADS, dim), normal(kv_heads, dim), normal(kv_heads, dim_v)


def tables(served=SERVED, sinks=SINKS, windows=WINDOWS):
    """heads, and their sinks and windows, int32 (h,)."""
    heads = torch.tensor(served, dtype=torch.int32)
    return heads, *(torch.tensor(x, dtype=torch.int32)[heads.long()] for x in (sinks, windows))


def site(sinks=SINKS, windows=WINDOWS):
    """The same of all heads, as operators take them: sinks, alphas int32 (H,), betas float64 (H,)."""
    return (
        torch.tensor(sinks, dtype=torch.int32),
        torch.tensor(windows, dtype=torch.int32),
        torch.zeros(len(sinks)).double(),
    )


def padding(name, length):
    """bool (2, N)."""
    j = torch.arange(length)
    rows = {
        "none": None,
        "left": torch.stack((j >= length // 3, j >= 0)),
        "right": torch.stack((j < length - length // 4, j >= 0)),
        "all of one": torch.stack((j < 0, j >= 0)),
        "holes": torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.4,
    }
    return rows[name]


def naive(q, k, v, heads, sinks, windows, maps, pad=None):
    """Row by row in float64, out of the formula: out (B, h, N, Dv), lse (B, h, N)."""
    from attnopt.feature_maps import key_features, query_features

    q, k, v = (x.double() for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], len(heads), q.shape[2], v.shape[3])
    lse = q.new_full(out.shape[:3], float("-inf"))
    for n, h in enumerate(heads.tolist()):
        own = maps.of([n])
        for b in range(q.shape[0]):
            f, shift = query_features(q[b, h : h + 1], own)
            g = key_features(k[b, h // share][None], own)
            for i in range(q.shape[2]):
                far = [j for j in range(sinks[n], max(0, i - int(windows[n]) + 1)) if pad is None or pad[b, j]]
                if far:
                    weights = (f[0, i] * g[0, far]).sum(-1)
                    out[b, n, i] = (weights[:, None] * v[b, h // share, far]).sum(0) / weights.sum()
                    lse[b, n, i] = shift[0, i] + weights.sum().log()
    return out, lse
