"""sink_window: the elastic rule, its damage between the observed windows, its refusals, its reference."""

from __future__ import annotations

import math

import pytest
import torch
from candidates.degenerate import LENGTH, Degenerate
from hypothesis import given
from hypothesis import strategies as st

from attnopt.ir import Choice, Load, Mask, Site
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation, naive_observation

GRID = Grid((0, 4), (16, 32, 64))
candidate = CANDIDATES["sink_window"]
DEGENERATE = [
    Degenerate("a window of every key", {"sink": 3, "alpha": LENGTH, "beta": 0.0}),
    Degenerate("a share of all", {"sink": 0, "alpha": 0, "beta": 1.0}),
    Degenerate("sinks reach the window", {"sink": LENGTH - 5, "alpha": 5, "beta": 0.0}),
    Degenerate("the site's own window is narrower", {"sink": 0, "alpha": 9, "beta": 0.0}, own_window=7),
]


def params(sink: int = 0, alpha: int = 0, beta: float = 0.0) -> dict[str, int | float]:
    return {"sink": sink, "alpha": alpha, "beta": beta}


def observed(values: list[float], length: int = 256) -> Observation:
    """One head; t2 of the three windows at both sinks."""
    result = Observation.zeros(1, GRID, length)
    result.t2[:] = torch.tensor(values, dtype=torch.float64)
    result.ablation_t2.fill_(100.0)
    return result


def site(mask: Mask) -> Site:
    return Site("layers.0", 0, "sdpa", 4, 2, 8, 8, 0.3, "float32", mask)


@pytest.mark.parametrize(
    ("alpha", "beta", "length", "window"),
    [
        (128, 0.0, 1024, 128),
        (128, 0.0, 100, 100),
        (0, 1 / 8, 1024, 128),
        (0, 1 / 64, 100, 1),
        (-512, 0.5, 2048, 512),
        (-512, 0.5, 512, 1),
        (64, 1 / 64, 1000, 79),
        (1 << 20, 1.0, 7, 7),
    ],
)
def test_window_is_the_clamped_floor(alpha: int, beta: float, length: int, window: int) -> None:
    assert candidate.span(params(4, alpha, beta), length) == (4, window)


def test_a_sites_own_window_bounds_it_and_hides_the_sink() -> None:
    assert candidate.span(params(4, 64), 1024, own_window=32) == (0, 32)
    assert candidate.span(params(4, 16), 1024, own_window=32) == (0, 16)


def test_damage_on_the_grid_is_half_of_t2() -> None:
    observation = observed([8.0, 4.0, 2.0])
    for window, expected in ((16, 4.0), (32, 2.0), (64, 1.0)):
        assert candidate.damage(observation, params(0, window), 256).item() == pytest.approx(expected)


def test_damage_between_windows_is_linear_in_log_window_and_ends_at_zero() -> None:
    observation = observed([8.0, 4.0, 2.0])
    middle = round(math.sqrt(16 * 32))
    share = math.log(middle / 16) / math.log(2)
    assert candidate.damage(observation, params(0, middle), 256).item() == pytest.approx(4 - 2 * share)
    assert candidate.damage(observation, params(0, 255), 256).item() > 0
    assert candidate.damage(observation, params(0, 256), 256).item() == 0
    assert candidate.damage(observation, params(4, 252), 256).item() == 0  # the sink holds the other four
    assert candidate.damage(observation, params(0, 40), 256, own_window=40).item() == 0


@given(st.lists(st.floats(0, 100), min_size=3, max_size=3), st.integers(1, 256), st.integers(1, 256))
def test_a_narrower_window_never_damages_less(values: list[float], a: int, b: int) -> None:
    observation = observed(values)
    wide, narrow = (candidate.damage(observation, params(0, w), 256).item() for w in (max(a, b), min(a, b)))
    assert narrow >= wide - 1e-12


