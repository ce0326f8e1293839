"""Mistakes that a cache of spans can make without a word: each test passes, and fails on the code that makes one.

Logits are compared, in float32, with the oracle's; tokens would hide half of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from generation import mistakes, models, oracle
from generation.mistakes import instead, only_right, remembered, slotted, told_apart
from torch import Tensor

from attnopt.cache import Layout
from attnopt.errors import AttnoptError
from attnopt.hf import attention as _registers  # noqa: F401
from attnopt.hf.cache import SpanCache, SpanLayer

Rules = tuple[tuple[models.Rule, ...], ...]


@contextlib.contextmanager
def attending(model: Any) -> Iterator[None]:
    """The model's attention set to attnopt's, and afterwards to what it was."""
    before = model.config._attn_implementation
    model.set_attn_implementation("attnopt")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def fed(
    model: Any, ids: Tensor, mask: Tensor | None, calls: Sequence[int], rules: Rules, length: int = models.MAX_LENGTH,
    cache: SpanCache | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Logits (B, sum of calls, V) of a bare model that is handed so many columns a call, and no positions where there
    is no padding."""
    found, done = [], 0
    with attending(model), torch.no_grad():
        if cache is None:
            cache = SpanCache.for_model(model, models.plan_of(model, rules), max_length=length, **options)
        for columns in calls:
            upto = done + columns
            given: dict[str, Any] = {}
            if mask is not None:
                positions = (mask[:, :upto].cumsum(1) - 1).clamp(min=0)
                given = {"attention_mask": mask[:, :upto], "position_ids": positions[:, done:]}
            found.append(model(ids[:, done:upto], past_key_values=cache, use_cache=True, **given).logits)
            done = upto
    return torch.cat(found, 1)


def wrong(
    calls: Sequence[int], padded: bool = False, family: str = "llama", rules: Rules | None = None,
    length: int = models.MAX_LENGTH,
) -> float:  # fmt: skip
    """The largest error of the logits of real tokens; NaN and infinity count, in pads as well."""
    model = models.shared(family)
    rules = models.rules_for(model) if rules is None else rules
    ids, mask = models.left_padded(length=sum(calls)) if padded else (models.prompts(length=sum(calls)), None)
    found = fed(model, ids, mask, calls, rules, length)
    expected = oracle.logits(model, ids, mask, models.spans_of(model, rules, length))
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return models.difference(found[real], expected[real]) if found.isfinite().all() else float("inf")


def of_tables(change: Callable[[Tensor, Tensor], object], name: str) -> mistakes.Mistake:
    """A mistake in what the kernels are told: change(table, spans) of each layer, in place."""

    def mistake(patch: pytest.MonkeyPatch) -> None:
        tables = Layout.tables

        def changed(self: Layout, *args: Any) -> tuple[Tensor, Tensor]:
            table, spans = tables(self, *args)
            change(table, spans)
            return table, spans

        patch.setattr(Layout, "tables", changed)

    mistake.__name__ = name
    return mistake


LONG = [21] + [1] * 19


def test_the_steps_that_make_mistakes_are_right_without() -> None:
    """Else the tests below would hold for another reason than the one they name."""
    assert wrong([9, 7, *[1] * 24], padded=True) <= models.TOLERANCE
    for step in (slotted(), remembered()):
        with pytest.MonkeyPatch.context() as patch:
            instead(step)(patch)
            assert wrong([9, 7, *[1] * 24], padded=True) <= models.TOLERANCE


def test_pads_do_not_become_sinks() -> None:
    told_apart(lambda: wrong(LONG, padded=True), instead(remembered(columns=True)))


def test_pads_are_neither_attended_nor_stored() -> None:
    def every_column_counts(patch: pytest.MonkeyPatch) -> None:
        attend = SpanLayer.attend
        patch.setattr(SpanLayer, "attend", lambda self, q, k, v, valid, scale: attend(self, q, k, v, None, scale))

    told_apart(lambda: wrong(LONG, padded=True), every_column_counts)


