"""Generation under plans whose heads select blocks of keys in a prompt, and decode with all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation import models
from generation.models import difference, generate, produced_logits
from generation.test_tokens import choice, top
from torch import Tensor

import attnopt
from attnopt.errors import ModelError
from attnopt.ir import DENSE, Choice
from attnopt.measure import Spans
from attnopt.ops import selected
from attnopt.plan import Plan

LENGTH = 75
FEW = Choice.of("pooled", {"mass": 0.25, "count": 1, "alike": -1.0, "block": 16, "skip": 0.0})
EVERY = Choice.of("pooled", {**dict(FEW.params), "mass": 1.0, "count": 99})
WINDOW = Choice.of("sink_window", {"sink": 2, "alpha": 9, "beta": 0.0})
MIXED = ((FEW, DENSE, WINDOW, FEW), (FEW, choice(top(5, 1, 3)), FEW, DENSE))


def plan_of(model: Any, choices: tuple[tuple[Choice, ...], ...], **changes: Any) -> Plan:
    sites = models.sites_of(model)
    named = {site.name: layer for site, layer in zip(sites, choices, strict=True)}
    return dataclasses.replace(models.plan_of(model, models.ALL_FULL[: len(sites)]), choices=named, **changes)


def as_prompt(model: Any, ids: Tensor, choices: tuple[tuple[Choice, ...], ...]) -> Tensor:
    """Logits (B, N, V) out of the operators that plans are verified with; heads that select tokens are dense there."""
    sites = models.sites_of(model)
    layers = [tuple(DENSE if c.candidate == "top_tokens" else c for c in layer) for layer in choices]
    with torch.no_grad():
        return Spans(model).logits(ids, {s.name: layer for s, layer in zip(sites, layers, strict=True)})


def test_the_prompt_is_what_was_verified_and_steps_read_every_key(eagerly: Any) -> None:
    model, ids, layers = models.build("llama", layers=1), models.prompts(2, LENGTH), MIXED[1:]
    expected = as_prompt(model, ids, layers)
    assert difference(expected, model(ids).logits) > 1e-2
    attnopt.enable(model, plan_of(model, layers), max_length=128)
    try:
        with torch.no_grad():
            assert difference(model(ids, use_cache=False).logits, expected) < models.TOLERANCE
            cache = attnopt.SpanCache.for_model(model, plan_of(model, layers), max_length=128)
            assert difference(model(ids, past_key_values=cache).logits, expected) < models.TOLERANCE
        out = generate(model, ids, None, 6)
        again = generate(model, ids, None, 6)
    finally:
        attnopt.disable(model)
    assert difference(produced_logits(out)[:, 0], expected[:, -1]) < models.TOLERANCE
    assert torch.equal(out.sequences, again.sequences)


def test_a_selection_of_everything_changes_nothing() -> None:
    model, (ids, mask) = models.shared("llama"), models.left_padded(length=40)
    plain = generate(model, ids, mask, 8)
    attnopt.enable(model, plan_of(model, ((EVERY,) * 4, (EVERY, DENSE, DENSE, EVERY))))
    try:
        out = generate(model, ids, mask, 8)
    finally:
        attnopt.disable(model)
    assert torch.equal(out.sequences, plain.sequences)
    assert difference(produced_logits(out), produced_logits(plain)) < models.TOLERANCE


def test_a_padded_row_gives_what_it_gives_alone() -> None:
    model, ids = models.shared("llama"), models.prompts(2, LENGTH)
    mask = torch.ones_like(ids)
    ids[0, :19], mask[0, :19] = 0, 0
    attnopt.enable(model, plan_of(model, MIXED), max_length=128)
    try:
        both = produced_logits(generate(model, ids, mask, 4))
        alone = produced_logits(generate(model, ids[:1, 19:], None, 4))
    finally:
        attnopt.disable(model)
    assert difference(both[:1], alone) < models.TOLERANCE


@pytest.mark.parametrize("least", [64, 1000])
def test_below_the_least_length_of_a_plan_nothing_is_selected(least: int) -> None:
    model, ids = models.shared("llama"), models.prompts(1, 40)
    attnopt.enable(model, plan_of(model, ((FEW,) * 4,) * 2, min_length=least))
    try:
        out = generate(model, ids, None, 3)
        with torch.no_grad():
            uncached = model(ids, use_cache=False).logits
    finally:
        attnopt.disable(model)
    dense = model(ids).logits
    assert difference(uncached, dense) < models.TOLERANCE
    # Whatever length the cache was made for.
    assert (out.past_key_values.max_length >= least) == (least == 64)
    assert difference(produced_logits(out)[:, 0], dense[:, -1]) < models.TOLERANCE


@torch.no_grad()
def in_chunks(model: Any, plan: Plan, ids: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits (B, N, V) of a prompt in chunks."""
    cache, found, first = attnopt.SpanCache.for_model(model, plan, max_length=256), [], 0
    for size in sizes:
        end = first + size
        given: dict[str, Any] = {}
        if mask is not None:
            given["attention_mask"] = mask[:, :end]
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, first:end]
        found.append(model(ids[:, first:end], past_key_values=cache, **given).logits)
        first = end
    return torch.cat(found, 1)


