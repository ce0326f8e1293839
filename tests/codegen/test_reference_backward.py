"""The reference's gradients: against finite differences and against autograd through the reference prefill."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.emit import load
from attnopt.codegen.reference_backward import backward
from attnopt.codegen.reference_prefill import prefill, prefill_lse
from attnopt.codegen.spec import SpanBackward

SINKS, WINDOWS = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3, 0], [2**30, 1, 2, 4]))
SCALE = 0.7


def inputs(length=7, batch=2, dim=3, dim_v=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, length, dim), (2, length, dim), (2, length, dim_v)
    q, k, v = (torch.randn(batch, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    pad = torch.rand(batch, length, generator=generator) > 0.4
    pad[0, :3] = False  # rows without a key
    return q, k, v, pad


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pad):
        out, lse = prefill_lse(q, k, v, SINKS, WINDOWS, SCALE, pad)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pad = pad
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *backward(dout, *ctx.saved_tensors, SINKS, WINDOWS, SCALE, ctx.pad, dlse), None


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_finite_differences(padded):
    q, k, v, pad = inputs()

    def both(*x):
        """The output, and the logsumexp where a key is kept: elsewhere it is -inf and has no differences."""
        out, lse = Attention.apply(*x, pad if padded else None)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("length", [0, 1, 19])
def test_autograd_of_the_prefill(length):
    q, k, v, pad = inputs(length)
    out, lse = prefill_lse(q, k, v, SINKS, WINDOWS, SCALE, pad)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(prefill(q, k, v, SINKS, WINDOWS, SCALE, pad), (q, k, v), dout)
    for found, gradient in zip(backward(dout, q, k, v, out, lse, SINKS, WINDOWS, SCALE, pad), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-10)


def test_logsumexp():
    q, k, v, pad = inputs()
    lse = prefill_lse(q, k, v, SINKS, WINDOWS, SCALE, pad)[1]
    assert lse.dtype == torch.float64 and (lse[0, :, :3] == float("-inf")).all() and lse[1, :, -1].isfinite().all()
    # Head 0 is dense: its last row keeps every key that is not padded.
    scores = (q[1, 0, -1] @ k[1, 0].T * SCALE)[pad[1]]
    torch.testing.assert_close(lse[1, 0, -1], scores.exp().sum().log())
    assert prefill_lse(q.half(), k.half(), v.half(), SINKS, WINDOWS, SCALE)[1].dtype == torch.float32


def test_the_emitted_module_is_the_reference():
    assert load(SpanBackward("reference", "float64", 4, 2, 3, 5, False)).backward is backward
