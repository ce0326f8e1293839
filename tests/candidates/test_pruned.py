"""pruned: a constant in the head's place, which costs nothing and keeps nothing."""

from __future__ import annotations

import torch
from candidates.degenerate import HEADS, Degenerate, alike_outputs, any_inputs

from attnopt.cost import CostTable
from attnopt.ir import Mask, Site
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation

candidate = CANDIDATES["pruned"]


def outputs() -> torch.Tensor:
    return alike_outputs()[2][0, :, 0].float().repeat_interleave(2, 0)


DEGENERATE = [Degenerate("a head whose output is constant", {}, alike_outputs, outputs)]


def test_every_row_is_the_mean() -> None:
    q, k, v = any_inputs()
    means = torch.randn(HEADS, v.shape[3])
    found = candidate.reference(q, k, v, {}, 1.0, given=means)
    assert found.shape == (*q.shape[:3], v.shape[3]) and found.equal(means.double()[None, :, None].expand_as(found))


def test_it_keeps_no_key_and_costs_nothing() -> None:
    assert candidate.span({}, 4096) == (0, 0)
    assert candidate.cost(CostTable.by_density(), {}, 4096) == 0
    assert (candidate.far, candidate.map_name({}), candidate.far_part({})) == ("gone", "", ("", 0))


def test_a_profile_knows_of_removal_only_and_offers_no_choice() -> None:
    grid = Grid((0,), (16,))
    seen = Observation.zeros(HEADS, grid, 64)
    seen.ablation_t2[:] = 3.0
    assert candidate.damage(seen, {}, 64).tolist() == [1.5] * HEADS and candidate.space(grid, [64]) == []


def test_any_attention_with_known_heads_may_lose_some() -> None:
    assert candidate.refuse(Site("a", 0, "sdpa", 4, 2, 8, 8, 0.3, "float32", Mask(causal=True, window=8))) is None
    refusal = candidate.refuse(Site("a", 0, "sdpa", 0, 0, 8, 8, 0.3, "float32", Mask(causal=True)))
    assert refusal is not None and refusal.code == "symbolic-heads"
