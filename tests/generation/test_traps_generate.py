"""Mistakes between `generate` and the cache that nothing in transformers would notice: what calls the cache, how it is
rolled back, reused and reordered, and what of a model's attention is left out."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from generation import mistakes, models, oracle
from generation.mistakes import instead, only_right, remembered, told_apart, wrong
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import attnopt
from attnopt.cache import Layout
from attnopt.errors import AttnoptError
from attnopt.hf import attention, generation
from attnopt.hf.cache import SpanCache, SpanLayer


def registered(patch: pytest.MonkeyPatch) -> None:
    """What is registered with transformers now, stays."""
    for module in (attention, generation):
        patch.setattr(module, "register", lambda: None)


def any_mask(patch: pytest.MonkeyPatch) -> None:
    """The mistake of asking nothing of a mask, not even its length."""

    def unquestioned(q_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        return None if attention_mask is None else attention_mask[:, None, None, -q_length:].bool()

    registered(patch)
    patch.setitem(AttentionMaskInterface._global_mapping, "attnopt", unquestioned)


def test_the_mask_function_is_registered_with_the_attention() -> None:
    """Without one transformers drops the mask, padding too."""
    model, (ids, mask) = models.shared("llama"), models.left_padded()

    def error() -> float:
        with models.enabled(model, models.RULES, max_length=models.MAX_LENGTH):
            return wrong(models.generate(model, ids, mask), ids, mask, models.MAX_LENGTH)

    def attention_alone(patch: pytest.MonkeyPatch) -> None:
        registered(patch)
        patch.delitem(AttentionMaskInterface._global_mapping, "attnopt")

    told_apart(error, attention_alone)


def test_a_padded_row_is_the_row_alone() -> None:
    model, (ids, mask) = models.shared("llama"), models.left_padded()

    def error() -> float:
        found = 0.0
        with models.enabled(model, models.RULES, max_length=models.MAX_LENGTH):
            together = models.produced_logits(models.generate(model, ids, mask, 12))
            for row in range(len(ids)):
                alone = models.generate(model, ids[row : row + 1, 5 * row :], None, 12)
                found = max(found, models.difference(together[row], models.produced_logits(alone)[0]))
        return found

    told_apart(error, instead(remembered(columns=True)))


def test_beams_take_their_keys_and_values_along() -> None:
    """Sequences and their scores, of padded prompts; a beam that is dropped leaves nothing to the one in its place."""
    model, (ids, mask) = models.shared("llama"), models.left_padded(2, 14)
    twin = oracle.of(model, models.spans_of(model, models.RULES))
    options = dict(num_beams=4, num_return_sequences=2, length_penalty=1.0)
    expected = models.generate(twin, ids, mask, 14, past_key_values=DynamicCache(), **options)

    def error() -> float:
        with models.enabled(model, models.RULES, max_length=models.MAX_LENGTH):
            out = models.generate(model, ids, mask, 14, **options)
        if not torch.equal(out.sequences, expected.sequences):
            return float("inf")
        return models.difference(out.sequences_scores, expected.sequences_scores)

    told_apart(error, *map(mistakes.forgetting, ("slots_k", "slots_v")), mistakes.not_done(SpanLayer, "reorder_cache"))


@pytest.mark.parametrize("family", ["mistral", "mixed"])
def test_dense_heads_keep_the_window_their_model_has(family: str) -> None:
    model, (ids, mask) = models.shared(family), models.left_padded(2, 24)
    stock = models.produced_logits(models.generate(model, ids, mask, 12))

    def error() -> float:
        with models.enabled(model, models.ALL_FULL):
            return models.difference(models.produced_logits(models.generate(model, ids, mask, 12)), stock)

    def dropped(patch: pytest.MonkeyPatch) -> None:
        of = Layout.of.__func__  # type: ignore[attr-defined]

        def layout(cls: Any, choices: Any, site: Any, *rest: Any) -> Layout:
            return of(cls, choices, replace(site, mask=replace(site.mask, window=None)), *rest)

        patch.setattr(Layout, "of", classmethod(layout))

    told_apart(error, dropped)


def test_a_window_that_the_cache_was_not_made_for_is_an_error() -> None:
    def check() -> None:
        model = models.build("mistral")
        with models.enabled(model, None):
            cache = SpanCache.for_model(model, max_length=64)
            model.config.sliding_window = 5
            with pytest.raises(AttnoptError, match="sliding window of 5"), torch.no_grad():
                model(models.prompts(), past_key_values=cache)

    def unread(patch: pytest.MonkeyPatch) -> None:
        registered(patch)
        patch.setitem(AttentionInterface._global_mapping, "attnopt", without("sliding_window"))

    only_right(check, unread)


def without(*names: str) -> Any:
    """The attention function, not told of these."""

    def deaf(*args: Any, **kwargs: Any) -> Any:
        return attention.attention(*args, **{name: value for name, value in kwargs.items() if name not in names})

    return deaf


MODIFIERS = {
    "softcap": 30.0,
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 5, 5),
    "cu_seq_lens_q": torch.ones(2),
}


def test_what_else_a_model_asks_of_its_attention_is_an_error_that_names_it() -> None:
    def check(attend: Any = None) -> None:
        attend = attend or attention.attention
        module = SimpleNamespace(is_causal=True)
        q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
        for name, value in MODIFIERS.items():
            with pytest.raises(AttnoptError, match=name):
                attend(module, q, k, k, None, **{name: value})

    check()
    with pytest.raises(pytest.fail.Exception):
        check(without(*MODIFIERS))


def test_masks_that_are_more_than_causal_are_an_error() -> None:
    """Packed sequences: two in one row, told apart by their positions."""
    model, ids = models.shared("llama"), models.prompts(1, 12)
    positions = torch.arange(6).repeat(2)[None]

    def check() -> None:
        with models.enabled(model, None), torch.no_grad(), pytest.raises(AttnoptError, match="packed"):
            model(ids, position_ids=positions, use_cache=False)

    only_right(check, lambda patch: patch.setattr(attention, "causal", lambda *_: True))


def test_soft_capped_scores_are_refused_by_name() -> None:
    config = transformers.Gemma2Config(**models.SHARED | {"head_dim": 16, "num_hidden_layers": 1})
    with pytest.raises(AttnoptError, match="soft-cap"):
        attnopt.enable(transformers.Gemma2ForCausalLM(config))


def test_a_cache_that_was_used_is_reset_before_another_prompt() -> None:
    """transformers would cut the new prompt by the length of the old one, from its end where that is longer."""
    model, rules = models.shared("llama"), models.RULES
    first, second = models.prompts(2, 21), models.prompts(2, 20, seed=7)
    mask = torch.ones_like(second)

    def refused(cache: SpanCache) -> None:
        for length in (20, int(cache.get_seq_length())):
            with pytest.raises(AttnoptError, match="reset"):
                models.generate(model, models.prompts(2, length, seed=7), None, 2, past_key_values=cache)

    def check() -> None:
        with models.enabled(model, rules):
            cache = SpanCache.for_model(model, models.plan_of(model, rules), max_length=64)
            models.generate(model, first, None, 8, past_key_values=cache)
            refused(cache)
            cache.reset()
            out = models.generate(model, second, mask, 8, past_key_values=cache)
        assert wrong(out, second, mask, 64) <= models.TOLERANCE
        # Without enable(), which knows of a call of generate() before transformers cuts the prompt.
        with models.attending(model):
            refused(cache)

    def one_layer(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(SpanCache, "reset", lambda self: self.layers[0].reset())

    only_right(check, mistakes.all_of(mistakes.not_done(generation, "accept"), any_mask, mistakes.unchecked), one_layer)


def test_a_cache_that_is_used_again_is_what_a_new_one_would_be() -> None:
    """What nobody holds any more serves the next call: of as many rows and as much slack, and of the same length where
    windows depend on it."""
    model = models.shared("llama")
    calls = (
        (2, 150, 0),
        (2, 144, 0),
        (2, 20, 0),
        (3, 30, 0),
        (1, 40, 0),
        (1, 60, 10),
        (1, 60, 10),
        (1, 50, 0),
        (2, 150, 0),
    )

    fixed = tuple(tuple((sink, alpha or 16, 0.0) for sink, alpha, _ in layer) for layer in models.RULES)

    def error() -> float:
        found = 0.0
        for rules in (models.RULES, fixed):
            with models.enabled(model, rules):
                for rows, length, drafts in calls:
                    ids = models.prompts(1, 6, seed=length).repeat(rows, length // 6)
                    options = {"prompt_lookup_num_tokens": drafts} if drafts else {}
                    out = models.generate(model, ids, None, 6, **options)
                    # One that has other rows by now is of no use.
                    if length == 60:
                        out.past_key_values.batch_repeat_interleave(2)
                    out = SimpleNamespace(sequences=out.sequences, logits=out.logits)
                    size = generation.bucket(ids.shape[1] + 6)
                    found = max(found, wrong(out, ids, torch.ones_like(ids), size, rules=rules))
        return found

    def not_reset(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(SpanCache, "reset", lambda self: None)
        patch.setattr(SpanLayer, "check", lambda *_: None)

    def any_length(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(generation, "elastic", lambda plan: False)

    told_apart(error, not_reset, any_length)


def test_a_token_that_is_cached_cannot_be_masked_afterwards() -> None:
    """What is evicted cannot be told from what is masked; a whole cache would go on without that token."""
    model, (ids, mask) = models.shared("llama"), models.left_padded()

    def check() -> None:
        with models.enabled(model, models.RULES), torch.no_grad():
            for column, generates in ((12, True), (12, False), (0, True)):
                cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=models.MAX_LENGTH)
                turn = models.generate(model, ids, mask, 8, past_key_values=cache).sequences
                asked = torch.cat((turn, models.prompts(3, 7, seed=3)), 1)
                both = torch.cat((mask, mask.new_ones(3, asked.shape[1] - mask.shape[1])), 1)
                both[1, column] ^= 1
                seen = int(cache.get_seq_length())
                with pytest.raises(AttnoptError, match="older tokens count"):
                    if generates:
                        models.generate(model, asked, both, 8, past_key_values=cache)
                    else:
                        model(asked[:, seen:], attention_mask=both, past_key_values=cache)
                with pytest.raises(AttnoptError, match="older tokens count"):
                    model(asked[:, seen:], past_key_values=cache)

    only_right(check, mistakes.unchecked)


def test_a_second_turn_is_cut_by_what_was_seen() -> None:
    """Full ids of both turns, of rows that were padded: columns seen, not slots held, and not tokens that count."""
    model, (ids, mask) = models.shared("llama"), models.left_padded()

    def error() -> float:
        with models.enabled(model, models.RULES):
            cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=models.MAX_LENGTH)
            turn = models.generate(model, ids, mask, 8, past_key_values=cache)
            asked = torch.cat((turn.sequences, models.prompts(3, 7, seed=3)), 1)
            both = torch.cat((mask, mask.new_ones(3, asked.shape[1] - mask.shape[1])), 1)
            out = models.generate(model, asked, both, 8, past_key_values=cache)
        return wrong(out, asked, both, models.MAX_LENGTH)

    def seen_as(length: Any, name: str) -> mistakes.Mistake:
        def mistake(patch: pytest.MonkeyPatch) -> None:
            seen = SpanLayer.get_seq_length
            patch.setattr(SpanLayer, "get_seq_length", lambda self: length(self, seen(self)))

        mistake.__name__ = name
        return mistake

    held = seen_as(lambda layer, seen: min(int(seen), layer.layout.capacities[0]), "slots held")
    counting = seen_as(lambda layer, seen: layer.n[-1] if layer.is_initialized else 0, "tokens that count")
    told_apart(error, held, counting)


def test_a_cache_that_attnopt_does_not_know_is_an_error() -> None:
    """Its history is neither guessed at nor thrown away."""
    model, ids = models.shared("llama"), models.prompts()

    def filled() -> DynamicCache:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        return cache

    held = filled()

    def check() -> None:
        cache = copy.deepcopy(held)
        with models.enabled(model, models.RULES), torch.no_grad():
            with pytest.raises(AttnoptError, match="SpanCache"):
                models.generate(model, torch.cat((ids, ids), 1), None, 4, past_key_values=cache)
            with pytest.raises(AttnoptError, match="does not know"):
                model(ids[:, :3], past_key_values=cache)

    def history_thrown_away(patch: pytest.MonkeyPatch) -> None:
        def forgetting(module: Any, q: Tensor, k: Any, v: Any, *rest: Any, **kwargs: Any) -> Any:
            if isinstance(k, Tensor):
                k, v = k[:, :, -q.shape[2] :], v[:, :, -q.shape[2] :]
            return attention.attention(module, q, k, v, *rest, **kwargs)

        any_mask(patch)
        patch.setitem(AttentionInterface._global_mapping, "attnopt", forgetting)

    only_right(check, mistakes.all_of(mistakes.not_done(generation, "accept"), history_thrown_away))
