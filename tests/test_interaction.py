"""What heads lose together: their losses in the same rows, against the exact sum of squares of the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_planner import random_problem

from attnopt.fingerprint import Fingerprint
from attnopt.planner.interaction import correlations
from attnopt.planner.problem import predicted_of
from attnopt.profile_file import Profile
from attnopt.statistics import SKETCH, Grid, row_signs

GRID = Grid((4,), (16, 32))
ROWS = 512


def profile_of(rows: dict[str, torch.Tensor], lengths: tuple[int, ...] = (ROWS,)) -> Profile:
    """A profile whose heads lose `rows` (heads, N), or half of that with the wider window."""
    profile = Profile.empty(Fingerprint("x", (1.0,)), GRID, ["d"], ["float32"])
    for name, lost in rows.items():
        for length in lengths:
            o = profile.observation(name, len(lost), length)
            o.rows, o.samples = lost.shape[1], 1
            signs = row_signs(f"text {length}", 1, lost.shape[1])[0].double()
            for n, share in enumerate((1.0, 0.5)):
                o.t2[:, 0, n] = (share * lost).square().sum(1)
                o.sketch += share * lost @ signs
    return profile


def losses() -> dict[str, torch.Tensor]:
    """Heads of two sites: three that lose in the same rows, one that loses in others, one that loses nothing."""
    generator = torch.Generator().manual_seed(0)
    common, other = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, ROWS, generator=generator, dtype=torch.float64)
    return {
        "a": torch.stack([common, common + noise[0]]),
        "b": torch.stack([-common + 0.5 * noise[1], other, torch.zeros_like(other)]),
    }


def test_correlations_are_those_of_the_rows():
    rows = losses()
    found = correlations(profile_of(rows), ["a", "b"], [ROWS])
    exact = np.corrcoef(torch.cat([rows["a"], rows["b"][:2]]).numpy())
    assert np.abs(found[:4, :4] - exact).max() < 4 / SKETCH**0.5
    assert (found[4, :4] == 0).all() and (np.diag(found) == 1).all() and (found == found.T).all()
    assert found[0, 2] < -0.6 and found[0, 1] > 0.5
    swapped = correlations(profile_of(rows), ["b", "a"], [ROWS])
    assert swapped[0, 3] == found[2, 0]


def test_several_lengths_are_estimated_together():
    found = correlations(profile_of(losses(), (ROWS, 2 * ROWS)), ["a", "b"], [ROWS, 2 * ROWS])
    exact = np.corrcoef(torch.cat(list(losses().values()))[:4].numpy())
    # Two independent sketches of the same rows: closer than one.
    assert np.abs(found[:4, :4] - exact).max() < 3 / SKETCH**0.5


def test_a_plan_is_expected_to_lose_what_its_rows_lose_together():
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((8, 4000))
    rows[1:4] += rows[0]
    problem = replace(random_problem(2, 4, 0), correlate=lambda: np.corrcoef(rows))
    damage = np.zeros_like(problem.damage)
    damage[:, 1:] = np.square(rows).sum(1, keepdims=True) / 2
    problem = replace(problem, damage=damage)
    everything = problem.of(np.full(8, 1))
    assert problem.expected(everything) == pytest.approx(np.square(rows.sum(0)).sum() / 2, rel=0.03)
    assert everything.damage < 0.8 * problem.expected(everything)
    assert problem.expected(problem.of(np.eye(8, dtype=int)[3])) == pytest.approx(damage[3, 1])
    assert problem.expected(problem.dense) == 0.0
    assert predicted_of(problem, everything).kl_nats_per_token == problem.expected(everything)


def test_without_sketches_heads_are_added():
    forward = Profile.empty(Fingerprint("x", (1.0,)), GRID, ["d"], ["float32"], delta=True, backward=False)
    assert correlations(forward, ["a"], [ROWS]).shape == (0, 0)
    problem = random_problem(1, 4, 0)
    solution = problem.of(np.full(len(problem.heads), 2))
    assert problem.expected(solution) == solution.damage
