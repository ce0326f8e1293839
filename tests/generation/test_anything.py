"""A cache of spans against the oracle, whatever is done with it: random spans, and tokens, padding, rollbacks and
changes of rows in any order. After every call the logits of all its real tokens are the oracle's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generation import models, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnopt.settings
from attnopt import SpanCache
from attnopt.codegen import native
from attnopt.errors import AttnoptError


@dataclass
class Conversation:
    """What was fed to a cache: ids and mask (B, columns), and of each row the most tokens there ever were."""

    ids: Tensor
    mask: Tensor
    highest: Tensor

    @classmethod
    def empty(cls, rows: int) -> Conversation:
        nothing = torch.zeros(rows, 0, dtype=torch.long)
        return cls(nothing, nothing, torch.zeros(rows, dtype=torch.long))

    @property
    def counted(self) -> Tensor:
        return self.mask.sum(1)

    def rows(self, index: Tensor) -> None:
        self.ids, self.mask, self.highest = self.ids[index], self.mask[index], self.highest[index]


rules = st.tuples(st.integers(0, 6), st.integers(1, 12), st.sampled_from([0.0, 0.0, 0.125])) | st.just(models.FULL)
plans = st.tuples(*[st.tuples(*[rules] * models.HEADS)] * models.LAYERS)


def feed(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    """Some columns, with padding anywhere or nowhere; as many as there is room for."""
    room = cache.max_length - int(said.counted.max()) if len(said.ids) else 0
    columns = data.draw(st.integers(1, 3) | st.integers(1, 40))
    if columns > room:
        columns = room
    if columns < 1:
        return
    shape = len(said.ids), columns
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    new = torch.randint(1, models.VOCABULARY, shape, generator=generator)
    share = data.draw(st.sampled_from([1.0, 1.0, 0.8, 0.3]))
    real = (torch.rand(shape, generator=generator) < share).long()
    said.ids, said.mask = torch.cat((said.ids, new * real), 1), torch.cat((said.mask, real), 1)
    positions = (said.mask.cumsum(1) - 1).clamp(min=0)
    masked = {"attention_mask": said.mask} if not said.mask.all() else {}
    found = model(new * real, past_key_values=cache, position_ids=positions[:, -columns:], **masked).logits
    expected = twin(said.ids, attention_mask=said.mask, position_ids=positions, use_cache=False).logits[:, -columns:]
    assert found.isfinite().all()
    keep = real.bool()
    if keep.any():
        assert models.difference(found[keep], expected[keep]) <= models.TOLERANCE
    assert int(cache.get_seq_length()) == said.ids.shape[1]
    said.highest = torch.maximum(said.highest, said.counted)


def crop(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    """Exactly, or not at all: back to no further than the slack behind the most tokens there ever were."""
    if not said.ids.shape[1]:
        return
    columns = data.draw(st.integers(1, min(12, said.ids.shape[1])))
    ids, mask = said.ids[:, :-columns], said.mask[:, :-columns]
    back, most = int((said.highest - mask.sum(1)).max()), int(said.highest.max())
    rings = [
        c for layer in cache.layers for c, w in zip(layer.layout.capacities, layer.layout.whole, strict=True) if not w
    ]
    if back > cache.layers[0].layout.slack and any(most > ring for ring in rings):
        with pytest.raises(AttnoptError, match="slack"):
            cache.crop(-columns)
    else:
        cache.crop(-columns)
        said.ids, said.mask = ids, mask


def reorder(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    count = len(said.ids)
    index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count)))
    cache.reorder_cache(index)
    said.rows(index)


def repeat(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    if len(said.ids) < 4 and said.ids.shape[1]:
        cache.batch_repeat_interleave(2)
        said.rows(torch.arange(len(said.ids)).repeat_interleave(2))


def select(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    if said.ids.shape[1]:
        index = torch.tensor(data.draw(st.lists(st.integers(0, len(said.ids) - 1), min_size=1, max_size=3)))
        cache.batch_select_indices(index)
        said.rows(index)


def reset(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> None:
    cache.reset()
    rows = len(said.ids)
    said.ids, said.mask = said.ids[:, :0], said.mask[:, :0]
    said.highest = torch.zeros(rows, dtype=torch.long)


def copied(data: st.DataObject, model: Any, twin: Any, cache: SpanCache, said: Conversation) -> SpanCache:
    """Go on with a copy, after the original was fed something else."""
    other, told = copy.deepcopy(cache), copy.deepcopy(said)
    feed(data, model, twin, cache, told)
    return other


STEPS = (feed, feed, feed, crop, crop, reorder, repeat, select, copied, reset)


@settings(max_examples=30)
@given(
    kernel=st.sampled_from(["compiled", "torch", "reference"]),
    plan=plans,
    length=st.integers(20, 72),
    slack=st.sampled_from([0, 3, 9]),
    rows=st.integers(1, 3),
    data=st.data(),
)
def test_anything(kernel: str, plan: Any, length: int, slack: int, rows: int, data: st.DataObject) -> None:
    model = models.shared("llama")
    twin = oracle.of(model, models.spans_of(model, plan, length))
    with pytest.MonkeyPatch.context() as patch, models.attending(model), torch.no_grad():
        if kernel == "torch":
            patch.setattr(native, "takes", lambda *_: False)
        elif kernel == "reference":
            patch.setattr(attnopt.settings, "target", lambda _: "reference")
        cache = SpanCache.for_model(model, models.plan_of(model, plan), max_length=length, slack=slack)
        said = Conversation.empty(rows)
        for _ in range(data.draw(st.integers(2, 10))):
            cache = data.draw(st.sampled_from(STEPS))(data, model, twin, cache, said) or cache
