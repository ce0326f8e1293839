"""What the tests of span kernels on the CPU share: mixtures of spans, inputs, memory that shows what nobody wrote."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen import span_cpu

HEADS = 8
# Per-head (sink, window): one list for each shape of mixture. Windows past every length are dense.
SPANS = {
    "uniform": [(4, 32)] * HEADS,
    "window 1": [(0, 1)] * HEADS,
    "no sink": [(0, 50)] * HEADS,
    "sink beyond window": [(90, 7)] * HEADS,
    "dense": [(0, 2**30)] * HEADS,
    "mixed": [(4, 32), (4, 32), (0, 1), (90, 7), (0, 2**30), (4, 32), (16, 200), (16, 200)],
    "split": [(5, 40), (5, 40), (5, 40), (5, 40), (0, 40), (0, 41), (70, 300), (0, 2**30)],
}
# Small chunks and segments, so that short inputs reach the split form, ragged heads and several segments.
SMALL = span_cpu.Tuning(rows=16, segment=2**11, split_from=33, extra=3)


def inputs(length, dtype=torch.float32, batch=2, kv_heads=4, dim=16, dim_v=16):
    generator = torch.Generator().manual_seed(length + kv_heads)

    def normal(heads, width):
        return torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)

    return normal(HEADS, dim), normal(kv_heads, dim), normal(kv_heads, dim_v)


def tables(spans):
    return tuple(torch.tensor(column, dtype=torch.int32) for column in zip(*spans, strict=True))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from torch.empty and new_empty holds NaN, so that a row nobody writes shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: new_empty(*a, **kw).fill_(float("nan")))
