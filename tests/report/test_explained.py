"""A plan's problem posed again, and what is told of it: candidates, the front, and why a head has its choice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_plans import HEADS, LENGTHS, WINDOWS, made_plan, random_profile, sites_of, timed

from attnopt.errors import PlanError
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice
from attnopt.plan import Plan
from attnopt.planner.again import pose, told_sites
from attnopt.planner.verify import Record
from attnopt.profile_file import Profile
from attnopt.report.data import candidates_json, front_json, head_json
from attnopt.report.data.candidates import label

SITE = "model.layers.0.self_attn"
PROFILE, SITES = random_profile(), sites_of()


@pytest.mark.parametrize("objective", ["prefill", "decode", "memory", "mixed"])
def test_the_problem_is_the_one_that_was_solved(objective: str) -> None:
    sites = sites_of(kv_heads=2)
    plan = made_plan(PROFILE, sites, objective=objective)
    posed = pose(plan, PROFILE, sites)
    assert posed.notes == () and posed.own_costs and posed.problem.unit == plan.predicted.unit
    assert posed.solution.cost == pytest.approx(plan.predicted.planned_cost, rel=1e-12)
    assert posed.problem.dense.cost == pytest.approx(plan.predicted.dense_cost, rel=1e-12)
    assert posed.problem.expected(posed.solution) == pytest.approx(plan.predicted.kl_nats_per_token, rel=1e-12)
    assert {posed.free.choices[c] for c in posed.solution.index} == {
        c for heads in plan.choices.values() for c in heads
    }


def test_stored_costs_are_found_by_their_id_and_tell_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    table = timed(sites_of(kv_heads=2))
    plan = made_plan(PROFILE, sites_of(kv_heads=2), table)
    before = pose(plan, PROFILE)
    assert not before.own_costs and before.problem.unit == "million kept pairs" and told_sites(plan) is None
    assert any(table.id in note and "not stored" in note for note in before.notes)
    table.save(tmp_path / "costs" / "a.json")
    (tmp_path / "costs" / "b.json").write_text("{")
    after = pose(plan, PROFILE)
    assert after.own_costs and after.solution.cost == pytest.approx(plan.predicted.planned_cost, rel=1e-12)
    assert [s.kv_heads for s in told_sites(plan) or ()] == [2, 2]


def test_damages_are_those_of_the_profile() -> None:
    plan = made_plan(PROFILE, SITES)
    found = candidates_json(plan, PROFILE)
    columns = [c["choice"] for c in found["choices"]]
    at = columns.index(f"sink_window(alpha={WINDOWS[1]}, beta=0, sink=4)")
    assert found["choices"][at]["window"] == WINDOWS[1] and found["choices"][at]["sink"] == 4
    explained = head_json(plan, PROFILE, pose(plan, PROFILE), SITE, 2)
    (row,) = [r for r in explained["candidates"] if r["choice"] == columns[at]]
    by_hand = {}
    for n in LENGTHS:
        seen = PROFILE.observations[SITE, n]
        # No smaller window is ever said to damage less.
        by_hand[n] = float(seen.t2[2, 1, 1:].max()) / 2 / (2 * n)
    assert {int(n): damage for n, damage in row["damages"].items()} == pytest.approx(by_hand)
    assert row["damage"] == pytest.approx(max(by_hand.values()))
    assert found["sites"][SITE]["damage"][2][at] == pytest.approx(max(by_hand.values()), rel=1e-3)
    assert row["share"] == pytest.approx(row["damage"] / 0.02)  # 1 percent of 2 nats
    chosen = found["sites"][SITE]["chosen"]
    assert [columns[c] for c in chosen] == [str(c) for c in plan.choices[SITE]]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_front_is_the_lower_hull_of_all_plans() -> None:
    profile = random_profile(layers=1, heads=3)
    sites = sites_of(1, 3)
    plan = made_plan(profile, sites, budget=0.002)
    posed = pose(plan, profile, sites)
    found = front_json(plan, posed)
    points = found["points"]
    assert [p["cost"] for p in points] == sorted(p["cost"] for p in points) and sum(p["chosen"] for p in points) == 1
    assert points[-1]["predicted"] == 0.0 and points[-1]["kv_memory"] == 1.0 and points[0]["kv_memory"] < 0.5
    # Every combination of choices, by itself: none is below the front.
    problem = posed.problem
    every = np.stack(np.meshgrid(*[np.arange(len(problem.choices))] * 3), -1).reshape(-1, 3)
    groups = (np.diff(np.sort(problem.span[0][every], 1), axis=1) != 0).sum(1) + 1
    every = every[groups <= 4]
    damage, cost = (values[np.arange(3), every].sum(1) for values in (problem.damage, problem.cost))
    for k in range(len(posed.front)):
        below = (damage < posed.front.damage[k] * (1 - 1e-9)) & (cost < posed.front.cost[k] * (1 - 1e-9))
        assert not below.any()


def test_what_was_measured_stands_beside_the_front() -> None:
    plan = made_plan(PROFILE, SITES)
    posed = pose(plan, PROFILE, SITES)
    (own,) = front_json(plan, posed)["measured"]
    (point,) = [p for p in front_json(plan, posed)["points"] if p["chosen"]]
    assert (own["upper_95"], own["holds"]) == (0.75, True) and own["cost"] == point["cost"]
    over = replace(plan, measured=tuple(replace(m, upper_95=1.5) for m in plan.measured))
    assert not front_json(over, pose(over, PROFILE, SITES))["measured"][0]["holds"]
    missed = Record("point 8 of 9", 0.5, 2.0, (replace(plan.measured[0], upper_95=math.inf),), False, 0.85)
    tried, last = front_json(plan, posed, [missed])["measured"]
    assert tried["upper_95"] is None and not tried["holds"] and last == own


def test_every_choice_is_the_best_at_the_price_of_the_plan() -> None:
    plan = made_plan(PROFILE, SITES, max_rules=2)
    posed = pose(plan, PROFILE, SITES)
    assert posed.price is not None
    reasons = set()
    for site, heads in plan.choices.items():
        for head in range(len(heads)):
            found = head_json(plan, PROFILE, posed, site, head)
            (own,) = [row for row in found["candidates"] if row["chosen"]]
            reasons |= {row["why"].partition(":")[0] for row in found["candidates"]}
            assert own["choice"] == found["chosen"] == str(heads[head])
            paid = {
                row["choice"]: row["change"]["damage"] + posed.price * row["change"]["cost"]
                for row in found["candidates"] if row["hull"]
            }  # fmt: skip
            assert min(paid.values()) >= -1e-9 * plan.predicted.dense_cost, (site, head, paid)
            assert own["hull"] and "and the plan pays" in found["reason"]
            for row in found["candidates"]:
                if "times the price" in row["why"]:
                    more, rate = row["change"]["damage"] > 0, abs(row["change"]["damage"] / row["change"]["cost"])
                    pays = rate < posed.price if more else rate > posed.price
                    assert ("by itself it would pay" in row["why"]) == pays
    assert any("of the layer, and 2 are the limit" in reason for reason in reasons), reasons


def test_what_keeps_a_head_dense_is_said() -> None:
    plan = made_plan(PROFILE, SITES, protect=("0.1", "model.layers.1"), protect_top=2)
    posed = pose(plan, PROFILE, SITES)
    whys = {
        (site, head): head_json(plan, PROFILE, posed, site, head)["reason"]
        for site, heads in plan.choices.items() for head in range(len(heads))
    }  # fmt: skip
    assert whys[SITE, 1] == "protected by --protect 0.1"
    assert whys["model.layers.1.self_attn", 3] == "protected by --protect model.layers.1"
    by_removal = sorted(
        whys, key=lambda k: -max(float(PROFILE.observations[k[0], n].ablation_t2[k[1]] / n) for n in LENGTHS)
    )
    assert all(whys[key].startswith("protected") for key in by_removal[:2])
    kept = [h for h, key in enumerate(posed.problem.heads) if whys[key].startswith("protected")]
    assert len(kept) >= 5 and all(np.isfinite(posed.problem.damage[h]).sum() == 1 for h in kept)
    rows = head_json(plan, PROFILE, posed, SITE, 1)["candidates"]
    assert all(row["why"] == "protected by --protect 0.1" for row in rows if not row["chosen"]) and len(rows) > 3


def test_an_edited_plan_and_a_choice_whose_fits_are_elsewhere() -> None:
    plan = made_plan(PROFILE, SITES)
    odd = Choice.of("sink_window", {"sink": 1, "alpha": 11, "beta": 0.0})
    edited = replace(plan, choices={**plan.choices, SITE: (odd, *plan.choices[SITE][1:])})
    found = head_json(edited, PROFILE, pose(edited, PROFILE, SITES), SITE, 0)
    (own,) = [row for row in found["candidates"] if row["chosen"]]
    assert own["choice"] == str(odd) and found["reason"].startswith("The plan was edited") and own["damage"] > 0
    # No other head is offered it, and theirs are what they were.
    posed = pose(edited, PROFILE, SITES)
    assert np.isfinite(posed.solution.damage) and posed.notes == ()
    assert np.isfinite(posed.free.damage[:, posed.free.choices.index(odd)]).tolist() == [True] + [False] * (
        2 * HEADS - 1
    )
    far = Choice.of("linear", {"sink": 4, "window": 16, "features": 32})
    mixed = replace(plan, choices={**plan.choices, SITE: (far, *plan.choices[SITE][1:])})
    posed = pose(mixed, PROFILE, SITES)
    found = head_json(mixed, PROFILE, posed, SITE, 0)
    assert "give --fitted" in found["reason"] and "give --fitted" in " ".join(posed.notes)
    assert all(row["change"] is None for row in found["candidates"])
    assert [p for p in front_json(mixed, posed)["points"] if p["chosen"]]
    assert json.loads(json.dumps(candidates_json(mixed, PROFILE), allow_nan=False))


def test_another_models_profile_is_refused() -> None:
    plan = made_plan(PROFILE, SITES)
    with pytest.raises(PlanError, match="another model"):
        pose(plan, random_profile(model=Fingerprint("f" * 16, (0.5,))))
    with pytest.raises(PlanError, match=r"holds nothing of model\.layers\.1"):
        pose(plan, random_profile(layers=1))


def test_choices_in_few_words() -> None:
    words = {
        "window 128, sink 4": Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0}),
        "window N/8": Choice.of("sink_window", {"sink": 0, "alpha": 0, "beta": 0.125}),
        "window 64 + N/2, sink 1": Choice.of("sink_window", {"sink": 1, "alpha": 64, "beta": 0.5}),
        "linear 32, window 16, sink 4": Choice.of("linear", {"sink": 4, "window": 16, "features": 32}),
        "dense": DENSE,
        "pruned": Choice("pruned"),
    }
    assert {label(choice) for choice in words.values()} == set(words)


def test_plans_are_written_and_read_the_same(tmp_path: Path) -> None:
    plan = made_plan(PROFILE, SITES)
    plan.save(tmp_path / "plan.json")
    PROFILE.save(tmp_path / "p.safetensors")
    read, profile = Plan.load(tmp_path / "plan.json"), Profile.load(tmp_path / "p.safetensors")
    assert candidates_json(read, profile) == candidates_json(plan, PROFILE)
