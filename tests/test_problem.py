"""From a profile and a cost table to the planner's problem, and from its solution to what a plan file says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from attnopt.cost import CostTable
from attnopt.errors import ProfileError
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.planner import (
    choices_from,
    kept_dense,
    make_problem,
    min_length_of,
    predicted_of,
    solve,
)
from attnopt.profile_file import Profile
from attnopt.statistics import Grid


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
