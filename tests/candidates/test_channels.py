"""channels: tokens selected by the features that weigh most."""

from __future__ import annotations

import torch
from candidates.degenerate import DIM, LENGTH, SCALE, Degenerate, Inputs, any_inputs

from attnopt.codegen.reference_tokens import TokenRule
from attnopt.cost import CostTable
from attnopt.ir import Mask, Site
from attnopt.registry import CANDIDATES

candidate = CANDIDATES["channels"]
PARAMS = {"k": 5, "sink": 1, "recent": 3, "r": 2, "every": 1}
TOP = {"k": 5, "sink": 1, "recent": 3, "every": 1, "similar": 0.0, "behind": 0}
DEGENERATE = [
    Degenerate("as many tokens as there are keys", {**PARAMS, "k": LENGTH}),
    Degenerate("recent keys up to the first", {**PARAMS, "k": 1, "recent": LENGTH, "every": 3}),
]


def two_features() -> Inputs:
    """Queries and keys that have no others than the features 3 and 6."""
    q, k, v = any_inputs()
    there = torch.isin(torch.arange(DIM), torch.tensor([3, 6]))
    return q * there, k * there, v


def test_the_features_there_are_select_as_all_do() -> None:
    q, k, v = two_features()
    expected = CANDIDATES["top_tokens"].reference(q, k, v, TOP, SCALE)
    torch.testing.assert_close(candidate.reference(q, k, v, PARAMS, SCALE), expected)
    fewer = candidate.reference(q, k, v, {**PARAMS, "r": 1}, SCALE)
    assert (fewer - expected).abs().max() > 1e-3


def test_as_many_features_as_there_are_change_nothing() -> None:
    inputs = any_inputs()
    expected = CANDIDATES["top_tokens"].reference(*inputs, {**TOP, "every": 4}, SCALE)
    for r in (DIM, DIM + 5):
        torch.testing.assert_close(candidate.reference(*inputs, {**PARAMS, "r": r, "every": 4}, SCALE), expected)


def test_features_are_kept_once_for_the_heads_of_a_kv_head() -> None:
    site = Site("h", 0, "sdpa", 8, 2, 16, 16, 0.25, "bfloat16", Mask(causal=True))
    # Two features of 800 keys in two bytes, for four query heads.
    assert candidate.state_bytes(PARAMS, site, 800) == 2 * 800 * 2 / 4
    assert candidate.misfit({**PARAMS, "r": 17}, site) and not candidate.misfit({**PARAMS, "r": 16}, site)


def test_a_step_reads_a_share_of_the_keys() -> None:
    assert candidate.decoded and candidate.token_rule(PARAMS) == TokenRule(5, 1, 3, channels=2)
    table = CostTable.by_density()
    assert candidate.selecting(table, PARAMS, 800, 16) == (50, 9)
    assert candidate.selecting(table, {**PARAMS, "every": 2}, 800, 16) == (25, 9)
    assert candidate.selecting(table, PARAMS, 800, 2) == CANDIDATES["top_tokens"].selecting(table, TOP, 800, 2)
    assert candidate.problem({**PARAMS, "r": 0}) and not candidate.problem(PARAMS)
