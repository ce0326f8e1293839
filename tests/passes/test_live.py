"""Which attentions read the filled slots of a written cache, what they compute then, and what is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attentions import call, written
from tracing import trace

from attnopt.capture import capture
from attnopt.passes import PIPELINE, Program, pays

BATCH, HEADS, KV_HEADS, SLOTS, DIM = 2, 4, 2, 19, 8
columns = torch.arange(SLOTS)
SLOPES = torch.tensor([0.1, -0.2, 0.4, 0.0])[None, :, None, None]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens, kv_heads, at, dim_v=DIM):
    """q, new k and v, buffers of which the first `at` slots are filled, and where to write."""
    q, k, v = (normal(BATCH, h, tokens, d, seed=n) for n, (h, d) in
               enumerate([(HEADS, DIM), (kv_heads, DIM), (kv_heads, dim_v)]))  # fmt: skip
    keys, values = normal(BATCH, kv_heads, SLOTS, DIM, seed=3), normal(BATCH, kv_heads, SLOTS, dim_v, seed=4)
    for x in (keys, values):
        x[:, :, at:] = 0.0
    return q, k, v, keys, values, torch.arange(tokens) + at


def write(keys, values, k, v, at):
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)


def opaque(attend):
    """The mask is an input: nothing in the graph says where it ends."""

    def fn(q, k, v, keys, values, at, mask):
        write(keys, values, k, v, at)
        return attend(q, keys, values, mask), keys, values

    return fn


def formula(attend):
    def fn(q, k, v, keys, values, at):
        write(keys, values, k, v, at)
        return attend(q, keys, values, columns <= at[:, None]), keys, values

    return fn


def rows_of_pads(attend):
    def fn(q, k, v, keys, values, at, pad):
        write(keys, values, k, v, at)
        return attend(q, keys, values, (columns <= at[:, None]) & pad[:, None, None]), keys, values

    return fn


def ring(q, k, v, keys, values, at, mask):
    keys, values = (torch.cat([old[:, :, 1:], new], 2) for old, new in ((keys, k), (values, v)))
    return call(q, keys, values, mask), keys, values


def added(q, k, v, mask):
    return written(q, k, v, bias=mask)


def shown(tokens, at, pads=(0, 3)):
    """bool (B, 1, T, C), as transformers hands it over."""
    rows = columns <= at + torch.arange(tokens)[:, None]
    return rows & (columns >= torch.tensor(pads)[:, None, None, None])


def floats(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


PAD = columns >= torch.tensor([0, 3])[:, None]
CASES = {
    "grouped": (opaque(call), 1, KV_HEADS, (shown(1, 9),)),
    "as many heads": (opaque(call), 1, HEADS, (shown(1, 9),)),
    "repeated, written out": (opaque(written), 1, 1, (shown(1, 9),)),
    "added": (opaque(added), 1, KV_HEADS, (floats(shown(1, 9)),)),
    "several tokens": (opaque(call), 3, KV_HEADS, (shown(3, 9),)),
    "several tokens, added": (opaque(added), 3, KV_HEADS, (floats(shown(3, 9)),)),
    "a bound in the graph": (formula(call), 1, KV_HEADS, ()),
    "a bound, several tokens": (formula(written), 4, KV_HEADS, ()),
    "a bound and padding": (rows_of_pads(call), 2, KV_HEADS, (PAD,)),
    "a mask full of holes": (opaque(call), 2, KV_HEADS, (normal(BATCH, 1, 2, SLOTS, seed=8) > 0.5,)),
    "nothing filled before": (opaque(call), 1, KV_HEADS, (shown(1, 0, (0, 0)),)),
    "a ring": (ring, 1, KV_HEADS, (columns[None, None, None] >= torch.tensor([4, 9])[:, None, None, None],)),
}


def double(tensors):
    return [x.double() if x.is_floating_point() else x.clone() for x in tensors]


@pytest.mark.parametrize("name", CASES)
def test_the_filled_slots_are_read(name):
    fn, tokens, kv_heads, more = CASES[name]
    at = 0 if name == "nothing filled before" else 9
    given = (*inputs(tokens, kv_heads, at), *more)
    expected = fn(*double(given))
    traced = trace(fn, *given)
    assert traced.rewrites == [pays.LIVE], (traced.rewrites, traced.left, traced.misses)
    for found, wanted in zip(traced.output, expected, strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_values_of_another_size_and_half_precision():
    fn, given = opaque(call), (*inputs(1, KV_HEADS, 9, dim_v=5), shown(1, 9))
    given = [x.bfloat16() if x.is_floating_point() else x for x in given]
    expected = fn(*double(given))[0]
    traced = trace(fn, *given)
    assert traced.rewrites == [pays.LIVE]
    assert (traced.output[0].double() - expected).norm() <= 1e-2 * expected.norm()


def per_head(q, k, v, keys, values, at, mask):
    write(keys, values, k, v, at)
    return F.scaled_dot_product_attention(q, keys, values, mask + SLOPES * columns)


def grown(q, k, v, keys, values, at, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return call(q, keys, values, F.pad(mask, (1, 0), value=True)), keys, values


def unmasked(q, k, v, keys, values, at, mask):
    write(keys, values, k, v, at)
    return call(q, keys, values), mask + 0


def hides_rows(q, k, v, keys, values, at, mask):
    """It says which queries count, not which keys."""
    write(keys, values, k, v, at)
    return call(q, keys, values, mask[..., :1].expand(-1, -1, -1, SLOTS))


LEFT = {
    "a bias of every head's own": (per_head, floats(shown(1, 9)), HEADS),
    "a cache that grows": (grown, shown(1, 9), KV_HEADS),
    "no mask": (unmasked, floats(shown(1, 9)), KV_HEADS),
    "no mask of keys": (hides_rows, shown(1, 9, (0, 0)), KV_HEADS),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_other_forms(name):
    fn, mask, kv_heads = LEFT[name]
    given = (*inputs(1, kv_heads, 9), mask)
    expected = fn(*double(given))
    traced = trace(fn, *given)
    assert len(traced.sites) == 1 and pays.LIVE not in traced.rewrites
    found, wanted = (x[0] if isinstance(x, tuple) else x for x in (traced.output, expected))
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_training_keeps_its_gradient():
    q, *rest = (*inputs(1, KV_HEADS, 9), shown(1, 9))
    traced = trace(opaque(call), q.requires_grad_(), *rest, grad=True)
    assert traced.sites and pays.LIVE not in traced.rewrites
    traced.output[0].sum().backward()
    assert q.grad is not None


def test_one_graph_serves_every_number_of_tokens_and_sequences():
    programs = []

    def backend(gm, _):
        captured = capture(gm)
        programs.append(Program(captured, verify=True).run(PIPELINE))
        return captured.forward

    fn = opaque(call)
    compiled = torch.compile(fn, backend=backend)
    for tokens, batch in ((3, 2), (5, 2), (2, 4)):
        given = [torch.cat([x] * (batch // 2)) for x in (*inputs(tokens, KV_HEADS, 9)[:5], shown(tokens, 9))]
        given.insert(5, torch.arange(tokens) + 9)
        expected = fn(*double(given))
        for n, dims in enumerate([(0, 2), (0, 2), (0, 2), (0,), (0,), (0,), (0, 2)]):
            torch._dynamo.mark_dynamic(given[n], dims)
        with torch.no_grad():
            found = compiled(*given)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a.double(), b, atol=1e-5)
    assert [r.lowering for p in programs for r in p.rewrites] == [pays.LIVE]
