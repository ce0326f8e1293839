"""Exact mode where a target prints masks into kernels: what is lowered to it, and to the same numbers.

The reference target stands in for a GPU's: the graph, the form and the arguments are those that Triton gets.
"""

from __future__ import annotations

import math

import pytest
import torch
from attentions import alibi, call, padded, positions, written
from tracing import Traced, qkv, trace

from attnopt.capture import capture
from attnopt.passes import PIPELINE, Program, pays

LENGTH, HEADS = 13, 4


@pytest.fixture(autouse=True)
def printed_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")


def scores_of(q, k, cap=0.0):
    scores = q @ k.transpose(-2, -1) * 0.3
    return cap * torch.tanh(scores / cap) if cap else scores


def capped(q, k, v):
    i, j = positions(q, k)
    return torch.softmax(scores_of(q, k, 5.0).masked_fill(j > i, -math.inf), -1) @ v


def with_sink(q, k, v, logits):
    i, j = positions(q, k)
    scores = scores_of(q, k).masked_fill((j > i) | (i - j >= 4), torch.finfo(q.dtype).min)
    column = logits.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def off_by_one(q, k, v):
    """A soft-max with one more column of 0."""
    i, j = positions(q, k)
    scores = scores_of(q, k).masked_fill(j > i, -math.inf)
    column = torch.zeros_like(scores[..., :1])
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def packed(q, k, v, document):
    i, j = positions(q, k)
    return call(q, k, v, (j <= i) & (document[:, None, :, None] == document[:, None, None, :]))


def prefixed(q, k, v, start):
    i, j = positions(q, k)
    return call(q, k, v, (j <= i) | (j < start[:, None, None, None]))


def banded_and_padded(q, k, v, pad):
    i, j = positions(q, k)
    return call(q, k, v, ((i - j).abs() < 4) & pad[:, None, None, :])


def first_keys_and_window(q, k, v):
    i, j = positions(q, k)
    return written(q, k, v, (j <= i) & ((j < 2) | (i - j < 4)))


def negative(q, k, v):
    """A scale that SDPA's kernels would hide keys before."""
    i, j = positions(q, k)
    return torch.softmax((-scores_of(q, k)).masked_fill(j > i, -math.inf), -1) @ v


def by_groups(q, k, v, slopes):
    """Heads as (KV heads, heads of one): an axis of two parts."""
    share = q.shape[1] // k.shape[1]
    i, j = positions(q, k)
    scores = torch.einsum("bgrid,bgjd->bgrij", q.unflatten(1, (-1, share)), k) * 0.3
    scores = scores + slopes.view(1, -1, share, 1, 1) * j
    weights = scores.masked_fill(j > i, -math.inf).softmax(-1)
    return torch.einsum("bgrij,bgjd->bgrid", weights, v).flatten(1, 2)


def masked_by_data(q, k, v, data):
    return call(q, k, v, data)


def flags(*shape: int) -> torch.Tensor:
    made = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
    made[..., 0] = True
    return made


