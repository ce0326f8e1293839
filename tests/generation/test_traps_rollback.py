"""Mistakes in taking tokens back, which speculative decoding does on every step: what was overwritten does not come
back by lowering a counter."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from generation import mistakes, models, oracle
from generation.mistakes import not_done, only_right, told_apart, wrong
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.hf import generation
from attnopt.hf.cache import SpanCache, SpanLayer

REPEATED = models.prompts(1, 6).repeat(1, 12)


def no_slack(patch: pytest.MonkeyPatch) -> None:
    not_done(SpanLayer, "check_crop", "activate_past_recording")(patch)
    patch.setattr(SpanCache, "activate_past_recording", lambda self: None)
    patch.setattr(generation, "rollback", lambda *_: 0)


def test_lookups_that_are_taken_back_leave_nothing() -> None:
    """A prompt that repeats itself, past every window: a crop that only lowers a counter finds keys overwritten."""
    model, mask = models.shared("llama"), torch.ones_like(REPEATED)

    def error() -> float:
        taken_back = []
        with pytest.MonkeyPatch.context() as patch, models.enabled(model, models.RULES, max_length=256):
            crop = SpanLayer.crop
            patch.setattr(SpanLayer, "crop", lambda self, *r: (taken_back.append(r[0]), crop(self, *r))[1])
            out = models.generate(model, REPEATED, mask, 30, prompt_lookup_num_tokens=10)
        assert sum(map(bool, taken_back)) > 5
        return wrong(out, REPEATED, mask, 256)

    told_apart(error, no_slack)


def test_the_cache_is_told_that_it_will_be_rolled_back_before_it_is_allocated() -> None:
    """`activate_past_recording` is optional: a cache without it is cropped all the same."""
    model, mask = models.shared("llama"), torch.ones_like(REPEATED)

    def check(slack: int = 0) -> None:
        told = []
        with pytest.MonkeyPatch.context() as patch, models.enabled(model, models.RULES):
            activate = SpanLayer.activate_past_recording
            patch.setattr(
                SpanLayer, "activate_past_recording",
                lambda self: (told.append(self.is_initialized), activate(self))[1],
            )  # fmt: skip
            cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=256, slack=slack)
            out = models.generate(model, REPEATED, mask, 20, prompt_lookup_num_tokens=10, past_key_values=cache)
        assert told == [False] * models.LAYERS
        assert wrong(out, REPEATED, mask, 256) <= models.TOLERANCE

    check(slack=3)

    def nothing_to_tell(patch: pytest.MonkeyPatch) -> None:
        no_slack(patch)
        patch.delattr(SpanLayer, "activate_past_recording")
        patch.setattr(SpanLayer, "activate_past_recording", lambda self: None, raising=False)

    def too_late(patch: pytest.MonkeyPatch) -> None:
        activate = SpanLayer.activate_past_recording
        patch.setattr(SpanLayer, "activate_past_recording", lambda self: None)
        not_done(SpanLayer, "check_crop")(patch)
        attend = SpanLayer.attend

        def attending(self: SpanLayer, *args: Any) -> Tensor:
            out = attend(self, *args)
            with contextlib.suppress(AttnoptError):
                activate(self)
            return out

        patch.setattr(SpanLayer, "attend", attending)

    only_right(check, nothing_to_tell, too_late)


def test_assisted_decoding_is_greedy_decoding_or_an_error() -> None:
    """transformers refuses exactly StaticCache, and no class derived from it or like it."""
    model, draft = models.shared("llama"), models.build("llama", layers=1, seed=0)
    mask = torch.ones_like(REPEATED)

    def check() -> None:
        with models.enabled(model, models.RULES, max_length=256):
            out = models.generate(model, REPEATED, mask, 20, assistant_model=draft)
            assert wrong(out, REPEATED, mask, 256) <= models.TOLERANCE
            # One that was filled without slack.
            cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=256)
            turn = models.generate(model, REPEATED, mask, 4, past_key_values=cache).sequences
            with pytest.raises(AttnoptError, match="slack"):
                models.generate(model, turn, None, 20, prompt_lookup_num_tokens=10, past_key_values=cache)

    def nothing_taken_back(patch: pytest.MonkeyPatch) -> None:
        not_done(SpanLayer, "crop")(patch)

    only_right(check, nothing_taken_back, no_slack)


def test_a_rollback_is_exact_up_to_the_slack_and_an_error_beyond() -> None:
    """In one go or in several, counted from the most there ever was."""
    model = models.shared("llama")
    ids, other = models.prompts(2, 40), models.prompts(2, 12, seed=5)
    spans = models.spans_of(model, models.RULES, 128)

    def check() -> None:
        model.set_attn_implementation("attnopt")
        try:
            with torch.no_grad():
                rolled_back()
        finally:
            model.set_attn_implementation("sdpa")

    def rolled_back() -> None:
        # As long as no ring of 32 slots has begun again nothing is lost; a positive number is what stays.
        cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=128, slack=8)
        assert min(cache.layers[0].layout.capacities) == 32
        model(ids[:, :32], past_key_values=cache)
        cache.crop(12)
        assert cache.layers[1].n.tolist() == [12, 12]
        for parts in ([8], [3, 5], [1] * 8):
            cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=128, slack=8)
            model(ids, past_key_values=cache)
            for part in parts:
                cache.crop(-part)
            with pytest.raises(AttnoptError, match="slack=9"):
                cache.crop(-1)
            found = model(other, past_key_values=cache).logits
            expected = oracle.logits(model, torch.cat((ids[:, :32], other), 1), None, spans)[:, 32:]
            assert models.difference(found, expected) <= models.TOLERANCE

    def from_here(patch: pytest.MonkeyPatch) -> None:
        furthest = SpanLayer.furthest

        def forgetful(self: SpanLayer, *asked: Any) -> tuple[int, int]:
            self.highest.zero_()
            return furthest(self, *asked)

        patch.setattr(SpanLayer, "furthest", forgetful)

    only_right(check, no_slack, from_here)


def test_how_far_back_is_known_of_each_row() -> None:
    """The most tokens a row ever had, and which of its columns are padding, go where it goes, and with a reset."""
    model = models.shared("llama")
    ids, mask = models.prompts(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :20] = 0

    def fed() -> SpanCache:
        cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=128, slack=8)
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-5)
        return cache

    def check() -> None:
        shorter = torch.tensor([1, 1])
        with models.attending(model), torch.no_grad():
            for change in ("reorder_cache", "batch_select_indices"):
                cache = fed()
                getattr(cache, change)(shorter)
                cache.crop(-3)
                assert cache.layers[0].n.tolist() == [12, 12]
                # Padding is no token: that of the other row would be taken for some of these.
                cache.crop(-14)
                assert cache.layers[0].n.tolist() == [0, 0] and int(cache.get_seq_length()) == 18
            cache = fed()
            cache.reset()
            model(ids[:, :30], past_key_values=cache)
            some = torch.ones(2, 32, dtype=torch.long)
            some[:, 31] = 0
            model(ids[:, 30:32], attention_mask=some, past_key_values=cache)
            cache.crop(-20)
            assert cache.layers[0].n.tolist() == [12, 12] and cache.layers[1].pads.tolist() == [0, 0]
            with pytest.raises(AttnoptError, match="13 columns are to be taken back of 12"):
                cache.crop(-13)
            further_than_is_remembered()
            padding_taken_back()

    def padding_taken_back() -> None:
        """The column of a pad that was taken back is a token's afterwards."""
        cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=128, slack=8)
        some = torch.ones(2, 10, dtype=torch.long)
        some[:, [1, 8]] = 0
        model(ids[:, :10], attention_mask=some, past_key_values=cache)
        cache.crop(-3)
        for at in range(7, 10):
            model(ids[:, at : at + 1], past_key_values=cache)
        cache.crop(-3)
        assert cache.layers[0].n.tolist() == [6, 6] and cache.layers[1].pads.tolist() == [1, 1]

    def further_than_is_remembered() -> None:
        """A pad 128 columns before a token; a step of decoding may come without a mask."""
        cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=256, slack=8)
        long, some = models.prompts(2, 135), torch.ones(2, 133, dtype=torch.long)
        some[:, 5] = 0
        model(long[:, :133], attention_mask=some, past_key_values=cache)
        for at in (133, 134):
            model(long[:, at : at + 1], past_key_values=cache)
        with pytest.raises(AttnoptError, match="not known"):
            cache.crop(-132)
        cache.crop(-2)
        assert cache.layers[0].n.tolist() == [132, 132] and cache.layers[1].pads.tolist() == [1, 1]

    def left_behind(name: str) -> mistakes.Mistake:
        def mistake(patch: pytest.MonkeyPatch) -> None:
            counts = SpanLayer.counts
            patch.setattr(SpanLayer, "counts", lambda self: [x for x in counts(self) if x is not getattr(self, name)])

        mistake.__name__ = f"{name} left behind"
        return mistake

    only_right(check, *map(left_behind, ("highest", "marks", "pads")))
