"""Replacements that were tried: what a plan weighs of them, and that shared costs are still solved with them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_problem import small_profile

from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import CostTable, FarTable, Joined, Roofline, device, load_or_measure_far
from attnopt.errors import AttnoptError, FittedError, OptionError
from attnopt.fitted import Fitted, Header
from attnopt.ir import DENSE, Choice
from attnopt.plan import Constraints
from attnopt.planner import Problem, choices_from, make_problem, min_length_of, predicted_of
from attnopt.planner.exact import compare
from attnopt.planner.frontier import front
from attnopt.planner.knapsack import GONE, Limits, code_of, settle
from attnopt.planner.make import posed
from attnopt.planner.problem import closed
from attnopt.planner.tried import allowed_families, grown_on, not_pruned
from attnopt.profile_file import Profile
from attnopt.registry import CANDIDATES
from attnopt.statistics.trials import Trials
from attnopt.units import MIB

PLAIN = Choice.of("sink_window", {"sink": 4, "alpha": 64, "beta": 0.0})
LINEAR = Choice.of("linear", {"sink": 4, "window": 64, "features": 8})
TAYLOR = Choice.of("taylor", {"sink": 4, "window": 64, "rank": 2})
MEAN = Choice.of("compensation", {"sink": 4, "alpha": 64, "beta": 0.0})
PRUNED = Choice.of("pruned")
TRIED = (PLAIN, LINEAR, TAYLOR, MEAN, PRUNED)
DENSITY = CostTable.by_density()


def small_fits(profile: Profile, site: str = "a", heads: int = 4) -> Fitted:
    """Of one site: the window alone loses 0.02 at 512 tokens, LINEAR a quarter, MEAN half of it; at 256 half as much.
    Head 2 is worse off with LINEAR than with its window."""
    made = Fitted(Header(profile.header.fingerprint, lengths=(256, 512)))
    shares = torch.tensor([1.0, 0.25, 0.3, 0.5, 3.0], dtype=torch.float64).repeat(heads, 1)
    shares[2, 1] = 1.25
    for length in (256, 512):
        t2 = 2 * 0.02 * length / 512 * shares * 1000.0
        made.trials[site, length] = Trials(TRIED, t2, t2.clone(), t2.clone(), 1000.0)
    from attnopt.feature_maps import FeatureMap, shapes
    from attnopt.fitted import HeadFit

    for name, kind, rank in (("linear/8", "exp", 8), ("taylor/2", "taylor", 2)):
        maps = FeatureMap(kind, *(torch.zeros(s) for s in shapes(heads, rank, 8).values()))
        made.add_map(site, name, maps, [HeadFit("random", 0.5)] * heads)
    made.means[site] = torch.zeros(heads, 8)
    return made


def column(problem: Problem, choice: Choice) -> int:
    return problem.choices.index(choice)


def test_without_fits_nothing_is_other_than_before() -> None:
    profile, sites = small_profile()
    problem = make_problem(profile, DENSITY, sites, 1024)
    assert {c.candidate for c in problem.choices} == {"dense", "sink_window"}
    assert not problem.group.size and not problem.state.size and problem.groups is problem.span


def test_damage_is_the_trials_worst_and_refused_where_the_window_is_better() -> None:
    profile, sites = small_profile()
    problem = make_problem(profile, DENSITY, sites, 512, fitted=small_fits(profile))
    assert (
        problem.damage[:, column(problem, LINEAR)].tolist()
        == [*[pytest.approx(0.005)] * 2, np.inf, pytest.approx(0.005)] + [np.inf] * 4
    )
    assert problem.damage[0, column(problem, MEAN)] == pytest.approx(0.01)
    assert np.isinf(problem.damage[4:, column(problem, MEAN)]).all()  # never tried at b, which has a window of its own
    assert PRUNED not in problem.choices
    without = make_problem(profile, DENSITY, sites, 512)
    assert problem.choices[: len(without.choices)] == without.choices
    assert problem.damage[:, : len(without.choices)].tolist() == without.damage.tolist()


def test_allowed_families_are_weighed_and_no_other() -> None:
    profile, sites = small_profile()
    fits = small_fits(profile)
    for allow, wanted in ((("taylor",), {TAYLOR}), (("prune", "linear"), {LINEAR, PRUNED}), ((), set())):
        problem = make_problem(profile, DENSITY, sites, 512, fitted=fits, allow=allow)
        assert {c for c in problem.choices if c.candidate not in ("dense", "sink_window")} == wanted
    assert allowed_families(None, fits) == ("linear", "taylor", "compensation") and allowed_families(None, None) == ()
    assert allowed_families(["prune", "linear"], fits) == ("linear", "prune") and allowed_families([], fits) == ()
    with pytest.raises(OptionError, match="no family 'prun'") as caught:
        allowed_families(["prun"], fits)
    assert "'prune'" in caught.value.remedy
    with pytest.raises(OptionError, match="Nothing was fitted for linear"):
        allowed_families(["linear"], None)


def test_beyond_the_trials_damage_grows_as_the_span_s_does() -> None:
    profile, sites = small_profile()
    fits, far = small_fits(profile), 2048
    problem = make_problem(profile, DENSITY, sites, far, fitted=fits)
    near = make_problem(profile, DENSITY, sites, 512, fitted=fits)
    c, plain = column(problem, MEAN), column(problem, PLAIN)
    grown = problem.damage[0, plain] / near.damage[0, plain]
    assert grown > 1 and problem.damage[0, c] == pytest.approx(0.01 * grown)


def test_damage_that_begins_behind_the_shorter_length_grows_as_fast_as_any() -> None:
    tried = {256: np.array([0.0, 1e-12, 0.0, 0.01]), 1024: np.array([0.01, 0.01, 0.0, 0.02])}
    grown = grown_on(tried, 4096)
    assert grown.tolist() == pytest.approx([0.16, 0.16, 0.0, 0.04])


def test_an_answer_of_the_probe_is_as_lost_as_without_a_far_part() -> None:
    profile, sites = small_profile()
    for seen in profile.observations.values():
        seen.probe = {
            "t2": torch.full((4, 2, 4), 6.0, dtype=torch.float64),
            "ablation_t2": torch.full((4,), 8.0).double(),
        }
        seen.asked = 10.0
    fits = small_fits(profile)
    problem = make_problem(profile, DENSITY, sites, 512, retrieval=0.5, fitted=fits, allow=("linear", "prune"))
    forgotten = problem.retrieval[0]
    assert forgotten[column(problem, LINEAR)] == pytest.approx(0.5 * 0.3) == forgotten[column(problem, PLAIN)]
    assert forgotten[column(problem, PRUNED)] == pytest.approx(0.5 * 0.4)
    assert problem.on_text[0, column(problem, LINEAR)] == pytest.approx(0.005)


def test_a_length_that_was_not_tried_is_refused() -> None:
    profile, sites = small_profile((256, 512, 1024))
    with pytest.raises(FittedError, match="not tried at a with 1024 tokens") as caught:
        make_problem(profile, DENSITY, sites, 1024, fitted=small_fits(profile))
    assert "attnopt distill" in caught.value.remedy


def test_far_parts_cost_and_keep_something_and_what_is_gone_does_not() -> None:
    profile, sites = small_profile()
    fits, every = small_fits(profile), ("linear", "taylor", "compensation", "prune")
    of = {objective: make_problem(profile, DENSITY, sites, 512, objective=objective, fitted=fits, allow=every)
          for objective in ("prefill", "memory", "decode", "mixed")}  # fmt: skip
    prefill, memory = of["prefill"], of["memory"]
    plain, linear, pruned = (column(prefill, c) for c in (PLAIN, LINEAR, PRUNED))
    assert prefill.cost[0, linear] == pytest.approx(prefill.cost[0, plain] + DENSITY.far_cost(512, "exp", 8))
    assert prefill.cost[0, pruned] == 0 == memory.cost[0, pruned]
    # One span, three kinds of heads; nothing is run for the fourth.
    assert prefill.span[0, plain] == prefill.span[0, linear] == prefill.span[0, column(prefill, MEAN)]
    assert len({int(prefill.groups[0, column(prefill, c)]) for c in (PLAIN, LINEAR, TAYLOR, MEAN)}) == 4
    assert prefill.groups[0, pruned] == GONE
    # A state of 8 features x (8 + 1) float32 a head; a decoded token reads and writes it.
    assert memory.state[0, linear] == 288
    assert memory.cost[0, linear] == pytest.approx(288 / MIB) and of["decode"].cost[0, linear] == pytest.approx(
        2 * 288 / MIB
    )
    assert of["mixed"].cost[0, linear] > of["mixed"].cost[0, plain]
    every_plain, every_linear = (memory.of(np.array([c] * 4 + [0] * 4)) for c in (plain, linear))
    assert every_linear.memory == every_plain.memory + 4 * 288
    assert every_linear.cost == pytest.approx(every_linear.memory / MIB)
    # Two query heads share a KV head's 64 bytes a token: its keys go with the last of them.
    one, both = (memory.of(np.array(heads + [0] * 6)).memory for heads in ([pruned, 0], [pruned, pruned]))
    assert one == memory.dense.memory and both == one - 512 * 64


def gone_and_far(seed: int, group_cost: float, cached: bool) -> Problem:
    """Two sites of two heads on one KV head: dense, two windows, one of them with a far part, and gone."""
    rng = np.random.default_rng(seed)
    length, spans = 1024, [(0, 1024), (4, 64), (4, 64), (0, 256), (0, 0)]
    damage = rng.uniform(0, 1, (4, 5)) * np.array([0, 1.0, 0.4, 0.5, 1.5])
    damage[1, 4] = np.inf
    return Problem(
        heads=tuple((f"s{h // 2}", h % 2) for h in range(4)),
        choices=(DENSE, PLAIN, LINEAR, Choice.of("sink_window", {"sink": 0, "alpha": 256, "beta": 0.0}), PRUNED),
        damage=damage,
        cost=np.tile([1.0, 0.1, 0.3, 0.35, 0.0], (4, 1)),
        span=np.tile([code_of(s, w, length) for s, w in spans], (4, 1)),
        site=np.array([0, 0, 1, 1]),
        group_cost=np.full(2, group_cost),
        length=length,
        kv=np.array([0, 0, 1, 1]),
        key_cost=np.full(2, 1e-3 if cached else 0.0),
        key_bytes=np.full(2, 2.0),
        group=np.tile([0, 1, 2, 3, GONE], (4, 1)),
        state=np.tile([0.0, 0.0, 500.0, 0.0, 0.0], (4, 1)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("group_cost", "cached", "limits"),
    [
        (0.0, False, Limits()), (0.2, False, Limits()), (0.2, False, Limits(spans=1)), (0.0, True, Limits()),
        (0.2, True, Limits(spans=2)), (0.1, False, Limits(spans=2, memory=3000.0)),
    ],
    ids=str,
)  # fmt: skip
def test_front_and_exact_plan_against_every_assignment(group_cost: float, cached: bool, limits: Limits) -> None:
    problem, every = gone_and_far(1, group_cost, cached), []
    spans = [(0, 1024), (4, 64), (4, 64), (0, 256), (0, 0)]
    for index in itertools.product(range(5), repeat=4):
        solution = problem.of(np.array(index))
        groups = [{index[h] for h in (2 * s, 2 * s + 1)} - {4} for s in (0, 1)]
        if all(len(g) <= (limits.spans or 9) for g in groups) and limits.allow(solution) and solution.damage < 9:
            every.append(solution)
            rows = problem.cost[np.arange(4), index].sum() + group_cost * sum(max(len(g) - 1, 0) for g in groups)
            keys = [min(sum(np.max([spans[i] for i in index[2 * s : 2 * s + 2]], axis=0)), 1024) for s in (0, 1)]
            assert solution.cost == pytest.approx(rows + (1e-3 * sum(keys) if cached else 0.0))
            assert solution.memory == 2 * sum(keys) + 500 * index.count(2)
    sweep = front(problem, limits)
    for k in range(len(sweep)):
        point = sweep.point(k)
        assert limits.allow(point)
        assert (point.damage, point.cost) == pytest.approx((sweep.damage[k], sweep.cost[k]))
        assert limits.memory is None or point.memory == pytest.approx(sweep.memory[k])
    for most in (0.1, 0.4, 0.8, 2.0):
        best = min((s.cost for s in every if s.damage <= most), default=None)
        quick = sweep.pick(max_damage=most)
        if best is None:
            assert quick is None
            continue
        found = compare(sweep, max_damage=most, gap=0)
        assert found.solution.cost == pytest.approx(best, rel=1e-6), most
        assert limits.allow(found.solution) and found.solution.damage <= most * (1 + 1e-6)
    settled = settle(problem, problem.of(np.array([1, 2, 3, 4])))
    assert settled.damage <= problem.of(np.array([1, 2, 3, 4])).damage and settled.index[3] == 4


def test_a_plan_says_what_it_expects_and_from_where_on_it_pays() -> None:
    profile, sites = small_profile()
    fits, every = small_fits(profile), ("linear", "prune")
    problem = make_problem(profile, DENSITY, sites, 512, fitted=fits, allow=every)
    linear, pruned = column(problem, LINEAR), column(problem, PRUNED)
    solution = problem.of(np.array([linear, linear, 0, pruned, 0, 0, 0, 0]))
    assert choices_from(problem, solution)["a"] == (LINEAR, LINEAR, DENSE, PRUNED)
    predicted = predicted_of(problem, solution)
    assert predicted.kl_nats_per_token == pytest.approx(0.005 * 2 + 0.06) and 0 < predicted.kv_memory < 1.01
    gone = predicted_of(problem, replace(problem.of(np.array([pruned] * 4 + [0] * 4)), cost=0.0))
    assert np.isfinite(gone.speedup)
    # A far part that costs more than its window saves: nothing is planned below the length where that turns.
    spans = CostTable((), tuple(((n, s, w), ms) for n in (256, 512) for s, w, ms in ((0, n, n / 64), (4, 64, 1.0))))
    far = FarTable((), (((256, "exp", 8), 4.0), ((512, "exp", 8), 5.0)))
    choices = choices_from(problem, problem.of(np.array([linear] * 4 + [0] * 4)))
    assert min_length_of(choices, sites, Joined(spans, far)) == 512
    assert min_length_of(choices, sites, Joined(spans, replace(far, entries=(((256, "exp", 8), 1.0),)))) == 256
    gone_choices = {"a": (PRUNED,) * 4, "b": (DENSE,) * 4}
    assert min_length_of(gone_choices, sites, spans) == 256


def test_heads_whose_removal_hurts_are_not_pruned_unless_nothing_is_said() -> None:
    profile, sites = small_profile()
    for seen in profile.observations.values():
        seen.ablation_t2[:] = torch.tensor([1e-3, 1e-3, 0.1, 1e-3]) * 2 * seen.tokens
        seen.probe = {"t2": torch.zeros(4, 2, 4).double(), "ablation_t2": torch.tensor([0.0, 1.0, 0.0, 9.0]).double()}
        seen.asked = 10.0
    kept = not_pruned(profile, ["a"])
    assert list(kept) == ["a"] and sorted(kept["a"]) == [2, 3]
    assert "0.1 nats per token" in kept["a"][2] and "0.45 nats per answer of the probe" in kept["a"][3]
    fits = small_fits(profile)
    asked = Constraints(protect=("a.0",), allow=("linear", "prune"))
    problem, _ = posed(profile, DENSITY, sites, 512, asked, "prefill", fits)
    pruned, linear = column(problem, PRUNED), column(problem, LINEAR)
    assert np.isfinite(problem.damage[:4, pruned]).tolist() == [False, True, False, False]
    assert np.isfinite(problem.damage[:4, linear]).tolist() == [False, True, False, True]  # 2: its window is better
    assert np.isfinite(closed(problem, {"a": [1]}, [LINEAR]).damage[:4, linear]).tolist() == [False, False, False, True]


def test_times_of_far_parts_grow_with_the_length_and_the_rank() -> None:
    table = FarTable((), tuple(((n, "exp", r), n * r / 1e4) for n in (512, 2048) for r in (16, 64)))
    assert table.cost(512, "exp", 16) == pytest.approx(0.8192) == table.cost(100, "exp", 8)
    assert table.cost(1024, "exp", 32) == pytest.approx(1024 * 32 / 1e4)  # a power law in both
    assert table.cost(8192, "exp", 128) == pytest.approx(8192 * 128 / 1e4)
    with pytest.raises(AttnoptError, match="No 'mean' far part was timed"):
        table.cost(512, "mean", 0)
    with pytest.raises(AttnoptError, match="spans only"):
        CostTable((), (((64, 0, 64), 1.0),)).far_cost(64, "mean", 0)
    assert (
        CANDIDATES["taylor"].cost(Joined(DENSITY, FarTable((), (((64, "taylor", 2), 3.0),))), dict(TAYLOR.params), 64)
        > 3
    )


def test_far_parts_are_timed_once_and_damaged_tables_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "far.json"
    monkeypatch.setattr("attnopt.cost.far.path_of", lambda key, what: path)
    spec, parts = SpanPrefill("cpu", "float32", 4, 2, 8, 8, False), [("exp", 4), ("mean", 0)]
    table = load_or_measure_far(spec, [160, 200], parts, rounds=1)
    assert table.lengths == (160, 200) and set(table.parts) == set(parts)
    assert all(ms > 0 for _, ms in table.entries)
    assert FarTable.load(path) == table
    monkeypatch.setattr("attnopt.cost.far.interleaved", lambda calls, *_: [7.0] * len(calls))
    assert load_or_measure_far(spec, [200], parts) == table  # stored: nothing is timed again
    more = load_or_measure_far(spec, [200], [("taylor", 2)])
    assert {key: ms for key, ms in more.entries if key[0] == 200} == {(200, *p): 3.5 for p in (*parts, ("taylor", 2))}
    assert [e for e in more.entries if e[0][0] == 160] == [e for e in table.entries if e[0][0] == 160]
    path.write_text(path.read_text().replace("3.5", "-1"))
    with pytest.raises(AttnoptError, match="damaged: -1 is no time"):
        load_or_measure_far(spec, [200], parts)


def test_a_device_that_is_not_at_hand_has_a_bound_for_far_parts() -> None:
    card = Roofline(device("h100"), "bfloat16", 32, 8, 128, 128)
    costs = [card.far_cost(n, "exp", r) for n, r in ((4096, 64), (8192, 64), (4096, 2048))]
    assert costs[1] == pytest.approx(2 * costs[0]) and costs[2] > costs[0]
    # Few features are read and written faster than memory brings q, k, v and both outputs.
    assert card.far_cost(4096, "mean", 0) == pytest.approx(costs[0]) == 1e3 * 4096 * 2 * (256 * 1.25 + 256) / 3.35e12
    assert card.cost(1 << 17, 4, 128) + card.far_cost(1 << 17, "exp", 64) < card.cost(1 << 17, 0, 1 << 17) / 20
