"""What does not pay is left alone with its reason, and what pays is not: by length, dtype, window and spelling."""

from __future__ import annotations

import pytest
import torch
from attentions import alibi, call, padded, written
from tracing import qkv, trace

from attnopt.passes import kv_sources, lower_exact, match_attention, normalise, pays, recover_masks, resolve_regions

FLOAT, HALF = torch.float32, torch.bfloat16
# Recognise and choose; nothing large is computed twice.
PASSES = (normalise.run, match_attention.run, resolve_regions.run, recover_masks.run, lower_exact.run)


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.delenv("ATTNOPT_ALWAYS")


def sliding(attend, window):
    def fn(q, k, v):
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        return attend(q, k, v, (distance >= 0) & (distance < window))

    return fn


def traced(fn, length, dtype, keys=None, kv_heads=None, pad=False, **sizes):
    inputs = qkv(batch=1, heads=2, kv_heads=kv_heads, length=length, keys=keys, dtype=dtype, **sizes)
    more = (torch.arange(keys or length)[None] > 3,) if pad else ()
    return trace(fn, *inputs, *more, passes=PASSES, verify=False)


# function, length, dtype, further arguments of `traced` -> lowering, or None and a part of the reason
CASES = [
    (sliding(call, 16), 128, FLOAT, {}, None, "below 512 keys its chunks"),
    (sliding(written, 16), 128, FLOAT, {}, pays.AS_IT_WAS, ""),
    (sliding(call, 64), 512, FLOAT, {}, "span kernel, window 64", ""),
    (sliding(call, 256), 512, FLOAT, {}, None, "over a quarter of the keys"),
    (sliding(call, 64), 512, HALF, {}, None, "below 768 keys its chunks"),
    (sliding(call, 64), 800, HALF, {}, None, "below 1024 keys its chunks"),
    (sliding(call, 64), 800, HALF, {"kv_heads": 1}, "span kernel, window 64", ""),
    (sliding(call, 256), 512, FLOAT, {"kv_heads": 1}, "span kernel, window 256", ""),
    (sliding(call, 64), 1024, HALF, {}, "span kernel, window 64", ""),
    (padded(call, True), 256, FLOAT, {"pad": True}, None, "cutting it into runs"),
    (padded(written, True), 256, FLOAT, {"pad": True}, pays.AS_IT_WAS, ""),
    (padded(call, True), 512, HALF, {"pad": True}, pays.RUNS, ""),
    (padded(written, False), 1, FLOAT, {"keys": 40, "pad": True}, None, "one query is cheaper written out"),
    (padded(written, False), 1, HALF, {"keys": 40, "pad": True}, pays.PADDING, ""),
    (padded(written, False), 1, FLOAT, {"keys": 40, "pad": True, "kv_heads": 1}, pays.PACKED, ""),
    (call, 1, FLOAT, {"keys": 40, "kv_heads": 1}, pays.PACKED, ""),
    (call, 1, HALF, {"keys": 40, "kv_heads": 1}, None, "a grouped call is as fast"),
    (call, 1, HALF, {"keys": 16384, "kv_heads": 1, "dim": 32, "dim_v": 32}, pays.PACKED, ""),
    (call, 1, torch.float16, {"keys": 40, "kv_heads": 1}, pays.PACKED, ""),
    (padded(written, False), 16, FLOAT, {"pad": True}, None, "below 32 keys"),
    (alibi, 256, FLOAT, {}, None, "the sum of mask and bias"),
    (alibi, 256, HALF, {}, pays.AS_IT_WAS, ""),
    (sliding(written, 16), 128, FLOAT, {"dim": 12}, None, "too wide to gain"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_does_not_pay_is_left_with_its_reason(number):
    fn, length, dtype, more, lowering, reason = CASES[number]
    if more.get("dim") == 12:
        more = {**more, "dim_v": 8}
    found = traced(fn, length, dtype, **more)
    assert found.rewrites == ([lowering] if lowering else []), (found.rewrites, found.left, found.misses)
    if lowering is None:
        assert reason in found.left[0] and found.programs[0].refusals[0].code == "does-not-pay"


def test_gradients_have_a_break_even_of_their_own():
    for length, window, lowering in ((512, 64, []), (1024, 64, ["span kernel, window 64"])):
        q, k, v = (x.requires_grad_() for x in qkv(batch=1, heads=2, length=length))
        assert trace(sliding(call, window), q, k, v, passes=PASSES, verify=False, grad=True).rewrites == lowering


@pytest.mark.parametrize(("slots", "lowering"), [(1023, pays.PACKED), (1024, pays.LIVE)])
def test_filled_slots_are_looked_for_in_buffers_that_are_long_enough(slots, lowering):
    def decode(q, k, v, keys, values, at, mask):
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        return call(q, keys, values, mask)

    buffers = torch.zeros(1, 1, slots, 8), torch.zeros(1, 1, slots, 8)
    given = *qkv(batch=1, heads=2, kv_heads=1, length=1), *buffers, torch.tensor([3])
    mask = (torch.arange(slots) < 4)[None, None, None]
    passes = (*PASSES[:-1], kv_sources.run, PASSES[-1])
    assert trace(decode, *given, mask, passes=passes, verify=False).rewrites == [lowering]


def test_the_switch_makes_what_does_not_pay(monkeypatch):
    monkeypatch.setenv("ATTNOPT_ALWAYS", "1")
    assert traced(sliding(call, 16), 128, FLOAT).rewrites == ["span kernel, window 16"]
