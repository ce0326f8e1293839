"""Calls of scaled_dot_product_attention: masks, heads, scales that are understood, and those that are not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, LAYERS, NanoGPT, build, padding, tokens
from tracing import qkv, trace

from attnopt.ir import Mask

sdpa = F.scaled_dot_product_attention
CAUSAL = Mask(causal=True)


def positions(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def is_causal(q, k, v):
    return sdpa(q, k, v, is_causal=True)


def causal_mask(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=j <= i)


def causal_float(q, k, v):
    n = q.shape[2]
    return sdpa(q, k, v, attn_mask=torch.triu(torch.full((n, n), float("-inf")), 1))


def no_mask(q, k, v):
    return sdpa(q, k, v)


def all_true(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))


def sliding(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=(j <= i) & (j > i - 4), scale=0.7)


def band(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=(i - j < 4) & (j - i < 4))


def grouped(q, k, v):
    return sdpa(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)


def repeated(q, k, v):
    i, j = positions(q, k)
    k, v = (t[:, ::2].repeat_interleave(2, 1) for t in (k, v))
    return sdpa(q, k, v, attn_mask=j <= i)


def tiled(q, k, v):
    """repeat, not repeat_interleave: query head h reads KV head h mod 2, which is no group of consecutive heads."""
    i, j = positions(q, k)
    k, v = (t[:, ::2].repeat(1, 2, 1, 1) for t in (k, v))
    return sdpa(q, k, v, attn_mask=j <= i)


def tiled_by_expand(q, k, v):
    i, j = positions(q, k)
    k, v = (t[:, None, ::2].expand(2, 2, 2, 13, 8).reshape(2, 4, 13, 8) for t in (k, v))
    return sdpa(q, k, v, attn_mask=j <= i)


def keys_repeated_values_tiled(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k[:, ::2].repeat_interleave(2, 1), v[:, ::2].repeat(1, 2, 1, 1), attn_mask=j <= i)


# fn -> (mask, KV heads of the site, rewritten)
MATCHES = {
    is_causal: (CAUSAL, 4, False),
    causal_mask: (CAUSAL, 4, True),
    causal_float: (CAUSAL, 4, True),
    no_mask: (Mask(), 4, False),
    all_true: (Mask(), 4, True),
    sliding: (Mask(causal=True, window=4), 4, True),
    band: (Mask(window=4, symmetric=True), 4, False),
    grouped: (CAUSAL, 2, False),
    repeated: (CAUSAL, 2, True),
    tiled: (CAUSAL, 4, True),
    tiled_by_expand: (CAUSAL, 4, True),
    keys_repeated_values_tiled: (CAUSAL, 4, True),
}


@pytest.mark.parametrize("fn", MATCHES, ids=lambda fn: fn.__name__)
def test_matches(fn):
    inputs = qkv()
    traced = trace(fn, *inputs)
    (site,) = traced.sites
    mask, kv_heads, rewritten = MATCHES[fn]
    assert (site.mask, site.heads, site.kv_heads, site.pattern) == (mask, 4, kv_heads, "sdpa")
    assert math.isclose(site.scale, 0.7 if fn is sliding else 8**-0.5, rel_tol=1e-6)
    assert bool(traced.rewrites) == rewritten and bool(traced.left) != rewritten and not traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


# --- near misses ----------------------------------------------------------------------------------------------------


def dropout(q, k, v):
    return sdpa(q, k, v, dropout_p=1e-9, is_causal=True)


def three_dimensions(q, k, v):
    return sdpa(q[0], k[0], v[0], is_causal=True)


def future_only(q, k, v):
    """The mask of what is dropped, given as what is kept."""
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=j >= i)


def outside_the_window(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=(j <= i) & (i - j >= 4) | (j == 0))


def chunked(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=(j <= i) & (i // 4 == j // 4))


def prefix(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=(j <= i) | (j < 5))


def per_head(q, k, v):
    i, j = positions(q, k)
    reach = torch.arange(4).view(4, 1, 1)
    return sdpa(q, k, v, attn_mask=(j <= i) & (i - j < 3 + reach))


def alibi(q, k, v):
    i, j = positions(q, k)
    slope = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1)
    return sdpa(q, k, v, attn_mask=(slope * (j - i)).masked_fill(j > i, float("-inf")))


def soft_bias(q, k, v):
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=torch.where(j <= i, 0.0, -5.0))


def scaled_distance(q, k, v):
    """2 j <= i is no causal bound."""
    i, j = positions(q, k)
    return sdpa(q, k, v, attn_mask=2 * j <= i)


def test_active_dropout_is_left_alone():
    traced = trace(dropout, *qkv(), verify=False)
    assert not traced.sites and not traced.rewrites and "dropout of the weights is active" in traced.misses[0]


# What is no plain mask, and what its record must say: never that it is causal.
RECORDS = {
    three_dimensions: "j <= i",
    future_only: "i - j < 1",
    chunked: "j <= i and i // 4 == j // 4",
    soft_bias: "all",
    scaled_distance: "2*j <= i",
}
OTHERS = [outside_the_window, prefix, per_head, alibi]


@pytest.mark.parametrize("fn", [*RECORDS, *OTHERS], ids=lambda fn: fn.__name__)
def test_records_of_other_masks(fn):
    inputs = qkv()
    traced = trace(fn, *inputs)
    (site,) = traced.sites
    if fn in RECORDS:
        assert site.mask.closed and str(site.mask) == RECORDS[fn]
    if fn is not three_dimensions:
        assert not site.mask.causal or not site.plain
        assert "SDPA is_causal" not in traced.rewrites
    assert (site.bias is not None) == (fn in (alibi, soft_bias))
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 13, 13), (2, 4, 13, 13), (13, 13), (1, 4, 1, 13), (2, 1, 13, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_that_are_inputs_are_data(shape, dtype):
    def masked(q, k, v, mask):
        return sdpa(q, k, v, attn_mask=mask)

    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    inputs = (*qkv(), mask if dtype == torch.bool else torch.randn(shape))
    traced = trace(masked, *inputs)
    (site,) = traced.sites
    assert bool(traced.rewrites) == (dtype == torch.float32 and shape[-1] == 1)
    data = site.mask.opaque or site.mask.reads or site.mask.loads if dtype == torch.bool else site.bias
    # A float mask of one value for each row moves all its scores alike: nothing is left of it.
    assert data or shape[-1] == 1
    torch.testing.assert_close(traced.output, masked(*inputs))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_key_padding(rank):
    def masked(q, k, v, pad):
        return sdpa(q, k, v, attn_mask=pad.view(2, 1, 1, 13))

    pad = (torch.rand(2, 13) > 0.3).view(2, *[1] * (rank - 2), 13)
    pad[..., 0] = True
    traced = trace(masked, *qkv(), pad)
    (site,) = traced.sites
    assert [load.dims for load in site.mask.loads] == [("b", "j")]
    torch.testing.assert_close(traced.output, masked(*qkv(), pad), atol=2e-5, rtol=1e-4)


def test_causal_and_padding_of_several_loads():
    def masked(q, k, v, one, two):
        i, j = positions(q, k)
        return sdpa(q, k, v, attn_mask=(j <= i) & one[:, None, None, :] & two)

    one, two = torch.rand(2, 13) > 0.3, torch.rand(13) > 0.2
    one[:, 0] = two[0] = True
    inputs = (*qkv(), one, two)
    traced = trace(masked, *inputs)
    (site,) = traced.sites
    assert sorted(load.dims for load in site.mask.loads) == [("b", "j"), ("j",)] and traced.rewrites
    torch.testing.assert_close(traced.output, masked(*inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(5, 13), (13, 5), (1, 13)])
def test_is_causal_is_aligned_to_the_first_key(queries, keys):
    """PyTorch aligns is_causal top left whatever the lengths, and so must the site's record."""
    inputs = qkv(length=queries, keys=keys)
    traced = trace(is_causal, *inputs)
    (site,) = traced.sites
    assert site.mask.offset == 0
    torch.testing.assert_close(traced.output, is_causal(*inputs))


