"""How often a function is compiled anew: with backend="attnopt" never more often than with backend="inductor"."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from attnopt import backend


def causal(q):
    i = torch.arange(q.shape[-2], device=q.device)
    return i <= i[:, None]


def attend(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q), scale=scale)


def written(q, k, v, scale):
    return torch.softmax((q @ k.mT * scale).masked_fill(~causal(q), -torch.inf), -1) @ v


def halved(q, k, v, scale):
    """Python's own arithmetic on the float, and scores over it."""
    return torch.softmax((q @ k.mT / (scale * 2 + 1)).masked_fill(~causal(q), -torch.inf), -1) @ v


def scaled_after(q, k, v, scale):
    return scale * attend(q, k, v)


def dropped(q, k, v, p):
    """Dropout after the attention; with nothing but zeros to drop, so that eager can be compared."""
    return attend(q, k, v) + F.dropout(torch.zeros_like(q), p)


class Attention(nn.Module):
    scaling = 0.4

    def forward(self, q, k, v):
        return attend(q, k, v, self.scaling) * self.scaling


def qkv(batch, length, dtype):
    """Heads and their size are numbers, as in a model; batch and length are not."""
    found = torch.randn(3, batch, 2, length, 16).to(dtype).unbind()
    for tensor in found:
        torch._dynamo.mark_static(tensor, 1)
        torch._dynamo.mark_static(tensor, 3)
    return found


def graphs(fn, name, calls, dtype=torch.float32):
    """How many graphs there were after each call; every result is eager's."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fn, backend=name, dynamic=True)
    found = []
    for batch, length, *more in calls:
        inputs = qkv(batch, length, dtype)
        # Eager rounds scores, weights and output to the 8 bits of bfloat16 each, the outputs up to 4.
        limit = 1e-4 if dtype == torch.float32 else 4e-2
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs, *more), fn(*inputs, *more), atol=limit, rtol=limit)
        found.append(counters["stats"]["unique_graphs"])
    return found


def rewritten():
    return [len(r.rewrites) for r in backend.reports()]


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


SCALES = [(2, 8, 0.3), (2, 8, 0.7), (3, 12, 0.9)]


@pytest.mark.parametrize(
    "fn", [written, pytest.param(halved, marks=pytest.mark.full), scaled_after], ids=lambda fn: fn.__name__
)
def test_a_float_argument_that_changes_is_no_new_graph(fn):
    found = graphs(fn, "attnopt", SCALES)
    assert found == graphs(fn, "inductor", SCALES) and found[1] == 1
    assert all(rewritten())


def test_a_float_argument_beside_half_precision():
    found = graphs(written, "attnopt", SCALES, torch.bfloat16)
    assert found == graphs(written, "inductor", SCALES, torch.bfloat16) and found[1] == 1


@pytest.mark.parametrize("fn", [attend, dropped], ids=lambda fn: fn.__name__)
def test_a_float_argument_that_inductor_needs_as_a_number(fn):
    calls = SCALES[:2]
    found = graphs(fn, "attnopt", calls)
    assert found == graphs(fn, "inductor", calls) == [1, 2]
    assert all(rewritten())


@pytest.mark.parametrize("fn", [attend, Attention()], ids=["function", "module with a float"])
def test_batch_and_length_that_change_are_no_new_graph(fn):
    calls = [(2, 8), (3, 12), (5, 40), (2, 130)]
    found = graphs(fn, "attnopt", calls)
    assert found == graphs(fn, "inductor", calls) and found[0] == 1
    assert all(rewritten())
