"""Ways to generate with a cache that holds what a plan keeps: every logit is the oracle's."""

from __future__ import annotations

import pytest
import torch
from generation import models, oracle
from generation.models import ALL_FULL, MAX_LENGTH, RULES, assert_follows, attending, enabled, generate, produced_logits
from transformers import DynamicCache

import attnopt


@pytest.mark.parametrize("family", models.FAMILIES)
def test_greedy_far_past_the_windows(family: str) -> None:
    """Left padding beyond the sinks; by `enable` and by a cache passed in; a part of what a dense cache takes."""
    model = models.shared(family)
    rules = models.rules_for(model)
    ids, mask = models.left_padded()
    with enabled(model, rules, max_length=MAX_LENGTH):
        out = generate(model, ids, mask, 40)
        assert_follows(model, rules, ids, mask, out)
    with attending(model):
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, rules), max_length=MAX_LENGTH)
        again = generate(model, ids, mask, 40, past_key_values=cache)
        assert again.past_key_values is cache and cache.max_length == MAX_LENGTH
        assert_follows(model, rules, ids, mask, again)
    dense = 2 * 4 * models.LAYERS * models.KV_HEADS * models.HEAD_DIM * MAX_LENGTH * len(ids)
    assert cache.ideal_nbytes <= cache.nbytes < 0.7 * dense
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["mistral", "mixed"])
def test_without_a_plan_the_stock_model(family: str) -> None:
    """Every head dense, the model's own windows kept; so too under a plan of dense heads."""
    model = models.shared(family)
    ids, mask = models.left_padded()
    stock = generate(model, ids, mask, 30)
    for rules in (None, ALL_FULL):
        with enabled(model, rules):
            out = generate(model, ids, mask, 30)
        assert torch.equal(out.sequences, stock.sequences)
        assert models.difference(produced_logits(out), produced_logits(stock)) < models.TOLERANCE


def test_a_padded_row_is_that_row_alone() -> None:
    model = models.shared("llama")
    ids, mask = models.left_padded()
    with enabled(model, RULES, max_length=MAX_LENGTH):
        together = generate(model, ids, mask, 30)
        for row in range(len(ids)):
            alone = generate(model, ids[row : row + 1, mask[row].bool()], None, 30)
            off = models.difference(produced_logits(alone)[0], produced_logits(together)[row])
            assert off < models.TOLERANCE, (row, off)


def test_sampling_with_several_returns() -> None:
    model = models.shared("qwen3")
    ids, mask = models.left_padded()
    with enabled(model, RULES, max_length=MAX_LENGTH):
        out = generate(model, ids, mask, 30, do_sample=True, num_return_sequences=3, temperature=1.5)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 9
    assert_follows(model, RULES, ids, mask, out)


def test_beams() -> None:
    """Sequences and scores are those of a beam search over the oracle: beams change places often."""
    model = models.shared("llama")
    ids, mask = models.left_padded()
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    with enabled(model, RULES, max_length=MAX_LENGTH):
        out = generate(model, ids, mask, 30, **options)
    twin = oracle.of(model, models.spans_of(model, RULES))
    expected = generate(twin, ids, mask, 30, past_key_values=DynamicCache(), **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.beam_indices, expected.beam_indices)
    changes = (expected.beam_indices[:, 1:] != expected.beam_indices[:, :-1]).float().mean()
    assert changes > 0.1, "beams that never change places show nothing"
    assert models.difference(out.sequences_scores, expected.sequences_scores) < models.TOLERANCE
    assert models.difference(produced_logits(out), produced_logits(expected)) < models.TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_every_chunk_of_a_prefill_gives_the_same(family: str) -> None:
    model = models.shared(family)
    rules = models.rules_for(model)
    ids, mask = models.left_padded(length=33)
    window = models.spans_of(model, rules)[0][0][1]
    with enabled(model, rules, max_length=MAX_LENGTH):
        for size in (1, 3, window, window + 1, ids.shape[1], None):
            options = {} if size is None else {"prefill_chunk_size": size}
            assert_follows(model, rules, ids, mask, generate(model, ids, mask, 12, **options))


@pytest.mark.parametrize("padded", [False, True])
def test_bare_forward_steps(padded: bool) -> None:
    """A loop of the user's own that passes no positions: the model counts columns, pads too, as it does everywhere."""
    model = models.shared("partial")
    ids, mask = models.left_padded(length=44) if padded else (models.prompts(length=44), None)
    spans = models.spans_of(model, RULES)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    expected = oracle.logits(model, ids, mask, spans, positions=columns)
    with enabled(model, RULES), torch.no_grad():
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=MAX_LENGTH)
        found, start = [], 0
        for size in (20, 1, 1, 1, 5, *[1] * 16):
            now = None if mask is None else mask[:, : start + size]
            found.append(model(ids[:, start : start + size], attention_mask=now, past_key_values=cache).logits)
            start += size
            assert int(cache.get_seq_length()) == start
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert start == ids.shape[1]
    assert models.difference(torch.cat(found, 1)[real], expected[real]) < models.TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_scoring_without_a_cache(family: str) -> None:
    """A forward pass alone attends as the plan says at that length."""
    model = models.shared(family)
    rules = models.rules_for(model)
    ids, mask = models.left_padded(length=40)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = oracle.logits(model, ids, mask, models.spans_of(model, rules, ids.shape[1]))
    with enabled(model, rules), torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert models.difference(found[mask.bool()], expected[mask.bool()]) < models.TOLERANCE


def test_static_caches_are_absorbed() -> None:
    model = models.shared("qwen3")
    ids, mask = models.left_padded()
    with enabled(model, RULES):
        out = generate(model, ids, mask, 30, cache_implementation="static")
    assert isinstance(out.past_key_values, attnopt.SpanCache)
    assert_follows(model, RULES, ids, mask, out)


def test_a_plan_below_its_least_length_is_dense() -> None:
    """What counts is the length of the cache, not of the prompt."""
    model = models.shared("llama")
    ids, mask = models.left_padded()
    plan = models.plan_of(model, RULES, min_length=MAX_LENGTH + 1)
    for length, rules in ((MAX_LENGTH, ALL_FULL), (MAX_LENGTH + 1, RULES)):
        attnopt.enable(model, plan, max_length=length)
        out = generate(model, ids, mask, 20)
        attnopt.disable(model)
        assert_follows(model, rules, ids, mask, out, length)


def test_a_prompt_of_one_token() -> None:
    model = models.shared("partial")
    ids = models.prompts(2, 1)
    with enabled(model, RULES):
        out = generate(model, ids, None, 40)
    assert_follows(model, RULES, ids, None, out)


def test_rows_that_end_early() -> None:
    model = models.build("llama", pad_token_id=0)
    ids, mask = models.left_padded()
    free = generate(oracle.of(model, models.spans_of(model, RULES)), ids, mask, 30, past_key_values=DynamicCache())
    stop = int(free.sequences[0, ids.shape[1] + 4])
    with enabled(model, RULES, max_length=MAX_LENGTH):
        out = generate(model, ids, mask, 30, eos_token_id=stop)
    assert (out.sequences[0, -8:] == 0).all() or out.sequences.shape[1] < ids.shape[1] + 30
    assert_follows(model, RULES, ids, mask, out)
