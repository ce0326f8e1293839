"""What scores are multiplied with goes into q; queries and keys that were widened are read narrow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tracing import qkv, trace

from attnopt.ir import Mask

from .written import CAUSAL, SCALE, scores, triangle


def tempered(q, k, v, t):
    return F.softmax((scores(q, k) * t).masked_fill(~triangle(q.shape[2]), float("-inf")), -1) @ v


def test_a_factor_goes_into_q_and_is_counted():
    inputs = (*qkv(dtype=torch.float64), torch.linspace(-2.0, 3.0, 4, dtype=torch.float64)[:, None, None])
    traced = trace(tempered, *inputs)
    (site,) = traced.sites
    assert site.mask == CAUSAL and site.scale == 1.0 and traced.rewrites == ["SDPA is_causal"]
    assert dict(traced.program.report().rules)["folded"] == 1
    torch.testing.assert_close(traced.output, tempered(*inputs), atol=1e-12, rtol=1e-12)


def test_a_factor_of_zero_averages_what_is_kept():
    inputs = (*qkv(dtype=torch.float64), torch.zeros(4, 1, 1, dtype=torch.float64))
    traced = trace(tempered, *inputs)
    assert traced.rewrites
    torch.testing.assert_close(traced.output, tempered(*inputs), atol=1e-12, rtol=1e-12)
    counts = torch.arange(1, 14, dtype=torch.float64)[:, None]
    torch.testing.assert_close(traced.output, inputs[2].cumsum(2) / counts, atol=1e-12, rtol=1e-12)


def test_a_factor_in_float32_is_rounded_once():
    """bfloat16 q, k and v, their scores multiplied in float32: so is q, and then rounded."""

    def fn(q, k, v, t):
        return F.softmax(scores(q, k).float() * t, -1).to(q.dtype) @ v

    q, k, v = qkv(dtype=torch.bfloat16)
    t = torch.linspace(-0.7, 0.9, 4)[:, None, None]
    traced = trace(fn, q, k, v, t)
    assert traced.rewrites
    once = F.scaled_dot_product_attention((q.float() * t).to(q.dtype), k, v, scale=1.0)
    torch.testing.assert_close(traced.output, once, atol=0, rtol=0)


def test_a_factor_without_dimensions_decides_no_type():
    inputs = (*qkv(), torch.tensor(0.3, dtype=torch.float64))
    traced = trace(tempered, *inputs)
    assert traced.rewrites and traced.output.dtype == torch.float32
    torch.testing.assert_close(traced.output, tempered(*inputs))


def test_a_factor_stays_with_the_scores_in_float16():
    """q times a large factor may be more than float16 holds where its scores are not."""
    q, k, v = qkv(dtype=torch.float16)
    q, k, t = q * 1000, k / 1000, torch.full((4, 1, 1), 100.0, dtype=torch.float16)
    traced = trace(tempered, q, k, v, t, verify=False)
    assert not traced.sites and "float16" in traced.misses[0] and traced.output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_widened_queries_and_keys_are_those_of_the_narrow_ones(dtype):
    """q and k are cast to float32 before the product, the weights to V's dtype after it."""

    def fn(q, k, v):
        wide = q.to(torch.float32) * SCALE @ k.transpose(-2, -1).to(torch.float32)
        return F.softmax(wide.masked_fill(~triangle(13), torch.finfo(wide.dtype).min), -1).to(v.dtype) @ v

    inputs = qkv(dtype=dtype)
    traced = trace(fn, *inputs)
    (site,) = traced.sites
    assert site.dtype == str(dtype).removeprefix("torch.") and site.mask == Mask(causal=True, fill="finite")
    assert traced.rewrites == ["SDPA is_causal"]
    exact = fn(*(t.double() for t in inputs))
    ours, plain = ((o.double() - exact).abs().max() for o in (traced.output, fn(*inputs)))
    assert ours <= 2 * plain


def made_wide(q, k, v):
    """These scores are no products of narrow values: the sum is rounded to nothing less than float32."""
    return F.softmax(scores(q.float() + 1e-4, k.float()), -1).to(v.dtype) @ v


def made_hot(q, k, v):
    """These scores are products of narrow values, times what q may not hold in a narrow type."""
    return F.softmax(scores(q.float(), k.float()) * torch.arange(1, 5)[:, None, None] * 1e4, -1).to(v.dtype) @ v


def narrowed_weights(q, k, v):
    return F.softmax(scores(q, k), -1).to(v.dtype) @ v


def test_values_narrower_than_what_made_the_scores_are_no_site():
    for fn, inputs in (
        (made_wide, qkv(dtype=torch.bfloat16)),
        (made_hot, qkv(dtype=torch.float16)),
        (narrowed_weights, (*qkv()[:2], qkv(dtype=torch.bfloat16)[2])),
    ):
        traced = trace(fn, *inputs)
        assert not traced.sites and "have the dtypes" in traced.misses[0]
        torch.testing.assert_close(traced.output, fn(*inputs), atol=0, rtol=0)
