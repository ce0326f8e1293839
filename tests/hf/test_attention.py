"""The attention and the mask function that transformers calls by the name "attnopt"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation import models, oracle
from generation.models import RULES, enabled
from torch import Tensor
from transformers import masking_utils

from attnopt.errors import AttnoptError, ModelError
from attnopt.hf.attention import attention, causal, mask


@pytest.fixture
def model() -> Iterator[Any]:
    with models.attending(models.shared("llama")) as found:
        yield found


def asked(model: Any, tokens: int = 4, **given: Any) -> Tensor:
    """What the first layer's attention returns for random tokens."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, models.HEADS, tokens, models.HEAD_DIM, generator=generator)
    k, v = (torch.randn(2, models.KV_HEADS, tokens, models.HEAD_DIM, generator=generator) for _ in range(2))
    return attention(model.model.layers[0].self_attn, q, k, v, given.pop("attention_mask", None), **given)[0]


def test_what_is_asked_beside_is_named(model: Any) -> None:
    expected = asked(model)
    for name, value in {"softcap": 30.0, "s_aux": torch.zeros(4), "cu_seq_lens_q": torch.arange(2), "new": 0}.items():
        with pytest.raises(ModelError, match=name) as refused:
            asked(model, **{name: value})
        assert "attnopt.disable" in refused.value.remedy
        assert torch.equal(asked(model, **{name: None}), expected)
    assert torch.equal(asked(model, position_ids=torch.arange(4), use_cache=True, output_attentions=False), expected)
    with pytest.raises(ModelError, match="later tokens"):
        asked(model, is_causal=False)


def test_masks_are_known_by_what_they_compute() -> None:
    known = masking_utils
    assert causal(known.causal_mask_function, None)
    assert causal(known.sliding_window_causal_mask_function(7), 7)
    one = torch.zeros(1, 4, dtype=torch.int64)
    for other, size in (
        (known.causal_mask_function, 7),
        (known.sliding_window_causal_mask_function(7), 8),
        (known.sliding_window_causal_mask_function(7), None),
        (known.chunked_causal_mask_function(7, one), 7),
        (known.bidirectional_mask_function, None),
        (known.sliding_window_bidirectional_mask_function(7), 7),
        (known.and_masks(known.causal_mask_function, known.packed_sequence_mask_function(one)), None),
        (known.or_masks(known.causal_mask_function, known.causal_mask_function), None),
        (known.and_masks(known.sliding_window_overlay(7), known.bidirectional_mask_function), 7),
        (lambda b, h, i, j: j <= i, None),
    ):
        assert not causal(other, size)
        with pytest.raises(ModelError, match="more than their order"):
            mask(1, 4, 4, mask_function=other, local_size=size)


def test_only_the_new_columns_of_a_mask_are_handed_on() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    found = mask(2, 2, 64, q_offset=3, attention_mask=padding)
    assert found is not None and found.dtype == torch.bool and found.is_contiguous()
    assert found.tolist() == [[[[True, True]]], [[[False, True]]]]
    assert found.history.tolist() == [2, 3]  # type: ignore[attr-defined]
    assert mask(2, 2, 64, q_offset=3) is None
    with pytest.raises(AttnoptError, match="5 columns, and the cache with the new tokens 6"):
        mask(2, 2, 64, q_offset=torch.tensor(4), attention_mask=padding)
    with pytest.raises(AttnoptError, match="keep anything"):
        mask(2, 2, 64, attention_mask=padding[:, None])


def test_masks_that_may_be_anything_are_refused(model: Any) -> None:
    ids = models.prompts(2, 4)
    for given in (torch.ones(2, 1, 4, 4, dtype=torch.bool), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 1, 4)):
        with pytest.raises(AttnoptError, match=r"\(batch, tokens\)"):
            model(ids, attention_mask=given)


@pytest.mark.parametrize("family", ["llama", "mixed"])
def test_without_a_cache_there_are_gradients(family: str) -> None:
    """Of the plan's spans at the length that is there, padded anywhere: the loss and what it asks of every weight."""
    model = models.shared(family)
    rules, (ids, padding) = models.rules_for(model), models.left_padded(3, 24)
    padding[0, 20:], padding[1, 11] = 0, 0
    real = padding.bool()
    twin = oracle.of(model, models.spans_of(model, rules, 24))

    def gradients(of: Any) -> tuple[Tensor, list[Tensor]]:
        logits = of(ids, attention_mask=padding, use_cache=False).logits
        wanted = [p for name, p in of.named_parameters() if "self_attn" in name]
        return logits, list(torch.autograd.grad(logits[real].square().mean(), wanted))

    expected, theirs = gradients(twin)
    with enabled(model, rules):
        found, ours = gradients(model)
    assert models.difference(found[real], expected[real]) < models.TOLERANCE
    for a, b in zip(ours, theirs, strict=True):
        assert models.difference(a, b) < 1e-4 * max(1.0, b.abs().max().item())


def test_dropped_weights_are_refused_where_spans_are() -> None:
    model, ids = models.build("llama", layers=1, attention_dropout=0.5), models.prompts()
    model.train()
    with enabled(model, None):
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    with enabled(model, RULES[:1]), pytest.raises(ModelError, match="drops"):
        model(ids, use_cache=False)


def test_scoring_compiles_whole(eagerly: list[Any]) -> None:
    """A forward without a cache is one graph. Without a mask too transformers would look for packed sequences in it."""
    model, (ids, padding) = models.build("mixed"), models.left_padded(2, 20)
    with enabled(model, models.rules_for(model)), torch.no_grad():
        compiled = torch.compile(model, backend="attnopt", fullgraph=True)
        for given in (padding, torch.ones_like(padding)):
            expected = model(ids, attention_mask=given, use_cache=False).logits
            found = compiled(ids, attention_mask=given, use_cache=False).logits
            assert models.difference(found, expected) < models.TOLERANCE
        assert len(eagerly) == 1
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Pass an attention_mask"):
            compiled(ids, use_cache=False)
