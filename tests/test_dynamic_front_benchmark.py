"""The benchmark of fronts with heads selected while running: which sets there are, and which is above another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_problem import small_profile
from test_selected_plan import FAMILIES, FEW, SKIPPING, both, trials_of

from attnopt.cost import CostTable
from attnopt.planner import make_problem
from benchmarks.dynamic_front import (
    MIXTURE,
    NATS,
    STATIC,
    Line,
    Measured,
    behind,
    described,
    figure,
    found_at,
    front_of,
    predicted,
    sets_of,
)


def test_sets_of_choices_and_their_fronts() -> None:
    profile, sites = small_profile()
    fits = both(profile, 0.1, 0.9, 0.99, 1e-4)
    assert trials_of(0.1, 0.9, 0.99, 1e-4).choices == (FEW, *SKIPPING)
    problem = make_problem(profile, CostTable.by_density(), sites, 512, fitted=fits, allow=FAMILIES)
    sets = sets_of(problem)
    assert list(sets) == [MIXTURE, STATIC, "sink_window", "pooled", "threshold"]
    # A threshold that skips nothing is offered to no head.
    assert {str(problem.choices[c]) for c in sets["threshold"]} == {str(SKIPPING[1])}
    assert sorted(sets[MIXTURE]) == sorted(sets[STATIC] + sets["pooled"] + sets["threshold"])
    for name, columns in sets.items():
        found = front_of(problem, columns).pick(max_damage=1e-3)
        assert found is not None and {*np.unique(found.index)} <= {0, *columns}, name
        assert found.cost >= front_of(problem, sets[MIXTURE]).pick(max_damage=1e-3).cost - 1e-12  # type: ignore[union-attr]


def test_the_mixture_is_held_against_the_best_other_set(tmp_path: Path) -> None:
    out_of_reach: list[float | None] = [None] * (len(NATS) - 2)
    lines = [
        Line("text", MIXTURE, (0.5, 0.25, *out_of_reach), {"0.5": Measured(0.49, 0.0125, 0.25, 0.75)}),
        Line("text", STATIC, (0.5, 0.2, *out_of_reach), {}),
        Line("text", "pooled", (0.4, None, *out_of_reach), {}),
    ]
    assert behind(lines) == {"text": pytest.approx(1.25)}
    assert predicted(lines[0])[:3] == ["mixture", "0.50", "0.25"] and "0.0125; 0.250; 75%" in found_at(lines[0])
    facts = {"model": "m", "profiled": [64], "length": 128, "dense_recalls": 1.0}
    assert "| pooled | 0.40 |  |" in described(facts, lines)
    figure(lines, tmp_path / "front.svg")
    assert "<svg" in (tmp_path / "front.svg").read_text()
