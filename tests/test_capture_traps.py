"""What the export would lose or stumble over: opaque fast paths, floats as inputs, values of buffers.

Every captured graph runs eagerly here, so that a result equal to the model's own is asked for to the last bit wherever
the same operations run in the same order.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capturing import captured, equal
from torch import nn

from attnopt.capture import KEY, capture
from attnopt.capture.constants import LIMIT, guarded


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


# --- opaque fast paths ----------------------------------------------------------------------------------------------


def encoder(norm_first=False, activation="relu", layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def shown(gm):
    names = targets(gm)
    assert not any("transformer_encoder" in name or "native_multi_head" in name for name in names)
    return sum("scaled_dot_product_attention" in name for name in names)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
def test_encoder_layers_are_opened(norm_first, activation, masked):
    model, x = encoder(norm_first, activation), torch.randn(2, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked in ("causal", "both") else None
    pad = torch.arange(5) >= torch.tensor([[3], [5]]) if masked in ("padding", "both") else None

    def fn(x):
        return model(x, mask=mask, src_key_padding_mask=pad, is_causal=mask is not None)

    gm, found = captured(fn, x)
    assert shown(gm) == 2
    with torch.no_grad():
        torch.testing.assert_close(found, fn(x), atol=1e-5, rtol=1e-5)


def test_padding_that_eager_runs_as_nested_tensors():
    """Eager leaves zeros at padded positions there; Dynamo's graph does not, and neither does its capture."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval(), torch.randn(2, 5, 16)
    pad = torch.arange(5) >= torch.tensor([[3], [5]])

    def fn(x, pad):
        return model(x, src_key_padding_mask=pad)

    gm, found = captured(fn, x, pad)
    assert shown(gm) == 2
    with torch.no_grad():
        torch.testing.assert_close(found[~pad], fn(x, pad)[~pad], atol=1e-5, rtol=1e-5)


def test_one_layer_and_one_attention_by_themselves():
    layer, x = encoder(layers=1).layers[0], torch.randn(2, 5, 16)
    gm, found = captured(lambda x: layer(x), x)
    assert shown(gm) == 1
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x), atol=1e-5, rtol=1e-5)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    gm, found = captured(lambda x: attention(x, x, x, need_weights=False)[0], x)
    assert shown(gm) == 1
    with torch.no_grad():
        torch.testing.assert_close(found, attention(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)


# --- floats under dynamic=True --------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, scaling=0.3):
        super().__init__()
        self.scaling = scaling

    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, scale=self.scaling) + q * self.scaling


def test_floats_of_modules_are_numbers():
    model, q = Scaled(), torch.randn(1, 2, 5, 8)
    gm, found = captured(model, q, dynamic=True)
    equal(found, model(q))
    (call,) = (n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target))
    assert call.kwargs["scale"] == 0.3 and not any("item" in name for name in targets(gm))


def test_a_float_that_changes_is_noticed():
    """The number was put in under a guard: another one is compiled anew and not computed with the old."""
    model, q = Scaled(), torch.randn(1, 2, 5, 8)
    call = torch.compile(model, backend=lambda gm, _: capture(gm).forward, dynamic=True)
    with torch.no_grad():
        for scaling in (0.3, 0.5, 0.3):
            model.scaling = scaling
            equal(call(q), model(q))


def test_a_float_argument_is_a_tensor_of_the_graph():
    """A half precision meets it in float32, as in ATen's own kernel, and is rounded once."""

    def fn(x, y, scale):
        return x * scale + 1 / (scale - 3), y.mul(scale) / (scale + 1)

    x, y = torch.randn(50, 40), torch.randn(50, 40).bfloat16()
    gm, found = captured(fn, x, y, 0.7531, dynamic=True)
    assert not any("item" in name for name in targets(gm))
    assert all(torch.equal(a, b) for a, b in zip(found, fn(x, y, 0.7531), strict=True))
    call = torch.compile(fn, backend=lambda gm, _: capture(gm).forward, dynamic=True)
    for scale in (0.3, 1e-9, 7.0):
        equal(call(x, y, scale), fn(x, y, scale))


def test_items_of_data_are_no_constants():
    """A tensor's own value is no guard's business: such a graph breaks in Dynamo, or has a reason."""
    call = torch.compile(lambda x, n: x * n.item(), backend=lambda gm, _: getattr(capture(gm), "forward", gm.forward))
    for value in (2.0, 3.0):
        equal(call(torch.ones(3), torch.tensor(value)), torch.ones(3) * value)


