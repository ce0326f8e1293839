"""One soft-max whose weights go into several products: several attentions that share their scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tracing import qkv, trace

from .written import CAUSAL, SCALE, scores, triangle


def weighted(q, k, causal=True):
    s = scores(q, k) * SCALE
    return F.softmax(s.masked_fill(~triangle(q.shape[2]), float("-inf")) if causal else s, -1)


def doubles(**sizes):
    return qkv(dtype=torch.float64, **sizes)


def two_values(q, k, v):
    w = weighted(q, k)
    return w @ v, w @ k


def the_same_in_two_calls(q, k, v):
    return weighted(q, k) @ v, weighted(q, k) @ v.flip(2)


def two_layouts(q, k, v):
    w = weighted(q, k)
    return torch.einsum("bhij,bhjd->bihd", w, v), torch.bmm(w.flatten(0, 1), v.cos().flatten(0, 1))


def other_width(q, k, v):
    w = weighted(q, k)
    return w @ v, w @ torch.cat([v, v.sin()[..., :3]], -1)


@pytest.mark.parametrize("fn", [two_values, the_same_in_two_calls, two_layouts], ids=lambda fn: fn.__name__)
def test_a_softmax_for_two_values_is_two_sites(fn):
    inputs = doubles()
    traced = trace(fn, *inputs)
    assert [s.name for s in traced.sites] == ["attention", "attention#1"]
    assert all(s.mask == CAUSAL for s in traced.sites) and not traced.misses
    assert traced.rewrites == ["SDPA is_causal"] * 2
    assert not any("softmax" in str(n.target) for n in traced.program.gm.graph.nodes)
    torch.testing.assert_close(traced.output, fn(*inputs), atol=1e-12, rtol=1e-12)


def test_values_of_unlike_width_are_two_sites():
    inputs = doubles()
    traced = trace(other_width, *inputs)
    assert [(s.head_dim, s.head_dim_v) for s in traced.sites] == [(8, 8), (8, 11)] and not traced.misses
    assert len(traced.rewrites) in (0, 2)
    torch.testing.assert_close(traced.output, other_width(*inputs), atol=1e-12, rtol=1e-12)


def value_of_the_first_output(q, k, v):
    """The second attention reads the first one's output: it is none of its own."""
    w = weighted(q, k)
    return w @ (w @ v)


def transposed_the_second_time(q, k, v):
    w = weighted(q, k)
    return w @ v, w.mT @ v


def another_axis_the_second_time(q, k, v):
    w = weighted(q, k)
    return w @ v, torch.einsum("bhij,bhid->bhjd", w, q)


def multiplied_by_a_gate(q, k, v):
    w = weighted(q, k)
    return w @ v, (w * torch.sigmoid(q[..., :1])).square() @ v


def half_of_them_again(q, k, v):
    w = weighted(q, k)
    return w @ v, w[..., :6] @ v[:, :, :6]


def returned_as_well(q, k, v):
    w = weighted(q, k)
    return w @ v, w @ k, w


# What stands beside the site, or sites, none of which is lowered.
ONE_IS_NONE = {
    value_of_the_first_output: (1, "own scores"), transposed_the_second_time: (1, "the product sums over dim"),
    another_axis_the_second_time: (1, "the product sums over dim"), multiplied_by_a_gate: (1, None),
    half_of_them_again: (1, "sliced"), returned_as_well: (2, None),
}  # fmt: skip


@pytest.mark.parametrize("fn", ONE_IS_NONE, ids=lambda fn: fn.__name__)
def test_attentions_whose_scores_are_needed_in_any_case_stay(fn):
    inputs = doubles()
    traced = trace(fn, *inputs, verify=False)
    sites, miss = ONE_IS_NONE[fn]
    assert len(traced.sites) == sites and not traced.rewrites, (traced.rewrites, traced.misses)
    assert all("nothing would be saved" in reason for reason in traced.left), traced.left
    assert [miss in reason for reason in traced.misses] == ([True] if miss else []), traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=1e-12, rtol=1e-12)


def both_sides(q, k, v):
    w = weighted(q, k, causal=False)
    return w @ w.mT @ v


def twice_the_same(q, k, v):
    w = weighted(q, k, causal=False)
    return w @ v + w @ v


def test_weights_times_themselves_are_none():
    inputs = doubles()
    traced = trace(both_sides, *inputs, verify=False)
    assert not traced.sites and not traced.rewrites
    torch.testing.assert_close(traced.output, both_sides(*inputs), atol=1e-12, rtol=1e-12)


def test_the_same_product_twice_is_one_site():
    inputs = doubles()
    traced = trace(twice_the_same, *inputs)
    assert len(traced.sites) == 1 and traced.rewrites == ["SDPA without a mask"]
    torch.testing.assert_close(traced.output, twice_the_same(*inputs), atol=1e-12, rtol=1e-12)


def test_two_values_have_their_gradients():
    def loss(outputs):
        return sum(o.square().sum() for o in outputs)

    inputs = [t.requires_grad_() for t in doubles()]
    traced = trace(two_values, *inputs, grad=True)
    assert len(traced.rewrites) == 2
    ours, plain = (torch.autograd.grad(loss(o), inputs) for o in (traced.output, two_values(*inputs)))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
