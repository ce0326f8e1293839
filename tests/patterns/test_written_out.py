"""Attention written out: spellings that are one site. What is none: test_written_out_near_misses.

Every case runs with verification on, and its output must be that of the plain function whatever was recognised.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import HEADS, LAYERS, NanoGPT, tokens
from tracing import qkv, trace

from attnopt.ir import Mask

from .written import CAUSAL, SCALE, positions, scores, triangle

NONE = Mask()


def plain(q, k, v):
    return torch.softmax(scores(q, k) * SCALE, -1) @ v


def divided(q, k, v):
    return torch.softmax(scores(q, k) / math.sqrt(8), dim=3) @ v


def unscaled(q, k, v):
    return F.softmax(scores(q, k), -1) @ v


def scaled_twice(q, k, v):
    return F.softmax(scores(q, k) * 0.5 / 2.0, -1) @ v


def in_float32(q, k, v):
    return F.softmax(scores(q, k) * SCALE, -1, dtype=torch.float32).to(q.dtype) @ v


def inactive_dropout(q, k, v):
    return F.dropout(F.softmax(scores(q, k) * SCALE, -1), 0.1, training=False) @ v


def masked_fill(q, k, v):
    return F.softmax((scores(q, k) * SCALE).masked_fill(~triangle(q.shape[2]), float("-inf")), -1) @ v


def where_keeps(q, k, v):
    i, j = positions(q.shape[2])
    return F.softmax(torch.where(j <= i, scores(q, k) * SCALE, torch.finfo(q.dtype).min), -1) @ v


def inverted_polarity(q, k, v):
    """masked_fill drops where true: the future, written as j > i."""
    i, j = positions(q.shape[2])
    return F.softmax((scores(q, k) * SCALE).masked_fill(j > i, float("-inf")), -1) @ v


def added_triu(q, k, v):
    n = q.shape[2]
    return F.softmax(scores(q, k) * SCALE + torch.triu(torch.full((n, n), float("-inf")), 1), -1) @ v


def added_on_the_left(q, k, v):
    n = q.shape[2]
    return F.softmax(torch.triu(torch.full((n, n), -1e9), 1) + scores(q, k) * SCALE, -1) @ v


def filled_before_the_scale(q, k, v):
    """Minus infinity survives any positive scale, so this order means the same."""
    return F.softmax(scores(q, k).masked_fill(~triangle(q.shape[2]), float("-inf")) * SCALE, -1) @ v


def given_transposed(q, k, v):
    return F.softmax((q @ k.permute(0, 1, 3, 2)) * SCALE, -1) @ v


def repeated_keys(q, k, v):
    k, v = (t[:, ::2].repeat_interleave(2, 1) for t in (k, v))
    return F.softmax(scores(q, k) * SCALE, -1) @ v


def expanded_keys(q, k, v):
    k, v = (t[:, :2, None].expand(2, 2, 2, 13, 8).reshape(2, 4, 13, 8) for t in (k, v))
    return F.softmax(scores(q, k) * SCALE, -1) @ v


MATCHES = {
    plain: NONE, divided: NONE, unscaled: NONE, scaled_twice: NONE, in_float32: NONE, inactive_dropout: NONE,
    masked_fill: CAUSAL, where_keeps: Mask(causal=True, fill="finite"), inverted_polarity: CAUSAL, added_triu: CAUSAL,
    added_on_the_left: Mask(causal=True, fill="finite"), filled_before_the_scale: CAUSAL, given_transposed: NONE,
    repeated_keys: NONE, expanded_keys: NONE,
}  # fmt: skip
SCALES = {unscaled: 1.0, scaled_twice: 0.25}


@pytest.mark.parametrize("fn", MATCHES, ids=lambda fn: fn.__name__)
def test_matches(fn):
    inputs = qkv()
    traced = trace(fn, *inputs)
    (site,) = traced.sites
    assert site.mask == MATCHES[fn] and site.pattern == "written-out"
    assert math.isclose(site.scale, SCALES.get(fn, SCALE), rel_tol=1e-6)
    assert (site.heads, site.kv_heads) == (4, 2 if "keys" in fn.__name__ else 4)
    assert traced.rewrites and not traced.left and not traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


def test_the_rules_that_applied_are_counted():
    def fn(q, k, v):
        return F.softmax((scores(q, k) * 1.0 * SCALE).masked_fill(~triangle(13), -1e9), -1) @ v

    counted = dict(trace(fn, *qkv()).program.report().rules)
    assert counted["scaled"] == counted["filled"] == counted["drop_neutral_operand"] == 1 and "added" not in counted


@pytest.mark.parametrize("shape", [(1, 4, 13, 13), (13, 13), (2, 1, 13, 13), (1, 1, 1, 13)], ids=str)
def test_a_bias_that_is_an_input_is_data(shape):
    def biased(q, k, v, bias):
        return F.softmax(scores(q, k) * SCALE + bias, -1) @ v

    inputs = (*qkv(), torch.randn(shape))
    traced = trace(biased, *inputs)
    (site,) = traced.sites
    assert site.bias.kind == "data" and site.mask == NONE and traced.rewrites == ["SDPA with the mask as it was"]
    torch.testing.assert_close(traced.output, biased(*inputs), atol=2e-5, rtol=1e-4)


def test_a_boolean_mask_over_pairs_is_data():
    def masked(q, k, v, keep):
        return F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None], float("-inf")), -1) @ v

    keep = torch.rand(2, 13, 13) > 0.3
    keep[..., 0] = True
    traced = trace(masked, *qkv(), keep)
    (site,) = traced.sites
    assert not site.mask.closed and not site.mask.causal and site.mask.kind == "data"
    torch.testing.assert_close(traced.output, masked(*qkv(), keep), atol=2e-5, rtol=1e-4)


def test_key_padding_is_a_load():
    def padded(q, k, v, keep):
        return F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None, None, :], float("-inf")), -1) @ v

    keep = torch.rand(2, 13) > 0.3
    keep[:, 0] = True
    inputs = (*qkv(), keep)
    traced = trace(padded, *inputs)
    (site,) = traced.sites
    assert [load.dims for load in site.mask.loads] == [("b", "j")] and traced.rewrites
    torch.testing.assert_close(traced.output, padded(*inputs), atol=2e-5, rtol=1e-4)


def test_query_padding_is_no_key_padding():
    """[b, i] where [b, j] is meant: with a square mask the shapes are the same."""

    def padded(q, k, v, keep):
        return F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None, :, None], -1e9), -1) @ v

    keep = torch.rand(2, 13) > 0.3
    traced = trace(padded, *qkv(), keep)
    (site,) = traced.sites
    assert not site.mask.loads and not site.plain
    torch.testing.assert_close(
        traced.output[keep[:, None].expand(2, 4, 13)], padded(*qkv(), keep)[keep[:, None].expand(2, 4, 13)]
    )


@pytest.mark.parametrize("read", [lambda keep: keep.t(), lambda keep: keep.transpose(0, 1), lambda keep: keep.flip(1)])
def test_padding_read_in_another_order(read):
    """With as many samples as keys the shapes are those of padding: refused, or right."""

    def padded(q, k, v, keep):
        return F.softmax((scores(q, k) * SCALE).masked_fill(~read(keep)[:, None, None, :], -1e9), -1) @ v

    inputs = (*qkv(batch=5, length=5), torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5) > 0.5))
    traced = trace(padded, *inputs, verify=False)
    torch.testing.assert_close(traced.output, padded(*inputs), atol=2e-5, rtol=1e-4)


def test_nano_gpt_with_a_mask_made_in_the_graph():
    model = NanoGPT(flash=False).eval()
    traced = trace(model, tokens())
    assert [s.path for s in traced.sites] == [f"h.{n}" for n in range(LAYERS)]
    assert {(s.heads, s.mask, s.pattern) for s in traced.sites} == {(HEADS, CAUSAL, "written-out")}
    assert traced.rewrites == ["SDPA is_causal"] * LAYERS
    torch.testing.assert_close(traced.output, model(tokens()), atol=1e-4, rtol=1e-4)


def test_a_mask_read_from_a_buffer_is_data():
    """Someone may have written to the buffer: what it holds is not in the graph."""
    model = NanoGPT(flash=False, made_here=False).eval()
    with torch.no_grad():
        model.h[0].bias[:, :, 5, 7] = 1
    traced = trace(model, tokens())
    # The other layer's buffer still holds a triangle, proved by its value, which the backend guards.
    assert [s.mask.causal for s in traced.sites] == [False, *[True] * (LAYERS - 1)]
    assert len(traced.program.relied_on) == LAYERS - 1
    torch.testing.assert_close(traced.output, model(tokens()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 13), (5, 13), (13, 5)])
def test_cross_attention_and_decoding(queries, keys):
    inputs = qkv(length=queries, keys=keys)
    traced = trace(plain, *inputs)
    (site,) = traced.sites
    assert site.mask == NONE and traced.rewrites == ["SDPA without a mask"]
    torch.testing.assert_close(traced.output, plain(*inputs), atol=2e-5, rtol=1e-4)


def test_values_of_another_width():
    inputs = qkv(dim_v=24)
    traced = trace(masked_fill, *inputs)
    (site,) = traced.sites
    assert (site.head_dim, site.head_dim_v) == (8, 24)
    torch.testing.assert_close(traced.output, masked_fill(*inputs), atol=2e-5, rtol=1e-4)


def test_one_key_head_broadcast_without_a_flag():
    inputs = qkv(kv_heads=1)
    traced = trace(plain, *inputs)
    torch.testing.assert_close(traced.output, plain(*inputs), atol=2e-5, rtol=1e-4)
    assert [(s.heads, s.kv_heads) for s in traced.sites] == [(4, 1)]
