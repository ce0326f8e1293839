"""Documents kept apart on the CPU against float64 on explicit masks: any order of ids, windows, padding, gradients."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen import documents_cpu, reference_documents
from attnopt.ops import document_attention

LENGTH = 41
GENERATOR = torch.Generator


def numbers(kind, batch=2, length=LENGTH):
    """ids (E, B, N) of a kind; samples differ."""
    generator = GENERATOR().manual_seed(3)
    counted = torch.randint(0, 4, (1, batch, length), generator=generator)
    return {
        "one document": torch.full((1, batch, length), 7),
        "in order": counted.sort(-1).values,
        "one sample out of order": torch.cat([counted[:, :1], counted[:, 1:].sort(-1).values], 1),
        "out of order": counted,
        "all alone": torch.arange(length).flip(0).expand(1, batch, -1),
        "two numbers": torch.stack([counted[0], torch.randint(-1, 1, (batch, length), generator=generator)]),
    }[kind]


KINDS = ("one document", "in order", "one sample out of order", "out of order", "all alone", "two numbers")


def tensors(dtype=torch.float64, heads=4, kv_heads=2, dim=8, dim_v=6, batch=2, length=LENGTH):
    generator = GENERATOR().manual_seed(1)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
    # As models lay them out: (B, N, heads, D) in memory.
    return [torch.randn(batch, length, *s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def padding(kind, ids):
    if not kind:
        return None
    pad = torch.rand(ids.shape[1:], generator=GENERATOR().manual_seed(2)) > 0.5
    if kind == "one sample":
        pad[1:] = True
    if kind == "a whole document":
        pad[ids[0] == ids[0, 0, 0]] = False
    return pad


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", ["", "some tokens", "one sample", "a whole document"])
@pytest.mark.parametrize("rule", [(True, 0), (True, 5), (False, 0)], ids=["causal", "window", "both ways"])
def test_result_and_gradients_are_those_of_an_explicit_mask(kind, padded, rule):
    """Exact to double precision, so that one key too many or too few shows."""
    ids = numbers(kind)
    pad = padding(padded, ids)
    if padded == "a whole document" and kind == "one document":
        pad[:, :] = False
    inputs = [x.requires_grad_() for x in tensors()]
    expected, _ = reference_documents.prefill(*inputs, ids, pad, 0.4, *rule)
    found, _ = document_attention(*inputs, ids, pad, 0.4, *rule)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.transpose(1, 2).is_contiguous()
    weight = torch.randn(found.shape, generator=GENERATOR().manual_seed(4), dtype=found.dtype)
    wanted = torch.autograd.grad(expected, inputs, weight)
    for a, b in zip(torch.autograd.grad(found, inputs, weight), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        twins = reference_documents.gradients(weight, expected, expected, *inputs, ids, pad, 0.4, *rule)
    for a, b in zip(twins, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("window", [0, 70])
def test_long_documents_in_every_dtype(dtype, bound, window):
    """Long enough for the span kernel, and for padding as a feature."""
    ids = torch.tensor([0] * 1100 + [1] * 130 + [2] * 30 + [3] * 30)[None, None]
    pad = torch.ones(1, 1290, dtype=torch.bool)
    pad[0, 50:400] = False
    for flags in (None, pad):
        inputs = tensors(dtype, batch=1, length=1290)
        wide, _ = reference_documents.prefill(*(x.double() for x in inputs), ids, flags, 0.4, True, window)
        assert relative(documents_cpu.prefill(*inputs, ids, flags, 0.4, True, window)[0], wide) < bound


def test_the_gradient_of_long_windows():
    """One document that takes the span kernel, one that takes a mask, one that takes neither."""
    ids = torch.tensor([0] * 600 + [1] * 130 + [2] * 30)[None, None]
    inputs = [x.requires_grad_() for x in tensors(batch=1, length=760)]
    expected, _ = reference_documents.prefill(*inputs, ids, None, 0.4, True, 70)
    found, _ = document_attention(*inputs, ids, None, 0.4, True, 70)
    weight = torch.randn(found.shape, generator=GENERATOR().manual_seed(4), dtype=found.dtype)
    wanted = torch.autograd.grad(expected, inputs, weight)
    for a, b in zip(torch.autograd.grad(found, inputs, weight), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5), (2, 1)])
def test_empty_and_single_tokens(batch, length):
    inputs = [x.requires_grad_() for x in tensors(batch=batch, length=length)]
    ids = torch.zeros(1, batch, length, dtype=torch.int32)
    found, _ = document_attention(*inputs, ids, None, 0.4, True, 0)
    assert found.shape == (batch, 4, length, 6)
    # One key: its value.
    torch.testing.assert_close(found, inputs[2].repeat_interleave(2, 1))
    made = torch.autograd.grad(found.sum(), inputs)
    assert [x.shape for x in made] == [x.shape for x in inputs]


def test_features_that_are_no_neighbours_in_memory():
    """A gradient that is one number for all, as `sum` gives it, and operands that lie across."""
    ids = torch.tensor([0] * 30 + [1] * 11)[None, None].expand(1, 2, -1)
    inputs = [x.mT.contiguous().mT.requires_grad_() for x in tensors()]
    expected, _ = reference_documents.prefill(*inputs, ids, None, 0.4, True, 0)
    found, _ = document_attention(*inputs, ids, None, 0.4, True, 0)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    for a, b in zip(torch.autograd.grad(found.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_documents_are_views_where_they_lie_together():
    ids = torch.tensor([[5] * 200 + [2] * 300 + [9] * 150])[None]
    parts = documents_cpu.cut(ids)
    assert parts.order is None
    assert {(c.length, *c.at) for c in parts.calls} == {(150, (0, 500)), (200, (0, 0)), (300, (0, 200))}
    assert documents_cpu.cut(ids.flip(-1)).order is None
    mixed = torch.cat([ids, torch.zeros_like(ids)], 1)
    mixed[0, 0, 649] = 5
    order = documents_cpu.cut(mixed).order
    assert order is not None and order[1].tolist() == list(range(650))
    assert order[0].tolist() == [*range(200, 500), *range(200), 649, *range(500, 649)]


def test_short_documents_of_one_length_share_calls():
    ids = torch.arange(64).repeat_interleave(10)[None, None]
    calls = documents_cpu.cut(ids).calls
    assert {c.length for c in calls} == {10} and sum(len(c.at) for c in calls) == 64 and len(calls) == 2
