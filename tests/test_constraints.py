"""What may be asked for besides a budget: kept where it can be, else refused with what binds and the best there is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from models import HEADS, NanoGPT, tokens
from problems import LENGTH, profile_like

from attnopt.cost import CostTable
from attnopt.errors import BudgetError, OptionError
from attnopt.plan import Budget, Constraints, Plan
from attnopt.planner import Limits, Problem, front, kept_dense, make_problem
from attnopt.planner.constraints import (
    MAX_SPANS,
    limits_of,
    protected,
    refuse_contradiction,
    refuse_impossible,
)
from attnopt.planner.make import Made, make_plan, without_effect
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from benchmarks.planner_front import synthetic_profile

SHORT = 64


def problem(seed: int = 0) -> Problem:
    return profile_like(4, 8, seed, kv_heads=2)


def check(of: Problem, asked: Constraints, free: Problem | None = None) -> Limits:
    limits = limits_of(of, asked, "prefill")
    refuse_impossible(of, limits, free or of)
    return limits


def test_limits_are_in_the_problems_units() -> None:
    of = problem()
    limits = limits_of(of, Constraints(min_speedup=2.0, max_kv_memory=0.5, max_kv_bytes=1000), "prefill")
    assert limits.spans == MAX_SPANS and limits.cost == of.dense.cost / 2
    assert limits.memory == pytest.approx(min(0.5 * of.dense.memory, 1000))
    assert limits_of(of, Constraints(max_rules=2), "decode").spans == 2
    assert limits_of(of, Constraints(), "memory") == Limits()


def test_what_no_spans_reach_is_refused_with_the_most_there_is() -> None:
    of = problem()
    fastest = of.dense.cost / front(of, Limits(spans=MAX_SPANS)).cost[-1]
    check(of, Constraints(min_speedup=0.99 * fastest))
    with pytest.raises(OptionError, match="windows that were profiled allow") as caught:
        check(of, Constraints(min_speedup=10 * fastest))
    assert f"{fastest:.2f}" in str(caught.value) and caught.value.remedy and caught.value.exit_code == 2
    least = float((of.kept(np.full(32, 1)) * of.key_bytes).sum()) / of.dense.memory
    check(of, Constraints(max_kv_memory=1.01 * least))
    with pytest.raises(OptionError, match=f"allow {least:.1%} at the least"):
        check(of, Constraints(max_kv_memory=0.9 * least))


def test_protected_heads_and_rules_are_named_where_they_bind() -> None:
    free = problem()
    held = replace(free, damage=free.damage.copy())
    held.damage[:24, 1:] = np.inf
    with pytest.raises(OptionError, match="the protected heads, which stay dense, allow"):
        check(held, Constraints(min_speedup=3.0), free)
    one = replace(free, damage=free.damage.copy())
    one.damage[::8, 1:] = np.inf  # a dense head in every layer
    with pytest.raises(OptionError, match=r"at most 1 spans a layer allow 1\.00"):
        check(one, Constraints(min_speedup=2.0, max_rules=1), free)


def test_a_whole_protected_model_is_refused_not_broken() -> None:
    free = problem()
    held = replace(free, damage=free.damage.copy())
    held.damage[:, 1:] = np.inf
    with pytest.raises(OptionError, match="protected heads"):
        check(held, Constraints(min_speedup=2.0), free)


def test_a_budget_of_nothing_contradicts_a_speed_up() -> None:
    of = problem()
    limits = check(of, Constraints(min_speedup=4.0))
    with pytest.raises(OptionError, match="contradicts a speed-up of 4") as caught:
        refuse_contradiction(of, limits, Budget("loss", 0.0), 2.5)
    assert "The budget binds" in str(caught.value) and "a speed-up of 1.00" in str(caught.value)
    needed = float(front(of, limits).damage[0])
    assert f"{100 * needed / 2.5:.3g} percent" in str(caught.value)
    with pytest.raises(OptionError, match="contradicts a speed-up of 4"):
        refuse_contradiction(of, limits, Budget("kl", needed / 11), 2.5)
    # Within reach of a prediction that may be wrong: measured, not refused.
    refuse_contradiction(of, limits, Budget("kl", needed / 9), 2.5)
    refuse_contradiction(of, Limits(), Budget("kl", 1e-300), 2.5)
    with pytest.raises(OptionError, match="no head's mildest replacement"):
        refuse_contradiction(of, Limits(), Budget("kl", 0.0), 2.5)


def test_speed_and_memory_can_each_be_had_but_not_together() -> None:
    of = replace(problem(), cost=problem().cost.copy())
    of.cost[:, 1:] = np.where(of.span[:, 1:] & 0xFFFFFFFF < 4096, 0.9, 0.1)  # only the widest windows are fast
    with pytest.raises(OptionError, match=r"not together: within the memory, the most found is 1\.2"):
        check(of, Constraints(min_speedup=4.0, max_kv_memory=0.1))


def test_heads_are_protected_by_name_by_number_and_by_what_their_removal_does() -> None:
    profile, sites = synthetic_profile(12, 4, 2, (1024,))

    def of(*names: str, top: int | None = None) -> dict[str, list[int]]:
        return protected(sites, Constraints(protect=names, protect_top=top), profile)

    assert of("3") == {"layers.3": [0, 1, 2, 3]} == of("layers.3")
    assert of("3.1", "layers.11.0") == {"layers.3": [1], "layers.11": [0]}
    assert set(of("layers")) == {s.name for s in sites}
    removal = {(s.name, h): float(profile.observations[s.name, 1024].ablation_t2[h]) for s in sites for h in range(4)}
    worst = sorted(removal, key=lambda k: -removal[k])[:3]
    assert {(n, h) for n, heads in of(top=3).items() for h in heads} == set(worst)
    for wrong in ("12", "layers.1.4", "layer.3", "layers.3.x"):
        with pytest.raises(OptionError, match="--protect") as caught:
            of(wrong)
        assert caught.value.remedy
    table = CostTable.by_density()
    dense = kept_dense(make_problem(profile, table, sites, LENGTH), of("3.1"))
    index = [(s.name, h) for s in sites for h in range(4)].index(("layers.3", 1))
    assert np.isinf(dense.damage[index, 1:]).all() and np.isfinite(dense.damage[index + 1, 1:]).any()


@cache
def observed() -> Profile:
    sequences = [tokens(1, SHORT, seed=n) for n in range(2)]
    return profile_model(NanoGPT().eval(), sequences, Grid((0, 2), (8, 16, 32)))


def made(**options: Any) -> Made:
    model, profile = NanoGPT().eval(), observed()
    verify, final = ({SHORT: tokens(8, SHORT, seed=n)} for n in (3, 4))
    budget = options.pop("budget", Budget("loss", 50.0))
    return make_plan(model, "nano", profile, verify, final, budget, SHORT, tables=CostTable.by_density(), **options)


def test_a_plan_keeps_to_what_was_asked_for_and_says_so() -> None:
    asked = Constraints(
        min_speedup=1.2, max_kv_memory=0.9, max_rules=2, protect=("0.1",), protect_top=1, dense_below=16
    )
    plan = made(constraints=asked, exact=2.0).plan
    assert plan.constraints == asked and plan.predicted.speedup >= 1.2 and plan.predicted.kv_memory <= 0.9
    assert plan.choices["h.0"][1].candidate == "dense" and plan.min_length == 16
    assert plan.tables("h.0", 15)[1] == [15] * HEADS
    for name in plan.choices:
        assert len(set(zip(*plan.tables(name, SHORT), strict=True))) <= 2
    assert plan.predicted.gap is None or plan.predicted.gap >= 0
    final = next(m for m in plan.measured if m.split == "final")
    assert final.kl is not None and final.kl >= 0 and final.top1 is not None and 0 < final.top1 <= 1


def test_a_plan_that_does_nothing_where_it_was_made_for_says_so() -> None:
    (said,) = made(constraints=Constraints(dense_below=SHORT + 1), exact=2.0).notes
    assert f"changes nothing at {SHORT} tokens" in said and "as asked" in said and "--dense-below 0" in said
    kept = made(constraints=Constraints(dense_below=0))
    assert not kept.notes and kept.plan.min_length == 0
    (said,) = without_effect(replace(kept.plan, min_length=SHORT + 1, constraints=Constraints()))
    assert "predicted to save nothing there" in said
    assert Plan.parse(kept.plan.dump()).constraints.dense_below == 0


def test_contradictions_are_refused_before_the_search_and_misses_after_it() -> None:
    with pytest.raises(OptionError, match="contradicts"):
        made(budget=Budget("loss", 0.0), constraints=Constraints(min_speedup=2.0))
    with pytest.raises(BudgetError, match="The closest of") as caught:
        made(budget=Budget("kl", 1e-12))
    assert "times as fast as dense" in str(caught.value) and "1e-12 nats" in str(caught.value)


@pytest.mark.parametrize("objective", ["decode", "memory", "mixed"])
def test_other_objectives_make_plans(objective: str) -> None:
    plan = made(objective=objective).plan
    assert plan.objective == objective and plan.predicted.speedup > 1 and plan.predicted.kv_memory < 1
    assert plan.predicted.cost == ("density and bytes" if objective == "mixed" else "bytes")
    assert type(plan).parse(plan.dump()) == plan
