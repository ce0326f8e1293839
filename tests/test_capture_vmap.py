"""Capture of torch.vmap: its batched operations are plain ones, with eager's results and gradients; or a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnopt.capture import capture
from attnopt.ir import Refusal
from tests.tracing import qkv, trace


def captured(fn, *inputs, grad=False, dynamic=False):
    """What capture makes of the graph of `fn`, and the result of running it."""
    seen = []

    def backend(gm, _):
        seen.append(capture(gm))
        return gm.forward if isinstance(seen[-1], Refusal) else seen[-1].forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    (found,) = seen
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    return found, out


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def windowed(q, k, v):
    """Attention whose mask is a function of two indices, batched twice."""

    def keep(i, j):
        return (j <= i) & (i - j < 4)

    i, j = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    mask = torch.vmap(torch.vmap(keep, (None, 0)), (0, None))(i, j)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_made_by_vmap_is_recovered(dynamic):
    q, k, v = qkv()
    for tensor in (q, k, v) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    traced = trace(windowed, q, k, v, dynamic=None)
    (site,) = traced.sites
    assert site.mask.closed and "j <= i" in str(site.mask)
    torch.testing.assert_close(traced.output, windowed(q, k, v))


def test_gradients_go_through_a_vmap():
    def fn(x, w):
        y = torch.vmap(lambda row: torch.softmax(row @ w, -1).detach() * torch.tanh(row @ w))(x.sin())
        return y.square().sum()

    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    gm, out = captured(fn, x, w, grad=True)
    assert isinstance(gm, torch.fx.GraphModule)
    expected = torch.autograd.grad(fn(x, w), (x, w))
    torch.testing.assert_close(torch.autograd.grad(out, (x, w)), expected)


def test_writes_inside_a_vmap_reach_the_input():
    def fn(x, y):
        torch.vmap(lambda a, b: a.add_(b))(x, y)
        return x * 2

    one, other, y = torch.zeros(4, 3), torch.zeros(4, 3), torch.randn(4, 3)
    gm, out = captured(fn, one, y)
    assert isinstance(gm, torch.fx.GraphModule)
    torch.testing.assert_close((out, one), (fn(other, y), other))


def test_two_vmaps_in_a_row_one_over_the_results_of_the_other():
    def fn(x):
        y, z = torch.vmap(lambda a: (a.cumsum(0), a.sum()), out_dims=(1, 0))(x)
        return torch.vmap(lambda a: a - z)(y)

    x = torch.randn(4, 3)
    gm, out = captured(fn, x, dynamic=True)
    assert isinstance(gm, torch.fx.GraphModule)
    torch.testing.assert_close(out, fn(x))


def test_random_numbers_in_a_vmap():
    gm, out = captured(lambda x: torch.vmap(lambda a: F.dropout(a, 0.5), randomness="different")(x), torch.ones(40, 50))
    assert isinstance(gm, torch.fx.GraphModule)
    assert set(out.unique().tolist()) == {0.0, 2.0} and len(out.unique(dim=0)) > 1


def test_other_transforms_are_a_reason():
    fn = torch.vmap(torch.func.grad(lambda a: a.sin().sum()))
    x = torch.randn(4, 3)
    found, out = captured(lambda x: fn(x), x)
    assert isinstance(found, Refusal) and found.code == "func-transform"
    torch.testing.assert_close(out, x.cos())


def test_a_vmap_under_autocast_is_a_reason():
    x = torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, out = captured(lambda x: torch.vmap(lambda a: a @ a.mT)(x), x)
    assert isinstance(found, Refusal) and found.code == "func-transform" and out.dtype == torch.bfloat16


def test_what_cannot_be_traced_is_a_reason(monkeypatch):
    from torch.fx.experimental import proxy_tensor

    def fail(*_, **__):
        def enter_and_fail(*_):
            torch._C._functorch._vmap_increment_nesting(2, "error")
            raise RuntimeError("no")

        return enter_and_fail

    monkeypatch.setattr(proxy_tensor, "make_fx", fail)
    found, _ = captured(lambda x: torch.vmap(torch.sin)(x), torch.ones(3, 2))
    assert isinstance(found, Refusal) and found.code == "func-transform"
