"""What a user may do to a compiled attention: the result is eager's, or the mistake eager's too.

Through inductor itself where it has a say: sizes, types, modes, transforms, threads."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnopt import backend

pytestmark = pytest.mark.slow


def attend(q, k, v):
    """Causal attention whose mask is spelled out, so that there is something to rewrite."""
    i, j = torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i[:, None])


def written(q, k, v):
    """Dtypes that SDPA refuses: attention in products and a soft-max of the real part."""
    weights = torch.softmax((q @ k.transpose(-1, -2)).real.float(), -1)
    return weights.to(v.dtype) @ v


def compiled(fn):
    return torch.compile(fn, backend=backend.attnopt)


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


def same(fn, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn)(*inputs), fn(*inputs), atol=1e-4, rtol=1e-4, equal_nan=True)
    assert backend.reports()


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 5, 8), (2, 2, 0, 8), (1, 2, 1, 8), (1, 1, 2, 1)],
    ids=["batch 0", "length 0", "length 1", "width 1"],
)
def test_sizes_at_the_edge(shape):
    same(attend, *torch.randn(3, *shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_dtypes_that_are_no_attentions(dtype):
    same(written, *(torch.randn(3, 1, 2, 5, 8) * 2).to(dtype))


def test_inputs_that_are_not_contiguous(eagerly):
    x = torch.randn(2, 6, 3, 8)
    same(attend, x.transpose(1, 2), x[:, :1].expand(2, 6, 3, 8).transpose(1, 2), x.flip(0).transpose(1, 2))


def test_heads_that_do_not_divide_are_an_error():
    """Four query heads over three of K: eager refuses, and so does what is compiled."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8)
    for call in (attend, compiled(attend)):
        with pytest.raises(Exception, match=r"(?i)must match|size|broadcast"):
            call(q, k, k)


def test_inference_mode():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    call = compiled(attend)
    with torch.inference_mode():
        torch.testing.assert_close(call(q, k, v), attend(q, k, v), atol=1e-5, rtol=1e-5)
    # And out of it again, where gradients are asked of the same code.
    q.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(call(q, k, v).square().sum(), q)[0],
        torch.autograd.grad(attend(q, k, v).square().sum(), q)[0],
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_vmap():
    same(lambda q, k, v: torch.func.vmap(attend)(q, k, v), *torch.randn(3, 2, 1, 2, 5, 8))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return attend(q, k, v)


def test_functional_call(eagerly):
    model, x = Attention(), torch.randn(1, 5, 16)
    weights = {name: p.detach() * 2 for name, p in model.named_parameters()}
    same(lambda x: torch.func.functional_call(model, weights, (x,)), x)


def test_hooks(eagerly):
    model, x, seen = Attention(), torch.randn(1, 5, 16), []
    model.qkv.register_forward_hook(lambda module, inputs, out: out * 2)
    model.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    same(model, x)
    assert seen[0] == (1, 2, 5, 8)


def test_a_model_moved_to_another_dtype():
    model, x = Attention(), torch.randn(1, 5, 16)
    call = compiled(model)
    with torch.no_grad():
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-9), (torch.bfloat16, 2e-2)):
            model.to(dtype)
            found = call(x.to(dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(found, model(x.to(dtype)), atol=limit, rtol=limit)
    assert len(backend.reports()) == 3


def test_a_model_without_data():
    with torch.device("meta"), torch.no_grad():
        found = compiled(Attention())(torch.empty(1, 5, 16))
    assert found.device.type == "meta" and found.shape == (1, 2, 5, 8)


def test_two_threads_compile_at_once():
    inputs, found = [torch.randn(3, 1, heads, 5, 8) for heads in (2, 3)], [None, None]

    def work(n):
        with torch.no_grad():
            found[n] = compiled(lambda q, k, v: attend(q, k, v) * (n + 1))(*inputs[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (0, 1):
        torch.testing.assert_close(found[n], attend(*inputs[n]) * (n + 1), atol=1e-5, rtol=1e-5)
