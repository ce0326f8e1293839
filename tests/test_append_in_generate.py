"""`generate` on transformers' DynamicCache through `model.compile(backend="attnopt")`: appended to in place, and the
logits of a batch with pads and of a prefix that is continued twice are those of the uncompiled model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from attnopt import backend
from attnopt.backend import append, inductor

IDS = models.tokens(2, 10)


@pytest.fixture(autouse=True)
def run_by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rewritten graphs run by torch: which memory is whose is what is tested."""
    for module in (backend, inductor):
        monkeypatch.setattr(module, "to_inductor", lambda graph, inputs, patches: graph.forward)
    torch._dynamo.reset()
    counters.clear()
    backend.clear_reports()
    append.counts.appended = append.counts.copied = 0
    yield
    torch._dynamo.reset()


def generated(model: Any, ids: Tensor, count: int, **options: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


def padded(model: Any) -> list[Tensor]:
    shown = torch.ones_like(IDS)
    shown[0, :4] = 0
    return [torch.stack(generated(model, IDS, 14, attention_mask=shown).logits)]


def continued_twice(model: Any) -> list[Tensor]:
    """A state after some tokens, continued in two copies of the cache that share its tensors; and all that they hold
    in the end."""
    cache = DynamicCache(config=model.config)
    first = generated(model, IDS, 5, past_key_values=cache)
    logits, forks = [], [cache]
    for turn in (IDS, IDS.flip(1)):
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        out = generated(model, torch.cat([first.sequences, turn], 1), 4, past_key_values=fork)
        logits.append(torch.stack(out.logits))
        forks.append(fork)
    return [*logits, *(held for fork in forks for layer in fork.layers for held in (layer.keys, layer.values))]


def test_a_batch_with_pads() -> None:
    """Three graphs, for the prompt, the first token and all others; keys and values are copied once."""
    model = models.build("llama", num_key_value_heads=2, num_hidden_layers=1)
    expected = padded(model)
    model.compile(backend="attnopt")
    torch.testing.assert_close(padded(model), expected, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 3
    assert (append.counts.copied, append.counts.appended) == (2, 2 * 12)


def test_a_prefix_continued_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """And were any state appended to as if it were the newest, one continuation would hold tokens of the other."""
    model = models.build("llama", num_key_value_heads=2, num_hidden_layers=1)
    expected = continued_twice(model)
    model.compile(backend="attnopt")
    torch.testing.assert_close(continued_twice(model), expected, atol=1e-5, rtol=1e-4)
    assert append.counts.appended
    monkeypatch.setattr(append, "claimed", lambda past: True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(continued_twice(model), expected, atol=1e-2, rtol=1e-2)
