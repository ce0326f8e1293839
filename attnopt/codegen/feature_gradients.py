"""Gradients of the feature maps at what they map. The maps themselves are fitted offline and get none."""

from __future__ import annotations

import math

from torch import Tensor

from attnopt.feature_maps import KEY_CAP, FeatureMap


def at_queries(x: Tensor, maps: FeatureMap, f: Tensor, df: Tensor, dshift: Tensor) -> Tensor:
    """The gradient at queries x (..., h, N, D), whose features are f (..., h, N, F), for the gradients df at these and
    dshift (..., h, N) at their shifts.

    The largest exponent, which kind "exp" moves from features to shift, is taken for a constant: what is made of both
    together does not depend on it.
    """
    wq, cq, u = (t.to(x.dtype) for t in (maps.wq, maps.cq, maps.u))
    if maps.kind == "exp":
        de = f * df
        dx = _less_square(de @ wq, x, cq, de)
    else:
        dx = _through_products(f, df) @ wq
    return dx + dshift[..., None] * u[:, None, :]


def at_keys(x: Tensor, maps: FeatureMap, g: Tensor, dg: Tensor) -> Tensor:
    """The gradient at keys x (..., h, N, D), whose features are g (..., h, N, F), for the gradients dg at these."""
    wk, ck = maps.wk.to(x.dtype), maps.ck.to(x.dtype)
    if maps.kind == "exp":
        # None where the exponent is capped: within a thousandth of it, for exponentials differ in their last bits.
        de = (g * dg).masked_fill(g > 0.999 * math.exp(KEY_CAP), 0.0)
        return _less_square(de @ wk, x, ck, de)
    return _through_products(g, dg) @ wk


def _less_square(dx: Tensor, x: Tensor, c: Tensor, de: Tensor) -> Tensor:
    """dx with the share of exponents that end in - c |x|²; most maps have c of 0."""
    return dx - 2.0 * c[:, None, None] * x * de.sum(-1, keepdim=True) if bool(c.any()) else dx


def _through_products(f: Tensor, df: Tensor) -> Tensor:
    """The gradient at y (..., R) of kind "taylor", whose features f are [1, y, vec(y yᵀ) / sqrt 2]."""
    rank = math.isqrt(f.shape[-1])  # F = 1 + R + R² lies between R² and (R + 1)²
    y, dy = f[..., 1 : 1 + rank], df[..., 1 : 1 + rank]
    products = df[..., 1 + rank :].unflatten(-1, (rank, rank))
    both = products + products.mT
    return dy + (both @ y[..., None])[..., 0] * math.sqrt(0.5)
