"""SpanCache as transformers asks for it: its members, what is taken back, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation import models, oracle
from generation.models import LAYERS, MAX_LENGTH, RULES
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode

from attnopt.errors import AttnoptError, CacheFull, ModelError, OptionError
from attnopt.hf.cache import SpanCache
from attnopt.hf.generation import rollback
from attnopt.hf.span_layer import REMEMBERED, ROLLBACK


@pytest.fixture
def model() -> Iterator[Any]:
    with models.attending(models.shared("llama")) as found, torch.no_grad():
        yield found


def made(model: Any, **options: Any) -> SpanCache:
    return SpanCache.for_model(model, models.plan_of(model, RULES), **{"max_length": MAX_LENGTH} | options)


def held(cache: SpanCache) -> list[Tensor]:
    return [x.clone() for layer in cache.layers for x in layer.tensors()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def positions(mask: Tensor) -> Tensor:
    """Those that generate() gives: tokens that count before each, 0 where one does not."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


def test_what_transformers_asks(model: Any) -> None:
    cache, (ids, mask) = made(model), models.left_padded()
    assert isinstance(cache, Cache) and all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    assert cache.is_compileable and cache.is_croppable and not any(cache.is_sliding) and not cache.is_initialized
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and len(cache) == LAYERS
    model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.is_initialized and cache.batch_size == len(ids)
    # Columns, padding included; tokens that count are fewer.
    assert int(cache.get_seq_length()) == ids.shape[1] and cache.layers[1].n.tolist() == mask.sum(1).tolist()
    assert cache.get_max_length() == cache.max_length == MAX_LENGTH
    assert cache.get_mask_sizes(1, 0) == (MAX_LENGTH, 0)
    cache.crop(0)
    assert int(cache.get_seq_length()) == ids.shape[1]


def test_bytes(model: Any) -> None:
    rows, length = 3, 4096
    cache = made(model, max_length=length, batch_size=rows)
    assert cache.is_initialized and cache.nbytes == sum(
        layer.slots_k.numel() * 4 + layer.slots_v.numel() * 4 for layer in cache.layers
    )
    dense = LAYERS * rows * length * models.KV_HEADS * models.HEAD_DIM * 2 * 4
    assert cache.ideal_nbytes <= cache.nbytes <= 1.05 * cache.ideal_nbytes < 0.5 * dense


def test_keys_are_not_there_to_be_read(model: Any) -> None:
    layer = made(model).layers[0]
    for name in ("keys", "values"):
        with pytest.raises(AttnoptError, match="no keys") as refused:
            getattr(layer, name)
        assert "attnopt.disable" in refused.value.remedy
    with pytest.raises(AttnoptError, match="offloaded"):
        layer.offload()


