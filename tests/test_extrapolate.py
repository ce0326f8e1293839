"""A profile carried on to a longer text: exact where rows behave as assumed, cautious where nothing was seen."""

from __future__ import annotations

import pytest
import torch

from attnopt.planner.extrapolate import carried_on
from attnopt.statistics import Grid, Observation, naive_observation

GRID = Grid((2,), (4, 16, 64, 128))


def seen(length: int, lost: float = 0.3) -> Observation:
    """Rows that lose `lost` from the window's length on, whatever their position."""
    observation = Observation.zeros(3, GRID, length)
    observation.rows, observation.samples = 2 * length, 2
    for n, window in enumerate(GRID.windows):
        observation.sums["t2"][:, :, n] = 2 * lost * max(0, length - window)
    observation.sums["ablation_t2"] += 2 * length * 5.0
    return observation


def test_rows_that_lose_alike_are_carried_on_exactly():
    found, expected = carried_on(seen(256), 1024), seen(1024)
    assert (found.length, found.tokens) == (1024, 1024.0)
    for n in (0, 1, 2, 3):
        assert torch.allclose(found.t2[..., n] / found.tokens, expected.t2[..., n] / expected.tokens, rtol=1e-12)
    assert torch.allclose(found.ablation_t2 / found.tokens, expected.ablation_t2 / expected.tokens)


def test_a_window_that_no_row_left_loses_what_its_share_of_the_text_does():
    observation = seen(128)
    assert float(observation.t2[0, 0, 3]) == 0.0
    found = carried_on(observation, 512)
    # 128 of 512 keys, as 32 of 128 do: between the windows of 16 and 64.
    between = (observation.t2[0, 0, 1] + observation.t2[0, 0, 2]) / 2 / observation.tokens
    assert float(found.t2[0, 0, 3] / found.tokens) == pytest.approx(float(between), rel=1e-12)
    # 64 of 512 as 16 of 128 would be less cautious than what its rows lose already.
    assert float(found.t2[0, 0, 2] / found.tokens) > float(observation.t2[0, 0, 2] / observation.tokens)


def test_nothing_is_lost_by_a_window_of_the_whole_text():
    found = carried_on(seen(64), 128)
    assert not found.t2[..., 3].any() and found.t2[..., 2].all()


def test_a_text_that_is_no_longer_is_refused():
    with pytest.raises(ValueError, match="no more than the 256"):
        carried_on(seen(256), 256)


def test_attention_that_reaches_everywhere_is_predicted_from_a_quarter_of_its_length():
    """Random scores: what a row loses levels off with what is dropped, and a share of a longer text averages more."""
    torch.manual_seed(0)
    made = {}
    for length in (96, 384):
        q, k, v, grad = torch.randn(4, 4, 8, length, 8).unbind()
        made[length] = naive_observation(q, k, v, grad, Grid((0,), (8, 32, 96)), 8**-0.5)
    carried, real = carried_on(made[96], 384), made[384]
    ratio = (carried.t2 / carried.tokens) / (real.t2 / real.tokens)
    assert ratio[..., :2].min() > 0.4 and ratio[..., :2].max() < 1.5
    assert ratio[..., 2].min() > 1.0 and ratio[..., 2].max() < 10.0
