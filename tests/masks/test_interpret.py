"""Masks against brute force: random expressions in many spellings, the recovered predicate evaluated at every position.

What is recovered must be right at every position; what cannot be recovered must be a miss. Never anything between.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from masks.recovering import bounded
from torch.fx.experimental.proxy_tensor import make_fx
from tracing import qkv, trace

from attnopt.ir import Mask
from attnopt.passes import RECOGNISE, Program

BATCH, HEADS, QUERIES, KEYS = 2, 3, 7, 9


# The terms that are no bound, as they print.
ODD = {
    "(i + j) % 2 == 0": lambda i, j: (i + j) % 2 == 0,
    "(j <= 3 or j <= i)": lambda i, j: (j <= 3) | (j <= i),
    "i + j >= 4": lambda i, j: i + j > 3,
    "(i == j or j <= 3)": lambda i, j: (i == j) | (j <= 3),
    "i // 3 == j // 3": lambda i, j: i // 3 == j // 3,
}


def evaluate(mask: Mask, loads: dict, queries=QUERIES, keys=KEYS) -> torch.Tensor:
    """The record read literally: bool (B, Sq, Sk)."""
    keep = bounded(mask, BATCH, queries, keys)
    for term in mask.terms:
        if term == "none":
            return keep & False
        keep &= ODD[term](torch.arange(queries)[:, None], torch.arange(keys))
    for load in mask.loads:
        keep &= loads[load.name].reshape(-1, 1, keys)
    return keep


def compare(rng, i, j, bound):
    """i - j >= bound, spelled in one of many ways."""
    spellings = [
        lambda: i - j >= bound,
        lambda: i - j > bound - 1,
        lambda: j <= i - bound,
        lambda: j + bound <= i,
        lambda: ~(j > i - bound),
        lambda: torch.ge(i, j + bound),
        lambda: (j - i) < 1 - bound,
        lambda: torch.logical_not(i - j < bound),
        lambda: (2 * i - 2 * j) >= 2 * bound - 1,
        lambda: torch.le(-(i - j), -bound),
        lambda: torch.where(j <= i - bound, 1.0, 0.0) > 0.5,
        lambda: (j <= i - bound).to(torch.float32).bool(),
    ]
    return rng.choice(spellings)()


def upper(rng, i, j, bound):
    """i - j <= bound."""
    spellings = [
        lambda: i - j <= bound,
        lambda: i - j < bound + 1,
        lambda: j >= i - bound,
        lambda: ~(i - bound > j),
        lambda: torch.lt(i - 1, j + bound),
        lambda: (i - j).le(bound),
    ]
    return rng.choice(spellings)()


def triangle(rng, diagonal):
    """j <= i + diagonal through tril or triu."""
    ones = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    spellings = [
        lambda: torch.tril(ones, diagonal),
        lambda: ~torch.triu(ones, diagonal + 1),
        lambda: torch.tril(torch.ones(QUERIES, KEYS), diagonal) == 1,
        lambda: torch.triu(torch.ones(QUERIES, KEYS), diagonal + 1) == 0,
        lambda: torch.triu(torch.full((QUERIES, KEYS), float("-inf")), diagonal + 1) == 0,
    ]
    return rng.choice(spellings)()


def indices(rng):
    i, j = torch.arange(QUERIES), torch.arange(KEYS)
    spellings = [
        lambda: (i[:, None], j[None, :]),
        lambda: (i.view(-1, 1), j.view(1, -1)),
        lambda: (i.unsqueeze(1).expand(QUERIES, KEYS), j.unsqueeze(0).expand(QUERIES, KEYS)),
        lambda: (i.reshape(1, 1, QUERIES, 1), j.reshape(1, 1, 1, KEYS)),
        lambda: (torch.arange(1, QUERIES + 1)[:, None] - 1, torch.arange(3, KEYS + 3)[None, :] - 3),
        lambda: (torch.arange(0, 2 * QUERIES)[:QUERIES, None], torch.arange(KEYS).expand(4, KEYS)[0][None]),
    ]
    return rng.choice(spellings)()


def expression(rng, pad):
    """A random keep-mask: bounds, triangles, padding, and what is no band, joined in random order."""
    i, j = indices(rng)
    terms = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["lower", "upper", "triangle", "pad", "lower", "odd"])
        if kind == "lower":
            terms.append(compare(rng, i, j, rng.choice([0, 0, 0, -2, 1])))
        elif kind == "upper":
            terms.append(upper(rng, i, j, rng.choice([0, 2, 3, 20])))
        elif kind == "triangle":
            terms.append(triangle(rng, rng.choice([0, 0, 2])))
        elif kind == "pad":
            terms.append(rng.choice([pad[:, None, None, :], pad.view(BATCH, 1, 1, KEYS)]))
        elif rng.random() < 0.3:
            odd = [lambda: (i + j) % 2 == 0, lambda: i // 3 == j // 3, lambda: (j <= i) | (j < 4), lambda: i + j > 3]
            terms.append(rng.choice(odd)())
    rng.shuffle(terms)
    keep = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    for term in terms:
        keep = rng.choice([torch.bitwise_and, torch.logical_and, torch.mul])(keep, term)
    return keep


def attend(rng, q, k, v, pad):
    keep = expression(rng, pad)
    form = rng.choice(["bool", "where", "masked_fill", "scores"])
    if form == "bool":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    if form == "where":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(keep, 0.0, float("-inf")))
    if form == "masked_fill":
        additive = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=additive)
    return F.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), -1) @ v


def attention_of(seed):
    return lambda q, k, v, pad: attend(random.Random(seed), q, k, v, pad)


@pytest.mark.parametrize("block", range(8))
def test_random_masks(block):
    recovered = 0
    for seed in range(25 * block, 25 * block + 25):
        q, k, v = qkv(BATCH, HEADS, length=QUERIES, keys=KEYS)
        pad = torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(seed)) > 0.4
        truth = expression(random.Random(seed), pad).expand(BATCH, 1, QUERIES, KEYS)[:, 0]

        graph = make_fx(attention_of(seed), tracing_mode="fake", pre_dispatch=True)(q, k, v, pad)
        program = Program(graph).run(RECOGNISE)
        assert not program.misses, seed
        (region,) = program.regions
        # What has no closed form is carried as data, never as a formula that is not it.
        if region.site.mask.closed and region.site.bias is None:
            loads = {name: truth_of(graph, node, q, k, v, pad) for name, node in region.loads.items()}
            assert evaluate(region.site.mask, loads).equal(truth), (seed, str(region.site.mask))
            recovered += 1
    assert recovered >= 20


def truth_of(graph, node, *inputs):
    """A load's value, computed by the graph itself."""
    held = dict(zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs, strict=True))

    def value(n):
        if n not in held:
            args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), value)
            held[n] = n.target(*args, **kwargs)
        return held[n]

    return value(node)


