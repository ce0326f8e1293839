"""The CPU target's logsumexp and gradients against the reference in float64: spans, head sharing, padding, layouts."""

from __future__ import annotations

import pytest
import torch
from spanning import HEADS, SMALL, SPANS, inputs, poisoned, tables  # noqa: F401  (poisoned is a fixture)

from attnopt.codegen import reference_backward, reference_prefill, span_cpu, span_cpu_backward
from attnopt.codegen.emit import load
from attnopt.codegen.spec import SpanBackward, SpanPrefill

# Of dq, dk and dv, relative to their own norm and a tenth of dv's: dq of a row with one key is 0.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SCALE = 0.3


def errors(found, expected):
    least = 0.1 * expected[2].norm()
    for gradient, right in zip(found, expected, strict=True):
        assert gradient.shape == right.shape and torch.isfinite(gradient).all()
        assert gradient.transpose(1, 2).is_contiguous()
    pairs = zip(found, expected, strict=True)
    return [float((a.double() - b).norm() / torch.maximum(b.norm(), least).clamp_min(1e-30)) for a, b in pairs]


def both(q, k, v, sinks, windows, scale=SCALE, pad=None, tune=None, spans=None, through_lse=False):
    """The CPU's gradients and the reference's in float64, after the logsumexps are compared. `through_lse`: of a sum
    that the logsumexp is part of, with weights as large as the output's."""
    dout = torch.randn(q.shape[0], q.shape[2], HEADS, v.shape[3], generator=torch.Generator().manual_seed(3))
    dout = dout.to(q.dtype).transpose(1, 2)
    out, lse = span_cpu.prefill_lse(q, k, v, sinks, windows, scale, pad, tune)
    wide = [x.double() for x in (q, k, v)]
    sinks_, windows_ = spans or (sinks, windows)
    exact, sums = reference_prefill.prefill_lse(*wide, sinks_, windows_, scale, pad)
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    if spans is None:
        torch.testing.assert_close(lse.double(), sums, rtol=0, atol=0.03 if q.element_size() == 2 else 1e-5)
        assert float((out.double() - exact).norm()) <= TOLERANCE[q.dtype] * float(exact.norm())
    dlse = dout[..., 0].to(lse.dtype).contiguous() if through_lse else None
    found = span_cpu_backward.backward(dout, q, k, v, out, lse, sinks, windows, scale, pad, tune, dlse)
    right = dout.double(), *wide, exact, sums, sinks_, windows_, scale, pad, dlse
    return found, reference_backward.backward(*right)


@pytest.mark.parametrize("tune", [None, SMALL], ids=["measured", "small"])
@pytest.mark.parametrize("length", [0, 1, 301])
@pytest.mark.parametrize("name", SPANS)
def test_matches_reference(name, length, tune, poisoned):  # noqa: F811
    q, k, v = inputs(length)
    assert max(errors(*both(q, k, v, *tables(SPANS[name]), tune=tune))) < 1e-5


CASES = [
    (torch.float64, 8, (16, 16)),
    (torch.float32, 4, (16, 24)),
    (torch.float32, 2, (24, 16)),
    (torch.bfloat16, 4, (32, 32)),
    (torch.bfloat16, 2, (16, 24)),
    (torch.float16, 8, (24, 16)),
]


@pytest.mark.parametrize(("dtype", "kv_heads", "dims"), CASES, ids=str)
def test_dtypes_head_sharing_and_padding(dtype, kv_heads, dims, poisoned):  # noqa: F811
    q, k, v = inputs(157, dtype, kv_heads=kv_heads, dim=dims[0], dim_v=dims[1])
    pad = torch.rand(2, 157, generator=torch.Generator().manual_seed(1)) > 0.3
    pad[0, :40], pad[1, 70:150] = False, False
    cases = ("mixed", None), ("split", pad), ("mixed", pad), ("dense", pad), ("dense", None)
    for number, (name, mask) in enumerate(cases):
        found, expected = both(q, k, v, *tables(SPANS[name]), pad=mask, tune=SMALL, through_lse=number > 1)
        assert all(x.dtype == dtype for x in found)
        assert max(errors(found, expected)) < TOLERANCE[dtype], (name, mask is None)


@pytest.mark.parametrize("scale", [1e-6, 0.0, -0.25])
def test_scales(scale):
    """With padding a small scale goes into q, and so into its gradient."""
    q, k, v = inputs(90)
    pad = torch.arange(90).repeat(2, 1) >= torch.tensor([[7], [0]])
    for name in ("mixed", "dense"):
        found, expected = both(q, k, v, *tables(SPANS[name]), scale, pad)
        assert all(
            float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-12 for a, b in zip(found, expected, strict=True)
        )


def test_strided_gradients_and_features():
    """A gradient that is expanded, and inputs whose features do not lie side by side."""
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(150))
    sinks, windows = tables(SPANS["mixed"])
    dout = torch.randn(2, HEADS, 1, 1).expand(2, HEADS, 150, 16)
    out, lse = span_cpu.prefill_lse(q, k, v, sinks, windows, SCALE)
    found = span_cpu_backward.backward(dout, q, k, v, out, lse, sinks, windows, SCALE)
    wide = [x.double() for x in (q, k, v)]
    sums = reference_prefill.prefill_lse(*wide, sinks, windows, SCALE)
    assert max(errors(found, reference_backward.backward(dout.double(), *wide, *sums, sinks, windows, SCALE))) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sink,window", [(0, 1), (0, -1), (1, 0)])
def test_one_key_more_or_less_is_out_of_tolerance(dtype, sink, window):
    q, k, v = inputs(257, dtype)
    spans = tables([(4, 32)] * HEADS)
    wrong = tables([(4 + sink, 32 + window)] * HEADS)
    assert min(errors(*both(q, k, v, *wrong, spans=spans))) > 2 * TOLERANCE[dtype]


def test_memory_is_that_of_the_gradients_and_one_call():
    """Nothing of N x N: the largest tensor that a long input makes is a gradient or one call's copies."""
    q, k, v = inputs(2048, batch=1)
    sinks, windows = tables([(4, 32)] * HEADS)
    out, lse = span_cpu.prefill_lse(q, k, v, sinks, windows, SCALE)
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            made.extend(
                x.untyped_storage().nbytes() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x)
            )
            return result

    with Sizes():
        span_cpu_backward.backward(out, q, k, v, out, lse, sinks, windows, SCALE)
    segment = span_cpu_backward.tuning(q.dtype, 16).segment
    assert max(made) <= 4 * max(q.numel(), segment)


def test_emitted_module(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    q, k, v = inputs(100)
    spans = tables(SPANS["mixed"])
    out, lse = load(SpanPrefill("cpu", "float32", HEADS, 4, 16, 16, padded=False)).prefill_lse(q, k, v, *spans, SCALE)
    module = load(SpanBackward("cpu", "float32", HEADS, 4, 16, 16, padded=False))
    found = module.backward(out, q, k, v, out, lse, *spans, SCALE)
    expected = span_cpu_backward.backward(out, q, k, v, out, lse, *spans, SCALE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="padding"):
        module.backward(out, q, k, v, out, lse, *spans, SCALE, torch.ones(2, 100, dtype=torch.bool))
    with pytest.raises(ValueError, match="emitted for"):
        module.backward(out, q.bfloat16(), k, v, out, lse, *spans, SCALE)
