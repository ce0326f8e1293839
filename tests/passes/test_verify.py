"""A wrong lowering is caught by running it: the site is refused and the result stays right."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT, padding, tokens
from tracing import qkv, trace

from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.errors import VerificationError
from attnopt.masks.predicates import TRUE
from attnopt.masks.values import Sum
from attnopt.passes import PIPELINE, lower_exact, pays, verify
from attnopt.passes.program import Builder

aten = torch.ops.aten


def sliding(q, k, v, window=5):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < window))


def causal(q, k, v):
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)


def padded(q, k, v, pad):
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & pad[:, None, None, :])


def changed(**changes):
    """The lowering of a region whose site says something else than the graph does."""
    choose = lower_exact.choose

    def wrong(program, region):
        chosen = choose(program, region)
        site = region.site
        mask = dataclasses.replace(site.mask, **changes) if "window" in changes else site.mask
        other = {} if "window" in changes else changes
        fake = dataclasses.replace(region, site=dataclasses.replace(site, mask=mask, **other))
        return (lambda r: chosen[0](fake)), chosen[1]

    return wrong


def lower_without_mask(program, region):
    return lower_exact.lower_plain(program, False), "no mask"


def lower_forgetting_padding(program, region):
    return lower_exact.lower_plain(program, True), "SDPA is_causal"


def lower_swapped_heads(program, region):
    def build(r):
        builder = Builder(program.gm, r.out)
        return builder.call(aten.flip.default, lower_exact.lower_plain(program, True)(r), [1])

    return build, "heads in reverse"


MUTATIONS = {
    "window one too wide": (changed(window=6), sliding),
    "window one too narrow": (changed(window=4), sliding),
    "wrong scale": (changed(scale=0.3), causal),
    "no mask": (lower_without_mask, causal),
    "heads in reverse": (lower_swapped_heads, causal),
    "padding forgotten": (lower_forgetting_padding, padded),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_lowering_is_refused_and_the_result_is_right(name, monkeypatch):
    wrong, fn = MUTATIONS[name]
    inputs = qkv()
    if fn is padded:
        inputs = (*inputs, torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) > 0.3)
        inputs[3][:, 0] = True
    right = trace(fn, *inputs)
    assert right.rewrites and not right.left
    monkeypatch.setattr(lower_exact, "choose", wrong)
    traced = trace(fn, *inputs)
    assert not traced.rewrites
    (reason,) = traced.left
    assert "VerificationError" in reason and "differs from the original by" in reason
    torch.testing.assert_close(traced.output, fn(*inputs))
    # The same mistake goes through where nothing is verified, so the check is what caught it.
    unchecked = trace(fn, *inputs, verify=False)
    assert unchecked.rewrites and not torch.allclose(unchecked.output, fn(*inputs), atol=1e-3)


def test_strict_raises(monkeypatch):
    monkeypatch.setenv("ATTNOPT_STRICT", "1")
    monkeypatch.setattr(lower_exact, "choose", lower_without_mask)
    with pytest.raises(Exception, match="differs from the original") as caught:
        trace(causal, *qkv())
    assert isinstance(caught.value, VerificationError) or "VerificationError" in str(caught.value)


def test_the_environment_variable_switches_it_on(monkeypatch):
    monkeypatch.setattr(lower_exact, "choose", lower_without_mask)
    assert trace(causal, *qkv(), verify=False).rewrites
    monkeypatch.setenv("ATTNOPT_VERIFY", "1")
    assert not trace(causal, *qkv(), verify=False).rewrites


def test_one_wrong_site_leaves_its_neighbour_alone(monkeypatch):
    choose = lower_exact.choose

    def wrong_in_the_first(program, region):
        return lower_without_mask(program, region) if region.site.path.startswith("h.0") else choose(program, region)

    monkeypatch.setattr(lower_exact, "choose", wrong_in_the_first)
    model = NanoGPT(flash=False).eval()
    traced = trace(model, tokens())
    assert [r.site.path for r in traced.program.rewrites] == ["h.1"]
    assert [r.path for r in traced.program.refusals] == ["h.0"]
    torch.testing.assert_close(traced.output, model(tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_lowerings_pass_in_every_dtype(dtype):
    for fn in (sliding, causal):
        traced = trace(fn, *qkv(length=40, dtype=dtype))
        assert traced.rewrites and not traced.left


def test_symbolic_lengths_are_run_at_their_hints():
    x = qkv(length=19)[0]
    torch._dynamo.mark_dynamic(x, 2)
    traced = trace(lambda x: sliding(x, x.sin(), x.cos()), x, dynamic=None)
    assert not isinstance(traced.program.regions[0].q.meta["val"].shape[2], int)
    assert traced.rewrites and not traced.left and not traced.misses


def test_lengths_not_proved_equal_are_refused():
    inputs = qkv(length=19)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 2)
    traced = trace(sliding, *inputs, dynamic=None)
    assert len(traced.sites) == 1 and not traced.rewrites and "none is cheaper" in traced.left[0]


@pytest.mark.parametrize("scale", [0.25, 1.0, 0.0, 1e-6, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(8, 8), (64, 64), (8, 24), (24, 8)])
def test_padding_folded_into_a_feature(scale, dtype, dim, dim_v):
    q, k, v = qkv(kv_heads=2, dim=dim, dim_v=dim_v, dtype=dtype)
    pad = padding(2, 13, "left").bool()

    def fn(q, k, v, pad):
        i = torch.arange(13)
        keep = (i[:, None] >= i) & pad[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale, enable_gqa=True)

    grad = scale > 0
    traced = trace(fn, *(t.requires_grad_(grad) for t in (q, k, v)), pad, grad=grad)
    assert traced.rewrites == [pays.FEATURE] and not traced.left
    dense = torch.full((4,), 2**30, dtype=torch.int32)
    expected = reference(q.double(), k.double(), v.double(), torch.zeros_like(dense), dense, scale, pad)
    error = (traced.output.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert traced.output.transpose(1, 2).is_contiguous()


def test_padding_keeps_gradients():
    inputs = [t.requires_grad_() for t in qkv(kv_heads=2)]
    pad = padding(2, 13, "right").bool()
    weight = torch.randn(2, 4, 13, 8)

    def fn(q, k, v, pad):
        i = torch.arange(13)
        keep = (i[:, None] >= i) & pad[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)

    expected = torch.autograd.grad((fn(*inputs, pad) * weight).sum(), inputs)
    traced = trace(fn, *inputs, pad, grad=True)
    assert traced.rewrites and not traced.left
    found = torch.autograd.grad((traced.output * weight).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def recognised_then(change, fn, *inputs):
    """The pipeline with `change(program)` between recognition and what checks it."""
    at = PIPELINE.index(verify.run)
    return trace(fn, *inputs, passes=(*PIPELINE[:at], change, *PIPELINE[at:]))


def soft(q, k, v):
    """Written out: sliding, capped, with a bias, in a layout of its own."""
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    scores = 20 * torch.tanh(torch.einsum("bhid,bhjd->bhij", q, k) * 0.3 / 20) - 0.1 * distance
    weights = scores.masked_fill((distance < 0) | (distance >= 5), float("-inf")).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v)


def first(program, *targets):
    return next(n for n in program.gm.graph.nodes if n.target in targets)


def with_target(target, *targets):
    def change(program):
        first(program, *targets).target = target

    return change


def with_argument(position, found, *targets):
    def change(program):
        node = first(program, *targets)
        node.args = (*node.args[:position], found(node.args[position]), *node.args[position + 1 :])

    return change


def with_meaning(**changes):
    def change(program):
        for region in program.regions:
            region.meaning = dataclasses.replace(region.meaning, **changes)

    return change


def with_keep(move):
    """Every bound of the recovered predicate moved by one."""

    def change(program):
        for region in program.regions:
            keep = region.meaning.keep
            clauses = frozenset(frozenset(move(x) for x in clause) for clause in keep.clauses)
            region.meaning = dataclasses.replace(region.meaning, keep=type(keep)(clauses))

    return change


def by_one(literal):
    return dataclasses.replace(literal, expression=literal.expression + 1)


def with_site(**changes):
    def change(program):
        for region in program.regions:
            region.site = dataclasses.replace(region.site, **changes)

    return change


def swap_inner_axes(program):
    """The product reads its keys with batch and heads exchanged, which the record does not say."""
    (region,) = program.regions
    node = next(n for n in region.match.inner if region.match.k.node in n.all_input_nodes)
    with program.gm.graph.inserting_before(node):
        swapped = Builder(program.gm, region.match.k.node).call(aten.transpose.int, region.match.k.node, 0, 1)
    node.replace_input_with(region.match.k.node, swapped)


TAMPERED = {
    "<= for <": (with_target(aten.le.Scalar, aten.lt.Scalar), sliding, "the mask recovered"),
    "> for >=": (with_target(aten.gt.Scalar, aten.ge.Scalar), sliding, "the mask recovered"),
    "or for and": (
        with_target(aten.bitwise_or.Tensor, aten.__and__.Tensor, aten.bitwise_and.Tensor),
        sliding,
        "the mask recovered",
    ),
    "another window": (with_argument(1, lambda w: w + 1, aten.lt.Scalar), sliding, "the mask recovered"),
    "> for >= in what is written out": (with_target(aten.gt.Scalar, aten.ge.Scalar), soft, "the mask recovered"),
    "another slope": (with_argument(1, lambda s: s * 1.5, aten.mul.Tensor, aten.mul.Scalar), soft, "recovered|recogn"),
    "a bound moved by one": (with_keep(by_one), sliding, "the mask recovered"),
    "a bound moved by one, written out": (with_keep(by_one), soft, "the mask recovered"),
    "nothing is masked": (with_meaning(keep=TRUE), sliding, "the mask recovered"),
    "no bias": (with_meaning(added=Sum()), soft, "the mask recovered"),
    "another scale": (with_site(scale=0.31), soft, "what was recognised differs"),
    "another scale of a call": (with_site(scale=0.31), sliding, "what was recognised differs"),
    "no soft-cap": (with_site(softcap=0.0), soft, "what was recognised differs"),
    "axes exchanged": (swap_inner_axes, soft, "what was recognised differs"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_record_that_is_not_the_graph_is_refused(name):
    """Also where nothing would be rewritten: what is reported is checked."""
    change, fn, said = TAMPERED[name]
    inputs = qkv(batch=4) if change is swap_inner_axes else qkv()
    untouched = recognised_then(lambda program: None, fn, *inputs)
    assert untouched.sites and not any("Verification" in reason for reason in untouched.left)
    traced = recognised_then(change, fn, *inputs)
    assert traced.sites and not traced.rewrites
    (reason,) = traced.left
    assert "VerificationError in verification" in reason and re.search(said, reason), reason


def test_nothing_is_verified_where_that_is_off():
    at = PIPELINE.index(verify.run)
    passes = (*PIPELINE[:at], with_meaning(keep=TRUE), *PIPELINE[at:])
    assert not any("erification" in r for r in trace(soft, *qkv(), passes=passes, verify=False).left)


def test_assumptions_and_data_are_kept_to():
    """Masks from data: of zeros and ones where the record says so, of any values elsewhere."""

    def fn(q, k, v, padding, table):
        added = (1.0 - padding[:, None, None, :]) * -1e9 + table[None]
        return ((q @ k.mT) * 0.3 + added).softmax(-1) @ v

    pad, table = padding(2, 13, "left").float(), torch.randn(4, 13, 13)
    traced = trace(fn, *qkv(), pad, table)
    assert traced.sites and not any("erification" in r for r in traced.left)
    torch.testing.assert_close(traced.output, fn(*qkv(), pad, table))