# --- values of buffers ----------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keep", torch.ones(6, 6, dtype=torch.bool).tril())
        self.register_buffer("slopes", torch.rand(2, 1, 1), persistent=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.weight = nn.Parameter(torch.rand(1))
        self.plain = torch.rand(1)

    def forward(self, q):
        mask = self.keep[: q.shape[2], : q.shape[2]] * self.slopes + self.count + self.weight + self.plain
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_values_of_buffers_and_of_nothing_else():
    model = Buffered()
    gm, _ = captured(model, torch.randn(1, 2, 6, 8))
    found = gm.meta[KEY]
    assert {id(t) for t in found.values()} == {id(model.keep), id(model.slopes)}
    shapes = {n.name: tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.op == "placeholder"}
    assert all(shapes[name] == tuple(tensor.shape) for name, tensor in found.items())


def test_large_buffers_are_not_read():
    model = Buffered()
    model.keep = torch.ones(1, dtype=torch.bool).expand(LIMIT // 1024 + 1, 1024)
    gm, _ = captured(lambda q: F.scaled_dot_product_attention(q, q, q) + model.slopes * model.keep.shape[0],
                     torch.randn(1, 2, 6, 8))  # fmt: skip
    assert [tuple(t.shape) for t in gm.meta[KEY].values()] == [(2, 1, 1)]
    gm, _ = captured(lambda q: q * model.keep[0, 0], torch.randn(1, 2, 6, 8))
    assert not gm.meta[KEY]


def test_the_check_of_each_call():
    keep, compiled = torch.ones(3), []

    def untouched():
        compiled.append(1)
        return lambda x, keep: "untouched"

    call = guarded(lambda x, keep: "rewritten", untouched, {1: keep})
    assert call(torch.ones(3), keep) == "rewritten"
    # Another tensor, though equal, may be written to unseen.
    assert call(torch.ones(3), keep.clone()) == "untouched"
    assert call(torch.ones(3), keep) == "rewritten"
    kept = keep.data
    keep.data = torch.ones(3)
    assert call(torch.ones(3), keep) == "untouched"
    keep.data = kept
    assert call(torch.ones(3), keep) == "rewritten"
    keep.view(3)[0] = 2
    assert call(torch.ones(3), keep) == call(torch.ones(3), keep) == "untouched" and len(compiled) == 1


def test_a_rewrite_that_relies_on_a_buffer_ends_when_the_buffer_is_written(monkeypatch):
    """Stands in for a pass that reads the values of `keep`: whatever it made of them holds until the next write."""
    from attnopt import backend

    def rely(program):
        (name,) = (n for n, held in program.gm.meta[KEY].items() if held.dtype == torch.bool)
        program.relied_on = {name}
        for node in program.gm.graph.nodes:
            if node.target == torch.ops.aten.scaled_dot_product_attention.default:
                node.args, node.kwargs = (*node.args[:3], None, 0.0, True), {}
        program.rewrites.append(None)
        program.gm.recompile()

    monkeypatch.setattr(backend, "PIPELINE", (rely,))
    monkeypatch.setattr(backend, "record", lambda report: None)
    for module in (backend, backend.inductor):
        monkeypatch.setattr(module, "to_inductor", lambda gm, inputs, patches: gm.forward)
    keep, q = torch.ones(6, 6, dtype=torch.bool).tril(), torch.randn(1, 2, 6, 8)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keep", keep)

        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=self.keep)

    model = Masked()
    call = torch.compile(model, backend=backend.attnopt)
    with torch.no_grad():
        torch.testing.assert_close(call(q), model(q))
        keep[2, 4] = True
        for _ in range(2):
            torch.testing.assert_close(call(q), model(q))
        assert not torch.allclose(call(q), F.scaled_dot_product_attention(q, q, q, is_causal=True))


# --- copies under gradients -----------------------------------------------------------------------------------------


def copied_alike(x):
    out = torch.zeros(3, 4, 5)
    out[:, 1:3] = x * 2
    return out.flatten(1) * x.sum()


def copied_broadcast(x):
    out = torch.ones(5, 2, 3).transpose(0, 2)
    out[:] = x[:, :1]
    return out + x.mean()


def copied_in_another_dtype(x):
    out = torch.zeros(3, 2, 5, dtype=torch.float64)
    out.copy_(x * x)
    return out.view(6, 5)


def copied_twice(x):
    out = x.clone()
    out[0] = x[1]
    out[0].copy_(out[2] * 3)
    return out


@pytest.mark.parametrize("fn", [copied_alike, copied_broadcast, copied_in_another_dtype, copied_twice])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_copy_has_its_gradient(fn, dynamic):
    x = torch.randn(3, 2, 5, requires_grad=True)
    _, found = captured(fn, x, grad=True, dynamic=dynamic)
    expected = fn(x)
    equal(found, expected)
    weight = torch.randn(expected.shape, dtype=expected.dtype)
    equal(torch.autograd.grad(found, x, weight), torch.autograd.grad(expected, x, weight))
