"""A cache of spans against the oracle, whatever is done with it: random spans, and tokens, padding, rollbacks and
changes of rows in any order. After every call the logits of all its real tokens are the oracle's."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generation import models, oracle
from torch import Tensor

import attnopt.settings
from attnopt import SpanCache
from attnopt.codegen import native
from attnopt.errors import AttnoptError

# Conversations, of which each kernel has a third.
CONVERSATIONS = 36


@dataclass
class Conversation:
    """A cache, and what was fed to it: ids and mask (B, columns), and of each row the most tokens there ever were."""

    chance: random.Random
    plan: tuple[tuple[models.Rule, ...], ...]
    twin: Any
    cache: SpanCache
    ids: Tensor
    mask: Tensor
    highest: Tensor

    @property
    def model(self) -> Any:
        return models.shared("llama")

    def take(self, rows: Tensor) -> None:
        self.ids, self.mask, self.highest = self.ids[rows], self.mask[rows], self.highest[rows]

    def rows(self, count: int) -> Tensor:
        """So many rows, any of those there are."""
        return torch.tensor([self.chance.randrange(len(self.ids)) for _ in range(count)])


def feed(said: Conversation) -> None:
    """Some columns, with padding anywhere or nowhere; as many as there is room for."""
    wanted = said.chance.choice([1, 1, said.chance.randint(2, 9), said.chance.randint(10, 50)])
    columns = min(wanted, said.cache.max_length - int(said.mask.sum(1).max()))
    if columns < 1:
        return
    shape = len(said.ids), columns
    new = torch.tensor([[said.chance.randrange(1, models.VOCABULARY) for _ in range(columns)] for _ in said.ids])
    real = (torch.rand(shape) < said.chance.choice([1.0, 0.8, 0.3])).long()
    said.ids, said.mask = torch.cat((said.ids, new * real), 1), torch.cat((said.mask, real), 1)
    positions = (said.mask.cumsum(1) - 1).clamp(min=0)
    given = {} if said.mask.all() else {"attention_mask": said.mask}
    found = said.model(new * real, past_key_values=said.cache, position_ids=positions[:, -columns:], **given).logits
    expected = said.twin(said.ids, attention_mask=said.mask, position_ids=positions, use_cache=False).logits
    assert found.isfinite().all()
    if real.any():
        assert models.difference(found[real > 0], expected[:, -columns:][real > 0]) <= models.TOLERANCE
    assert int(said.cache.get_seq_length()) == said.ids.shape[1]
    said.highest = torch.maximum(said.highest, said.mask.sum(1))


def crop(said: Conversation) -> None:
    """Exactly, or not at all: back to no further than the slack behind the most tokens there ever were."""
    layouts = [layer.layout for layer in said.cache.layers]
    slack = layouts[0].slack
    columns = said.chance.randint(1, min(slack + 3, said.ids.shape[1]))
    ids, mask = said.ids[:, :-columns], said.mask[:, :-columns]
    back, most = int((said.highest - mask.sum(1)).max()), int(said.highest.max())
    rings = [c for layout in layouts for c, whole in zip(layout.capacities, layout.whole, strict=True) if not whole]
    if back > slack and any(most > ring for ring in rings):
        with pytest.raises(AttnoptError, match="slack"):
            said.cache.crop(-columns)
    else:
        said.cache.crop(-columns)
        said.ids, said.mask = ids, mask


def reorder(said: Conversation) -> None:
    rows = said.rows(len(said.ids))
    said.cache.reorder_cache(rows)
    said.take(rows)


def repeat(said: Conversation) -> None:
    if len(said.ids) < 4:
        said.cache.batch_repeat_interleave(2)
        said.take(torch.arange(len(said.ids)).repeat_interleave(2))


def select(said: Conversation) -> None:
    rows = said.rows(said.chance.randint(1, 3))
    said.cache.batch_select_indices(rows)
    said.take(rows)


def fork(said: Conversation) -> None:
    """Go on with a copy, after the original was fed something else."""
    other = Conversation(**vars(said))
    said.cache = copy.deepcopy(said.cache)
    feed(other)


def reset(said: Conversation) -> None:
    said.cache.reset()
    said.ids, said.mask, said.highest = said.ids[:, :0], said.mask[:, :0], torch.zeros_like(said.highest)
    feed(said)


def grow(said: Conversation) -> None:
    """Of windows that do not depend on the length."""
    length = said.cache.max_length + said.chance.randint(1, 40)
    if not any(beta for layer in said.plan for _, _, beta in layer):
        plan, slack = models.plan_of(said.model, said.plan), said.cache.layers[0].layout.slack
        said.cache.grow(SpanCache.for_model(said.model, plan, max_length=length, slack=slack))
        assert said.cache.max_length == length
        said.twin = oracle.of(said.model, models.spans_of(said.model, said.plan, length))


STEPS = (feed, feed, feed, feed, crop, crop, crop, reorder, repeat, select, fork, reset, grow)


def rule(chance: random.Random) -> models.Rule:
    return chance.choice(
        [
            models.FULL,
            *[(chance.randint(0, 6), chance.randint(1, 12), 0.0)] * 4,
            chance.choice([(0, 2, 0.125), models.FULL]),
        ]
    )


@pytest.mark.parametrize("kernel", ["compiled", "torch", "reference"])
def test_anything(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "torch":
        monkeypatch.setattr(native, "takes", lambda *_: False)
    elif kernel == "reference":
        monkeypatch.setattr(attnopt.settings, "target", lambda _: "reference")
    model = models.shared("llama")
    for seed in range(CONVERSATIONS // 3):
        chance = random.Random(f"{kernel} {seed}")
        torch.manual_seed(seed)
        plan = tuple(tuple(rule(chance) for _ in range(models.HEADS)) for _ in range(models.LAYERS))
        length, slack, rows = chance.randint(30, 90), chance.choice([0, 3, 9]), chance.randint(1, 3)
        twin = oracle.of(model, models.spans_of(model, plan, length))
        nothing = torch.zeros(rows, 0, dtype=torch.long)
        with models.attending(model), torch.no_grad():
            cache = SpanCache.for_model(model, models.plan_of(model, plan), max_length=length, slack=slack)
            said = Conversation(chance, plan, twin, cache, nothing, nothing, torch.zeros(rows, dtype=torch.long))
            feed(said)
            for _ in range(chance.randint(6, 12)):
                if said.ids.shape[1]:
                    chance.choice(STEPS)(said)
                else:
                    feed(said)
