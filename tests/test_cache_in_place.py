"""A KV cache that the graph writes to is written in place: inductor sees `index_copy` and `copy_` after the export and
must turn them back into one write, or every decoded token would copy the whole cache."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from attnopt.backend import clear_reports, reports
from attnopt.passes import pays

HEADS, CAPACITY, DIM = 4, 1024, 64
WHOLE = re.compile(rf"empty_strided_cpu\(\(1, {HEADS}, {CAPACITY}, {DIM}\)")


def decode(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    kept = torch.arange(CAPACITY) <= at
    scores = (q @ keys.mT) * DIM**-0.5
    return torch.softmax(scores.masked_fill(~kept, float("-inf")), -1) @ values


@pytest.mark.slow
def test_a_cache_is_not_copied() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cache = normal(1, HEADS, CAPACITY, DIM), normal(1, HEADS, CAPACITY, DIM)
    token = tuple(normal(1, HEADS, 1, DIM) for _ in range(3))
    expected = tuple(t.clone() for t in cache)
    at = torch.tensor([17])
    with torch.no_grad():
        wanted = decode(*expected, *token, at)
        clear_reports()
        found, codes = run_and_get_code(torch.compile(decode, backend="attnopt"), *cache, *token, at)
    (report,) = reports()
    # Whose operator is opaque, and reads the buffers that the graph has just written to.
    assert [r.lowering for r in report.rewrites] == [pays.LIVE], report.lines()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(cache, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    assert codes and not any(WHOLE.search(code) for code in codes)
