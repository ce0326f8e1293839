"""Maps on heads of which it is known what they should give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.feature_maps import FeatureMap
from attnopt.fitting import closed
from attnopt.fitting.hybrid import HeldOut, approximate, divergence, exact
from attnopt.fitting.rows import Rows

H, G, M, N, D, DV = 4, 2, 24, 150, 8, 6
SCALE, SINK, WINDOWS = 0.5, 2, (8, 32)


def rows(keys: Tensor, size: float = 1.0, seed: int = 0) -> Rows:
    """Of a head with the keys given, (G, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    at = (60 + torch.randperm(N - 60, generator=generator)[:M]).sort().values
    q = size * (torch.randn(H, M, D, generator=generator) + 0.5)
    return Rows(q, at, keys, torch.randn(G, N, DV, generator=generator))


def per_head(part: Rows) -> Tensor:
    return part.k.repeat_interleave(H // G, 0)


def centres_of(keys: Tensor, features: int) -> Tensor:
    return closed.clusters(keys, features, torch.Generator().manual_seed(0))


def error(part: Rows, map: FeatureMap) -> Tensor:
    return HeldOut(part, torch.eye(DV).expand(H, DV, DV), SCALE, SINK, WINDOWS).error(map)


def test_keys_of_few_kinds_are_linear_attention() -> None:
    """With as many features as there are different keys, exp(scale q.c) and which key it is are exact features."""
    kinds = 3 * torch.randn(G, 5, D)
    part = rows(kinds[:, torch.arange(N) % 5], size=2.0)
    map = closed.centroids(per_head(part), centres_of(per_head(part), 40), SCALE)
    assert (error(part, map) < 1e-6).all()
    # And the weights of attention, not only what comes of them.
    head = exact(part, torch.arange(H), SCALE, SINK, WINDOWS[0])
    assert divergence(head, approximate(head, map)).abs().max() < 1e-4


def test_the_divergence_is_that_of_the_weights() -> None:
    part = rows(torch.randn(G, N, D))
    map = closed.random(part.q, per_head(part), SCALE, 16, torch.Generator().manual_seed(0))
    head = exact(part, torch.arange(H), SCALE, SINK, WINDOWS[0])
    found = approximate(head, map)
    i, j = part.at[:, None], torch.arange(N)
    logs = torch.where(head.far, found.weights.double().log() + found.shift[..., None], head.scores.double())
    one, other = (x.masked_fill(j > i, -torch.inf).softmax(-1) for x in (head.scores.double(), logs))
    expected = (one * (one.clamp(min=1e-300).log() - other.clamp(min=1e-300).log())).sum(-1)
    torch.testing.assert_close(divergence(head, found).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.out.double(), other @ head.v.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.out.double(), one @ head.v.double(), rtol=1e-4, atol=1e-5)


def test_random_features_converge_around_large_means() -> None:
    """The means of queries and keys are exact factors: features see only what is left of them."""
    part = rows(0.5 * torch.randn(G, N, D) + 2.0, size=0.5)
    few, many = (
        error(part, closed.random(part.q, per_head(part), SCALE, n, torch.Generator().manual_seed(1))) for n in (8, 512)
    )
    assert (many < 0.02).all() and (many < few / 3).all()


def test_expansions_are_exact_to_second_order() -> None:
    """A third of the scores: a twenty-seventh of their error. One direction of varying keys: rank 1 is enough."""
    line = torch.randn(G, N, 1) * torch.randn(G, 1, D) + 3.0
    wide, narrow = (
        error(part, closed.expansion(part.q, per_head(part), SCALE, 1))
        for part in (rows(line, size=size) for size in (0.3, 0.1))
    )
    assert (wide < 1e-2).all() and (narrow < wide / 81).all()
    part = rows(torch.randn(G, N, D), size=0.3)
    full, cut = (error(part, closed.expansion(part.q, per_head(part), SCALE, rank)) for rank in (D, 2))
    assert (full < cut).all() and (full < 0.01).all()


def test_a_level_that_is_off_is_set_right() -> None:
    part, held_out = (rows(0.5 * torch.randn(G, N, D) + 1.0, size=0.5, seed=seed) for seed in (0, 1))
    right = closed.expansion(part.q, per_head(part), SCALE, D)
    wrong = FeatureMap("taylor", *right.tensors[:6], right.u + 0.2, right.u0 - 1.0)
    before, after, best = (
        error(held_out, map) for map in (wrong, closed.levelled(wrong, [part], SCALE, SINK, WINDOWS[0]), right)
    )
    assert (after < before / 20).all() and (after < 1.5 * best).all()


@pytest.mark.parametrize("features", [3, 20])
def test_fewer_keys_than_features(features: int) -> None:
    keys = torch.randn(H, 7, D)
    map = closed.centroids(keys, centres_of(keys, features), SCALE)
    assert map.rank == features and not map.problem(D)
