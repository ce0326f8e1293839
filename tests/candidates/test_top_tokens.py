"""top_tokens: the keys of the largest scores, found each step, now and then, or by an earlier layer."""

from __future__ import annotations

import pytest
import torch
from candidates.degenerate import DIM, HEADS, KV_HEADS, LENGTH, SCALE, Degenerate, any_inputs

from attnopt.codegen.reference_tokens import TokenRule
from attnopt.cost import CostTable
from attnopt.ir import Choice, Mask, Site
from attnopt.registry import CANDIDATES

candidate = CANDIDATES["top_tokens"]
PARAMS = {"k": 5, "sink": 1, "recent": 3, "every": 1, "similar": 0.0, "behind": 0}
DEGENERATE = [
    Degenerate("as many tokens as there are keys", {**PARAMS, "k": LENGTH}),
    Degenerate("more tokens than there are keys", {**PARAMS, "k": 10 * LENGTH, "sink": 0, "recent": 0}),
    Degenerate("recent keys up to the first", {**PARAMS, "k": 1, "recent": LENGTH, "every": 7}),
    Degenerate("a sink of every key", {**PARAMS, "k": 1, "sink": LENGTH, "similar": 0.5, "every": 9}),
]


def test_a_row_attends_to_its_best_keys_and_those_at_both_ends() -> None:
    q, k, v = any_inputs()
    found = candidate.reference(q, k, v, PARAMS, SCALE)
    for b, h, i in ((0, 0, 3), (0, 1, 20), (1, 3, LENGTH - 1)):
        scores = k[b, h // 2, : i + 1] @ q[b, h, i]
        keep = sorted({0, *range(max(0, i - 2), i + 1), *scores.sort(descending=True).indices[:5].tolist()})
        expected = torch.softmax(SCALE * scores[keep], 0) @ v[b, h // 2, keep]
        torch.testing.assert_close(found[b, h, i], expected)
    assert len(keep) > 6


def test_prompts_run_dense_and_a_step_reads_less() -> None:
    assert candidate.rule(PARAMS) == CANDIDATES["dense"].rule({}) and candidate.decoded
    assert candidate.span(PARAMS, 100) == (0, 100)

    def takes(length: int = 100, **own: int) -> tuple[float, float]:
        return tuple(candidate.selecting(CostTable.by_density(), {**PARAMS, **own}, length, 16))

    # Keys are half of keys and values.
    assert takes() == (50, 9) and takes(every=10) == (5, 9) and takes(behind=2) == (0, 9)
    assert takes(k=500) == (50, 100) and takes(1) == (0.5, 1)
    assert CANDIDATES["sink_window"].selecting(CostTable.by_density(), {}, 100, 16) == (0, 0)
    assert candidate.token_rule({**PARAMS, "similar": 0.5}) == TokenRule(5, 1, 3, 1, 0.5)
    assert (candidate.behind(PARAMS), candidate.behind({**PARAMS, "behind": 3})) == (0, 3)


def test_without_its_tokens_it_is_a_span() -> None:
    plain = {"sink": 1, "alpha": 3, "beta": 0.0}
    assert candidate.plain(PARAMS) == Choice.of("sink_window", plain)
    assert candidate.plain({**PARAMS, "recent": 0}) == Choice.of("sink_window", plain | {"alpha": 1})


def test_what_another_layer_selected_is_no_argument_of_the_reference() -> None:
    with pytest.raises(ValueError, match="another layer selected"):
        candidate.reference(*any_inputs(), {**PARAMS, "behind": 1}, SCALE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 0}, "k must be between 1"),
        ({"similar": 1.5}, "similar must be between 0 and 1"),
        ({"similar": 0.3}, "similar must be a multiple of"),
        ({"every": 0}, "every must be between 1"),
        ({"behind": -1}, "behind must be between 0"),
        ({"recent": 2.0}, "recent must be a whole number"),
    ],
)
def test_wrong_parameters_are_named(changed: dict[str, float], said: str) -> None:
    assert not candidate.problem(PARAMS)
    assert candidate.problem({**PARAMS, **changed}).startswith(said)


@pytest.mark.parametrize("mask", [Mask(causal=True, window=16), Mask(causal=False), Mask(causal=True, offset=3)])
def test_it_needs_plain_causal_attention(mask: Mask) -> None:
    def site(mask: Mask) -> Site:
        return Site("layers.0", 0, "sdpa", HEADS, KV_HEADS, DIM, DIM, SCALE, "float32", mask)

    assert candidate.refuse(site(Mask(causal=True))) is None
    assert candidate.refuse(site(mask)) is not None
