"""What the export would lose or stumble over: autocast, opaque fast paths, floats as inputs, values of buffers.

Every captured graph runs eagerly here, so that a result equal to the model's own is asked for to the last bit wherever
the same operations run in the same order.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT, build, tokens
from torch import nn
from torch._dynamo.utils import counters

from attnopt.capture import KEY, capture
from attnopt.capture.constants import LIMIT, guarded
from attnopt.ir import Refusal


def captured(fn, *inputs, grad=False, dynamic=False):
    """The captured graph of `fn` and its result on `inputs`; no graph may be refused."""
    seen = []

    def backend(gm, _):
        seen.append(capture(gm))
        assert not isinstance(seen[-1], Refusal), seen[-1]
        return seen[-1].forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    (gm,) = seen
    return gm, out


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def equal(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


# --- autocast -------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "linear": lambda x: F.linear(x, x, x[0]),
    "matmul": lambda x: x @ x,
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "einsum of three": lambda x: torch.einsum("ij,jk->ik", x @ x, x),
    "convolution": lambda x: F.conv1d(x[None], x[:, :, None]),
    "masked attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], x > 0.4),
    "biased attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], x),
    "mixed attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], (x @ x)[None, None]),
    "softmax": lambda x: (x @ x).softmax(-1),
    "softmax in float32": lambda x: (x @ x).softmax(-1, dtype=torch.float32),
    "layer norm": lambda x: F.layer_norm(x @ x, (4,)),
    "promotion": lambda x: torch.cat([x, x @ x]),
    "stack": lambda x: torch.stack([x, x @ x]),
    "float32 only": lambda x: (x @ x).prod() + F.mse_loss(x @ x, x),
    "a cast of its own": lambda x: (x @ x).float() @ x.half().float(),
    "integers": lambda x: x @ (x > 0.5).long().float(),
    "double": lambda x: x.double() @ x.double(),
    "weights twice": lambda x: F.linear(F.linear(x, x), x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_casts_are_those_of_aten(name):
    """Bitwise equal under autocast, and run without it: only casts that the graph shows can have done it."""
    fn, x = OPERATIONS[name], torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        gm, found = captured(fn, x)
        expected = fn(x)
    equal(found, expected)
    with torch.no_grad():
        equal(gm(x)[0], expected)


def test_every_value_has_the_dtype_that_the_graph_computes():
    with torch.autocast("cpu", torch.bfloat16):
        gm, _ = captured(lambda x: (x @ x).softmax(-1) @ x, torch.rand(4, 4))
    products = [n for n in gm.graph.nodes if "matmul" in str(n.target)]
    assert len(products) == 2
    assert {a.meta["val"].dtype for n in products for a in n.args} == {torch.bfloat16}


def regions(x):
    y = x @ x
    with torch.autocast("cpu", torch.bfloat16):
        y = y @ x
        with torch.autocast("cpu", enabled=False):
            y = y.float() @ x
        y = y @ x
    return y.float() @ x


@pytest.mark.parametrize("around", [True, False], ids=["around", "inside only"])
def test_autocast_regions(around):
    x = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        gm, found = captured(regions, x)
        expected = regions(x)
    equal(found, expected)
    assert torch.is_autocast_enabled("cpu") is False
    casts = [n.kwargs["dtype"] for n in gm.graph.nodes if n.target == torch.ops.aten._to_copy.default]
    assert torch.float32 in casts and casts.count(torch.bfloat16) >= 2


def test_autocast_with_gradients():
    weight, x = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4)

    def fn(x, weight):
        return F.linear(F.linear(x, weight).tanh(), weight).float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        _, found = captured(fn, x, weight, grad=True)
        expected = fn(x, weight)
    equal(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_under_autocast(family):
    """transformers switches autocast off around its rotary embedding."""
    model = build(family)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = captured(lambda ids: model(ids, use_cache=False).logits, tokens())
        with torch.no_grad():
            expected = model(tokens(), use_cache=False).logits
    assert found.dtype == torch.bfloat16
    equal(found, expected)


def test_casts_ask_nothing_about_symbolic_sizes():
    model = NanoGPT().eval()

    def graphs(backend):
        torch._dynamo.reset()
        counters.clear()
        call = torch.compile(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            for length in (20, 33, 47):
                call(tokens(2, length))
        return counters["stats"]["unique_graphs"]

    assert graphs(lambda gm, _: capture(gm).forward) == graphs("eager")


def test_what_autocast_does_beside_casting_is_a_reason(monkeypatch):
    from attnopt.capture import autocast

    monkeypatch.setattr(autocast, "casts_of", lambda *_: None)
    seen = []

    def backend(gm, _):
        seen.append(capture(gm))
        return gm.forward

    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda x: x @ x, backend=backend)(torch.ones(3, 3))
    assert isinstance(seen[0], Refusal) and "autocast does more to aten.matmul" in seen[0].reason


class Opaque:
    """Operations of which autocast meets a part inside a kernel, where no trace sees it."""

    bilinear = staticmethod(lambda x: F.bilinear(x, x, torch.ones(4, 4, 4)))
    custom = staticmethod(lambda x: torch.ops.attnopt_test.twice(x))


@torch.library.custom_op("attnopt_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return (x @ x).float()


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize("name", ["bilinear", "custom"])
def test_what_autocast_does_inside_a_kernel_is_a_reason(name):
    fn, x, seen = getattr(Opaque, name), torch.rand(4, 4) / 3, []

    def backend(gm, _):
        seen.append(capture(gm))
        return gm.forward

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(fn(x), without_autocast(fn, x)), "this operation is none of the kind"
        torch.compile(fn, backend=backend)(x)
        assert isinstance(seen.pop(), Refusal)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend)(x)
    assert not isinstance(seen.pop(), Refusal)


def without_autocast(fn, x):
    with torch.autocast("cpu", enabled=False):
        return fn(x)


def test_kernels_that_only_move_values_are_seen_through():
    """Each listed kernel computes with autocast what it does without."""
    from attnopt.capture import autocast

    x, keep = torch.rand(4, 4), torch.rand(4, 4) > 0.5
    arguments = {
        "lift_fresh_copy": (x,), "_unsafe_view": (x, [16]), "_safe_softmax": (x, -1), "sum": (x,), "rot90": (x,),
        "unsafe_split_with_sizes": (x, [1, 3]), "unsafe_split": (x, 2), "count_nonzero": (x,), "bernoulli": (x,),
        "masked_fill": (x, keep, x[0, 0]), "fill": (x, x[0, 0]), "new_full": (x, [2], 1.5), "new_ones": (x, [2]),
        "new_zeros": (x, [2]), "ones_like": (x,), "zeros_like": (x,), "rand_like": (x,), "randn_like": (x,),
    }  # fmt: skip
    names = {str(func.overloadpacket).split(".")[-1] for func in autocast.MOVING}
    assert names - set(arguments) == {"_assert_tensor_metadata", "new_empty", "empty_like"}
    for func in autocast.MOVING:
        if (given := arguments.get(str(func.overloadpacket).split(".")[-1])) is not None:
            results = []
            for enabled in (True, False):
                torch.manual_seed(0)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    results.append(func(*given))
            equal(*results)


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
