"""Heads that a plan removes: before and after, and in every spelling the float64 reference's numbers."""

from __future__ import annotations

import copy

import pruning
import pytest
import torch
import torch.nn.functional as F
from pruning import BATCH, LENGTH, WIDTH, built, error, means_for, plan_of, pruned, rows
from tracing import trace

from attnopt.ir import Choice
from attnopt.passes.prune import Class, Kept, kept_of

aten = torch.ops.aten


def calls(traced):
    """The graph's calls by name, with the shapes they yield."""
    nodes = traced.program.gm.graph.nodes
    nodes = [n for n in nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
    return [(str(n.target).split(".")[1], tuple(n.meta["val"].shape)) for n in nodes]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_before_and_after():
    """Six heads over two: 3, 4 and 5 go, and their KV head with them."""
    module = built(pruning.Attention, 6, 2)
    traced = pruned(module, (3, 4, 5))
    q, k = (BATCH, LENGTH, 24), (BATCH, LENGTH, 8)
    assert calls(traced) == [
        ("linear", q), ("reshape", (BATCH, LENGTH, 3, 8)), ("transpose", (BATCH, 3, LENGTH, 8)),
        ("linear", k), ("reshape", (BATCH, LENGTH, 1, 8)), ("transpose", (BATCH, 1, LENGTH, 8)),
        ("linear", k), ("reshape", (BATCH, LENGTH, 1, 8)), ("transpose", (BATCH, 1, LENGTH, 8)),
        ("scaled_dot_product_attention", (BATCH, 3, LENGTH, 8)),
        ("transpose", (BATCH, LENGTH, 3, 8)), ("reshape", q), ("linear", (BATCH, LENGTH, WIDTH)),
    ]  # fmt: skip
    held = dict(traced.program.gm.named_buffers())
    products = traced.program.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    (q_weight, q_bias), _, _, (out_weight, out_bias) = (
        tuple(held[a.target] for a in product.args[1:]) for product in products
    )
    torch.testing.assert_close((q_weight, q_bias), (module.q.weight[:24], module.q.bias[:24]), rtol=0, atol=0)
    torch.testing.assert_close(out_weight, module.o.weight[:, :24], rtol=0, atol=0)
    folded = module.o.bias + module.o.weight[:, 24:] @ means_for(6)[3:].flatten()
    torch.testing.assert_close(out_bias, folded)
    (rewrite,) = traced.program.rewrites
    assert str(rewrite) == "attention: 3 of 6 heads removed; SDPA is_causal (1 of 2 KV heads with them)"
    assert error(module, (3, 4, 5), traced) < 1e-6


def test_groups_of_equal_numbers_lie_side_by_side():
    assert kept_of(8, 4, (0, 1, 2, 5)) == Kept((3, 4, 6, 7), (1, 2, 3), (Class(0, 2, 0, 2), Class(2, 2, 2, 1)))
    assert kept_of(6, 3, (0, 5)) == Kept((1, 4, 2, 3), (0, 2, 1), (Class(0, 2, 0, 2), Class(2, 2, 2, 1)))
    assert kept_of(4, 4, (1,)) == Kept((0, 2, 3), (0, 2, 3), (Class(0, 3, 0, 3),))
    assert kept_of(4, 1, range(4)) == Kept((), (), ())


SPELLINGS = [
    ("Attention", (8, 4), (0, 1, 2, 5)),
    ("Attention", (4, 1), (2,)),
    ("Thirds", (4, 1), (0, 3)),
    ("Thirds", (6, 2), (0, 1, 2, 4)),
    ("Stacked", (4, 4), (0, 2)),
    ("Chunked", (4, 4), (3,)),
    ("Falcon", (6, 2), (0, 4, 5)),
    ("Falcon", (6, 2), (0, 1, 2)),
    ("Conv", (4, 4), (1, 2)),
    ("Einsum", (6, 3), (0, 1, 4)),
    ("Rotated", (6, 2), (0, 4, 5)),
    ("Adapted", (6, 2), (3,)),
    ("Adapted", (4, 4), (3,)),
    ("Dequantised", (6, 3), (2, 3)),
    ("Tied", (4, 4), (2,)),
    ("WrittenOut", (6, 2), (0, 1, 2, 4)),
    ("Attention", (4, 1), range(4)),
]


@pytest.mark.parametrize(("name", "sizes", "gone"), SPELLINGS, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_a_spelling(name, sizes, gone):
    module = built(getattr(pruning, name), *sizes)
    traced = pruned(module, gone, dynamic=len(gone) == 4, verify=name == "WrittenOut")
    assert len(traced.rewrites) == 1 and not traced.left, traced.left
    assert error(module, gone, traced) < 2e-6
    heads = [shape[1] for name, shape in calls(traced) if name == "scaled_dot_product_attention"]
    assert sum(heads) == sizes[0] - len(gone)


def test_the_spellings_without_their_constant_are_something_else():
    """What the tests above compare with is far from the whole model, and from heads that are zero."""
    module = built(pruning.Attention, 4, 4)
    traced = pruned(module, (1,))
    assert float((traced.output - module(rows())).abs().max()) > 0.1
    zero = plan_of({"attention": pruning.choices_for(4, (1,))}, {"attention": torch.zeros(4, 8)})
    assert float((trace(module, rows(), plan=zero).output - traced.output).abs().max()) > 0.1


def test_one_fused_projection_stays_one():
    spellings = (pruning.Thirds, (4, 4), (1,)), (pruning.Falcon, (6, 2), (0, 4)), (pruning.Conv, (4, 4), (1,))
    for kind, sizes, gone in spellings:
        products = [shape for name, shape in calls(pruned(built(kind, *sizes), gone)) if name in ("linear", "addmm")]
        own, groups = sizes[0] - len(gone), sizes[1] - (sizes[1] == sizes[0])
        assert products[0][-1] == (own + 2 * groups) * 8 and len(products) == (1 if kind is pruning.Conv else 2)


def test_half_precision():
    module, x = built(pruning.Rotated, 6, 2).bfloat16(), rows(torch.bfloat16)
    traced = pruned(module, (0, 4, 5), x)
    assert traced.output.dtype == torch.bfloat16 and len(traced.rewrites) == 1
    assert error(module, (0, 4, 5), traced, x) < 0.05


def test_heads_that_stay_follow_their_spans():
    module, span = built(pruning.Attention, 6, 2), Choice.of("sink_window", {"sink": 1, "alpha": 4, "beta": 0.0})
    traced = pruned(module, (0, 4), other=span)
    assert traced.rewrites == ["2 of 6 heads removed; span kernel, 1 span"] and not traced.left
    module.attend = lambda q, k, v: spanned(q, k, v, 1, 4)
    assert error(module, (0, 4), traced) < 1e-6


def spanned(q, k, v, sink, window):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    keep = (j <= i) & ((j < sink) | (i - j < window))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def test_a_module_in_two_layers():
    """Each layer has constants of its own, of the same parameters; in the first all heads are gone."""
    torch.manual_seed(0)
    model = pruning.Twice().eval()
    means = {"layer": means_for(4), "layer#1": means_for(4, seed=4)}
    plan = plan_of({"layer": pruning.choices_for(4, range(4)), "layer#1": pruning.choices_for(4, (1,))}, means)
    traced = trace(model, rows(), plan=plan)
    assert traced.rewrites == ["all 4 heads removed", "1 of 4 heads removed; SDPA is_causal"]
    twin, x = copy.deepcopy(model).double(), rows().double()
    twin.layer.constants = dict(enumerate(means["layer"]))
    inner = x + twin.layer(x)
    twin.layer.constants = {1: means["layer#1"][1]}
    assert float((traced.output - twin.layer(inner)).abs().max()) < 1e-6
    (only,) = (shape for name, shape in calls(traced) if name == "scaled_dot_product_attention")
    assert only[1] == 3


class Cached(pruning.Attention):
    """Keys are returned, and values written into a buffer."""

    def build(self, bias):
        super().build(bias)
        self.register_buffer("held", torch.zeros(BATCH, self.groups, LENGTH, self.dim), persistent=False)

    def operands(self, x):
        q, k, v = super().operands(x)
        self.held.copy_(v)
        self.keys = k
        return q, k, v

    def forward(self, x):
        return super().forward(x), self.keys


class CachedThirds(Cached, pruning.Thirds):
    """The same, of one projection."""


class JointNorm(pruning.Attention):
    """Keys are normalised over all heads together."""

    def operands(self, x):
        q, _, v = super().operands(x)
        return q, self.split(F.layer_norm(self.k(x), (self.groups * self.dim,))), v


@pytest.mark.parametrize(
    ("kind", "sizes", "gone", "heads"),
    [(Cached, (4, 2), (1, 2), [2]), (Cached, (6, 3), (0, 2, 3), [1, 2]), (CachedThirds, (4, 4), (1,), [3]),
     (CachedThirds, (6, 2), (0, 5), [4]), (CachedThirds, (4, 1), (0,), [3]), (JointNorm, (4, 4), (0,), [3])],
)  # fmt: skip
def test_keys_and_values_that_are_read_elsewhere_stay_whole(kind, sizes, gone, heads):
    """The queries and the output are cut all the same."""
    module = built(kind, *sizes)
    traced = pruned(module, gone)
    assert len(traced.rewrites) == 1 and not traced.left, traced.left
    out, *keys = traced.output if isinstance(traced.output, tuple) else (traced.output,)
    traced.output = out
    means = means_for(module.heads)
    reference = pruning.expected(module, rows(), {module: {h: means[h] for h in gone}})
    if keys:
        torch.testing.assert_close(keys[0].double(), reference[1], atol=1e-6, rtol=0)
        torch.testing.assert_close(module.held.double(), module.operands(rows())[2].double(), atol=1e-6, rtol=0)
        reference = reference[0]
    assert float((out - reference).abs().max()) < 1e-6
    assert [shape[1] for name, shape in calls(traced) if name == "scaled_dot_product_attention"] == heads
    products = [shape[-1] for name, shape in calls(traced) if name == "linear"]
    own, whole = (sizes[0] - len(gone)) * 8, sizes[1] * 8
    assert products == ([own + 2 * whole, WIDTH] if kind is CachedThirds else [own, whole, whole, WIDTH])
    (rewrite,) = traced.program.rewrites
    assert ("keys and values stay whole" in rewrite.note) == (len(heads) > 1 or sizes[0] == sizes[1])


def test_a_single_query_reads_keys_where_they_are():
    """Neighbouring KV heads are a view of the cache; nothing is copied."""
    module = built(Decoding, 6, 6)
    traced = pruned(module, (2,))
    assert [shape for name, shape in calls(traced) if name in ("index_select", "slice")] and len(traced.rewrites) == 1
    assert not [name for name, _ in calls(traced) if name == "index_select"]
    assert [shape[1] for name, shape in calls(traced) if name == "scaled_dot_product_attention"] == [2, 3]
    assert error(module, (2,), traced) < 1e-6


class Decoding(pruning.Attention):
    """The last token's query over the keys of all."""

    def operands(self, x):
        _, k, v = super().operands(x)
        self.seen = k
        return self.split(self.q(x[:, -1:])), k, v

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def output(self, out):
        return super().output(out) + self.seen.mean((1, 2, 3))[:, None, None]


def test_a_site_without_pruned_heads_is_not_touched():
    module = built(pruning.Attention, 4, 4)
    traced = pruned(module, ())
    assert traced.rewrites == [] and not traced.program.relied_on
