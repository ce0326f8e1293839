"""The planner: the knapsack against brute force, the front's optimality, and the loop that only returns what holds."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from attnopt.cost import CostTable
from attnopt.errors import BudgetError, DependencyError, ProfileError
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, Mask, Site
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
    kept_dense,
    make_problem,
    min_length_of,
    paired_bound,
    predicted_of,
    settle,
    solve,
    tokens_needed,
    verify_loop,
)
from attnopt.profile_file import Profile
from attnopt.statistics import Grid

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


# From a profile


def site(name: str, heads: int = 4, window: int | None = None) -> Site:
    return Site(name, 0, "sdpa", heads, 2, 8, 8, 0.3, "float32", Mask(causal=True, window=window))


def small_profile(lengths: tuple[int, ...] = (256, 512)) -> tuple[Profile, list[Site]]:
    sites = [site("a"), site("b", window=64)]
    profile = Profile.empty(Fingerprint("x", (1.0,)), Grid((0, 4), (16, 32, 64, 128)), ["d"], ["float32"])
    for s, n in itertools.product(sites, lengths):
        o = profile.observation(s.name, 4, n)
        o.rows, o.samples = 2 * n, 2
        head = torch.arange(1, 5, dtype=torch.float64)
        o.t2[:] = (head[:, None, None] * n / torch.tensor([16.0, 32, 64, 128])) * (2 * n) * 1e-4
        o.ablation_t2[:] = 100.0
    return profile, sites


def test_a_problem_takes_the_worst_length_and_the_planned_lengths_cost() -> None:
    profile, sites = small_profile()
    table = CostTable.by_density()
    problem = make_problem(profile, table, sites, 1024)
    assert problem.choices[0] == DENSE and len(problem.heads) == 8 and not problem.measured
    c = problem.choices.index(Choice.of("sink_window", {"sink": 0, "alpha": 32, "beta": 0.0}))
    seen = 0.5 * 3 * 512 / 32 * 1e-4  # the longer length is the worse
    # Rows past the profiled ones lose what those past the window did on average: half of the text, at 512 / 480 of it.
    assert problem.damage[2, c] == pytest.approx(seen * (1 + 512 / 480) / 2)
    assert make_problem(profile, table, sites, 512).damage[2, c] == pytest.approx(seen)
    assert problem.cost[2, c] == table.cost(1024, 0, 32)
    assert (problem.damage[:, 0] == 0).all() and problem.cost[0, 0] == table.cost(1024, 0, 1024)
    assert problem.cost[4, 0] == table.cost(1024, 0, 64)  # dense at a sliding site is its own window
    only = make_problem(profile, table, sites, 256, lengths=[256])
    assert only.damage[2, only.choices.index(problem.choices[c])] == pytest.approx(0.5 * 3 * 256 / 32 * 1e-4)


def test_what_is_forgotten_of_the_probe_counts_in_the_search_and_in_no_prediction() -> None:
    profile, sites = small_profile()
    sites = sites[:1]
    plain = make_problem(profile, CostTable.by_density(), sites, 512)
    for seen in profile.observations.values():
        # Of the probe, dropping anything costs head 0 alone, two nats for each of ten answers.
        t2, ablation = torch.zeros_like(seen.t2), torch.zeros_like(seen.ablation_t2)
        t2[0], ablation[0] = 40.0, 40.0
        seen.probe, seen.asked = {"t2": t2, "ablation_t2": ablation}, 10.0
    asked = make_problem(profile, CostTable.by_density(), sites, 512, retrieval=0.25)
    first = np.array([h == 0 for _, h in asked.heads])
    narrow = np.array([c.params != () and c["beta"] == 0.0 and c["alpha"] <= 128 for c in asked.choices])
    more = asked.damage - plain.damage
    assert narrow.any() and np.allclose(more[np.ix_(first, narrow)], 0.25 * 2.0)
    assert np.abs(more[~first]).max() == 0.0 and np.allclose(asked.on_text, plain.damage)
    chosen = asked.of(np.full(len(asked.heads), int(np.flatnonzero(narrow)[0])))
    assert asked.expected(chosen) == pytest.approx(plain.expected(plain.of(chosen.index)))
    ignored = make_problem(profile, CostTable.by_density(), sites, 512, retrieval=0.0)
    assert np.array_equal(ignored.damage, plain.damage)


def test_a_sliding_site_gets_no_sinks_and_protected_heads_stay_dense() -> None:
    profile, sites = small_profile()
    problem = kept_dense(make_problem(profile, CostTable.by_density(), sites, 1024), {"a": [1]})
    sinks = np.array([c.candidate != "dense" and c["sink"] > 0 for c in problem.choices])
    assert np.isinf(problem.damage[4:, sinks]).all()
    assert np.isinf(problem.damage[1, 1:]).all() and np.isfinite(problem.damage[0, 1:]).any()


def test_a_refused_site_stays_dense() -> None:
    profile, sites = small_profile()
    odd = Site("a", 0, "sdpa", 4, 2, 8, 8, 0.3, "float32", Mask())
    problem = make_problem(profile, CostTable.by_density(), [odd, sites[1]], 1024)
    assert np.isinf(problem.damage[:4, 1:]).all() and np.isfinite(problem.damage[4:, 1:]).any()


def test_what_was_not_profiled_is_an_error() -> None:
    profile, sites = small_profile()
    for asked, wanted in (([*sites, site("c")], None), (sites, [128]), ([site("a", 2)], None)):
        with pytest.raises(ProfileError, match="holds nothing of"):
            make_problem(profile, CostTable.by_density(), asked, 1024, lengths=wanted)


def test_choices_prediction_and_break_even_of_a_solution() -> None:
    profile, sites = small_profile()
    entries = {(n, 0, n): n * n / 1e5 for n in (256, 1024, 4096)}
    entries |= {(n, 4 * s, w): n * w / 1e5 + 2.0 for n in (256, 1024, 4096) for w in (16, 64, 128) for s in (0, 1)}
    table = CostTable((("target", "cpu"),), tuple(entries.items()), ((1024, 0.1),))
    problem = make_problem(profile, table, sites, 1024)
    solution = solve(problem, max_damage=0.01)
    choices = choices_from(problem, solution)
    assert set(choices) == {"a", "b"} and all(len(c) == 4 for c in choices.values())
    predicted = predicted_of(problem, solution)
    assert predicted.cost == "measured" and predicted.speedup == predicted.dense_cost / predicted.planned_cost > 1
    assert predicted.kl_nats_per_token <= 0.01
    assert min_length_of(choices, sites, table) == 1024
    assert min_length_of({"a": (DENSE,) * 4, "b": (DENSE,) * 4}, sites, table) == 4097
    assert min_length_of(choices, sites, CostTable.by_density()) == 0


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
    assert "too short to decide" in caught.value.remedy
    assert "tokens are needed where there are 6000" in caught.value.remedy


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