@pytest.mark.parametrize(("queries", "keys"), [(5, 13), (1, 13), (12, 13)])
@pytest.mark.parametrize("window", [None, 4])
def test_masks_aligned_to_the_last_key_are_not_is_causal(queries, keys, window):
    def aligned(q, k, v):
        i, j = positions(q, k)
        i = i + keys - queries
        return sdpa(q, k, v, attn_mask=j <= i if window is None else (j <= i) & (i - j < window))

    inputs = qkv(length=queries, keys=keys)
    traced = trace(aligned, *inputs)
    assert "SDPA is_causal" not in traced.rewrites
    for site in traced.sites:
        bound = Mask(causal=True, offset=keys - queries, window=window)
        if queries == 1:
            bound = Mask() if window is None else Mask(terms=(f"j >= {keys - window}",))
        assert site.mask == bound
    torch.testing.assert_close(traced.output, aligned(*inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.25, 1.0, 0, -0.5])
def test_scales(scale):
    def scaled(q, k, v):
        i, j = positions(q, k)
        return sdpa(q, k, v, attn_mask=j <= i, scale=scale)

    traced = trace(scaled, *qkv())
    (site,) = traced.sites
    assert math.isclose(site.scale, 8**-0.5 if scale is None else scale)
    # What SDPA's kernels do with is_causal and a scale that is not positive is no attention.
    assert bool(traced.rewrites) == (scale is None or scale > 0) and not any(
        "Error" in reason for reason in traced.left
    )
    torch.testing.assert_close(traced.output, scaled(*qkv()), atol=2e-5, rtol=1e-4)


