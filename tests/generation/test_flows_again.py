"""Caches that are used again: chats, shared prefixes, reset, batches that grow and shrink, speculation that fails."""

from __future__ import annotations

import copy

import pytest
import torch
from generation import models, oracle
from generation.models import MAX_LENGTH, RULES, assert_follows, attending, enabled, generate, produced_logits
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError

LONG = 112


def span_cache(model: object, length: int = MAX_LENGTH, **options: object) -> attnopt.SpanCache:
    return attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=length, **options)


@pytest.mark.parametrize("family", ["llama", "partial"])
def test_three_turns_of_a_chat(family: str) -> None:
    """All ids so far are passed again; questions of unequal length leave pads inside the rows."""
    model = models.shared(family)
    ids, mask = models.left_padded()
    cache = None
    with enabled(model, RULES, max_length=LONG):
        for turn in range(3):
            options = {} if cache is None else {"past_key_values": cache}
            out = generate(model, ids, mask, 14, **options)
            assert_follows(model, RULES, ids, mask, out, LONG)
            cache = out.past_key_values
            assert cache.max_length == LONG
            question, real = models.left_padded(length=12, seed=turn)
            real[1] = torch.tensor([0] * 7 + [1] * 5)
            ids = torch.cat([out.sequences, question], 1)
            mask = torch.cat([mask, torch.ones(len(mask), 14, dtype=torch.long), real], 1)


NARROWER = (((0, 3, 0.0),) * models.HEADS,) * models.LAYERS
CONSTANT = tuple(tuple((s, a or 8, 0.0) for s, a, _ in layer) for layer in RULES)


@pytest.mark.parametrize(("family", "rules"), [("llama", None), ("mixed", None), ("llama", CONSTANT), ("llama", RULES)])
def test_a_chat_past_the_length_of_its_first_turn(family: str, rules: tuple | None) -> None:
    """The cache grows, where what it dropped already is what a longer one would have dropped; else it says so."""
    model = models.shared(family)
    ids, mask = models.left_padded(length=100)
    following = models.ALL_FULL if rules is None else rules
    with enabled(model, rules):
        first = generate(model, ids, mask, 20)
        made_for = first.past_key_values.max_length
        question, real = models.left_padded(length=made_for - 115)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([mask, torch.ones(3, 20, dtype=torch.long), real], 1)
        held = copy.deepcopy(first.past_key_values)
        if rules is RULES:
            with pytest.raises(AttnoptError, match="max_length"):
                generate(model, ids, mask, 20, past_key_values=held)
            return
        out = generate(model, ids, mask, 20, past_key_values=first.past_key_values)
        assert out.past_key_values.max_length > made_for == held.max_length
        assert_follows(model, following, ids, mask, out)
        attnopt.enable(model, models.plan_of(model, NARROWER))
        with pytest.raises(AttnoptError, match="max_length"):
            generate(model, ids, mask, 20, past_key_values=held)


def test_only_the_new_ids_are_passed() -> None:
    """A second turn that brings its own tokens and the mask of all of them."""
    model = models.shared("llama")
    ids, mask = models.left_padded()
    with enabled(model, RULES, max_length=LONG):
        first = generate(model, ids, mask, 14)
        question = torch.cat([first.sequences[:, -1:], models.prompts(length=9, seed=3)], 1)
        whole = torch.cat([mask, torch.ones(3, 14 + 9, dtype=torch.long)], 1)
        out = generate(model, question, whole, 14, past_key_values=first.past_key_values)
    ids = torch.cat([first.sequences, question[:, 1:]], 1)
    out.sequences = torch.cat([first.sequences, out.sequences[:, 1:]], 1)
    assert_follows(model, RULES, ids, whole, out, LONG)


def test_a_second_call_leaves_the_first_cache_alone() -> None:
    """Both results are held; then the first chat goes on."""
    model = models.shared("llama")
    ids = models.prompts()
    with enabled(model, RULES, max_length=MAX_LENGTH):
        first = generate(model, ids, None, 14)
        other = generate(model, models.prompts(seed=2), None, 20)
        assert_follows(model, RULES, models.prompts(seed=2), None, other)
        longer = torch.cat([first.sequences, models.prompts(length=4, seed=3)], 1)
        out = generate(model, longer, None, 14, past_key_values=first.past_key_values)
        assert_follows(model, RULES, longer, None, out)


def test_copies_of_a_prefix() -> None:
    """Each copy continues by itself and the original stays what it was."""
    model = models.shared("qwen3")
    prefix = models.prompts(batch=1, length=30)
    with attending(model), torch.no_grad():
        cache = span_cache(model)
        model(prefix, past_key_values=cache)
        outs = []
        for seed in (5, 6, 5):
            ids = torch.cat([prefix, models.prompts(1, 7, seed)], 1)
            out = generate(model, ids, None, 20, past_key_values=copy.deepcopy(cache))
            assert_follows(model, RULES, ids, None, out)
            assert int(cache.get_seq_length()) == 30
            outs.append(out)
        assert torch.equal(produced_logits(outs[0]), produced_logits(outs[2]))
        ids = torch.cat([prefix, models.prompts(1, 7, 5)], 1)
        assert torch.equal(generate(model, ids, None, 20, past_key_values=cache).sequences, outs[0].sequences)


