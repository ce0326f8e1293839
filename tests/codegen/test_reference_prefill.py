"""The reference target against a triple loop, and its rules at the edges. Everything else is tested against it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attnopt.codegen.emit import load
from attnopt.codegen.reference_prefill import prefill, span_mask
from attnopt.codegen.spec import SpanPrefill

DENSE = 2**30


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def inputs(heads=4, kv_heads=2, length=9, dim=3, dim_v=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, length, dim), (kv_heads, length, dim), (kv_heads, length, dim_v)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_loops(q, k, v, sinks, windows, scale, pad=None):
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                kept = [
                    j for j in range(i + 1) if (j < sinks[h] or i - j < windows[h]) and (pad is None or bool(pad[b, j]))
                ]
                weights = [math.exp(float(q[b, h, i] @ k[b, kv, j]) * scale) for j in kept]
                for weight, j in zip(weights, kept, strict=True):
                    out[b, h, i] += weight / sum(weights) * v[b, kv, j]
    return out


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("spans", [([0, 1, 3, 0], [DENSE, 1, 2, 4]), ([9, 0, 20, 2], [0, 0, 3, 9])], ids=str)
def test_matches_a_triple_loop(spans, padded):
    q, k, v = inputs()
    pad = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.4 if padded else None
    sinks, windows = (ints(*column) for column in spans)
    torch.testing.assert_close(
        prefill(q, k, v, sinks, windows, 0.7, pad), by_loops(q, k, v, sinks, windows, 0.7, pad), atol=1e-12, rtol=1e-10
    )


def test_dense_is_sdpa():
    q, k, v = inputs()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(prefill(q, k, v, ints(0, 0, 0, 0), ints(*[DENSE] * 4), 0.7), expected)


def test_the_queries_own_key_counts_and_sinks_come_on_top():
    keep = span_mask(6, ints(0, 2), ints(1, 2))
    assert keep[0].equal(torch.eye(6, dtype=torch.bool))
    assert keep[1].long().sum(1).tolist() == [1, 2, 3, 4, 4, 4]
    assert keep[1, 5].tolist() == [True, True, False, False, True, True]


def test_rows_without_a_key_are_zero():
    q, k, v = inputs()
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[0, :4] = False
    out = prefill(q, k, v, ints(0, 0, 0, 0), ints(*[DENSE] * 4), 0.7, pad)
    assert (out[0, :, :4] == 0).all() and torch.isfinite(out).all() and (out[0, :, 4:] != 0).all()
    assert (prefill(q, k, v, ints(0, 0, 0, 0), ints(0, 0, 0, 0), 0.7) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_wide_whatever_the_dtype(dtype):
    q, k, v = inputs(dtype=dtype, dim=64)
    arguments = ints(0, 1, 3, 0), ints(DENSE, 1, 2, 4), 0.7
    out = prefill(q, k, v, *arguments)
    wide = prefill(q.double(), k.double(), v.double(), *arguments)
    assert out.dtype == dtype
    assert float((out.double() - wide).abs().max()) <= 8 * torch.finfo(dtype).eps * float(wide.abs().max())


def test_the_emitted_module_is_the_reference():
    spec = SpanPrefill("reference", "float64", 4, 2, 3, 5, False)
    assert load(spec).prefill is prefill


def test_heads_must_divide():
    with pytest.raises(ValueError, match="do not divide"):
        SpanPrefill("reference", "float32", 3, 2, 8, 8, False)
