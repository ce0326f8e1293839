"""MoA's planner as the benchmark implements it: the equation, the grid, the programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from models import HEADS, LAYERS, build, tokens

from benchmarks.planners.moa import (
    BLOCK,
    Problem,
    Rule,
    dropped,
    influence,
    loss_of,
    over_groups,
    pareto,
    profile,
    rules,
    solve,
)  # fmt: skip


def attention(q, k, v, scale, without=None):
    """Causal attention; `without` (i, j): key j is dropped from row i and the row renormalised."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    if without is not None:
        keep[without] = False
    return (q @ k.mT * scale).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def test_the_influence_of_an_entry_is_the_change_of_a_linear_loss():
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, heads, 9, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    dense = attention(q, k, v, 0.7)
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(1, 9):
        for j in range(i + 1):
            moved = attention(q, k, v, 0.7, (i, j)) - dense
            expected += (moved * grad).sum((0, 2, 3)).abs()
    found = influence(q, k, v, grad, 0.7)
    assert found.shape == (4, 1, 1)
    torch.testing.assert_close(found[:, 0, 0], expected, rtol=1e-4, atol=1e-6)


def test_influence_is_summed_over_blocks_and_samples():
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(2, 2, 150, 8, generator=generator) for _ in range(4))
    whole = influence(q, k, v, grad, 0.3)
    assert whole.shape == (2, 3, 3) and not whole.triu(1).any() and (whole.tril()[:, 2] > 0).all()
    apart = sum(influence(*(x[n : n + 1] for x in (q, k, v, grad)), 0.3) for n in range(2))
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-4)
    # Rows of the first block do not see the others.
    first = influence(*(x[:, :, :BLOCK] for x in (q, k, v, grad)), 0.3)
    torch.testing.assert_close(whole[:, :1, :1], first, rtol=1e-5, atol=1e-4)


def test_a_model_is_profiled_as_its_attention_is_called():
    model, sequences = build("llama"), [tokens(1, 70, seed=n) for n in range(2)]
    found = profile(model, sequences)
    assert list(found) == [f"model.layers.{n}.self_attn" for n in range(LAYERS)]
    assert all(list(of_site) == [70] and of_site[70].shape == (HEADS, 2, 2) for of_site in found.values())
    assert all(p.grad is None for p in model.parameters())
    apart = [profile(model, [ids]) for ids in sequences]
    for site, of_site in found.items():
        mean = (apart[0][site][70] + apart[1][site][70]) / 2
        torch.testing.assert_close(of_site[70], mean, rtol=1e-5, atol=1e-9)
        assert (mean.tril().diagonal(dim1=1, dim2=2) > 0).all()
    # A loss over the first half alone does not reach the later rows.
    labels = [torch.where(torch.arange(70) < 60, sequences[0].roll(-1, 1), -100)]
    half = profile(model, sequences[:1], labels)
    assert all((of_site[70][:, 1] == 0).all() and (of_site[70][:, 0] > 0).any() for of_site in half.values())


def test_the_published_grid():
    """Profiled at 2k, 4k and 8k and extended to 16k, 48 of 99 rules survive."""
    made = rules((2048, 4096, 8192), (16384,))
    assert len(made) == len(set(made)) == 48
    assert all(r.span(2048) > 0 and r.span(8192) <= 8192 and r.span(16384) <= 16384 for r in made)
    assert Rule(0, 1.0) in made and Rule(8192, 0.0) in made and Rule(-2048, 1.0) not in made


def test_what_a_rule_keeps():
    rule = Rule(100, 0.0)
    assert rule.band(1024) == 2 and rule.density(1024) == 3 / 16 and Rule(0, 1.0).density(1024) == 1.0
    blocks = torch.ones(1, 4, 4).tril().double()
    # Rows 2 and 3 drop blocks 1 .. i - 2: none and one.
    assert dropped(blocks, rule, 256).tolist() == [1.0] and dropped(blocks, Rule(0, 1.0), 256).tolist() == [0.0]


def test_group_maxima_as_they_are_and_as_published():
    values = np.arange(8.0)[:, None]
    assert over_groups(values, 2, False)[:, 0].tolist() == [3, 3, 3, 3, 7, 7, 7, 7]
    assert over_groups(values, 2, True)[:, 0].tolist() == [6, 7, 6, 7, 6, 7, 6, 7]
    assert (over_groups(values, 8, False) == values).all()


def small(seed, density=0.55):
    choices = [Rule(64, 0.0), Rule(0, 0.25), Rule(0, 0.5), Rule(0, 1.0)]
    generator = np.random.default_rng(seed)
    # Two lengths, two layers of two heads; less is lost with a wider band.
    loss = np.sort(generator.exponential(size=(2, 2, 2, 4)), -1)[..., ::-1].copy()
    loss[..., -1] = 0
    return Problem.of(loss, choices, (4096, 8192), (16384,), density)


def feasible(problem, plan):
    spent = problem.cost[:, plan].sum((1, 2))
    few = all(len(set(layer)) <= 2 for layer in plan)
    return few and (spent <= problem.bound + 1e-6).all() and (spent >= 0.9 * problem.bound - 1e-6).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_the_best_there_is(seed):
    problem = small(seed)
    every = [np.array(p).reshape(2, 2) for p in itertools.product(range(4), repeat=4)]
    every = [p for p in every if feasible(problem, p)]
    assert every
    for objective in (0, 1):
        plan = solve(problem, objective)
        assert feasible(problem, plan)
        best = min(loss_of(problem, p)[objective] for p in every)
        assert loss_of(problem, plan)[objective] == pytest.approx(best, rel=1e-3)
    front = pareto(problem)
    values = [tuple(loss_of(problem, p)) for p in front]
    assert front and all(feasible(problem, p) for p in front)
    for v in values:
        assert not any((np.array(loss_of(problem, p)) < np.array(v) - 1e-3).all() for p in every)


def test_a_budget_that_nothing_keeps_has_no_plan():
    assert solve(small(0, 0.01), 0) is None and pareto(small(0, 0.01)) == []
