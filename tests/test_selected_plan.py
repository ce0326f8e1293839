"""Heads whose keys are selected while running, from trials to a plan that runs: what was visited, weighed and shown."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiling import compiled
from models import HEADS, LAYERS, NanoGPT, tokens
from rich.console import Console
from test_problem import small_profile

import attnopt
from attnopt import backend
from attnopt.cost import CostTable
from attnopt.distill import Menu, distill_model
from attnopt.errors import FittedError, OptionError, PlanError
from attnopt.fitted import KEY, MOST_SKIPPED, Fitted, Header
from attnopt.ir import DENSE, WHOLE, Choice, Share
from attnopt.measure import Spans
from attnopt.ops import selected as operator
from attnopt.plan import Budget, Plan
from attnopt.planner import Problem, make_problem, min_length_of
from attnopt.planner.again import pose
from attnopt.planner.frontier import front
from attnopt.planner.make import Made, make_plan
from attnopt.planner.tried import allowed_families, refused, shares_at
from attnopt.planner.verify import verify_loop
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.registry import CANDIDATES
from attnopt.report import terminal
from attnopt.report.data import candidates_json, head_json, plan_facts, plan_json, plans_json
from attnopt.statistics import Grid
from attnopt.statistics.trials import VISITED, Trials
from attnopt.supervision import Sample

LENGTH = 64
DENSITY = CostTable.by_density()
FAMILIES = ("blocks", "threshold")
FEW = Choice.of("pooled", {"mass": 0.75, "count": 1 << 20, "alike": -1.0, "block": 16, "skip": 0.0})
WINDOW = {"sink": 0, "window": 1 << 30, "block": 16}
SKIPPING = [Choice.of("threshold", {**WINDOW, "skip": skip}) for skip in (0.25, 64.0)]


@pytest.fixture(scope="module")
def evidence() -> tuple[Profile, Fitted]:
    """A profile and trials of one text. Weights in the hundreds, so that what is skipped is worth skipping."""
    model, text = NanoGPT().eval(), [tokens(1, LENGTH, seed=n) for n in range(2)]
    weights = torch.zeros(LENGTH)
    weights[-4:] = 1.0
    asked = Sample(tokens(1, LENGTH, seed=9), weights, "probe", 4.0)
    fitted = distill_model(model, [], [tokens(1, LENGTH, seed=7), asked], Menu(families=FAMILIES))
    return profile_model(model, text, Grid((0, 2), (8, 16, 32))), fitted


def test_what_was_visited_and_kept_is_what_the_operator_did(evidence: tuple[Profile, Fitted]) -> None:
    """Nothing is fitted, and no two sequences are asked for; every choice is of a menu."""
    fitted = evidence[1]
    menu = [c for name in ("pooled", "threshold") for c in CANDIDATES[name].menu(LENGTH)]
    assert not fitted.maps and not fitted.means and set(menu) <= {*fitted.choices("h.0")}
    assert {CANDIDATES[c.candidate].family for c in fitted.choices("h.0")} == {*FAMILIES}
    assert fitted.header.settings == "families blocks,threshold"
    trials = fitted.trials["h.0", LENGTH]
    assert trials.rows == LENGTH and trials.asked == 4.0 and trials.tokens == LENGTH
    # Four blocks of rows, of which the n-th may visit n, by every head under every choice.
    assert (trials.possible == 10).all() and (trials.visited <= 10).all() and (trials.skipped <= trials.visited).all()
    whole = [c for c in trials.choices if (trials.visited - trials.skipped)[:, trials.choices.index(c)].eq(10).all()]
    assert whole and any((trials.visited < 10).flatten())
    for choice in trials.choices:
        shares, lost = fitted.shares("h.0", LENGTH, choice), fitted.forgotten("h.0", LENGTH, choice)
        assert all(0 < share.recalled <= 1 and 0 < share.visited <= 1 for share in shares) and (lost >= 0).all()
        if choice in whole:
            assert fitted.damage("h.0", LENGTH, choice).max() < 1e-9
            assert min(share.recalled for share in shares) == pytest.approx(1, abs=1e-5)


def test_what_was_visited_comes_back_from_a_file_and_adds_up(evidence: tuple[Profile, Fitted]) -> None:
    fitted = evidence[1]
    content = fitted.to_bytes()
    again = Fitted.from_bytes(content, "f")
    assert again.to_bytes() == content
    held = again.trials["h.1", LENGTH]
    for name in (*VISITED, "asked_t2"):
        assert torch.equal(getattr(held, name), getattr(fitted.trials["h.1", LENGTH], name)), name
    before = held.shares(FEW)
    held += fitted.trials["h.1", LENGTH]
    assert held.shares(FEW) == before and held.rows == 2 * LENGTH and held.asked == 8.0
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][KEY]
    old = content.replace(b'\\"schema\\": 2', b'\\"schema\\": 1')
    assert '"schema": 2' in header and old != content
    with pytest.raises(FittedError, match="format of fits 1, this attnopt reads 2") as caught:
        Fitted.from_bytes(old, "f")
    assert "attnopt distill" in caught.value.remedy


def trials_of(visited: float, skipped: float, recalled: float, lost: float, heads: int = 4) -> Trials:
    """Of DENSE-like sums: FEW visits and recalls so much, and loses `lost` nats per token; the first of SKIPPING skips
    nothing, the second `skipped`."""
    made = Trials.zeros(heads, (FEW, *SKIPPING))
    made.tokens = made.rows = 1000.0
    made.t2[:, 0] = 2 * 1000 * lost
    made.possible.fill_(100.0)
    made.visited[:] = torch.tensor([100 * visited, 100.0, 100.0])
    made.skipped[:] = torch.tensor([0.0, 0.0, 100 * skipped])
    made.recalled[:] = 1000 * torch.tensor([recalled, 1.0, recalled])
    return made


def fits_of(profile: Profile, trials: dict[int, Trials]) -> Fitted:
    header = Header(profile.header.fingerprint, lengths=tuple(trials))
    return Fitted(header, trials={("a", length): made for length, made in trials.items()})


def both(profile: Profile, *figures: float) -> Fitted:
    return fits_of(profile, {256: trials_of(*figures), 512: trials_of(*figures)})


def test_a_threshold_that_skips_nothing_or_too_much_is_not_offered() -> None:
    profile, _ = small_profile()
    idle, skipping = SKIPPING
    near = 1 - MOST_SKIPPED
    fits = both(profile, 0.2, 0.3, near + 1e-3, 0.0)
    assert fits.offered("a", skipping).all() and not fits.offered("a", idle).any() and fits.offered("a", FEW).all()
    assert "no block of it is skipped" in refused(fits, "a", 1, idle) and refused(fits, "a", 1, skipping) == ""
    fits = both(profile, 0.2, 0.3, near - 1e-3, 0.0)
    assert not fits.offered("a", skipping).any() and fits.offered("a", FEW).all()
    assert (
        refused(fits, "a", 1, skipping)
        == "it skips 30.0 % of the blocks with 5.1 % of the mass, of which 5 % are the most"
    )
    # What the same selection loses without a threshold is not the threshold's.
    both_ways = Choice.of("pooled", {**dict(FEW.params), "skip": 1.0})
    for trials in fits.trials.values():
        trials.choices = (FEW, both_ways, SKIPPING[1])
        trials.recalled[:] = 1000 * torch.tensor([0.5, 0.46, 0.5])
        trials.skipped[:, 1] = 1.0
    assert fits.offered("a", both_ways).all()


def column(problem: Problem, choice: Choice) -> int:
    return problem.choices.index(choice)


def test_a_head_whose_needle_moves_is_given_a_selection() -> None:
    """Windows lose what they drop; a selection that visits a tenth recalls it. Each head pays for what it visited."""
    profile, sites = small_profile()
    for seen in profile.observations.values():
        seen.t2.fill_(1e6)
    fits = both(profile, 0.1, 0.9, 0.99, 1e-4)
    fits.trials["a", 512].visited[3, 0] = 100.0
    problem = make_problem(profile, DENSITY, sites, 512, fitted=fits, allow=FAMILIES)
    few, dense = column(problem, FEW), problem.cost[0, 0]
    kind, params = CANDIDATES["pooled"], dict(FEW.params)
    expected = dense * 0.1 + kind.scored(params, 512) / 1e6
    assert problem.cost[:3, few] == pytest.approx(expected) and problem.cost[3, few] > dense
    assert problem.groups[0, few] != problem.groups[0, 0] == problem.groups[0, column(problem, DENSE)]
    # A skipped block costs its scores.
    assert problem.cost[0, column(problem, SKIPPING[1])] == pytest.approx(dense * 0.55 + expected - dense * 0.1)
    assert not np.isfinite(problem.damage[:4, column(problem, SKIPPING[0])]).any()
    found = front(problem).pick(max_damage=4e-3)
    assert found is not None
    chosen = [problem.choices[c].candidate for c in found.index[:4]]
    # All of the fourth would be visited: the threshold skips blocks of it instead.
    assert chosen == ["pooled"] * 3 + ["threshold"]
    # Where nothing of it pays, heads end dense by themselves.
    dear = both(profile, 1.0, 0.0, 1.0, 0.0)
    idle = front(make_problem(profile, DENSITY, sites, 512, fitted=dear, allow=FAMILIES)).pick(max_damage=1e-6)
    assert idle is not None and not idle.index[:4].any()
    # The whole cache is kept for them: decoding saves nothing.
    decoding = make_problem(profile, DENSITY, sites, 512, fitted=fits, allow=FAMILIES, objective="memory")
    assert decoding.span[0, few] == decoding.span[0, 0] and decoding.cost[0, few] == decoding.cost[0, 0]


def test_shares_and_damage_beyond_what_was_tried() -> None:
    profile, sites = small_profile()
    fits = fits_of(profile, {256: trials_of(0.4, 0.5, 0.9, 0.001), 512: trials_of(0.2, 0.6, 0.95, 0.002)})
    assert [shares_at(fits, "a", FEW, n, 4)[0].visited for n in (512, 511, 4096)] == [0.2, 0.4, 0.2]
    # Below all lengths tried as many blocks as at the shortest, all of them at most.
    assert [shares_at(fits, "a", FEW, n, 4)[0].visited for n in (200, 100)] == [pytest.approx(0.512), 1.0]
    assert shares_at(fits, "a", DENSE, 512, 4) == (None,) * 4 == shares_at(None, "a", FEW, 512, 4)
    at = {n: make_problem(profile, DENSITY, sites, n, fitted=fits, allow=FAMILIES) for n in (512, 1024)}
    damages = [problem.damage[0, column(problem, FEW)] for problem in at.values()]
    assert damages == [pytest.approx(0.002), pytest.approx(0.004)]  # it doubled from 256 to 512
    choices = {"a": (FEW,) * 4, "b": (DENSE,) * 4}
    assert min_length_of(choices, sites, DENSITY, fits) == 0
    assert allowed_families(None, fits) == FAMILIES
    with pytest.raises(OptionError, match="no trials of linear") as caught:
        allowed_families(["linear"], fits)
    assert "attnopt distill --families blocks,linear,threshold" in caught.value.remedy


def test_what_is_lost_of_the_probe_is_what_was_tried_or_what_is_not_recalled() -> None:
    profile, sites = small_profile()
    for seen in profile.observations.values():
        seen.probe = {"t2": torch.zeros(4, 2, 4).double(), "ablation_t2": torch.full((4,), 8.0).double()}
        seen.asked = 10.0
    fits = both(profile, 0.1, 0.9, 0.75, 0.0)
    problem = make_problem(profile, DENSITY, sites, 512, retrieval=0.5, fitted=fits, allow=FAMILIES)
    assert problem.retrieval[0, column(problem, FEW)] == pytest.approx(0.5 * 0.4 * 0.25)
    for trials in fits.trials.values():
        trials.asked = 10.0
        trials.asked_t2[:, 0] = 6.0
    problem = make_problem(profile, DENSITY, sites, 512, retrieval=0.5, fitted=fits, allow=FAMILIES)
    assert problem.retrieval[0, column(problem, FEW)] == pytest.approx(0.5 * 0.3)


@pytest.fixture(scope="module")
def made(evidence: tuple[Profile, Fitted]) -> Made:
    """A plan of heads that select, of which it is said that h.0's lose nothing by it, and visit little; all others have
    to be dense."""
    profile, fitted = evidence[0], Fitted.from_bytes(evidence[1].to_bytes(), "copy")
    for (site, _), trials in fitted.trials.items():
        few, skipping = trials.choices.index(FEW), trials.choices.index(SKIPPING[1])
        trials.t2.fill_(1e9)
        trials.asked_t2.zero_()
        if site == "h.0":
            trials.t2[0, few] = trials.t2[1, skipping] = 0.0
        trials.visited[:, few], trials.skipped[:, skipping] = 1.0, 9.0
        trials.recalled[:, [few, skipping]] = 0.96 * trials.rows
    for seen in profile.observations.values():
        seen.t2.fill_(1e9)
    texts = ({LENGTH: tokens(8, LENGTH, seed=n)} for n in (3, 4))
    with pytest.MonkeyPatch.context() as patch:
        # The first point tried, where the prediction meets the budget: measured, cheaper ones would hold it as well.
        patch.setattr("attnopt.planner.make.verify_loop", partial(verify_loop, max_evaluations=1))
        budget = Budget("kl", 10.0)
        return make_plan(NanoGPT().eval(), "nano", profile, *texts, budget, LENGTH, tables=DENSITY, fitted=fitted)


def test_a_plan_with_selections_is_measured_saved_and_runs(made: Made, tmp_path: Path, eagerly: Any) -> None:
    plan = made.plan
    assert plan.choices["h.0"] == (FEW, SKIPPING[1], *[DENSE] * (HEADS - 2))
    assert {c for n in range(1, LAYERS) for c in plan.choices[f"h.{n}"]} == {DENSE}
    assert plan.fitted is None and plan.constraints.allow == FAMILIES
    assert plan.visits == {"h.0": {0: Share(0.1, 0.0, 0.96), 1: Share(1.0, 0.9, 0.96)}}
    plan.save(tmp_path / "plan.json")
    held = Plan.load(tmp_path / "plan.json")
    assert held == plan and held.dump() == plan.dump()
    model, ids = NanoGPT().eval(), tokens(1, LENGTH, seed=4)
    backend.clear_reports()
    operator.forget()
    call = compiled(model, plan=str(tmp_path / "plan.json"))
    with torch.no_grad():
        found, expected = call(ids), Spans(model).logits(ids, held.choices)
        assert (found - model(ids)).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    told = attnopt.explain(call)
    heads = told.to_json()["visits"]["h.0"]
    # Counted by the compiled model and by the measurement alike.
    assert [(h["head"], h["possible"], h["calls"]) for h in heads] == [(0, 20, 2), (1, 20, 2)]
    assert heads[0]["skipped"] == 0 and heads[0]["visited"] < 20 and heads[1]["visited"] == 20
    least, most = (f"{100 * h['visited'] / 20:.3g}" for h in heads)
    said = f"h.0, heads 0-1: {least} to {most} % of the blocks visited, of these 0 % skipped"
    assert said in " ".join(str(told).split())


def test_reports_say_what_such_heads_visit(made: Made, evidence: tuple[Profile, Fitted]) -> None:
    data = plan_json(made.plan)
    first, second = data["sites"]["h.0"][:2]
    assert (first["far"], first["dense"], first["kept"]) == ("selected", False, pytest.approx(0.1))
    assert (second["skipped"], second["kept"]) == (0.9, pytest.approx(0.1))
    assert data["density"] < 1 and data["totals"]["replaced"] == 2
    facts = [value for label, value in plan_facts(data) if label == "selected"]
    assert facts == [
        "1 head, pooled, mass 0.75, block 16: visits 10 % of its blocks, recalls 96.0 % of the mass",
        "1 head, threshold, block 16, skip 64: visits 100 % of its blocks, skips 90 % of "
        "these, recalls 96.0 % of the mass",
    ]
    # With the plan and the profile alone: costs as the plan had them, damages not known.
    posed = pose(made.plan, evidence[0])
    assert posed.solution.cost == pytest.approx(made.verified.solution.cost)
    said = head_json(made.plan, evidence[0], posed, "h.0", 0)
    assert next(row["visits"] for row in said["candidates"] if row["chosen"]).startswith("visits 10 % of its blocks, ")
    assert "selection 0.00016 of" in next(row["visits"] for row in said["candidates"] if row["chosen"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["visits"].update(nowhere={}), "visits.nowhere: there is no such site"),
        (lambda d: d["visits"]["h.0"].update({"9": {}}), "head '9' does not exist"),
        (lambda d: d["visits"]["h.0"]["0"].update(visited=1.5), "1.5 is no share of 1"),
        (lambda d: d["visits"]["h.0"]["0"].pop("recalled"), "'recalled' is missing"),
        (lambda d: d["sites"]["h.0"]["choices"]["0"].update(block=48), "block must be one of 16, 32, 64, 128"),
        (lambda d: d["sites"]["h.0"]["choices"]["0"].update(mass=1.25), "mass must be between"),
        (lambda d: d["sites"]["h.0"]["choices"]["0"].update(count=0), "count must be between 1 and 1048576, not 0"),
    ],
)
def test_wrong_values_of_a_plan_are_named(made: Made, edit: Any, said: str) -> None:
    data = json.loads(made.plan.dump())
    edit(data)
    with pytest.raises(PlanError, match=said):
        Plan.parse(json.dumps(data))


def test_two_plans_are_compared_by_what_such_heads_visit(made: Made, evidence: tuple[Profile, Fitted]) -> None:
    plan = made.plan
    dense = replace(plan, choices={**plan.choices, "h.0": (DENSE,) * HEADS}, visits={})
    found = plans_json(dense, plan, ("a", "b"))
    assert [(c["heads"], c["labels"][1].partition(",")[0]) for c in found["changes"]] == [
        ("0", "pooled"),
        ("1", "threshold"),
    ]
    assert [c["cost"][0] for c in found["changes"]] == [1.0, 1.0] and all(c["cost"][1] < 0.75 for c in found["changes"])
    assert found["sites"]["h.0"][0]["kept"] == [1.0, pytest.approx(0.1)]
    weighed = candidates_json(plan, evidence[0])["choices"]
    assert next(c["cost"] for c in weighed if c["candidate"] == "pooled") < 0.3


def test_what_is_not_known_is_said_not_to_be(made: Made, evidence: tuple[Profile, Fitted]) -> None:
    bare = replace(made.plan, visits={})
    data, dense = plan_json(bare), replace(bare, choices={name: (DENSE,) * HEADS for name in bare.choices})
    head = data["sites"]["h.0"][0]
    assert (head["kept"], head["visited"]) == (None, None) and Share(1.0, 0.0, 1.0) == WHOLE
    # It may visit everything: the sums say so.
    assert data["density"] == 1.0 and dict(plan_facts(data))["density"].startswith("at most 100.0 % of the dense")
    assert candidates_json(bare, evidence[0])["choices"][-1]["cost"] is None
    found = plans_json(dense, bare, ("a", "b"))
    assert [c["cost"] for c in found["changes"]] == [[1.0, None], [1.0, None]]
    said = io.StringIO()
    terminal.print_plan(data, Console(file=said, width=120))
    terminal.print_difference(found, Console(file=said, width=120))
    assert "selected         ? " in said.getvalue() and "100 -> ? %" in said.getvalue()


def test_under_the_break_even_such_heads_are_dense(made: Made, evidence: tuple[Profile, Fitted]) -> None:
    plan = replace(made.plan, min_length=2 * LENGTH)
    data = plan_json(plan)
    assert {(h["far"], h["kept"], h["dense"]) for h in data["sites"]["h.0"]} == {("", 1.0, True)}
    assert f"{LENGTH} are fewer, so what is predicted there does not run" in dict(plan_facts(data))["break-even"]
    measured = f"at {LENGTH} tokens, where dense runs and its choices were measured, increase"
    assert dict(plan_facts(data))["final text"].startswith(measured)
    notes = head_json(plan, evidence[0], pose(plan, evidence[0]), "h.0", 0)["notes"]
    assert notes[0] == f"Under {2 * LENGTH} tokens the plan runs every head dense, also at the {LENGTH} compared here."


def test_what_is_not_there_is_not_written(made: Made) -> None:
    bare = replace(made.plan, visits={})
    assert "visits" not in json.loads(bare.dump())