def recover(fn, *inputs):
    traced = trace(fn, *inputs, passes=RECOGNISE)
    return traced.sites[0].mask if traced.sites else traced.misses[0]


def masked(build):
    def fn(q, k, v):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(i, j))

    return fn


MUTATIONS = {
    "window": lambda i, j: (j <= i) & (i - j < 4),
    "window of one more": lambda i, j: (j <= i) & (i - j <= 4),
    "strict causal": lambda i, j: (j < i) & (i - j < 4),
    "other direction": lambda i, j: (j >= i) & (i - j < 4),
    "or": lambda i, j: (j <= i) | (i - j < 4),
    "no window": lambda i, j: j <= i,
    "not": lambda i, j: ~(j <= i) & (i - j < 4),
    "shifted": lambda i, j: (j <= i + 1) & (i - j < 4),
    "i and j exchanged": lambda i, j: (j <= i) & (j - i < 4),
}


def test_every_mutation_of_a_mask_is_told_apart():
    found = {name: recover(masked(build), *qkv(length=9)) for name, build in MUTATIONS.items()}
    right = found.pop("window")
    assert right == Mask(causal=True, window=4)
    assert all(other != right for other in found.values()), found
    assert found["window of one more"] == Mask(causal=True, window=5) and found["no window"] == Mask(causal=True)
    assert found["i and j exchanged"] == Mask(causal=True)  # j - i < 4 holds wherever j <= i does


def test_ranges_decide_what_lengths_decide():
    """A window no key is outside of is none; one decoded token keeps all."""
    assert recover(masked(lambda i, j: (j <= i) & (i - j < 100)), *qkv(length=9)) == Mask(causal=True)
    assert recover(masked(lambda i, j: j <= i + 8), *qkv(length=1, keys=9)) == Mask()
    assert recover(masked(lambda i, j: j <= i + 4), *qkv(length=5, keys=9)) == Mask(causal=True, offset=4)