# name -> (function, further inputs, sizes of q, k and v, what the report says of the kernel)
CASES = {
    "soft-cap": (capped, (), {}, "softcap=5, keep j <= i"),
    "sink": (with_sink, (torch.randn(HEADS),), {}, "sink=logit[h], keep j <= i and i - j < 4"),
    "sink of 0": (off_by_one, (), {}, "sink=0, keep j <= i"),
    "documents": (packed, (torch.randint(0, 3, (2, LENGTH)),), {"kv_heads": 2}, "keep j <= i and doc"),
    "prefix": (prefixed, (torch.tensor([3, 9]),), {}, "keep (j < "),
    "band, padding": (banded_and_padded, (flags(2, LENGTH),), {"kv_heads": 1}, "keep |i - j| < 4 and"),
    "first keys": (first_keys_and_window, (), {"kv_heads": 2}, "keep j <= i and (i <= j + 3 or j <= 1)"),
    "alibi": (alibi, (), {}, "bias=(j - i)*"),
    "heads in groups": (by_groups, (torch.rand(HEADS),), {"kv_heads": 2}, "bias=j*"),
    "negative scale": (negative, (), {}, "keep j <= i"),
    "numbers": (masked_by_data, (torch.randn(2, 1, LENGTH, LENGTH),), {}, "keep all"),
    "flags": (masked_by_data, (flags(2, 1, LENGTH, 17),), {"keys": 17, "kv_heads": 2}, "[b, i, j]"),
}


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("name", CASES)
def test_a_printed_mask_computes_the_same(name: str) -> None:
    fn, more, sizes, said = CASES[name]
    inputs = (*qkv(**sizes), *more)
    traced = trace(fn, *inputs)
    (lowering,) = traced.rewrites or [str((traced.left, traced.misses))]
    assert lowering.startswith(pays.PRINTED)
    assert said.replace("doc", "") in lowering.replace(str(traced.sites[0].mask.reads[:1]), ""), lowering
    expected = fn(*double(inputs))
    assert (traced.output.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("name", ["soft-cap", "alibi"])
def test_a_cpu_has_no_such_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", "auto")
    fn, more, sizes, _ = CASES[name]
    traced = trace(fn, *qkv(**sizes), *more)
    assert not any(pays.PRINTED in lowering for lowering in traced.rewrites)


def test_what_takes_no_mask_stays_with_sdpa() -> None:
    def causal(q, k, v):
        i, j = positions(q, k)
        return written(q, k, v, j <= i)

    assert trace(causal, *qkv()).rewrites == ["SDPA is_causal"]
    assert trace(padded(written, True), *qkv(length=15), flags(2, 15)).rewrites == [pays.RUNS]
    assert trace(written, *qkv()).rewrites == ["SDPA without a mask"]


def test_gradients_are_not_cut_off() -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    traced: Traced = trace(capped, *inputs, grad=True)
    assert not traced.rewrites and any("caps scores" in reason for reason in traced.left)


def test_one_query_keeps_its_call() -> None:
    traced = trace(masked_by_data, *qkv(length=1, keys=11), flags(2, 1, 1, 11))
    assert not traced.rewrites


def test_a_bias_wider_than_the_scores_is_taken_as_it_is() -> None:
    """SDPA would round it to the type of q."""

    def fn(q, k, v, bias):
        return torch.softmax((q @ k.transpose(-2, -1) * 0.3).float() + bias, -1).to(v.dtype) @ v

    slopes = torch.tensor([2.0**-n for n in range(1, HEADS + 1)])[:, None, None]
    inputs = (*qkv(dtype=torch.bfloat16), slopes * (torch.arange(LENGTH) - 2047.0))
    traced = trace(fn, *inputs)
    assert len(traced.rewrites) == 1 and traced.rewrites[0].startswith(pays.PRINTED)
    expected = fn(*double(inputs))
    assert (traced.output.double() - expected).norm() <= 1e-2 * expected.norm()


def test_lengths_known_at_run_time_take_one_graph() -> None:
    """Sizes that the mask needs are arguments: more keys than queries, aligned to the end."""
    programs: list[Program] = []

    def fn(q, k, v):
        i, j = positions(q, k)
        scores = scores_of(q, k, 5.0).masked_fill(j > i + (k.shape[2] - q.shape[2]), -math.inf)
        return torch.softmax(scores, -1) @ v

    def backend(gm, _):
        captured = capture(gm)
        programs.append(Program(captured, verify=True).run(PIPELINE))
        return captured.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend)
    for queries, keys in ((7, 11), (5, 29), (12, 13)):
        inputs = qkv(length=queries, keys=keys, seed=keys)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        with torch.no_grad():
            found = compiled(*inputs)
        expected = fn(*double(inputs))
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()
    (program,) = programs
    (rewrite,) = program.rewrites
    assert rewrite.lowering.startswith(pays.PRINTED)
    (node,) = [n for n in program.gm.graph.nodes if n.target is torch.ops.attnopt.masked_attention.default]
    assert len(node.args[4]) == 1, "the one size that the mask needs"
