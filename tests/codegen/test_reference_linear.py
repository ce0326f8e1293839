"""The reference of linear far parts: against the formula row by row, and its gradients against finite differences."""

from __future__ import annotations

import linears
import pytest
import torch

from attnopt.codegen import reference_linear
from attnopt.codegen.emit import load
from attnopt.codegen.spec import LinearBackward, LinearDecode, LinearPrefill


@pytest.mark.parametrize("pad", ["none", "left", "all of one", "holes"])
@pytest.mark.parametrize("kind", linears.RANK)
def test_prefill_is_the_formula(kind, pad):
    arguments = *linears.inputs(37, torch.float64), *linears.tables(), linears.maps(kind, 5, 16)
    pad = linears.padding(pad, 37)
    out, lse = reference_linear.prefill(*arguments, pad)
    expected, sums = linears.naive(*arguments, pad)
    assert torch.equal(lse.isneginf(), sums.isneginf()) and (out[lse.isneginf()] == 0).all()
    torch.testing.assert_close((out, lse), (expected, sums), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", linears.RANK)
@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_finite_differences(kind, length):
    q, k, v = (x.requires_grad_() for x in linears.inputs(length, torch.float64, batch=1, dim=3, dim_v=2))
    tables = linears.tables((0, 3, 7), (1,) * 8, (2, 1, 1, 1, 1, 1, 1, 3))
    maps, pad = linears.maps(kind, 3, 3, rank=3), torch.arange(length)[None] != 3

    class Far(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = reference_linear.prefill(q, k, v, *tables, maps, pad)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            return reference_linear.backward(dout, dlse, *ctx.saved_tensors, *tables, maps, pad)

    def finite(*x):
        out, lse = Far.apply(*x)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    if length:
        assert torch.autograd.gradcheck(finite, (q, k, v))
    else:
        assert all(x.numel() == 0 for x in torch.autograd.grad(sum(x.sum() for x in finite(q, k, v)), (q, k, v)))


def test_a_capped_key_has_no_gradient():
    q, k, v = linears.inputs(5, torch.float64, dim=3)
    maps = linears.maps("exp", 5, 3)
    maps.bk[:, 0] += 100.0
    tables = linears.tables(sinks=(0,) * 8, windows=(1,) * 8)
    k.requires_grad_()
    out, lse = reference_linear.prefill(q, k, v, *tables, maps)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    expected = torch.autograd.grad((out, lse), k, (dout, dlse))[0]
    given = reference_linear.prefill(q, k.detach(), v, *tables, maps)
    found = reference_linear.backward(dout, dlse, q, k.detach(), v, *given, *tables, maps)[1]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("kind", linears.RANK)
def test_a_prompt_and_then_steps_are_a_prefill(kind, pad):
    """Decoding from the state of a prompt gives the rows of the whole."""
    length, prompt = 41, 30
    q, k, v = linears.inputs(length, torch.float64)
    heads, sinks, windows = tables = linears.tables()
    maps, pad = linears.maps(kind, 5, 16), linears.padding(pad, length)
    out, lse = reference_linear.prefill(q, k, v, *tables, maps, pad)
    first = (x[:, :, :prompt] for x in (k, v))
    state = reference_linear.state(*first, heads, 8, sinks, windows, maps, None if pad is None else pad[:, :prompt])
    kv, batch = heads.long() // 2, torch.arange(2)[:, None]
    for i in range(prompt, length):
        leaving = (i - windows).clamp(min=0)
        slots = torch.where((i - windows >= sinks) & (True if pad is None else pad[:, leaving]), torch.arange(5), -1)
        rows = (x[batch, kv, leaving.long()] for x in (k, v))
        found = reference_linear.decode(q[:, :, i : i + 1], *rows, slots.expand(2, -1), heads, state, maps)
        torch.testing.assert_close(found, (out[:, :, i : i + 1], lse[:, :, i : i + 1]), atol=1e-12, rtol=1e-12)


def test_the_emitted_modules_are_the_reference():
    sizes = "reference", "float64", 8, 4, 16, 24, 5, "exp", 24
    assert load(LinearPrefill(*sizes, False)).prefill is reference_linear.prefill
    assert load(LinearBackward(*sizes, False)).backward is reference_linear.backward
    assert load(LinearDecode(*sizes)).decode is reference_linear.decode