def test_damage_falls_back_to_the_next_smaller_sink() -> None:
    observation = observed([8.0, 4.0, 2.0])
    observation.t2[:, 1] /= 2
    assert candidate.damage(observation, params(3, 16), 256).item() == pytest.approx(4.0)
    assert candidate.damage(observation, params(9, 16), 256).item() == pytest.approx(2.0)


def test_damage_without_a_small_enough_sink_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sink of 0"):
        candidate.damage(Observation.zeros(1, Grid((4,), (16,)), 256), params(0, 16), 256)


def test_damage_agrees_with_the_naive_statistics() -> None:
    q, v, grad = torch.randn(1, 4, 96, 8), torch.randn(1, 2, 96, 8), torch.randn(1, 4, 96, 8)
    observation = naive_observation(q, torch.randn(1, 2, 96, 8), v, grad, GRID, 0.3, delta=False)
    expected = [observation.damage(h, 4, 32) for h in range(4)]
    found = candidate.damage(observation, params(4, 32), 96)
    assert found.tolist() == pytest.approx([max(e, observation.damage(h, 4, 64)) for h, e in enumerate(expected)])


def test_space_is_small_never_dense_and_never_narrower_than_observed() -> None:
    choices = candidate.space(GRID, [128, 256, 1024])
    assert choices and len(choices) <= 20
    for choice in choices:
        spans = [candidate.span(dict(choice.params), n) for n in (128, 256, 1024)]
        assert min(w for _, w in spans) >= 16
        assert any(w < n for (_, w), n in zip(spans, (128, 256, 1024), strict=True))
    assert len({tuple(candidate.span(dict(c.params), n) for n in (128, 256, 1024)) for c in choices}) == len(choices)


def test_space_of_a_sliding_site_has_no_sinks_and_no_wider_windows() -> None:
    choices = candidate.space(GRID, [256, 1024], own_window=40)
    assert {c["sink"] for c in choices} == {0}
    assert all(candidate.span(dict(c.params), 256, 40)[1] < 40 for c in choices)
    assert Choice.of("sink_window", params(0, 64)) not in choices


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Mask(), "'none'"),
        (Mask(window=8), "'band'"),
        (Mask(causal=True, offset=3), "shifted by 3"),
        (Mask(causal=True, loads=(Load("bias", ("b", "i", "j")),)), "bias"),
    ],
)
def test_refusals_say_why(mask: Mask, reason: str) -> None:
    refusal = candidate.refuse(site(mask))
    assert refusal is not None and reason in str(refusal) and "layers.0" in str(refusal)


@pytest.mark.parametrize(
    "mask",
    [Mask(causal=True), Mask(causal=True, window=64), Mask(causal=True, loads=(Load("pad", ("b", "j")),))],
)
def test_causal_sites_are_taken(mask: Mask) -> None:
    assert candidate.refuse(site(mask)) is None


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"sink": -1}, "sink must be between 0"),
        ({"sink": 4.0}, "sink must be a whole number"),
        ({"sink": True}, "sink must be a whole number"),
        ({"beta": 0.3}, "multiple of 0.015625"),
        ({"beta": 1.5}, "beta must be between 0 and 1"),
        ({"beta": float("nan")}, "beta must be between 0 and 1"),
        ({"alpha": "many"}, "alpha must be a whole number"),
    ],
)
def test_wrong_parameters_are_named(changed: dict[str, object], text: str) -> None:
    assert text in candidate.problem({**params(4, 128), **changed})
    assert candidate.problem(params(4, -128, 0.5)) == ""
    assert "alpha" in candidate.problem({"sink": 1, "beta": 0.5})


def test_reference_keeps_sinks_outside_the_window() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    i = torch.arange(40)
    keep = (i <= i[:, None]) & ((i < 3) | (i[:, None] - i < 5))
    assert keep[20].sum() == 3 + 5
    weights = (q @ k.mT * 0.3).masked_fill(~keep, float("-inf")).softmax(-1)
    torch.testing.assert_close(candidate.reference(q, k, v, params(3, 5), 0.3), weights @ v)
