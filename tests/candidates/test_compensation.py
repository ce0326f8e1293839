"""compensation: one token for all dropped keys, weighed by their number."""

from __future__ import annotations

import torch
from candidates.degenerate import DIM, HEADS, LENGTH, SCALE, Degenerate, any_inputs, keys_alike

from attnopt.ir import Mask, Site
from attnopt.registry import CANDIDATES

candidate = CANDIDATES["compensation"]
PARAMS = {"sink": 2, "alpha": 9, "beta": 0.0}
DEGENERATE = [
    Degenerate("a window of every key", {**PARAMS, "alpha": LENGTH}),
    Degenerate("a single far key", {"sink": 2, "alpha": LENGTH - 3, "beta": 0.0}),
    Degenerate("keys that queries cannot tell apart", PARAMS, keys_alike),
]


def test_the_dropped_keys_are_one_token_of_their_number() -> None:
    q, k, v = any_inputs()
    found = candidate.reference(q, k, v, PARAMS, SCALE)
    for b, h, i in ((0, 0, 3), (0, 1, 11), (1, 3, LENGTH - 1)):
        keys, values = k[b, h // 2, : i + 1], v[b, h // 2, : i + 1]
        j = torch.arange(i + 1)
        far = (j >= 2) & (i - j >= 9)
        scores = SCALE * keys @ q[b, h, i]
        weights, kept = scores[~far].exp(), values[~far]
        if far.any():
            weights = torch.cat((weights, far.sum() * torch.exp(SCALE * keys[far].mean(0) @ q[b, h, i])[None]))
            kept = torch.cat((kept, values[far].mean(0)[None]))
        torch.testing.assert_close(found[b, h, i], weights @ kept / weights.sum())
    assert far.sum() == LENGTH - 11


def test_it_follows_the_elastic_rule_and_keeps_two_sums() -> None:
    assert candidate.span({"sink": 4, "alpha": 0, "beta": 1 / 8}, 1024) == (4, 128)
    site = Site("layers.0", 0, "sdpa", HEADS, 2, DIM, 16, SCALE, "float16", Mask(causal=True))
    assert candidate.state_bytes(PARAMS, site, 512) == (DIM + 16 + 1) * 4
    assert (candidate.far, candidate.map_name(PARAMS), candidate.far_part(PARAMS)) == ("mean", "", ("mean", 0))
