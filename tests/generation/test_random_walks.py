"""A SpanCache through whatever a caller may do with it, in any order: the logits of every call are the oracle's."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from generation import models, oracle
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError
from attnopt.hf.span_layer import SpanLayer


class Walk:
    """A cache, the tokens that it should hold, ids and mask (B, columns), and what they should give."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.draw, self.random = model, random.Random(seed), torch.Generator().manual_seed(seed)
        rules = self.draw.choice([models.rules_for(self.model), models.ALL_FULL])
        self.length = self.draw.choice([48, 64, 96])
        plan, slack = models.plan_of(self.model, rules), self.draw.choice([0, 5, 20])
        self.cache = attnopt.SpanCache.for_model(self.model, plan, max_length=self.length, slack=slack)
        self.twin = oracle.of(self.model, models.spans_of(self.model, rules, self.length))
        rows = self.draw.randint(1, 3)
        self.ids, self.mask = torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0, dtype=torch.long)
        self.done: list[Any] = []

    def feed(self) -> None:
        """Some tokens, with padding anywhere among them or none; how far the logits of the others are off."""
        tokens = self.draw.choice([1, 1, 1, 2, 5, 17])
        if self.ids.shape[1] + tokens > self.length:
            return self.reset()
        new = torch.randint(1, 60, (len(self.ids), tokens), generator=self.random)
        real = torch.rand(new.shape, generator=self.random) < self.draw.choice([0.6, 2, 2])
        self.ids, self.mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, real.long()], 1)
        told = self.told()
        options = told | {"position_ids": told["position_ids"][:, -tokens:]}
        options = {} if bool(self.mask.all()) and self.draw.random() < 0.5 else options
        found = self.model(new, past_key_values=self.cache, **options).logits
        wanted = self.twin(self.ids, use_cache=False, **told).logits[:, -tokens:]
        self.done.append((tokens, bool(real.all()), bool(options)))
        off = ((found.double() - wanted).abs() * real[..., None]).max()
        assert found.isfinite().all() and off < models.TOLERANCE, (off, self.done)

    def told(self) -> dict[str, Tensor]:
        return {"attention_mask": self.mask, "position_ids": (self.mask.cumsum(1) - 1).clamp(min=0)}

    def crop(self) -> None:
        """What cannot be taken back is refused, and then nothing has changed."""
        columns = self.draw.choice([1, 2, 5, 19])
        if columns <= self.ids.shape[1]:
            try:
                self.cache.crop(-columns)
            except AttnoptError as error:
                assert "can give back" in str(error)
                columns = 0
            kept = self.ids.shape[1] - columns
            self.ids, self.mask = self.ids[:, :kept], self.mask[:, :kept]

    def rows(self, index: Tensor) -> None:
        self.ids, self.mask = self.ids[index], self.mask[index]

    def reorder(self) -> None:
        index = torch.randint(0, len(self.ids), (len(self.ids),), generator=self.random)
        self.cache.reorder_cache(index)
        self.rows(index)

    def select(self) -> None:
        index = torch.randperm(len(self.ids), generator=self.random)[: self.draw.randint(1, len(self.ids))]
        self.cache.batch_select_indices(index)
        self.rows(index)

    def repeat(self) -> None:
        if len(self.ids) < 4:
            self.cache.batch_repeat_interleave(2)
            self.rows(torch.arange(len(self.ids)).repeat_interleave(2))

    def fork(self) -> None:
        """Go on with a copy; what then happens to the other must not show."""
        other, self.cache = self.cache, copy.deepcopy(self.cache)
        if self.ids.shape[1] < self.length and bool(self.mask.all()):
            self.model(torch.ones(len(self.ids), 1, dtype=torch.long), past_key_values=other)

    def reset(self) -> None:
        self.cache.reset()
        self.ids, self.mask = self.ids[:, :0], self.mask[:, :0]


@torch.no_grad()
def walks(family: str) -> None:
    first = 10 * list(models.FAMILIES).index(family)
    with models.attending(models.shared(family)) as model:
        for seed in range(first, first + 2):
            walk = Walk(model, seed)
            for _ in range(14):
                walk.feed()
                name = walk.draw.choice(["feed", "crop", "crop", "reorder", "repeat", "select", "fork", "reset"])
                walk.done.append(name)
                getattr(walk, name)()
            walk.feed()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_any_calls_in_any_order(family: str) -> None:
    walks(family)


@pytest.mark.parametrize("mistake", ["values stay when beams change places", "any number of tokens is taken back"])
def test_a_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SpanLayer.reorder_cache

    def forgets_the_values(layer: SpanLayer, beam_idx: Tensor) -> None:
        values = layer.slots_v.clone()
        right(layer, beam_idx)
        layer.slots_v.copy_(values)

    if mistake.startswith("values"):
        monkeypatch.setattr(SpanLayer, "reorder_cache", forgets_the_values)
    else:
        monkeypatch.setattr(SpanLayer, "check_crop", lambda *_: None)
    with pytest.raises(AssertionError):
        for family in models.FAMILIES:
            walks(family)
