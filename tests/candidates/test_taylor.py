"""taylor: the series around the mean key, and what it keeps."""

from __future__ import annotations

import torch
from candidates.degenerate import DIM, HEADS, LENGTH, SCALE, Degenerate, any_inputs, keys_alike, map_of

from attnopt.ir import Mask, Site
from attnopt.registry import CANDIDATES

candidate = CANDIDATES["taylor"]
RANK = DIM // 2
PARAMS = {"sink": 2, "window": 9, "rank": RANK}


def around_the_mean() -> object:
    """The dimensions that queries look at, of which the keys' are all mu's: s = 0 and exp(scale q.mu) is a factor."""
    _, k, _ = keys_alike()
    seen, mu = torch.eye(DIM)[:RANK], k[0, 0, 0]
    return map_of("taylor", seen, seen, -(seen @ mu.float()), SCALE * mu)


def one_mean_for_all() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = keys_alike()
    seen = torch.arange(DIM) < RANK
    return q, torch.where(seen, k[:1, :1, :1], k), v


DEGENERATE = [
    Degenerate("a window of every key", {**PARAMS, "window": LENGTH}, given=around_the_mean),  # type: ignore[arg-type]
    Degenerate("keys at their mean", PARAMS, one_mean_for_all, around_the_mean),  # type: ignore[arg-type]
]


def test_far_keys_weigh_as_the_series_says() -> None:
    q, k, v = any_inputs()
    given = around_the_mean()
    found = candidate.reference(q, k, v, PARAMS, SCALE, given=given)  # type: ignore[arg-type]
    b, h, i = 1, 3, LENGTH - 1
    keys, values = k[b, h // 2], v[b, h // 2]
    _, mean, _ = keys_alike()
    mu = mean[0, 0, 0].float().double()
    s = (keys - mu)[:, :RANK] @ q[b, h, i, :RANK]
    exact = torch.exp(SCALE * keys @ q[b, h, i])
    far = torch.exp((SCALE * mu.float()).double() @ q[b, h, i]) * (1 + s + s**2 / 2)
    j = torch.arange(LENGTH)
    weights = torch.where((j < 2) | (i - j < 9), exact, far)
    torch.testing.assert_close(found[b, h, i], weights @ values / weights.sum(), rtol=1e-6, atol=1e-6)


def test_it_names_its_map_and_its_state() -> None:
    site = Site("layers.0", 0, "sdpa", HEADS, 2, DIM, DIM, SCALE, "float32", Mask(causal=True))
    assert (candidate.map_name(PARAMS), candidate.far_part(PARAMS)) == ("taylor/4", ("taylor", 4))
    assert candidate.state_bytes(PARAMS, site, 512) == (1 + 4 + 16) * (DIM + 1) * 4
