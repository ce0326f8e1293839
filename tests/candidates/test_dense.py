"""dense: every key the site's own mask keeps, no damage, at any site."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates.degenerate import Degenerate

from attnopt.ir import DENSE, Mask, Site
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation

dense = CANDIDATES["dense"]
DEGENERATE = [Degenerate("it is dense", {}), Degenerate("it keeps the site's own window", {}, own_window=7)]


def test_span_is_the_length_or_the_sites_own_window() -> None:
    assert dense.span({}, 512) == (0, 512)
    assert dense.span({}, 512, own_window=100) == (0, 100)
    assert dense.span({}, 50, own_window=100) == (0, 50)


def test_it_damages_nothing_and_is_the_only_choice_of_its_space() -> None:
    observation = Observation.zeros(3, Grid((0,), (16,)), 64)
    observation.t2.fill_(1.0)
    assert dense.damage(observation, {}, 64).tolist() == [0.0, 0.0, 0.0]
    assert dense.space(observation.grid, [64]) == [DENSE]


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(causal=True, window=8), Mask(window=8)])
def test_it_stands_at_any_site(mask: Mask) -> None:
    assert dense.refuse(Site("a", 0, "sdpa", 4, 2, 8, 8, 0.3, "float32", mask)) is None


def test_reference_is_causal_attention() -> None:
    q, k, v = torch.randn(2, 4, 33, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(dense.reference(q, k, v, {}, 0.3), expected, atol=1e-5, rtol=1e-5)
