"""The operators of linear far parts: results, gradients, fakes, what they refuse."""

from __future__ import annotations

import linears
import pytest
import torch

from attnopt.codegen import reference_linear
from attnopt.errors import PlanError
from attnopt.ops import linear_decode, linear_far

MAPS = linears.maps("exp", 5, 16)
HEADS, SINKS, WINDOWS = linears.tables()


def far(q, k, v, pad=None, maps=MAPS, heads=HEADS, site=None, min_length=0):
    return linear_far(q, k, v, heads, *(site or linears.site()), pad, *maps.tensors, maps.kind, min_length)


@pytest.mark.parametrize("pad", ["none", "left", "all of one"])
def test_forward_and_backward(pad):
    q, k, v = (x.requires_grad_() for x in linears.inputs(70, torch.float64))
    pad = linears.padding(pad, 70)
    out, lse = far(q, k, v, pad)
    expected = reference_linear.prefill(q, k, v, HEADS, SINKS, WINDOWS, MAPS, pad)
    torch.testing.assert_close((out, lse), expected, atol=1e-10, rtol=1e-10)
    assert out.transpose(1, 2).is_contiguous()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    finite = expected[1].masked_fill(expected[1].isneginf(), 0.0)
    gradients = torch.autograd.grad((expected[0], finite), (q, k, v), (dout, dlse))
    found = torch.autograd.grad((out, lse.masked_fill(lse.isneginf(), 0.0)), (q, k, v), (dout, dlse))
    torch.testing.assert_close(found, gradients, atol=1e-9, rtol=1e-9)


def test_windows_grow_with_the_length_and_short_inputs_are_dense():
    q, k, v = linears.inputs(64)
    sinks, alphas, betas = (
        torch.zeros(8, dtype=torch.int32),
        torch.full((8,), 2, dtype=torch.int32),
        torch.full((8,), 0.25),
    )
    out, lse = far(q, k, v, site=(sinks, alphas, betas.double()))
    expected = reference_linear.prefill(q, k, v, *linears.tables(sinks=(0,) * 8, windows=(18,) * 8), MAPS)
    torch.testing.assert_close((out, lse), expected)
    out, lse = far(q, k, v, site=(sinks, alphas, betas.double()), min_length=65)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("length", [0, 1, 33])
def test_operator_checks(length):
    q, k, v = (x.requires_grad_() for x in linears.inputs(length, dim=8, dim_v=4))
    maps = linears.maps("taylor", 5, 8, rank=2)
    arguments = q, k, v, HEADS, *linears.site(), None, *maps.tensors, "taylor", 0
    # Its gradient is registered by hand and compared above; what is checked here are schema, fake and tracing.
    torch.library.opcheck(
        linear_far, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_no_head_has_a_far_part():
    q, k, v = linears.inputs(20)
    out, lse = far(q, k, v, maps=MAPS.of([]), heads=HEADS[:0])
    assert out.shape == (2, 0, 20, 24) and lse.shape == (2, 0, 20)


def test_a_map_of_another_shape_is_refused():
    q, k, v = linears.inputs(20)
    for wrong in (linears.maps("exp", 4, 16), linears.maps("exp", 5, 17)):
        with pytest.raises(PlanError, match=r"wq of a map is float32 (.|\n)*attnopt distill"):
            far(q, k, v, maps=wrong)
    with pytest.raises(PlanError, match="no map of kind 'relu'"):
        linear_far(q, k, v, HEADS, *linears.site(), None, *MAPS.tensors, "relu", 0)


def test_decoding_has_no_gradient_and_wants_its_state():
    q = linears.inputs(1)[0]
    rows = torch.randn(2, 5, 16), torch.randn(2, 5, 24)
    slots = torch.full((2, 5), -1, dtype=torch.int32)
    state = torch.zeros(2, 5, 24, 25)
    out, lse = linear_decode(q, *rows, slots, HEADS, state, *MAPS.tensors, "exp")
    assert out.shape == (2, 5, 1, 24) and (out == 0).all() and lse.isneginf().all()
    with pytest.raises(ValueError, match="expected one token and a state"):
        linear_decode(q, *rows, slots, HEADS, state[:, :4], *MAPS.tensors, "exp")
    with pytest.raises(RuntimeError, match="no gradient"):
        linear_decode(q.requires_grad_(), *rows, slots, HEADS, state, *MAPS.tensors, "exp")
