"""Capture under autocast: the casts are those of ATen, and what is not known to be one is a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capturing import captured, equal
from models import NanoGPT, build, tokens
from torch._dynamo.utils import counters

from attnopt.capture import capture
from attnopt.ir import Refusal

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
