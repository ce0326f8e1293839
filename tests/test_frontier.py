"""The front: as good as the exact optimum to a percent, fast for a large model, and never over a limit."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from problems import LENGTH, SPANS, profile_like, spans_problem

from attnopt.planner import Limits, Problem, compare, front, make_problem, solve
from benchmarks.planner_front import synthetic_profile, synthetic_table

pytestmark = pytest.mark.slow

FEW = [SPANS[0], (0, 64), (4, 64), (0, 1024)]


def random_problem(sites: int, heads: int, seed: int, group_cost: float = 0.0, kv_heads: int = 0) -> Problem:
    """Damage and cost of no shape at all, but for dense, which damages nothing and costs most."""
    rng = np.random.default_rng(seed)
    damage, cost = rng.exponential(1, (sites * heads, len(FEW))), rng.uniform(0.1, 1, (sites * heads, len(FEW)))
    damage[:, 0], cost[:, 0] = 0, 1
    return spans_problem(damage, cost, sites, group_cost, kv_heads, FEW, 0.3 / LENGTH * bool(kv_heads))


def brute(problem: Problem, limits: Limits) -> list[tuple[float, float]]:
    """(damage, cost) of every assignment within the limits."""
    found = []
    for index in itertools.product(range(len(problem.choices)), repeat=len(problem.heads)):
        solution = problem.of(np.array(index))
        spans = problem.span[np.arange(len(index)), solution.index]
        few = limits.spans is None or all(
            len(set(spans[problem.site == s])) <= limits.spans for s in range(len(problem.group_cost))
        )
        if few and limits.allow(solution):
            found.append((solution.damage, solution.cost))
    return found


CASES = [
    (0.0, 0, Limits()), (0.2, 0, Limits()), (0.0, 0, Limits(spans=1)), (0.2, 0, Limits(spans=2)),
    (0.0, 2, Limits()), (0.2, 1, Limits(spans=2)), (0.0, 1, Limits(memory=2.2 * LENGTH)),
    (0.1, 2, Limits(spans=2, memory=3.5 * LENGTH)),
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_and_front_against_every_assignment(case: tuple[float, int, Limits], seed: int) -> None:
    group_cost, kv_heads, limits = case
    problem = random_problem(2, 4 if kv_heads != 1 else 3, seed, group_cost, kv_heads)
    problem = problem if len(problem.heads) < 8 else random_problem(1, 6, seed, group_cost, kv_heads)
    every = brute(problem, limits)
    sweep = front(problem, limits)
    assert len(sweep)
    for k in range(len(sweep)):
        point = sweep.point(k)
        assert limits.allow(point)
        assert (point.damage, point.cost) == pytest.approx((sweep.damage[k], sweep.cost[k]))
    for share in (0.1, 0.4, 0.8):
        limit = share * max(d for d, _ in every)
        best = min((c for d, c in every if d <= limit * (1 + 1e-9)), default=None)
        if best is None:
            assert sweep.pick(max_damage=limit) is None
            continue
        found = compare(sweep, max_damage=limit, gap=0)
        assert limits.allow(found.solution) and found.solution.damage <= limit * (1 + 1e-6)
        assert found.solution.cost == pytest.approx(best, rel=1e-6)
        quick = sweep.pick(max_damage=limit)
        if quick is not None:
            assert quick.damage <= limit * (1 + 1e-9) and limits.allow(quick)
            assert found.gap is not None and quick.cost == pytest.approx(best * (1 + found.gap / 100))
    if limits.memory is None:
        # Whatever a unit of cost is worth, no assignment is better than the best point of the front.
        for price in np.geomspace(0.01, 100, 25):
            best = min(d + price * c for d, c in every)
            within = 0.03 if limits.spans is not None else 0.01 if group_cost else 0.0
            assert (sweep.damage + price * sweep.cost).min() == pytest.approx(best, rel=within, abs=1e-9)


@pytest.mark.parametrize("kind", ["heads", "spans", "decode", "mixed"])
@pytest.mark.parametrize("seed", range(1))
def test_the_front_is_within_a_percent_of_the_exact_plan(kind: str, seed: int) -> None:
    cache = {} if kind in ("heads", "spans") else {"kv_heads": 2, "key_cost": 4 / LENGTH}
    group_cost = 0.05 if kind in ("spans", "mixed") else 0.0
    problem = profile_like(6, 8, seed, group_cost, prefill=0.0 if kind == "decode" else 1.0, **cache)  # type: ignore[arg-type]
    sweep = front(problem, Limits(spans=4 if group_cost else None))
    for damage in (1e-3, 1e-1):
        found = compare(sweep, max_damage=damage, seconds=2, gap=2e-3)
        assert found.solution.damage <= damage * (1 + 1e-6)
        # Spans and unions at once are the hardest, and 48 heads few: with a thousand it is under a percent there too.
        assert found.gap is not None and 0 <= found.gap <= (2.0 if kind == "mixed" else 1.0)
    found = compare(sweep, max_cost=0.5 * problem.dense.cost, seconds=2, gap=2e-3)
    assert found.solution.cost <= 0.5 * problem.dense.cost * (1 + 1e-6) and (found.gap or 0) <= 3.0


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_under_a_percent_on_random_problems(seed: int) -> None:
    rng = np.random.default_rng(seed)
    damage = rng.exponential(rng.exponential(1, (256, 1)), (256, len(SPANS)))
    cost = rng.uniform(0.05, 1, (256, len(SPANS)))
    damage[:, 0], cost[:, 0] = 0, 1
    sweep = front(spans_problem(damage, cost, 8))
    for share in (0.01, 0.1):
        gap = compare(sweep, max_damage=share * float(sweep.damage[-1])).gap
        assert gap is not None and gap <= 1.0


def test_where_all_layers_at_once_are_too_many_each_by_itself_bounds_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = front(profile_like(4, 8, 0), Limits(spans=4))
    for damage in (1e-3, 1e-2, 1e-1):
        exact = compare(sweep, max_damage=damage, seconds=10)
        monkeypatch.setattr("attnopt.planner.exact.MOST_SHARED", 0)
        bounded = compare(sweep, max_damage=damage, seconds=10)
        monkeypatch.undo()
        assert exact.gap is not None and bounded.gap is not None
        assert bounded.solution.cost == pytest.approx(exact.solution.cost * (1 + exact.gap / 100))
        # At most so much dearer than the best there is: no less than what it really is, and still a small figure.
        assert exact.gap - 1e-6 <= 100 * (1 / (1 - bounded.gap / 100) - 1) and bounded.gap < 2
    profile, sites = synthetic_profile(32, 32, 8, (LENGTH,))
    large = front(make_problem(profile, synthetic_table((1024, LENGTH)), sites, LENGTH), Limits(spans=4))
    found = compare(large, max_damage=0.01, seconds=32)
    assert found.gap is not None and 0 <= found.gap <= 1.0


def test_a_gap_is_what_the_front_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = front(profile_like(2, 4, 0))
    exact = compare(sweep, max_damage=0.01)
    dense = sweep.problem.dense
    monkeypatch.setattr("attnopt.planner.frontier.Front.pick", lambda *_, **__: dense)
    poor = compare(sweep, max_damage=0.01)
    assert poor.solution.cost == pytest.approx(exact.solution.cost)
    assert poor.gap == pytest.approx(100 * (dense.cost / exact.solution.cost - 1)) and poor.gap > 10  # type: ignore[operator]


def test_from_statistics_to_the_whole_front_takes_under_a_second() -> None:
    """32 layers, 32 heads, 4 lengths and some 50 candidates, a fixed cost for every span of a layer, in CPU time."""
    table = synthetic_table((1024, LENGTH))
    profile, sites = synthetic_profile(32, 32, 8, (1024, 2048, 4096, 8192))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        problem = make_problem(profile, table, sites, LENGTH)
        sweep = front(problem, Limits(spans=4))
        seconds.append(time.process_time() - start)
    assert len(problem.choices) >= 45 and len(problem.heads) == 1024 and len(sweep) > 200
    assert (np.diff(sweep.damage) >= 0).all() and (np.diff(sweep.cost) < 0).all()
    assert min(seconds) < 1.0  # 0.6 s on a core of a busy machine


def test_memory_and_cost_limits_are_kept_and_bind() -> None:
    problem = profile_like(4, 8, 0, kv_heads=2)
    dense = problem.dense
    free = front(problem, Limits(spans=4))
    limits = Limits(spans=4, cost=0.5 * dense.cost, memory=0.3 * dense.memory)
    sweep = front(problem, limits)
    assert len(sweep) and (sweep.memory <= limits.memory * (1 + 1e-9)).all()
    assert (sweep.cost <= limits.cost * (1 + 1e-9)).all()
    k = free.within(float(sweep.damage[-1]))
    assert free.cost[k] <= sweep.cost[-1] * (1 + 1e-9)  # a limit is never for nothing
    found = solve(problem, max_damage=1.0, max_spans=4, max_memory=limits.memory)
    assert found.memory <= limits.memory * (1 + 1e-6)
    assert not len(front(problem, Limits(memory=1e-6 * dense.memory)))