@pytest.fixture
def long() -> Iterator[tuple[Any, Tensor]]:
    """A model that reads a SpanCache, and two prompts."""
    model = models.build("llama", layers=1)
    with models.attending(model):
        yield model, models.prompts(2, 200)


def test_chunks_of_whole_blocks_are_the_prompt_at_once(long: tuple[Any, Tensor]) -> None:
    """To a method that looks at no more than a row's own queries; and beside a head with a window, whose keys go."""
    model, ids = long
    plan = plan_of(model, ((FEW, DENSE, WINDOW, WINDOW),))
    once = in_chunks(model, plan, ids, (200,))
    assert difference(once, in_chunks(model, plan_of(model, ((DENSE, DENSE, WINDOW, WINDOW),)), ids, (200,))) > 1e-2
    for sizes in ((32, 168), (32, 80, 88)):
        assert difference(in_chunks(model, plan, ids, sizes), once) < models.TOLERANCE


def test_a_padded_row_of_a_chunk_gives_what_it_gives_alone(long: tuple[Any, Tensor]) -> None:
    model, ids = long
    plan, mask = plan_of(model, MIXED[1:]), torch.ones_like(ids)
    # On the left, and between the tokens of the second chunk.
    mask[0, :19] = mask[0, 100:105] = 0
    real = mask[0].bool()
    both = in_chunks(model, plan, ids, (40, 160), mask)
    alone = in_chunks(model, plan, ids[:1, real], (21, 155))
    assert difference(both[:1, real], alone) < models.TOLERANCE
    assert difference(both[1:], in_chunks(model, plan, ids[1:], (40, 160))) < models.TOLERANCE


def test_a_chunk_is_dense_where_few_tokens_are_new_or_known_and_where_keys_are_gone(long: tuple[Any, Tensor]) -> None:
    model, ids = long
    few, dense = (plan_of(model, ((choice,) * 4,)) for choice in (FEW, DENSE))
    exact = in_chunks(model, dense, ids, (200,))
    # The first is below a block, and what follows could be drafted.
    assert difference(in_chunks(model, few, ids[:, :80], (16, 64)), exact[:, :80]) < models.TOLERANCE
    short = in_chunks(model, dataclasses.replace(few, min_length=190), ids, (100, 80, 20))
    assert difference(short, exact) < models.TOLERANCE
    windowed = models.build("mistral", layers=1)
    with models.attending(windowed):
        plan = plan_of(windowed, ((FEW,) * 4,))
        found = in_chunks(windowed, plan, ids, (16, 184))
    assert difference(found, windowed(ids).logits) < models.TOLERANCE


def test_the_report_of_a_generation_says_what_was_visited() -> None:
    model, ids = models.shared("llama"), models.prompts(2, 200)
    selected.forget()
    attnopt.enable(model, plan_of(model, ((FEW, DENSE, DENSE, FEW), (EVERY,) * 4)), max_length=256)
    try:
        assert not attnopt.explain(model).visits
        generate(model, ids, None, 3, prefill_chunk_size=100)
        explained = attnopt.explain(model)
        visits, told = explained.page_data()["visits"], " ".join(str(explained).split())
    finally:
        attnopt.disable(model)
        selected.forget()
    first, second = visits.values()
    assert [row["head"] for row in first] == [0, 3] and all(row["calls"] == 2 for row in first + second)
    assert all(row["visited"] < row["possible"] for row in first)
    assert all(row["visited"] == row["possible"] for row in second)
    assert "heads 0,3:" in told and "% of the blocks visited" in told and "in 2 calls" in told


def test_a_gradient_is_refused_and_a_copied_cache_keeps_its_heads() -> None:
    model, ids = models.build("llama"), models.prompts(1, 40)
    plan = plan_of(model, ((FEW,) * 4,) * 2)
    attnopt.enable(model, plan)
    with pytest.raises(ModelError, match="no gradient"):
        model(ids, use_cache=False)
    cache = attnopt.SpanCache.for_model(model, plan, max_length=64)
    with torch.no_grad():
        expected = model(ids, past_key_values=copy.deepcopy(cache)).logits
        assert difference(model(ids, past_key_values=cache).logits, expected) == 0
    cache.reset()
    with torch.no_grad():
        assert difference(model(ids, past_key_values=cache).logits, expected) == 0
