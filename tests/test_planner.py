"""The planner: the knapsack against brute force, the front's optimality, and the loop that only returns what holds."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from attnopt.errors import BudgetError, DependencyError
from attnopt.ir import DENSE, Choice
from attnopt.plan import Budget
from attnopt.planner import (
    Choices,
    Evaluation,
    Problem,
    back_off,
    choices_from,
    final_check,
    front,
    holds,
    judge,
    paired_bound,
    settle,
    solve,
    tokens_needed,
    verify_loop,
)

WINDOWS = (1024, 512, 256, 128, 64)
CHOICES = (DENSE, *(Choice.of("sink_window", {"sink": 0, "alpha": w, "beta": 0.0}) for w in WINDOWS[1:]))


def random_problem(sites: int, heads: int, seed: int, group_cost: float = 0.0, choices: int = 5) -> Problem:
    """Damage falls and cost rises with the window, by random amounts of each head."""
    rng = np.random.default_rng(seed)
    count = sites * heads
    damage = np.cumsum(rng.exponential(rng.exponential(1e-3, (count, 1)), (count, choices)), 1)
    damage[:, 0] = 0
    cost = np.repeat(np.sort(rng.uniform(0.05, 1, (sites, choices)))[:, ::-1], heads, 0)
    return Problem(
        heads=tuple((f"layers.{s}", h) for s in range(sites) for h in range(heads)),
        choices=CHOICES[:choices],
        damage=damage,
        cost=cost,
        span=np.tile(np.array(WINDOWS[:choices]), (count, 1)),
        site=np.repeat(np.arange(sites), heads),
        group_cost=np.full(sites, group_cost),
    )


def brute(problem: Problem, most: int | None = None) -> list[tuple[float, float]]:
    """(damage, cost) of every assignment, at most `most` spans a site."""
    found = []
    for index in itertools.product(range(len(problem.choices)), repeat=len(problem.heads)):
        array = np.array(index)
        spans = problem.span[np.arange(len(array)), array]
        if most is None or all(len(set(spans[problem.site == s])) <= most for s in set(problem.site)):
            solution = problem.of(array)
            found.append((solution.damage, solution.cost))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("group_cost", "most"), [(0.0, None), (0.15, None), (0.15, 2), (0.0, 1)])
def test_exact_solver_equals_brute_force(seed: int, group_cost: float, most: int | None) -> None:
    problem = random_problem(2, 3, seed, group_cost, choices=4)
    every = brute(problem, most)
    for share in (0.05, 0.3, 0.7):
        limit = share * max(d for d, _ in every)
        found = solve(problem, max_damage=limit, max_spans=most, gap=0)
        assert found.damage <= limit * (1 + 1e-6)
        assert found.cost == pytest.approx(min(c for d, c in every if d <= limit), rel=1e-6)
        costs = [c for _, c in every]
        limit = min(costs) + share * (max(costs) - min(costs))
        found = solve(problem, max_cost=limit, max_spans=most, gap=0)
        assert found.cost <= limit * (1 + 1e-6)
        assert found.damage == pytest.approx(min(d for d, c in every if c <= limit), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_front_points_are_optimal_for_their_cost(seed: int) -> None:
    problem = random_problem(2, 3, seed, choices=4)
    every, sweep = brute(problem), front(problem)
    for k in range(len(sweep)):
        point = sweep.point(k)
        assert (point.damage, point.cost) == pytest.approx((sweep.damage[k], sweep.cost[k]))
        assert point.damage <= min(d for d, c in every if c <= point.cost + 1e-12) + 1e-12
    # The hull of all assignments has no corner that the front lacks.
    for price in np.geomspace(1e-5, 1, 20):
        best = min(d + price * c for d, c in every)
        assert min(sweep.damage + price * sweep.cost) == pytest.approx(best)


def test_damage_and_cost_are_monotone_and_fast_for_a_large_model() -> None:
    problem = random_problem(32, 32, 0)
    start = time.perf_counter()
    sweep = front(problem)
    seconds = time.perf_counter() - start
    assert (np.diff(sweep.damage) >= 0).all() and (np.diff(sweep.cost) < 0).all() and len(sweep) > 1000
    assert sweep.damage[0] == 0 and (sweep.point(0).index == 0).all()
    assert seconds < 2  # 0.04 s where nothing else runs
    assert sweep.within(-1.0) == 0 and sweep.within(math.inf) == len(sweep) - 1


def test_exact_solver_copes_with_a_large_model() -> None:
    problem = random_problem(32, 32, 1, 0.1)
    limit = 0.2 * front(problem).damage[-1]
    found = solve(problem, max_damage=limit, max_spans=3, seconds=2)
    assert found.damage <= limit * (1 + 1e-6) and found.cost < 0.9 * problem.dense.cost


def test_choices_that_are_not_allowed_are_never_taken() -> None:
    problem = random_problem(2, 3, 0)
    problem.damage[1, 1:] = np.inf
    sweep = front(problem)
    assert sweep.point(len(sweep) - 1).index[1] == 0
    assert solve(problem, max_damage=1e9).index[1] == 0


def test_settling_never_damages_more_nor_costs_more() -> None:
    for seed in range(5):
        problem = random_problem(4, 8, seed, 0.3)
        sweep = front(problem)
        for k in range(0, len(sweep), 9):
            point = sweep.point(k)
            merged = settle(problem, point)
            assert merged.damage <= point.damage + 1e-15 and merged.cost <= point.cost + 1e-12
            narrow = settle(problem, point, max_spans=2)
            spans = problem.span[np.arange(32), narrow.index]
            assert all(len(set(spans[problem.site == s])) <= 2 for s in range(4))
            assert narrow.damage <= point.damage + 1e-15


def test_settling_is_near_the_exact_optimum() -> None:
    ratios = []
    for seed in range(5):
        problem = random_problem(3, 6, seed, 0.2)
        sweep = front(problem)
        point = settle(problem, sweep.point(len(sweep) // 2))
        ratios.append(point.cost / solve(problem, max_damage=point.damage, gap=0).cost)
    assert np.mean(ratios) < 1.25


def test_infeasible_cost_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="cheapest costs"):
        solve(random_problem(1, 2, 0), max_cost=1e-6)
    with pytest.raises(ValueError, match="either"):
        solve(random_problem(1, 2, 0))


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(DependencyError) as caught:
        solve(random_problem(1, 2, 0), max_damage=1.0)
    assert "pip install scipy" in caught.value.remedy


def test_backing_off_takes_the_worst_heads_first() -> None:
    problem = random_problem(2, 4, 0)
    solution = problem.of(np.full(8, 4))
    ratio = problem.damage[:, 4] / (problem.cost[:, 0] - problem.cost[:, 4])
    for n in (0, 1, 3, 8, 20):
        found = back_off(problem, solution, n)
        assert set(np.flatnonzero(found.index == 0)) == set(np.argsort(-ratio)[:n])
    assert back_off(problem, problem.dense, 3).cost == problem.dense.cost


# The bound


def test_bound_is_deterministic_and_above_the_mean() -> None:
    rng = np.random.default_rng(0)
    d, w = rng.normal(0.1, 1, 40), rng.uniform(90, 110, 40)
    mean, upper = paired_bound(d, w, 3)
    assert (mean, upper) == paired_bound(d, w, 3) != paired_bound(d, w, 4)
    assert mean == pytest.approx(d.sum() / w.sum()) and upper > mean
    assert paired_bound([0.0] * 10, [1.0] * 10) == (0.0, 0.0)
    assert paired_bound([1.0], [1.0]) == (1.0, math.inf)


@pytest.mark.parametrize("draw", ["normal", "skewed"])
def test_bound_covers_the_truth_about_95_times_in_100(draw: str) -> None:
    rng = np.random.default_rng(1)
    covered, trials = 0, 300
    for trial in range(trials):
        tokens = rng.uniform(50, 150, 24)
        noise = rng.normal(0, 1, 24) if draw == "normal" else rng.exponential(1, 24) - 1
        covered += paired_bound(0.2 * tokens + 5 * noise, tokens, trial)[1] >= 0.2
    assert 0.90 <= covered / trials <= 0.99


# The loop


class Model:
    """A synthetic end-to-end measurement: the true loss of a plan is `factor` times its predicted damage, plus an
    interaction of heads, plus noise per sequence that shrinks with the change."""

    def __init__(
        self, problem: Problem, factor: float, sequences: int = 48, noise: float = 1.0, twist: float = 0.0
    ) -> None:
        self.problem, self.factor, self.noise, self.twist = problem, factor, noise, twist
        self.calls = 0
        rng = np.random.default_rng(5)
        tokens = 500
        self.tokens = (tokens,) * sequences
        self.dense = tuple(2.0 * tokens * rng.uniform(0.8, 1.2, sequences))
        self.spread = rng.normal(0, 1, sequences)

    def true(self, choices: Choices) -> float:
        flat = [self.problem.choices.index(c) for site in choices.values() for c in site]
        damage = self.problem.damage[np.arange(len(flat)), flat]
        return float(self.factor * damage.sum() + self.twist * damage.sum() ** 2)

    def __call__(self, choices: Choices) -> Evaluation:
        self.calls += 1
        true = self.true(choices)
        added = [t * true * (1 + self.noise * s) for t, s in zip(self.tokens, self.spread, strict=True)]
        planned = tuple(float(d + a) for d, a in zip(self.dense, added, strict=True))
        return Evaluation(2048, self.tokens, self.dense, planned, tuple(abs(a) for a in added))


@pytest.mark.parametrize("factor", [0.1, 1 / 3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("kind", ["loss", "kl"])
def test_the_budget_holds_however_wrong_the_prediction(factor: float, kind: str) -> None:
    problem = random_problem(8, 8, 3, 0.05)
    model = Model(problem, factor, twist=5.0 * factor)
    total = front(problem).damage[-1]
    budget = Budget("kl", 0.3 * total) if kind == "kl" else Budget("loss", 100 * 0.3 * total / 2.0)
    found = verify_loop(problem, model, budget)
    true = model.true(choices_from(problem, found.solution))
    assert true <= 0.3 * total
    assert model.calls == len(found.records) <= 8
    assert all(m.upper_95 <= budget.limit and m.split == "verify" for m in found.measured)
    # It is not timid either: either everything fits, or it reaches a good part of the budget.
    worst = max(m.upper_95 for m in found.measured)
    assert worst > 0.5 * budget.limit or found.solution.cost <= front(problem).cost[-1] * 1.1


def test_every_length_must_hold() -> None:
    problem = random_problem(8, 8, 4)
    near, far = Model(problem, 1.0), Model(problem, 4.0)
    budget = Budget("kl", 0.2 * front(problem).damage[-1])
    found = verify_loop(problem, lambda c: [near(c), far(c)], budget)
    assert len(found.measured) == 2 and far.true(choices_from(problem, found.solution)) <= budget.limit
    assert all(r.holds == all(holds(m, budget) for m in r.measured) and str(r) for r in found.records)


def test_a_model_that_no_plan_fits_is_an_error_and_no_plan() -> None:
    problem = random_problem(4, 4, 5)
    broken = Model(problem, 1.0)
    broken.true = lambda choices: 1.0 + 0 * len(choices)  # type: ignore[method-assign]
    with pytest.raises(BudgetError, match="No plan was found within") as caught:
        verify_loop(problem, broken, Budget("loss", 1.0))
    assert broken.calls <= 8 and "larger budget" in caught.value.remedy


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_holds(value: float) -> None:
    problem = random_problem(4, 4, 5)
    broken = Model(problem, 1.0)
    broken.true = lambda choices: value  # type: ignore[method-assign]
    with pytest.raises(BudgetError):
        verify_loop(problem, broken, Budget("loss", 1.0))


def test_too_few_sequences_say_how_many_are_needed() -> None:
    problem = random_problem(4, 4, 6)
    with pytest.raises(BudgetError, match="5 sequences of 2048 tokens are too few") as caught:
        verify_loop(problem, Model(problem, 1.0, sequences=5), Budget("loss", 1.0))
    assert "at least 8 (4000 tokens)" in caught.value.remedy


def test_text_too_noisy_to_decide_says_how_much_is_needed() -> None:
    problem = random_problem(4, 4, 7)
    noisy = Model(problem, 1.0, sequences=12)
    # The mean is well inside any budget, the spread far outside, whatever the plan.
    noisy.true = lambda choices: 1e-3  # type: ignore[method-assign]
    noisy.noise = 200.0
    noisy.spread = noisy.spread - noisy.spread.mean()
    with pytest.raises(BudgetError) as caught:
        verify_loop(problem, noisy, Budget("loss", 1.0))
    assert "too short to tell whether a plan keeps the budget" in caught.value.remedy
    assert "tokens are needed where there are 6000 (--samples " in caught.value.remedy


def test_tokens_needed_grow_with_the_square_of_the_width() -> None:
    problem = random_problem(2, 2, 8)
    evaluation = Model(problem, 1.0)(choices_from(problem, problem.of(np.full(4, 3))))
    measured = judge(evaluation, Budget("loss", 1.0), "verify", "")
    wide = Budget("loss", measured.increase + (measured.upper_95 - measured.increase) / 2)
    assert tokens_needed(measured, wide) == pytest.approx(4 * measured.tokens, abs=1)
    assert tokens_needed(measured, Budget("loss", measured.increase / 2)) is None


def test_the_final_split_is_judged_on_its_own() -> None:
    problem = random_problem(2, 2, 9)
    evaluation = Model(problem, 1.0)(choices_from(problem, problem.of(np.full(4, 2))))
    (measured,) = final_check(evaluation, Budget("loss", 50.0), "abc")
    assert measured.split == "final" and measured.choices == "abc" and measured.tokens == 48 * 500
    with pytest.raises(BudgetError, match="On the final split"):
        final_check([evaluation], Budget("loss", 1e-6), "abc")


def test_nothing_to_gain_is_an_error() -> None:
    problem = random_problem(2, 2, 0)
    problem.damage[:, 1:] = np.inf
    never: Callable[[Choices], Evaluation] = lambda choices: pytest.fail("measured")  # noqa: E731
    with pytest.raises(BudgetError, match="cheaper than dense"):
        verify_loop(problem, never, Budget("loss", 1.0))
