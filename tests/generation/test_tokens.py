"""Generation where heads select what they read, against a decode loop over all tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generation import models, token_oracle
from generation.models import difference, generate, produced_logits
from generation.token_oracle import Head
from torch import Tensor

import attnopt
from attnopt.cache.tokens import token_tables
from attnopt.errors import PlanError
from attnopt.hf.token_state import TokenState
from attnopt.ir import Choice
from attnopt.plan import Plan

Heads = Sequence[Sequence[Head]]
DENSE: Head = {}


def top(k: int, sink: int = 0, recent: int = 0, every: int = 1, similar: float = 0.0, behind: int = 0) -> Head:
    return dict(k=k, sink=sink, recent=recent, every=every, similar=similar, behind=behind)


def narrow(k: int, r: int, sink: int = 0, recent: int = 0, every: int = 1) -> Head:
    return dict(k=k, r=r, sink=sink, recent=recent, every=every)


def span(sink: int, window: int) -> Head:
    return dict(sink=sink, window=window)


EACH_STEP: Heads = [[top(4, 1, 2)] * 4, [top(3), top(5, recent=1), top(4, sink=2), top(200)]]
NOW_AND_THEN: Heads = [
    [top(4, 1, 2, every=3), top(4, 1, 2, every=7), top(3, recent=2, every=1000, similar=0.5), top(4, every=9)],
    [top(4, 1, 2, every=5, similar=0.75)] * 4,
]
# A ring that goes round, before and behind a KV head whose keys' features are kept.
RING_FIRST: Heads = [[span(1, 5), span(0, 4), narrow(4, 5, recent=2), narrow(3, 2, sink=1, every=3)], [DENSE] * 4]
RING_LAST: Heads = [[narrow(4, 5, recent=2), narrow(3, 2, sink=1, every=3), span(1, 5), span(0, 4)], [DENSE] * 4]
BEHIND: Heads = [
    [top(4, 1, 2, every=4), top(3), top(4, every=2), top(5)],
    [top(4, 0, 1, behind=1), top(3, behind=1), top(4, 2, 2, behind=1), top(5, behind=1)],
]
MIXED: Heads = [
    [top(4, 1, 2, every=3), top(4), DENSE, span(1, 5)],
    [top(4, 2, 3, behind=1), span(0, 4), narrow(4, 5, recent=2), narrow(3, 2, sink=1, every=3)],
]
ALL = {"each step": EACH_STEP, "now and then": NOW_AND_THEN, "of another layer": BEHIND, "mixed": MIXED}


def choice(head: Head) -> Choice:
    if "window" in head:
        return Choice.of("sink_window", dict(sink=head["sink"], alpha=head["window"], beta=0.0))
    return Choice.of("channels" if "r" in head else "top_tokens" if head else "dense", head)


def plan_of(model: Any, heads: Heads, **changes: Any) -> Plan:
    sites = models.sites_of(model)
    choices = {site.name: tuple(map(choice, layer)) for site, layer in zip(sites, heads, strict=True)}
    return dataclasses.replace(models.plan_of(model, models.ALL_FULL[: len(sites)]), choices=choices, **changes)


@contextmanager
def enabled(model: Any, heads: Heads, **options: Any) -> Iterator[Any]:
    attnopt.enable(model, plan_of(model, heads), **options)
    try:
        yield model
    finally:
        attnopt.disable(model)


def assert_follows(model: Any, heads: Heads, ids: Tensor, mask: Tensor | None, out: Any) -> None:
    mask = torch.ones_like(ids) if mask is None else mask
    expected = token_oracle.following(model, ids, mask, out.sequences, heads)
    off = difference(produced_logits(out), expected)
    assert off < models.TOLERANCE, f"off by {off:.2g}, at a spread of {expected.std():.2g}"


@pytest.mark.parametrize("name", ALL)
def test_greedy_with_left_padding(name: str) -> None:
    model, (ids, mask) = models.shared("llama"), models.left_padded()
    with enabled(model, ALL[name]):
        out = generate(model, ids, mask, 12)
        selecting = sum("k" in head for head in ALL[name][0])
        assert f"{selecting} of 4 query heads select what they read" in str(attnopt.explain(model))
    assert_follows(model, ALL[name], ids, mask, out)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("heads", [RING_FIRST, RING_LAST], ids=["before", "behind"])
def test_a_ring_beside_features(heads: Heads, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    model, ids = models.shared("llama"), models.prompts()
    with enabled(model, heads):
        out = generate(model, ids, None, 40)
    assert_follows(model, heads, ids, None, out)


def test_what_is_selected_matters() -> None:
    """Or the tests above would show nothing."""
    model, ids = models.shared("llama"), models.prompts()
    with enabled(model, MIXED):
        out = generate(model, ids, None, 12)
    right = produced_logits(out)
    for layer, head, changed in (0, 0, {"every": 2}), (1, 0, {"behind": 0}), (1, 2, {"r": 6}), (0, 1, {"k": 3}):
        other = [[dict(h) for h in row] for row in MIXED]
        other[layer][head].update(changed)
        if changed == {"k": 3}:
            other[1][0] = dict(DENSE)
        wrong = token_oracle.following(model, ids, torch.ones_like(ids), out.sequences, other)
        assert difference(right, wrong) > 1e-3, (layer, head, changed)


def test_beams_take_what_was_selected_along() -> None:
    model, (ids, mask) = models.shared("llama"), models.left_padded()
    with enabled(model, NOW_AND_THEN):
        out = generate(model, ids, mask, 12, num_beams=3, num_return_sequences=2, length_penalty=0.0)
    changes = (out.beam_indices[:, 1:] != out.beam_indices[:, :-1]).float().mean()
    assert changes > 0.1, "beams that never change places show nothing"
    logits = token_oracle.following(model, ids, mask, out.sequences, NOW_AND_THEN)
    new = out.sequences[:, ids.shape[1] :]
    scores = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), scores, rtol=0, atol=1e-4)


def test_a_prompt_in_chunks_and_a_second_turn_select_anew() -> None:
    model, ids = models.shared("llama"), models.prompts()
    with enabled(model, NOW_AND_THEN):
        out = generate(model, ids, None, 10, prefill_chunk_size=8)
        assert_follows(model, NOW_AND_THEN, ids, None, out)
        turn = torch.cat((out.sequences, models.prompts(length=5, seed=3)), 1)
        again = generate(model, turn, None, 10, past_key_values=out.past_key_values)
    # The last token of the first turn was not cached yet.
    late = range(out.sequences.shape[1] - 1, turn.shape[1])
    expected = token_oracle.following(model, ids, torch.ones_like(ids), again.sequences, NOW_AND_THEN, late)
    found = produced_logits(again)
    assert difference(found, expected[:, -found.shape[1] :]) < models.TOLERANCE


def test_after_tokens_were_taken_back_the_next_step_selects_anew() -> None:
    model, ids = models.shared("llama"), models.prompts()
    steps = models.prompts(length=9, seed=7)
    with enabled(model, NOW_AND_THEN), torch.no_grad():
        cache = attnopt.SpanCache.for_model(model, plan_of(model, NOW_AND_THEN), max_length=64, slack=8)
        model(ids, past_key_values=cache)
        found = [model(steps[:, [n]], past_key_values=cache).logits for n in range(6)]
        cache.crop(-2)
        found[4:] = [model(steps[:, [n]], past_key_values=cache).logits for n in range(4, 9)]
    every, anew = torch.cat((ids, steps, ids[:, :1]), 1), [ids.shape[1] + 4]
    ones = torch.ones_like(ids)
    expected = token_oracle.following(model, ids, ones, every, NOW_AND_THEN, anew=anew)[:, 1:]
    assert difference(torch.cat(found, 1), expected) < models.TOLERANCE
    as_before = token_oracle.following(model, ids, ones, every, NOW_AND_THEN)[:, 1:]
    assert difference(expected, as_before) > 1e-3


def test_drafted_tokens_are_dense_and_may_be_taken_back() -> None:
    model, ids = models.shared("llama"), models.prompts(1, 30)
    everything: Heads = [[top(400), top(1, recent=400, every=5)] * 2] * 2
    with enabled(model, everything):
        out = generate(model, ids, None, 16, prompt_lookup_num_tokens=3)
    assert_follows(model, everything, ids, None, out)


def test_a_copied_cache_goes_its_own_way_and_one_is_used_again() -> None:
    model, ids = models.shared("llama"), models.prompts()
    with enabled(model, MIXED, max_length=64):
        first = generate(model, ids, None, 6)
        kept = copy.deepcopy(first.past_key_values)
        assert isinstance(kept.layers[1].tokens, TokenState)
        assert kept.layers[1].tokens.sources[0] is kept.layers[0].tokens
        before = [x.clone() for x in kept.layers[0].tensors()]
        del first
        assert_follows(model, MIXED, ids, None, generate(model, ids, None, 12))
        assert all(map(torch.equal, before, kept.layers[0].tensors()))


def test_below_the_least_length_of_a_plan_every_head_is_dense() -> None:
    model, ids = models.shared("llama"), models.prompts()
    attnopt.enable(model, plan_of(model, MIXED, min_length=1000))
    try:
        out = generate(model, ids, None, 6)
    finally:
        attnopt.disable(model)
    assert all(layer.tokens is None for layer in out.past_key_values.layers)
    assert_follows(model, [[DENSE] * 4] * 2, ids, None, out)


@pytest.mark.parametrize(
    ("layer", "head", "said"),
    [
        (0, top(4, behind=1), "Head 2 of model.layers.0.self_attn reads .* there are 0 before it"),
        (1, top(4, behind=2), "there are 1 before it"),
        (1, top(5, behind=1), "which are 4 and not 5"),
        (1, top(4, behind=1, every=2), "is to select some itself"),
        (1, narrow(4, 99), "Head 2 of model.layers.1.self_attn, channels: r is 99, and its keys have 16 features"),
    ],
)
def test_a_selection_that_is_not_there_is_refused(layer: int, head: Head, said: str) -> None:
    model = models.shared("llama")
    heads = [[top(4)] * 4, [top(4)] * 4]
    heads[layer][2] = head
    with pytest.raises(PlanError, match=said) as caught:
        attnopt.enable(model, plan_of(model, heads))
    assert "_attnopt" not in vars(model)
    # What is wrong is an edit of this model's plan.
    assert caught.value.remedy.startswith(("Correct", 'Give it "every" 1'))


@pytest.mark.parametrize("source", [span(1, 5), top(4, behind=1)])
def test_a_source_that_does_not_select_is_refused(source: Head) -> None:
    model = models.shared("llama")
    with pytest.raises(PlanError, match=r"where that head selects none|there are 0 before it"):
        attnopt.enable(model, plan_of(model, [[source] * 4, [top(4, behind=1)] * 4]))


def test_a_plan_that_reads_other_layers_is_refused_where_there_are_fewer(eagerly: list[Any]) -> None:
    """In a compiled prefill nothing is read from another layer: what is there of the plan is dense."""
    smaller, plan, ids = models.build("llama", layers=1), plan_of(models.shared("llama"), BEHIND), models.prompts()
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attn"):
        attnopt.enable(smaller, plan)
    assert "_attnopt" not in vars(smaller)
    with torch.no_grad():
        found = torch.compile(smaller, backend="attnopt", options={"plan": plan})(ids, use_cache=False).logits
        assert difference(found, smaller(ids, use_cache=False).logits) < 1e-4 and len(eagerly) == 1


def test_a_dense_head_selects_for_those_that_read_it() -> None:
    """It attends to every key all the same."""
    model, (ids, mask), asking = models.shared("llama"), models.left_padded(), BEHIND[1]
    with enabled(model, [[DENSE] * 4, asking]):
        out = generate(model, ids, mask, 12)
    assert_follows(model, [[top(int(head["k"]), recent=10**6) for head in asking], asking], ids, mask, out)


def test_a_dense_head_selects_one_number_of_tokens() -> None:
    site = models.sites_of(models.shared("llama"))[0]
    layers = [None, (choice(top(4, behind=1)),) * 4, (choice(top(5, behind=2)),) * 4]
    with pytest.raises(PlanError, match="which are 4 and not 5"):
        token_tables(layers, [site] * 3)


def test_what_selecting_keeps_is_counted_with_the_cache() -> None:
    model = models.shared("llama")
    with enabled(model, [[narrow(4, 5)] * 4, [span(0, 9)] * 4], max_length=64):
        found = attnopt.explain(model).generation
        cache = generate(model, models.prompts(1), None, 4).past_key_values
    assert found is not None and cache.nbytes == found.nbytes
    first, second = cache.layers
    # Five features of every key of both KV heads, in float32, and less than a key of a token for what was selected.
    more = first.nbytes - (first.slots_k.nbytes + first.slots_v.nbytes)
    assert 5 * 2 * 64 * 4 < more < 5 * 2 * 64 * 4 + 1000 and second.nbytes == 2 * second.slots_k.nbytes


def test_a_window_of_the_model_itself_leaves_nothing_to_select() -> None:
    with pytest.raises(PlanError, match="cannot select tokens"):
        attnopt.enable(models.shared("mistral"), plan_of(models.shared("mistral"), EACH_STEP))


@pytest.mark.full
def test_a_compiled_model(eagerly: list[Any]) -> None:
    """Prefill and steps, padded; the state is written in place by what is compiled."""
    model, heads = models.build("llama", layers=1), MIXED[:1]
    with enabled(model, heads, max_length=64):
        model.compile(backend="attnopt", fullgraph=True)
        ids, mask = models.left_padded()
        assert_follows(model, heads, ids, mask, generate(model, ids, mask, 12))
        graphs = len(eagerly)
        assert 1 <= graphs <= 3
        assert_follows(model, heads, ids, mask, generate(model, ids, mask, 12))
        assert len(eagerly) == graphs