def test_rows_are_selected_and_repeated(model: Any) -> None:
    """Each row goes on as it would have alone, addresses kept where the batch is."""
    (ids, mask), more = models.left_padded(3, 30), models.prompts(3, 6, seed=8)
    cache = made(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    order = torch.tensor([2, 0, 2])
    changes = {
        "reorder_cache": (lambda c: c.reorder_cache(order), order),
        "batch_select_indices": (lambda c: c.batch_select_indices(order[:2]), order[:2]),
        "batch_repeat_interleave": (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for name, (change, rows) in changes.items():
        changed = copy.deepcopy(cache)
        before = [layer.slots_k.data_ptr() for layer in changed.layers]
        change(changed)
        assert changed.batch_size == len(rows)
        if name == "reorder_cache":
            assert before == [layer.slots_k.data_ptr() for layer in changed.layers]
        whole, counts = torch.cat((ids[rows], more[rows]), 1), torch.cat((mask[rows], torch.ones_like(more[rows])), 1)
        found = model(more[rows], attention_mask=counts, past_key_values=changed).logits
        expected = oracle.logits(model, whole, counts, models.spans_of(model, RULES))[:, ids.shape[1] :]
        assert models.difference(found, expected) < models.TOLERANCE, name
    assert equal(held(cache), held(copy.deepcopy(cache)))


def test_a_reset_stays_where_it_was(model: Any) -> None:
    (ids, mask), cache = models.left_padded(), made(model)
    first = model(ids, attention_mask=mask, past_key_values=cache).logits
    places = [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(first, again) and places == [x.data_ptr() for layer in cache.layers for x in layer.tensors()]


def test_padding_is_taken_back_with_what_is_between(model: Any) -> None:
    """Columns are asked for, and which of them count differs by row; as if they had never come."""
    ids, mask = models.prompts(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, 25:28], mask[1, 31], mask[2, :4], mask[2, 33:] = 0, 0, 0, 0
    other, after = models.prompts(3, 9, seed=6), torch.ones(3, 9, dtype=torch.long)
    after[1, 2:5] = 0
    for parts in ([15], [7, 8], [1] * 15):
        cache = made(model, slack=16)
        for at in (slice(0, 24), slice(24, 33), slice(33, 34), slice(34, 40)):
            places = positions(mask)[:, at]
            model(ids[:, at], attention_mask=mask[:, : at.stop], position_ids=places, past_key_values=cache)
        for part in parts:
            cache.crop(-part)
        counts = torch.cat((mask[:, :25], after), 1)
        assert cache.layers[0].n.tolist() == mask[:, :25].sum(1).tolist()
        places = positions(counts)[:, 25:]
        found = model(other, attention_mask=counts, position_ids=places, past_key_values=cache).logits
        expected = oracle.logits(model, torch.cat((ids[:, :25], other), 1), counts, models.spans_of(model, RULES))
        real = after.bool()
        assert models.difference(found[real], expected[:, 25:][real]) < models.TOLERANCE


def test_what_cannot_be_taken_back(model: Any) -> None:
    (ids, mask), cache = models.left_padded(2, 60), made(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    before = held(cache)
    for asked, said in ((-61, "of 60"), (-1, "give back 0")):
        with pytest.raises(AttnoptError, match=said):
            cache.crop(asked)
    assert equal(before, held(cache))
    # Everything fits where nothing was overwritten yet; and a length to keep is what transformers meant until 5.17.
    short = made(model, max_length=MAX_LENGTH)
    model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=short)
    short.crop(7)
    assert int(short.get_seq_length()) == 7 and short.layers[1].n.tolist() == [7, 2]
    long = made(model, max_length=512, slack=512)
    many = models.prompts(2, REMEMBERED + 40)
    counts = torch.ones_like(many)
    counts[1, :5] = 0
    model(many, attention_mask=counts, past_key_values=long)
    with pytest.raises(AttnoptError, match="padding is not known"):
        long.crop(-REMEMBERED - 1)
    long.crop(-REMEMBERED)
    assert long.layers[0].n.tolist() == [40, 35]


def test_every_layer_is_asked_what_can_be_taken_back(model: Any) -> None:
    """The first one holds every token; the last one has overwritten some. One that cannot keeps all from moving."""
    rules = (models.ALL_FULL[0], RULES[0])
    cache = SpanCache.for_model(model, models.plan_of(model, rules), max_length=MAX_LENGTH)
    model(models.prompts(1, 60), past_key_values=cache)
    assert all(cache.layers[0].layout.whole) and not all(cache.layers[1].layout.whole)
    before = held(cache)
    with pytest.raises(AttnoptError, match="give back 0"):
        cache.crop(-20)
    assert equal(before, held(cache))


@pytest.mark.parametrize(("drafts", "room"), [(10, ROLLBACK), (100, 100)])
def test_as_many_tokens_can_be_taken_back_as_are_drafted(drafts: int, room: int) -> None:
    config = GenerationConfig(prompt_lookup_num_tokens=drafts)
    assert rollback(config, GenerationMode.ASSISTED_GENERATION) == room
    assert rollback(config, GenerationMode.GREEDY_SEARCH) == 0


def test_room_for_rollbacks_is_made_before_it_is_needed(model: Any) -> None:
    cache = made(model, max_length=256)
    cache.activate_past_recording()
    assert all(layer.layout.slack == ROLLBACK or all(layer.layout.whole) for layer in cache.layers)
    full = made(model, max_length=256, batch_size=1)
    with pytest.raises(AttnoptError, match=f"slack={ROLLBACK}"):
        full.activate_past_recording()
    made(model, max_length=256, batch_size=1, slack=ROLLBACK).activate_past_recording()


def test_more_tokens_than_it_was_made_for(model: Any) -> None:
    """The count is of tokens: padding takes no room. On a GPU nobody waits for it, and `check` says it afterwards."""
    (ids, mask), cache = models.left_padded(2, 20), made(model, max_length=18)
    mask[0, :2] = 0
    model(ids, attention_mask=mask, past_key_values=cache)
    before = held(cache)
    with pytest.raises(CacheFull, match="this would be 19"):
        model(ids[:, :1], past_key_values=cache)
    assert equal(before, held(cache))
    cache.check()
    cache.layers[0].n.add_(1)
    with pytest.raises(CacheFull, match="has 19"):
        cache.check()


def test_the_model_must_be_this_one(model: Any) -> None:
    cache, other = made(model), models.build("llama", num_key_value_heads=4, num_attention_heads=4)
    with models.attending(other), pytest.raises(OptionError, match="2 KV heads, the model hands it 4"):
        other(models.prompts(1), past_key_values=cache)
    with pytest.raises(OptionError, match="0 tokens"):
        made(model, max_length=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"sdpa.*\n.*attnopt\.enable"):
        made(model)


def test_half_the_bytes_in_half_precision(model: Any) -> None:
    """Also where only autocast says so, under which queries and values have another dtype than keys."""
    ids = models.prompts(2, 30)
    half = copy.deepcopy(model).to(torch.bfloat16)
    cache, cast = made(half), made(model)
    model.eval()
    expected = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = [model(ids[:, at], past_key_values=cast).logits for at in (slice(0, 29), slice(29, 30))]
    half(ids, past_key_values=cache)
    assert cache.nbytes == cast.nbytes and cast.layers[0].slots_k.dtype == torch.bfloat16
    spread = expected.std()
    assert (
        models.difference(torch.cat(found, 1), oracle.logits(model, ids, None, models.spans_of(model, RULES))) < spread
    )


def test_a_copy_has_slots_of_its_own(model: Any) -> None:
    cache = made(model)
    model(models.prompts(1, 20), past_key_values=cache)
    before, twin = held(cache), copy.copy(cache)
    model(models.prompts(1, 25)[:, 20:], past_key_values=twin)
    assert equal(before, held(cache)) and int(twin.get_seq_length()) == 25