def test_slots_that_hold_nothing_are_not_attended() -> None:
    """Bare decoding without a mask in a buffer that is not full."""
    told_apart(lambda: wrong([3] + [1] * 9), instead(slotted(attends_empty=True)))


def test_the_length_is_that_of_what_was_seen_and_not_of_what_is_held() -> None:
    def slots_held(patch: pytest.MonkeyPatch) -> None:
        seen = SpanLayer.get_seq_length
        patch.setattr(SpanLayer, "get_seq_length", lambda self: min(int(seen(self)), min(self.layout.capacities)))

    told_apart(lambda: wrong(LONG), slots_held)


def test_every_partition_into_calls_gives_the_same_logits() -> None:
    """Calls of 1, 3, the window, one more, and all at once; old tokens are read before new ones take their slots."""
    window, tokens = 9, 40

    def error() -> float:
        sizes = (1, 3, window, window + 1, tokens)
        return max(wrong([size] * (tokens // size) + [tokens % size] * (tokens % size > 0)) for size in sizes)

    told_apart(error, instead(slotted(writes_first=True)))


def test_windows_grow_with_the_length_the_cache_was_made_for() -> None:
    """And not with what it has seen, or several calls would differ from one."""

    def of_the_current_length(patch: pytest.MonkeyPatch) -> None:
        attend, rules = SpanLayer.attend, models.RULES

        def current(self: SpanLayer, q: Tensor, *rest: Any) -> Tensor:
            for layer in rules:
                spans = [oracle.span(*rule, int(self.n.max()) + q.shape[2]) for rule in layer]
                frozen = [oracle.span(*rule, models.MAX_LENGTH) for rule in layer]
                if list(zip(self.layout.head_sinks, self.layout.head_windows, strict=True)) == frozen:
                    self.spans.copy_(torch.tensor(spans))
            return attend(self, q, *rest)

        patch.setattr(SpanLayer, "attend", current)

    told_apart(lambda: max(wrong([40]), wrong(LONG)), of_the_current_length)


def test_heads_of_a_group_see_what_each_of_them_keeps() -> None:
    """Masks of transformers have one answer for all heads, that of the first."""
    first = of_tables(lambda _, spans: spans.copy_(spans[:1].expand_as(spans)), "head 0 for all")
    widest = of_tables(lambda _, spans: spans.copy_(spans.amax(0).expand_as(spans)), "the widest head for all")
    told_apart(lambda: wrong(LONG), first, widest)


def test_a_sweep_of_sinks_windows_and_lengths() -> None:
    """Windows hold their own key, sinks lie outside the window, and what capacities are rounded up to means nothing."""
    sweep = [(sink, window) for sink in range(4) for window in (1, 2, 5, 8, 9)]

    def error() -> float:
        found = 0.0
        for first in range(0, len(sweep), models.LAYERS * models.HEADS):
            rules = [
                (sink, window, 0.0) for sink, window in (sweep + sweep)[first : first + models.LAYERS * models.HEADS]
            ]
            layers = (tuple(rules[: models.HEADS]), tuple(rules[models.HEADS :]))
            found = max(found, wrong([1, 2, 4, 8, 16, 9], rules=layers), wrong([40], rules=layers))
        return found

    def inside(_: Tensor, spans: Tensor) -> None:
        spans[:, 1] = (spans[:, 1] - spans[:, 0]).clamp(min=1)

    def rounded(table: Tensor, spans: Tensor) -> None:
        spans[:, 1] = (table[:, 1] - table[:, 2]).repeat_interleave(len(spans) // len(table))

    told_apart(
        error,
        of_tables(lambda _, spans: spans[:, 1].add_(1), "a window and its own key"),
        of_tables(lambda _, spans: spans[:, 0].sub_(1).clamp_(min=0), "one sink too few"),
        of_tables(inside, "sinks inside the window"),
        of_tables(rounded, "a window of all slots"),
    )


def test_rows_of_pads_stay_finite() -> None:
    """Two rows begin with calls of nothing but pads."""

    def without_a_key(*args: Any) -> Tensor:
        out = slotted()(*args)
        return out if args[6] is None else out.masked_fill(~args[6][:, None, :, None], float("nan"))

    told_apart(lambda: wrong([4, 4, 6, *[1] * 9], padded=True), instead(without_a_key))


@pytest.mark.parametrize("length", [48, 41])
def test_one_token_too_many_is_an_error(length: int) -> None:
    """A head that holds every token must not begin again at its first slot, nor drop a token without a word."""

    def check() -> None:
        model = models.shared("llama")
        ids = models.prompts(length=length + 1)
        fed(model, ids[:, :length], None, [length - 3, 1, 1, 1], models.RULES, length)
        for calls in ([length, 1], [length - 3, 4], [length + 1]):
            with pytest.raises(AttnoptError, match="max_length="):
                fed(model, ids, None, calls, models.RULES, length)

    def unchecked(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(SpanLayer, "check", lambda *_: None)
        instead(slotted())(patch)

    only_right(check, unchecked)


def test_keys_keep_the_rotation_they_were_given() -> None:
    """No key is rotated again to where it lies in the cache; of the partial family a quarter of each head rotates."""

    def rotated_to_slots(patch: pytest.MonkeyPatch) -> None:
        attend = SpanLayer.attend

        def rotating(self: SpanLayer, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            at = int(self.n.max()) + torch.arange(k.shape[2])
            slot = torch.stack([self.layout.slot_of(at, g) - s for g, s in enumerate(self.layout.starts)])
            half = k.shape[-1] // 2
            angle = (slot - at)[:, :, None] * 10000.0 ** (-torch.arange(half) / half)
            cos, sin = (torch.cat((f, f), -1) for f in (angle.cos(), angle.sin()))
            turned = torch.cat((-k[..., half:], k[..., :half]), -1)
            return attend(self, q, k * cos + turned * sin, *rest)

        patch.setattr(SpanLayer, "attend", rotating)

    told_apart(lambda: wrong([5] + [1] * 55, family="partial"), rotated_to_slots)


def test_models_whose_attention_hardly_matters_show_nothing() -> None:
    """The tests of this folder can fail: spans move logits by more than their spread."""

    def check() -> None:
        model, ids = models.shared("llama"), models.prompts(length=40)
        dense, sparse = (
            oracle.logits(model, ids, None, models.spans_of(model, rules)) for rules in (models.ALL_FULL, models.RULES)
        )
        assert models.difference(dense, sparse) > dense.std()

    def whispering(patch: pytest.MonkeyPatch) -> None:
        model = models.build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(1e-4)
        patch.setattr(models, "shared", lambda _: model)

    only_right(check, whispering)


def test_rows_that_change_places_take_all_they_hold_along() -> None:
    """Keys, values and counts, in place: the addresses are what a recorded graph writes to."""
    order = torch.tensor([2, 0, 0])

    def error() -> float:
        model = models.shared("llama")
        (ids, mask), more = models.left_padded(), models.prompts(length=9, seed=2)
        spans = models.spans_of(model, models.RULES)
        with attending(model), torch.no_grad():
            cache = SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=models.MAX_LENGTH)
            fed(model, ids, mask, [ids.shape[1]], models.RULES, cache=cache)
            places = [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
            cache.reorder_cache(order)
            ids, mask = torch.cat((ids[order], more), 1), torch.cat((mask[order], torch.ones_like(more)), 1)
            positions = mask.cumsum(1) - 1
            found = model(
                more, past_key_values=cache, attention_mask=mask, position_ids=positions[:, -more.shape[1] :]
            ).logits
            if places != [x.data_ptr() for layer in cache.layers for x in layer.tensors()]:
                return float("inf")
        return models.difference(found, oracle.logits(model, ids, mask, spans)[:, -more.shape[1] :])

    def elsewhere(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(SpanLayer, "reorder_cache", SpanLayer.batch_select_indices)

    told_apart(error, *map(mistakes.forgetting, ("slots_k", "slots_v", "n")), elsewhere)
