"""Plans without statistics have the density that is asked for."""

from __future__ import annotations

import pytest

from benchmarks.planners.fixed import density, drawn, uniform, window_of

HEADS = {"a": 8, "b": 4}
WINDOWS = (32, 64, 128, 256, 512, 1024)


def mean_density(choices, length):
    spans = [(c["sink"], c["alpha"]) for heads in choices.values() for c in heads]
    return sum(density(length, s, w) for s, w in spans) / len(spans)


def test_a_density_is_a_share_of_pairs():
    # Four rows of windows of two: 1, 2, 2, 2 of 1, 2, 3, 4; with one sink 1, 2, 3, 3.
    assert density(4, 0, 2) == pytest.approx(7 / 10) and density(4, 1, 2) == pytest.approx(9 / 10)
    assert density(1024, 4, 1024) == 1.0


@pytest.mark.parametrize("wanted", [0.75, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("length", [1024, 1000])
def test_the_density_is_met(wanted, length):
    window = window_of(length, 4, wanted)
    assert density(length, 4, window) <= wanted < density(length, 4, window + 1)
    alike = uniform(HEADS, length, wanted, lambda choices: mean_density(choices, length))
    assert mean_density(alike, length) == pytest.approx(wanted, abs=0.003)
    plans = [drawn(HEADS, length, wanted, WINDOWS, seed) for seed in range(20)]
    assert all(mean_density(p, length) == pytest.approx(wanted, abs=0.003) for p in plans)
    assert len({str(p) for p in plans}) == 20
    assert all(len(p["a"]) == 8 and len(p["b"]) == 4 for p in plans)
    assert drawn(HEADS, length, wanted, WINDOWS, 3) == plans[3]
