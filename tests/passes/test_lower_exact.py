"""Every lowering of exact mode against float64: odd sizes, grouped heads, padding, one query, several lengths."""

from __future__ import annotations

import pytest
import torch
from attentions import alibi, call, padded, positions, written
from tracing import qkv, trace

from attnopt.capture import capture
from attnopt.passes import PIPELINE, Program, pays

ROW = "SDPA with a mask of one row"
BATCH, LENGTH, HEADS = 2, 13, 4


def chunks(attend):
    def fn(q, k, v):
        i, j = positions(q, k)
        return attend(q, k, v, (j <= i) & (i // 5 == j // 5))

    return fn


def first_row(attend):
    """Keys that a document number decides: the same for every query, and neither padding nor a bound."""

    def fn(q, k, v, number):
        keep = ((number == 3) | (number == 5))[:, None, None].expand(-1, 1, q.shape[2], -1)
        return attend(q, k, v, keep)

    return fn


def padding(keys=LENGTH):
    pad = torch.rand(BATCH, keys, generator=torch.Generator().manual_seed(5)) > 0.4
    pad[:, 0] = True
    return pad


def numbers(keys=LENGTH):
    made = torch.randint(3, 6, (BATCH, keys), generator=torch.Generator().manual_seed(5))
    made[:, 0] = 3
    return made


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


# name -> (function, further inputs, sizes of q, k and v, lowering)
CASES = {
    "chunks, sdpa": (chunks(call), (), {"length": 15}, "SDPA, chunks of 5 as a batch"),
    "chunks, written out": (chunks(written), (), {"length": 15}, "SDPA, chunks of 5 as a batch"),
    "chunks, grouped": (chunks(call), (), {"length": 20, "kv_heads": 2}, "SDPA, chunks of 5 as a batch"),
    "chunks, values of another size": (chunks(call), (), {"length": 10, "dim_v": 12}, "SDPA, chunks of 5 as a batch"),
    "chunks, the last one short": (chunks(written), (), {"length": 17}, pays.AS_IT_WAS),
    "alibi": (alibi, (), {}, pays.AS_IT_WAS),
    "keys by number, sdpa": (first_row(call), (numbers(),), {}, ROW),
    "keys by number, grouped": (first_row(call), (numbers(),), {"kv_heads": 2}, ROW),
    "keys by number, written out": (first_row(written), (numbers(),), {}, pays.AS_IT_WAS),
    "padding, sdpa": (padded(call, False), (padding(),), {}, pays.PADDING),
    "padding, grouped": (padded(written, False), (padding(),), {"kv_heads": 1}, pays.PADDING),
    "causal padding": (padded(call, True), (padding(),), {"kv_heads": 2}, pays.RUNS),
    "causal, values of another size": (
        lambda q, k, v: call(q, k, v, is_causal=True),
        (),
        {"dim_v": 5},
        "SDPA is_causal",
    ),
    "values of another size": (call, (), {"dim_v": 12, "kv_heads": 2}, "SDPA without a mask"),
    "one query": (written, (), {"length": 1, "keys": 11}, "SDPA without a mask"),
    "one query, grouped": (call, (), {"length": 1, "keys": 11, "kv_heads": 2}, pays.PACKED),
    "one query, one KV head": (written, (), {"length": 1, "keys": 11, "kv_heads": 1, "dim_v": 6}, pays.PACKED),
    "one query, padding": (padded(call, False), (padding(11),), {"length": 1, "keys": 11, "kv_heads": 2}, pays.PACKED),
    "one query, numbers": (first_row(written), (numbers(11),), {"length": 1, "keys": 11, "kv_heads": 2}, pays.PACKED),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lowering_computes_the_same(name, dtype):
    fn, more, sizes, lowering = CASES[name]
    inputs = (*qkv(batch=BATCH, heads=HEADS, dtype=dtype, **{"length": LENGTH, **sizes}), *more)
    traced = trace(fn, *inputs)
    assert traced.rewrites == [lowering], (traced.rewrites, traced.left, traced.misses)
    expected = fn(*double(inputs))
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    assert (traced.output.double() - expected).norm() <= bound * expected.norm()


def test_a_batch_of_chunks_has_the_gradient():
    inputs = [x.requires_grad_() for x in qkv(length=15, kv_heads=2)]
    traced = trace(chunks(call), *inputs, grad=True)
    assert traced.rewrites == ["SDPA, chunks of 5 as a batch"]
    found = torch.autograd.grad(traced.output.square().sum(), inputs)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(chunks(call)(*twins).square().sum(), twins)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_packed_heads_serve_every_length_of_a_cache():
    programs = []

    def backend(gm, inputs):
        captured = capture(gm)
        programs.append(Program(captured, verify=True).run(PIPELINE))
        return captured.forward

    compiled = torch.compile(call, backend=backend)
    for keys in (11, 3, 29):
        inputs = qkv(length=1, keys=keys, kv_heads=2, seed=keys)
        for tensor in inputs[1:]:
            torch._dynamo.mark_dynamic(tensor, 2)
        with torch.no_grad():
            found = compiled(*inputs)
        assert torch.allclose(found.double(), call(*double(inputs)), atol=1e-5)
    assert [r.lowering for p in programs for r in p.rewrites] == [pays.PACKED]


def test_a_mask_that_differs_between_heads_is_not_packed():
    bias = torch.randn(1, HEADS, 1, 11)

    def fn(q, k, v, bias):
        return written(q, k, v, bias=bias)

    inputs = (*qkv(length=1, keys=11, kv_heads=2), bias)
    traced = trace(fn, *inputs)
    assert traced.rewrites == [pays.AS_IT_WAS]
    assert torch.allclose(traced.output.double(), fn(*double(inputs)), atol=1e-5)


def test_a_mask_that_repeats_itself_is_read_once():
    """(B, 1, Sq, Sk) of one row each: the call gets (B, 1, 1, Sk)."""
    inputs = (*qkv(), numbers())
    traced = trace(first_row(call), *inputs)
    (node,) = [n for n in traced.program.gm.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert tuple(node.args[3].meta["val"].shape) == (BATCH, 1, 1, LENGTH)


def test_head_sizes_are_made_equal():
    """The fused CPU kernel asks for it; a call with unequal ones runs written out."""
    traced = trace(lambda q, k, v: call(q, k, v, is_causal=True), *qkv(dim=12, dim_v=7))
    (node,) = [n for n in traced.program.gm.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert {x.meta["val"].shape[3] for x in node.args[:3]} == {12} and traced.output.shape[3] == 7


def test_a_mask_of_one_row_already_is_left():
    def fn(q, k, v, pad):
        return call(q, k, v, pad[:, None, None])

    traced = trace(fn, *qkv(), padding())
    assert not traced.rewrites and "already a single attention call" in traced.left[0]


def test_one_query_of_a_top_left_causal_call_keeps_one_key():
    """Position 0 sees key 0 alone, whatever stands behind it: not what a cache means, and not to be packed away."""

    def fn(q, k, v):
        return call(q, k, v, is_causal=True)

    inputs = qkv(length=1, keys=11, kv_heads=2)
    traced = trace(fn, *inputs)
    assert torch.allclose(traced.output.double(), fn(*double(inputs)), atol=1e-5)
    assert not traced.rewrites and "already a single attention call" in traced.left[0]


def added(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.3 + mask, -1) @ v


def filled(q, k, v, mask):
    return torch.softmax((q @ k.transpose(-2, -1) * 0.3).masked_fill(mask != 0, -1e9), -1) @ v


def filled_and_biased(q, k, v, mask):
    bias = torch.arange(LENGTH, dtype=q.dtype) * 0.1
    return torch.softmax((q @ k.transpose(-2, -1) * 0.3 + bias).masked_fill(mask != 0, -1e9), -1) @ v


@pytest.mark.parametrize("fn", [added, filled, filled_and_biased])
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -65504.0])
def test_a_row_without_keys_is_an_average_and_has_no_gradient_in_training(fn, fill):
    """A fused backward would take each weight of such a row for 1. All else is the model's, gradients too."""
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    mask[:, :, :, 9:] = fill
    mask[1, :, 2:4] = fill
    inputs = qkv(batch=BATCH, heads=HEADS)
    assert torch.allclose(trace(fn, *inputs, mask).output, fn(*inputs, mask), atol=1e-5)

    leaves = [x.clone().requires_grad_() for x in inputs]
    traced = trace(fn, *leaves, mask, grad=True)
    assert traced.rewrites == [pays.AS_IT_WAS]
    assert not traced.output[1, :, 2:4].any()
    weight = torch.randn(traced.output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(traced.output, leaves, weight)
    weight[1, :, 2:4] = 0
    twins = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(fn(*twins, mask.double()), twins, weight.double())
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_a_bias_in_a_wider_type_is_not_rounded():
    """ALiBi in float32 beside bfloat16 scores, far from the query that reads it; a mask that only hides is cast."""

    def fn(q, k, v, mask):
        scores = (q @ k.transpose(-2, -1) * 0.3).float() + mask
        return torch.softmax(scores, -1).to(v.dtype) @ v

    inputs = qkv(batch=BATCH, heads=HEADS, dtype=torch.bfloat16)
    slopes = torch.tensor([2.0**-n for n in range(1, HEADS + 1)])[:, None, None]
    bias = slopes * (torch.arange(LENGTH) - 2047.0)
    traced = trace(fn, *inputs, bias)
    assert not traced.rewrites and any("its bias is in float32" in reason for reason in traced.left)
    assert torch.equal(traced.output, fn(*inputs, bias))
    assert trace(fn, *inputs, bias.bfloat16()).rewrites == [pays.AS_IT_WAS]

    def hidden(q, k, v):
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return fn(q, k, v, torch.zeros(LENGTH, LENGTH).masked_fill(later, torch.finfo(torch.float32).min))

    assert trace(hidden, *inputs).rewrites == ["SDPA is_causal"]


def test_a_scale_known_at_run_time_only_is_a_miss():
    def fn(q, k, v):
        return written(q, k, v, None)

    traced = trace(fn, *qkv(batch=BATCH, heads=HEADS), dynamic=True)
    assert [miss.code for program in traced.programs for miss in program.misses] == ["scale-not-constant"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_attention_whose_operand_is_another_as_it_is(dynamic):
    """With nothing between, the next one must read what the first was rewritten to, or both would be computed."""

    def fn(x, pad):
        for _ in range(3):
            i, j = positions(x, x)
            x = written(x, x, x, (j <= i) & pad)
        return x

    x, pad = qkv(batch=BATCH, heads=HEADS)[0], padding()[:, None, None]
    torch._dynamo.mark_static(x, 3)
    traced = trace(fn, x, pad, dynamic=dynamic)
    assert len(traced.rewrites) == 3 and torch.allclose(traced.output, fn(x, pad), atol=1e-5)
    assert "softmax" not in "".join(str(node.target) for node in traced.programs[0].gm.graph.nodes)
