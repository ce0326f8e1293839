"""Which layers select tokens: against every assignment of short chains, and what is left open."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from attnopt.ir import DENSE, Choice
from attnopt.planner import Problem
from attnopt.planner.knapsack import Array
from attnopt.planner.reuse import allowed, chains_of, links_of, settled, shared_cost, solve

COUNTS = (8, 32)


def tokens(count: int, behind: int = 0) -> Choice:
    return Choice.of("top_tokens", {"k": count, "sink": 0, "recent": 4, "every": 1, "similar": 0.0, "behind": behind})


def problem_of(layers: int, heads: int, seed: int = 0) -> Problem:
    """Dense, a window, selecting, and reading 1 or 2 attentions behind; reading is cheap and selecting is not."""
    drawn = np.random.default_rng(seed)
    window = Choice.of("sink_window", {"sink": 0, "alpha": 64, "beta": 0.0})
    linked = [tokens(count, behind) for count in COUNTS for behind in (0, 1, 2)]
    choices = (DENSE, window, *linked)
    price = np.array([1.0, 0.3, *([0.6, 0.08, 0.08] * 2)])
    cost = price * drawn.uniform(0.8, 1.2, (layers * heads, len(choices)))
    damage = drawn.exponential(1.0, cost.shape) * np.array([0.0, 0.4, *([0.02, 0.1, 0.2] * 2)])
    return Problem(
        heads=tuple((f"layers.{layer}", head) for layer in range(layers) for head in range(heads)),
        choices=choices, damage=damage, cost=cost, span=np.zeros(cost.shape, dtype=np.int64),
        site=np.repeat(np.arange(layers), heads), group_cost=np.zeros(layers),
    )  # fmt: skip


def fits(problem: Problem, index: Array) -> bool:
    """Whether every head that reads finds a head that selects as many, or is dense."""
    chosen = dict(zip(problem.heads, (problem.choices[c] for c in index), strict=True))
    sites = list(dict.fromkeys(site for site, _ in problem.heads))
    for (site, head), choice in chosen.items():
        behind = dict(choice.params).get("behind", 0)
        if not behind:
            continue
        at = sites.index(site) - int(behind)
        source = chosen.get((sites[at], head)) if at >= 0 else None
        alike = source is not None and dict(source.params).get("k") == choice["k"] and not source["behind"]
        if source is None or not (source == DENSE or alike):
            return False
    return True


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [0.1, 0.7, 5.0])
def test_the_best_chain_of_all(seed: int, price: float) -> None:
    problem = problem_of(4, 1, seed)
    links, rows = links_of(problem), chains_of(problem)
    value = problem.damage + price * problem.cost
    every = itertools.product(range(len(problem.choices)), repeat=4)
    best = min(sum(value[row, c] for row, c in enumerate(index)) for index in every if fits(problem, np.array(index)))
    open_to = allowed(rows, links, solve(rows, problem.damage, price * problem.cost, links), 4)
    chosen = np.where(open_to, value, np.inf).argmin(1)
    assert fits(problem, chosen)
    assert value[np.arange(4), chosen].sum() == pytest.approx(best, rel=1e-12)


def test_whatever_is_chosen_of_what_is_left_finds_its_source() -> None:
    """Also when heads are made dense again afterwards, as a search does that backs off."""
    problem = problem_of(5, 3, 1)
    for nats in (0.05, 0.5, 3.0):
        left = settled(problem, nats)
        assert np.isfinite(left.damage[:, 0]).all()
        drawn = np.random.default_rng(0)
        for _ in range(200):
            index = np.array([drawn.choice(np.flatnonzero(np.isfinite(row))) for row in left.damage])
            index[drawn.random(len(index)) < 0.3] = 0
            assert fits(problem, index)
    # Something reads what another layer selected, and a window is open to those that nobody reads.
    links = links_of(problem)
    assert np.isfinite(left.damage[:, links.behind > 0]).any() and np.isfinite(left.damage[:, 1]).any()


def test_only_selecting_in_every_step_provides() -> None:
    """Reading was tried behind a source that does: one that selects now and then is another."""
    often = problem_of(2, 1)
    seldom = tuple(
        Choice.of(c.candidate, {**dict(c.params), "every": 64, "similar": 0.875})
        if c.candidate == "top_tokens" and not c["behind"] else c for c in often.choices
    )  # fmt: skip
    every = (*often.choices, *(c for c in seldom if c not in often.choices))
    at = [often.choices.index(c) if c in often.choices else seldom.index(c) for c in every]
    problem = replace(often, choices=every, **{x: getattr(often, x)[:, at] for x in ("damage", "cost", "span")})
    # Free of damage and nearly of cost, if it were allowed.
    problem.damage[:, len(often.choices) :] = 0.0
    left = settled(problem, 0.5)
    reads = [c for c in every if c.candidate == "top_tokens" and c["behind"]]
    assert any(np.isfinite(left.damage[1, every.index(c)]) for c in reads)
    assert not np.isfinite(left.damage[0, len(often.choices) :]).any()


def test_more_damage_allows_more_reading() -> None:
    problem = problem_of(6, 4, 2)
    open_to = [
        np.isfinite(settled(problem, nats).damage[:, links_of(problem).behind > 0]).sum() for nats in (1e-6, 4.0)
    ]
    assert open_to[0] < open_to[1]


def test_a_problem_without_links_is_left_as_it_is() -> None:
    problem = problem_of(3, 2)
    plain = replace(problem, choices=(*problem.choices[:3],), **{
        name: getattr(problem, name)[:, :3] for name in ("damage", "cost", "span")
    })  # fmt: skip
    assert settled(plain, 0.1) is plain


def test_the_cache_is_a_part_of_the_cost() -> None:
    problem = problem_of(2, 4)
    keys = np.full(problem.cost.shape, 100, dtype=np.int64)
    cached = replace(problem, kv=np.repeat(np.arange(4), 2), key_cost=np.full(4, 0.5), reads=keys, length=1000)
    np.testing.assert_allclose(shared_cost(cached), problem.cost + 25.0)
    assert np.array_equal(shared_cost(problem), problem.cost)
