"""Feature maps against their formulas, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnopt.feature_maps import KEY_CAP, NAMES, FeatureMap, key_features, query_features, shapes

B, H, N, D, R = 2, 3, 7, 5, 4


def made(kind: str, seed: int = 0) -> FeatureMap:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes(H, R, D).items()}
    return FeatureMap(kind, *(drawn[name] for name in NAMES))


def weights(q: Tensor, k: Tensor, map: FeatureMap) -> Tensor:
    features, shift = query_features(q, map)
    return shift.exp()[..., None] * (features @ key_features(k, map).mT)


def test_exponential_maps_are_their_formula() -> None:
    map, q, k = made("exp"), *torch.randn(2, B, H, N, D, dtype=torch.float64)
    for h in range(H):
        wq, bq, cq, wk, bk, ck, u, u0 = (x[h].double() for x in map.tensors)
        for i, j in ((0, 0), (3, 6)):
            x, y = q[1, h, i], k[1, h, j]
            sums = ((wq @ x + bq - cq * x @ x) + (wk @ y + bk - ck * y @ y)).exp().sum() * (u @ x + u0).exp()
            torch.testing.assert_close(weights(q, k, map)[1, h, i, j], sums, rtol=1e-12, atol=0)
    assert map.width == R and weights(q.float(), k.bfloat16(), map).dtype == torch.float32


def test_expansions_are_one_and_s_and_half_its_square() -> None:
    map, q, k = made("taylor"), *torch.randn(2, B, H, N, D, dtype=torch.float64)
    y, z = (x @ w.double().mT + b.double()[:, None] for x, w, b in ((q, map.wq, map.bq), (k, map.wk, map.bk)))
    s = y @ z.mT
    factor = ((q * map.u.double()[:, None]).sum(-1) + map.u0.double()[:, None]).exp()
    torch.testing.assert_close(weights(q, k, map), factor[..., None] * (1 + s + s.square() / 2), rtol=1e-12, atol=1e-12)
    assert map.width == key_features(k, map).shape[-1] == 1 + R + R**2
    assert (weights(q, k, map) > 0).all()


def test_nothing_overflows() -> None:
    map = made("exp")
    q, k = 1e3 * torch.randn(2, B, H, N, D)
    features, shift = query_features(q, map)
    assert features.isfinite().all() and shift.isfinite().all() and (features.amax(-1) == 1).all()
    assert float(key_features(k, map).amax()) <= math.exp(KEY_CAP) * 1.001


def test_maps_of_some_heads() -> None:
    map, q, k = made("exp"), *torch.randn(2, B, H, N, D)
    torch.testing.assert_close(weights(q[:, [2, 0]], k[:, [2, 0]], map.of([2, 0])), weights(q, k, map)[:, [2, 0]])


@pytest.mark.parametrize("kind", ["exp", "taylor"])
def test_empty_inputs(kind: str) -> None:
    features, shift = query_features(torch.zeros(0, H, 0, D), made(kind))
    assert features.shape == (0, H, 0, made(kind).width) and shift.shape == (0, H, 0)


def test_what_is_wrong_with_a_map_is_said() -> None:
    good = made("exp")
    assert not good.problem(D)
    assert "maps 5 numbers where a head has 6" in good.problem(D + 1)
    assert "'cosine'" in FeatureMap("cosine", *good.tensors).problem()
    parts = dict(zip(NAMES, good.tensors, strict=True))
    for change, words in (
        ({"u0": torch.zeros(H + 1)}, "u0 is float32 (4,), expected float32 (3,)"),
        ({"bk": torch.full((H, R), torch.nan)}, "bk is not finite"),
        ({"wk": torch.zeros(H, R, D).double()}, "wk is float64"),
        ({"wq": torch.zeros(H, D)}, "wq is (3, 5)"),
    ):
        assert words in FeatureMap("exp", *{**parts, **change}.values()).problem()
