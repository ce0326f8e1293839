"""Near misses of the written-out spellings, records of other attention, and what is named in a miss."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from tracing import qkv, trace

from .written import SCALE, positions, scores, triangle

# --- near misses ----------------------------------------------------------------------------------------------------


def permuted_keys(q, k, v):
    """Heads and positions of K change places: with as many heads as positions every shape is right."""
    return F.softmax((q @ k.permute(0, 2, 3, 1)) * SCALE, -1) @ v


def keys_not_transposed(q, k, v):
    """q @ k with as many positions as dimensions: the product is not over the features."""
    return F.softmax((q @ k) * SCALE, -1) @ v


def scaled_by_a_tensor(q, k, v):
    return F.softmax(scores(q, k) * q.mean(-1, keepdim=True), -1) @ v


def scaled_per_key(q, k, v):
    return F.softmax(scores(q, k) * torch.arange(1.0, k.shape[2] + 1), -1) @ v


def added_before_the_scale(q, k, v):
    n = q.shape[2]
    return F.softmax((scores(q, k) + torch.triu(torch.full((n, n), -1.2e4), 1)) * 1e-4, -1) @ v


def filled_before_a_tiny_scale(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~triangle(q.shape[2]), -1e4) * 1e-4, -1) @ v


def filled_before_a_negative_scale(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~triangle(q.shape[2]), -1e9) * -1e-9, -1) @ v


def filled_with_zero(q, k, v):
    return F.softmax((scores(q, k) * SCALE).masked_fill(~triangle(q.shape[2]), 0.0), -1) @ v


def masked_after_the_softmax(q, k, v):
    return F.softmax(scores(q, k) * SCALE, -1).masked_fill(~triangle(q.shape[2]), 0.0) @ v


def multiplied_after_the_softmax(q, k, v):
    return (F.softmax(scores(q, k) * SCALE, -1) * triangle(q.shape[2])) @ v


def weights_used_twice(q, k, v):
    weights = F.softmax(scores(q, k) * SCALE, -1)
    return weights @ v, weights.sum(-2)


def active_dropout(q, k, v):
    return F.dropout(F.softmax(scores(q, k) * SCALE, -1), 1e-9, training=True) @ v


def sum_of_two_products(q, k, v):
    return F.softmax(scores(q, k) * SCALE + scores(v, k), -1) @ v


def squared_scores(q, k, v):
    return F.softmax(scores(q, k).square() * SCALE, -1) @ v


def soft_cap(q, k, v):
    return F.softmax(torch.tanh(scores(q, k) * SCALE), -1) @ v


def alibi(q, k, v):
    i, j = positions(q.shape[2])
    slope = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)
    return F.softmax(scores(q, k) * SCALE + slope * (j - i), -1) @ v


def small_bias(q, k, v):
    """A constant distance bias that is no mask: 0 and -3, not 0 and minus infinity."""
    i, j = positions(q.shape[2])
    return F.softmax(scores(q, k) * SCALE + torch.where(j <= i, 0.0, -3.0), -1) @ v


def chunked(q, k, v):
    i, j = positions(q.shape[2])
    keep = (j <= i) & (torch.div(i, 4, rounding_mode="floor") == torch.div(j, 4, rounding_mode="floor"))
    return F.softmax((scores(q, k) * SCALE).masked_fill(~keep, float("-inf")), -1) @ v


def prefix(q, k, v):
    i, j = positions(q.shape[2])
    return F.softmax((scores(q, k) * SCALE).masked_fill(~((j <= i) | (j < 5)), float("-inf")), -1) @ v


def strided(q, k, v):
    i, j = positions(q.shape[2])
    keep = (j <= i) & ((i - j) % 3 == 0)
    return F.softmax((scores(q, k) * SCALE).masked_fill(~keep, float("-inf")), -1) @ v


NEAR_MISSES = [
    scaled_per_key, filled_before_a_tiny_scale, filled_before_a_negative_scale, filled_with_zero,
    masked_after_the_softmax, multiplied_after_the_softmax, active_dropout, squared_scores,
]  # fmt: skip
# What is no plain attention: the kind of its bias and its mask.
RECORDS = {
    scaled_by_a_tensor: ("", "all"), added_before_the_scale: ("data", "all"), weights_used_twice: ("", "all"),
    sum_of_two_products: ("data", "all"), soft_cap: ("", "all"),
    alibi: ("alibi", "all"), small_bias: ("", "all"), chunked: ("", "j <= i and i // 4 == j // 4"),
    prefix: ("", "(j <= 4 or j <= i)"), strided: ("", "j <= i and (i - j) % 3 == 0"),
}  # fmt: skip


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("sizes", [{}, {"heads": 8, "length": 8}], ids=["general", "all 8"])
def test_near_misses(fn, sizes):
    inputs = qkv(**sizes)
    # Unverified: the matcher itself must refuse, not the check after it.
    traced = trace(fn, *inputs, verify=False)
    assert not traced.sites and not traced.rewrites
    expected, found = fn(*inputs), traced.output
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fn", [permuted_keys, keys_not_transposed], ids=lambda fn: fn.__name__)
def test_keys_are_what_is_multiplied_whatever_made_them(fn):
    """Attention over other keys than one would guess: K is the transpose of the operand, no permutation is assumed."""
    inputs = qkv(heads=8, length=8)
    traced = trace(fn, *inputs, verify=False)
    assert traced.rewrites
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


def test_a_router_is_not_attention():
    def router(x, w, v):
        return F.softmax(x @ w, -1) @ v

    traced = trace(router, torch.randn(13, 8), torch.randn(8, 5), torch.randn(5, 8), verify=False)
    assert not traced.sites and not traced.rewrites


@pytest.mark.parametrize("fn", RECORDS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("sizes", [{}, {"length": 4}], ids=["general", "heads = length"])
def test_records_of_other_attention(fn, sizes):
    inputs = qkv(**sizes)
    traced = trace(fn, *inputs)
    (site,) = traced.sites
    bias, mask = RECORDS[fn]
    if bias or fn not in (small_bias,):
        assert (site.bias.kind if site.bias else "") == bias
    if not sizes:
        assert str(site.mask) == mask
        assert "SDPA is_causal" not in traced.rewrites
    assert site.softcap == (fn is soft_cap)
    assert bool(traced.rewrites) == (fn not in (weights_used_twice, soft_cap))
    expected, found = fn(*inputs), traced.output
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- weights that are zeroed, sinks of a row, operations without a rule ---------------------------------------------


def zeroed_again(q, k, v, keep):
    """What CPM-Ant writes: masked keys are minus infinity before the soft-max and zero after it."""
    dropped = keep[:, None].view(2, 1, 13, 13) == torch.tensor(False)
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(dropped, float("-inf")), -1)
    return weights.masked_fill(keep[:, None].view(2, 1, 13, 13) == torch.tensor(False), 0.0) @ v


def kept_twice(q, k, v, keep):
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None], float("-inf")), -1)
    return (weights * keep[:, None]) @ v


def guarded_twice(q, k, v, keep):
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None], float("-inf")), -1)
    return torch.where(weights.isnan(), 0.0, weights).nan_to_num(0.0) @ v


def causal_zeroed(q, k, v, keep):
    """A formula for both: the second mask is looser than the first."""
    i, j = positions(q.shape[2])
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(j > i, float("-inf")), -1)
    return torch.where(j <= i + 3, weights, 0.0) @ v


def some_keys() -> torch.Tensor:
    keep = torch.rand(2, 13, 13, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0] = True
    return keep


@pytest.mark.parametrize("fn", [zeroed_again, kept_twice, guarded_twice, causal_zeroed], ids=lambda fn: fn.__name__)
def test_weights_zeroed_where_they_are_zero(fn):
    inputs = (*qkv(), some_keys())
    traced = trace(fn, *inputs)
    assert len(traced.sites) == 1 and len(traced.rewrites) == 1 and not traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


def zeroed_by_another_mask(q, k, v, keep):
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None], float("-inf")), -1)
    return weights.masked_fill(~keep[:, None].transpose(-1, -2), 0.0) @ v


def kept_where_it_was_dropped(q, k, v, keep):
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(keep[:, None], -1e9), -1)
    return (weights * keep[:, None]) @ v


def zeroed_more_than_causal(q, k, v, keep):
    i, j = positions(q.shape[2])
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(j > i, float("-inf")), -1)
    return torch.where(j < i, weights, 0.0) @ v


def filled_with_one(q, k, v, keep):
    weights = F.softmax((scores(q, k) * SCALE).masked_fill(~keep[:, None], float("-inf")), -1)
    return weights.masked_fill(~keep[:, None], 1.0) @ v


def scores_through_relu(q, k, v, keep):
    return F.softmax(F.relu(scores(q, k) * SCALE), -1) @ v


def squared_weights(q, k, v, keep):
    return F.softmax(scores(q, k) * SCALE, -1).square() @ v


REASONS = {
    zeroed_by_another_mask: "may be zero where a key is kept",
    kept_where_it_was_dropped: "may be zero where a key is kept",
    zeroed_more_than_causal: "may be zero where a key is kept",
    filled_with_one: "the weights pass aten.masked_fill", scores_through_relu: "the scores pass aten.relu",
    squared_weights: "the weights pass aten.",
}  # fmt: skip


@pytest.mark.parametrize("fn", REASONS, ids=lambda fn: fn.__name__)
def test_what_stands_between_two_products_is_named(fn):
    inputs = (*qkv(), some_keys())
    traced = trace(fn, *inputs, verify=False)
    assert not traced.sites and [REASONS[fn] in m for m in traced.misses] == [True], traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


def test_a_gate_is_no_attention():
    """A soft-max over experts weighs their outputs: neither a site nor a miss."""

    def gated(x, router, experts, out):
        gates = F.softmax(F.silu(x @ router), -1)
        return ((x @ experts[0]) * gates[..., :1] + (x @ experts[1]) * gates[..., 1:]) @ out

    traced = trace(gated, torch.randn(2, 13, 8), torch.randn(8, 2), torch.randn(2, 8, 8), torch.randn(8, 8))
    assert not traced.sites and not traced.misses


def test_a_sink_of_every_row():
    def with_sink(q, k, v):
        joined = torch.cat([scores(q, k) * SCALE, q.sum(-1, keepdim=True)], -1)
        return F.softmax(joined, -1)[..., :-1] @ v

    inputs = qkv()
    traced = trace(with_sink, *inputs)
    (site,) = traced.sites
    assert site.sink == "logit[b, h, i]" and not site.plain and not traced.rewrites
    torch.testing.assert_close(traced.output, with_sink(*inputs), atol=2e-5, rtol=1e-4)


def test_scores_multiplied_by_a_constant_buffer():
    """GPT's first form: s * m - 1e4 * (1 - m), m a buffer whose value is guarded; another value is refused."""

    class Gpt(torch.nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("bias", mask)

        def forward(self, q, k, v):
            return F.softmax(scores(q, k) * SCALE * self.bias + -1e4 * (1 - self.bias), -1) @ v

    inputs = qkv()
    traced = trace(Gpt(torch.ones(13, 13).tril()), *inputs)
    assert [s.mask.causal for s in traced.sites] == [True] and traced.program.relied_on
    refused = trace(Gpt(torch.ones(13, 13).tril() * 0.5), *inputs, verify=False)
    assert not refused.rewrites and refused.misses
    torch.testing.assert_close(traced.output, Gpt(torch.ones(13, 13).tril())(*inputs), atol=2e-5, rtol=1e-4)


# --- nothing is silent ------------------------------------------------------------------------------------------------

HEADS_MOVED = torch.tensor([3, 1, 2, 0])
SCORES_PASS = {
    "slice": lambda s: s[..., :13], "roll": lambda s: s.roll(1, -1), "flip": lambda s: s.flip(-1),
    "cumsum": lambda s: s.cumsum(-1), "pad": lambda s: F.pad(s[..., :12], (1, 0)), "index": lambda s: s[:, HEADS_MOVED],
    "gather": lambda s: s.gather(-1, torch.arange(13).flip(0).expand(2, 4, 13, 13)), "sum": lambda s: s.sum(1, True),
    "index_fill": lambda s: s.index_fill(-1, HEADS_MOVED[:1], -1e9), "as_strided": lambda s: s.as_strided(
        (2, 4, 13, 13), (676, 169, 1, 13)), "getitem": lambda s: s.topk(13, -1)[0],
}  # fmt: skip


@pytest.mark.parametrize("step", SCORES_PASS)
@pytest.mark.parametrize("of", ["scores", "weights"])
def test_what_moves_scores_or_weights_is_named(step, of):
    def fn(q, k, v):
        k = torch.cat([k, k[:, :, :1]], 2) if step == "slice" else k
        v = torch.cat([v, v[:, :, :1]], 2) if step == "slice" and of == "scores" else v
        s = scores(q, k) * SCALE
        if of == "scores":
            return F.softmax(SCORES_PASS[step](s), -1) @ v[:, :, :13]
        return SCORES_PASS[step](F.softmax(s, -1)) @ v

    inputs = qkv()
    traced = trace(fn, *inputs, verify=False)
    assert not traced.sites and len(traced.misses) == 1, traced.misses
    assert re.search(rf"the {of} (pass|are sliced)", traced.misses[0]), traced.misses
    torch.testing.assert_close(traced.output, fn(*inputs), atol=2e-5, rtol=1e-4)


def test_a_softmax_of_what_is_no_score_is_no_miss():
    """A router's chosen entries, and a soft-max of scores that weighs nothing."""

    def routed(x, w, q, k):
        chosen = F.softmax((x @ w).topk(3, -1)[0], -1)
        return (chosen[..., :1] * x) @ w, F.softmax((q @ k.mT)[..., :5].sum(-1), -1)

    q, k, _ = qkv()
    traced = trace(routed, torch.randn(2, 13, 8), torch.randn(8, 8), q, k)
    assert not traced.sites and not traced.misses