# --- whole models ---------------------------------------------------------------------------------------------------

PATHS = {"llama": "model.layers.{}.self_attn", "mistral": "model.layers.{}.self_attn", "gpt2": "transformer.h.{}.attn",
         "bert": "encoder.layer.{}.attention.self"}  # fmt: skip
FORMULAS = {"llama": "j <= i", "gpt2": "j <= i", "mistral": "j <= i and i - j < 7", "bert": ""}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family, attention, side):
    """One site a layer, the expected record, and the output of the model itself wherever a query keeps a key."""
    layers = LAYERS if side == "none" else 1
    model = build(family, attention, **{"n_layer" if family == "gpt2" else "num_hidden_layers": layers})
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens()}
    if side != "none":
        inputs["attention_mask"] = padding(2, 20, side)
    expected = output(model(**inputs, **cacheless(family)))
    traced = trace(model, **inputs, **cacheless(family))
    assert [s.path for s in traced.sites] == [PATHS[family].format(n) for n in range(layers)]
    formula = FORMULAS[family]
    for site in traced.sites:
        kv_heads = KV_HEADS if family in ("llama", "mistral") else HEADS
        assert (site.heads, site.kv_heads, site.head_dim, site.dtype) == (HEADS, kv_heads, HEAD_DIM, "float32")
        assert math.isclose(site.scale, HEAD_DIM**-0.5, rel_tol=1e-6)
        assert site.pattern == ("sdpa" if attention == "sdpa" else "written-out")
        assert str(replace(site.mask, loads=())).replace("all", "") == formula, str(site)
        assert [load.dims for load in site.mask.loads] == [("b", "j")] * (side != "none")
    assert not traced.misses
    rows = inputs["attention_mask"].bool() if side != "none" else torch.ones(2, 20, dtype=torch.bool)
    torch.testing.assert_close(output(traced.output)[rows], expected[rows], atol=2e-3, rtol=2e-3)
    if attention == "eager" or family in ("llama", "mistral"):
        assert len(traced.rewrites) == layers, traced.left


def cacheless(family):
    return {} if family == "bert" else {"use_cache": False}


def output(result):
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_transformers_with_a_cache(family):
    """Prefill fills the cache as the model itself does, and decoding from it goes on alike."""
    model = build(family)
    with torch.no_grad():
        expected = model(tokens(), use_cache=True)
    traced = trace(model, tokens(), use_cache=True)
    assert len(traced.sites) == LAYERS
    torch.testing.assert_close(traced.output.logits, expected.logits, atol=2e-3, rtol=2e-3)
    found = [layer.keys for layer in traced.output.past_key_values.layers]
    for a, b in zip(found, [layer.keys for layer in expected.past_key_values.layers], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    follow = tokens(2, 1, seed=5)
    with torch.no_grad():
        after = model(follow, past_key_values=expected.past_key_values, use_cache=True).logits
    step = trace(model, follow, past_key_values=traced.output.past_key_values, use_cache=True)
    torch.testing.assert_close(step.output.logits, after, atol=2e-3, rtol=2e-3)
    assert len(step.sites) + len(step.misses) == LAYERS


def test_nano_gpt():
    model = NanoGPT(flash=True).eval()
    traced = trace(model, tokens())
    assert [s.path for s in traced.sites] == ["h.0", "h.1"]
    assert {(s.heads, s.kv_heads, s.mask) for s in traced.sites} == {(HEADS, HEADS, CAUSAL)}
    assert traced.left == ["already a single attention call without a mask"] * LAYERS
    torch.testing.assert_close(traced.output, model(tokens()))
