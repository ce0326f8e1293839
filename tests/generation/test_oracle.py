"""The oracle itself: a case by hand, the stock models where every head is dense, and that spans matter at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from generation import models, oracle
from transformers import DynamicCache


def test_what_a_head_sees_by_hand() -> None:
    """Two pads, a token, a pad, four tokens: sinks and windows count tokens, not columns."""
    valid = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    seen = oracle.keep(valid, [(1, 2), (0, 1)], 8)[0]
    rows = [[], [], [2], [], [2, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    assert [row.nonzero().flatten().tolist() for row in seen[0]] == rows
    assert [row.nonzero().flatten().tolist() for row in seen[1]] == [[], [], [2], [], [4], [5], [6], [7]]
    assert torch.equal(oracle.keep(valid, [(1, 2)], 3)[0, 0], seen[0, -3:])


def test_attention_by_hand() -> None:
    """Equal scores: each output is the mean of what is seen, per query head of its KV head, and 0 where nothing is."""
    valid = torch.tensor([[0, 1, 1, 1]], dtype=torch.bool)
    config = SimpleNamespace(oracle_spans=[[], [(0, 2), (1, 1), (0, 9), (0, 1)]])
    v = torch.tensor([[100.0, 1.0, 2.0, 4.0], [100.0, 10.0, 20.0, 40.0]])[None, ..., None]
    out, _ = oracle.attention(
        SimpleNamespace(config=config, layer_idx=1), torch.zeros(1, 4, 4, 3), torch.ones(1, 2, 4, 3), v,
        valid[:, None, None], 1.0,
    )  # fmt: skip
    expected = [[0.0, 1.0, 1.5, 3.0], [0.0, 1.0, 1.5, 2.5], [0.0, 10.0, 15.0, 70 / 3], [0.0, 10.0, 20.0, 40.0]]
    torch.testing.assert_close(out[0, :, :, 0].T, torch.tensor(expected))


@pytest.mark.parametrize("rule", [(0, 0, 0.0, 40, 1), (0, -9, 0.5, 40, 11), (2, 3, 0.3, 11, 6), (1, 50, 0.0, 40, 40)])
def test_windows_by_hand(rule: tuple[int, int, float, int, int]) -> None:
    *rule, window = rule
    assert oracle.span(*rule) == (rule[0], window)
    assert oracle.span(*rule, own_window=8) == (0, min(window, 8))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_dense_heads_are_the_stock_model_and_spans_matter(family: str) -> None:
    model = models.shared(family)
    ids, mask = models.left_padded(length=40)
    dense = oracle.logits(model, ids, mask, models.spans_of(model, models.ALL_FULL))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        stock = model(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert models.difference(stock[real], dense[real]) < models.TOLERANCE
    sparse = oracle.logits(model, ids, mask, models.spans_of(model, models.rules_for(model)))
    assert 0.5 < dense[real].std() < 2
    assert models.difference(sparse[real], dense[real]) > dense[real].std()


def test_step_by_step_equals_at_once() -> None:
    """With a cache that keeps everything, beyond a model's own window too."""
    model = models.shared("mistral")
    spans = models.spans_of(model, models.NARROW)
    twin = oracle.of(model, spans)
    ids, mask = models.left_padded()
    out = models.generate(twin, ids, mask, 12, past_key_values=DynamicCache())
    expected = oracle.following(model, ids, mask, out, spans)
    # `generate` hands logits out in float32.
    assert models.difference(models.produced_logits(out), expected) < 1e-6
    assert out.past_key_values.layers[0].keys.shape[2] == ids.shape[1] + 11