def test_reset_and_reuse() -> None:
    model = models.shared("mixed")
    rules = models.rules_for(model)
    with attending(model):
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, rules), max_length=MAX_LENGTH)
        for ids, mask in (models.left_padded(), models.left_padded(length=15, seed=4), (models.prompts(), None)):
            out = generate(model, ids, mask, 30, past_key_values=cache)
            assert_follows(model, rules, ids, mask, out)
            cache.reset()
            assert int(cache.get_seq_length()) == 0


def test_batches_that_grow_and_shrink() -> None:
    """Rows are repeated, dropped and reordered between steps; each goes on with its own past."""
    model = models.shared("llama")
    ids, mask = models.left_padded(length=50)
    rows = torch.arange(3)
    spans = models.spans_of(model, RULES)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(cache: object, ids: Tensor, mask: Tensor, positions: Tensor, start: int, end: int) -> None:
        expected = oracle.logits(model, ids[:, :end], mask[:, :end], spans)[:, start:]
        for now in range(start, end) if start else [start]:
            until = now + 1 if start else end
            out = model(
                ids[:, now:until], attention_mask=mask[:, :until], position_ids=positions[:, now:until],
                past_key_values=cache,
            )  # fmt: skip
            real = mask[:, now:until].bool()
            assert models.difference(out.logits[real], expected[:, now - start : until - start][real]) < 1e-5

    with attending(model), torch.no_grad():
        cache = span_cache(model)
        step(cache, ids, mask, positions, 0, 22)
        cache.batch_repeat_interleave(3)
        rows = rows.repeat_interleave(3)
        fork = models.prompts(9, 50, seed=9)
        ids = torch.cat([ids[rows, :22], fork[:, 22:]], 1)
        mask, positions = mask[rows], positions[rows]
        step(cache, ids, mask, positions, 22, 32)
        kept = torch.tensor([7, 0, 5, 2])
        cache.batch_select_indices(kept)
        ids, mask, positions = ids[kept], mask[kept], positions[kept]
        step(cache, ids, mask, positions, 32, 40)
        order = torch.tensor([3, 3, 0, 1])
        cache.reorder_cache(order)
        ids, mask, positions = ids[order], mask[order], positions[order]
        step(cache, ids, mask, positions, 40, 50)


def repetitive() -> Tensor:
    """A prompt that repeats itself, so that a look-up finds candidates, most of them wrong."""
    return models.prompts(1, 9).repeat(1, 4)


@pytest.mark.parametrize("own_cache", [False, True])
def test_prompt_lookup_equals_greedy(own_cache: bool) -> None:
    model = models.shared("llama")
    ids = repetitive()
    with enabled(model, RULES, max_length=LONG):
        greedy = generate(model, ids, None, 40)
        options = {"past_key_values": span_cache(model, LONG, slack=64)} if own_cache else {}
        out = generate(model, ids, None, 40, prompt_lookup_num_tokens=6, **options)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_follows(model, RULES, ids, None, greedy, LONG)
    assert_follows(model, RULES, ids, None, out, LONG)


@pytest.mark.parametrize("draft_enabled", [False, True])
def test_a_draft_model_changes_nothing(draft_enabled: bool) -> None:
    model = models.shared("qwen3")
    draft = models.build("qwen3", layers=1, seed=1)
    ids = models.prompts(1, 30)
    with enabled(model, RULES, max_length=LONG):
        greedy = generate(model, ids, None, 40)
        if draft_enabled:
            attnopt.enable(draft, models.plan_of(draft, RULES[:1]), max_length=LONG)
        out = generate(model, ids, None, 40, assistant_model=draft)
    assert torch.equal(out.sequences, greedy.sequences)
    assert_follows(model, RULES, ids, None, out, LONG)


def test_speculation_does_not_go_on_from_a_cache() -> None:
    """transformers feeds the whole conversation again there, after what is cached: dense caches take it, wrongly."""
    model = models.shared("llama")
    with enabled(model, RULES, max_length=4 * LONG):
        first = generate(model, repetitive(), None, 10, prompt_lookup_num_tokens=4)
        cache = first.past_key_values
        ids = torch.cat([first.sequences, models.prompts(1, 5, 8)], 1)
        before = int(cache.get_seq_length())
        with pytest.raises(AttnoptError, match="another prompt"):
            generate(model, ids, None, 10, past_key_values=cache, prompt_lookup_num_tokens=4)
        assert int(cache.get_seq_length()) == before
        assert_follows(model, RULES, ids, None, generate(model, ids, None, 10, past_key_values=cache), 4 * LONG)
