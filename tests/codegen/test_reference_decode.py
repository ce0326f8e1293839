"""Decoding in plain PyTorch against soft-max attention written out over a dense cache of every key."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.emit import load
from attnopt.codegen.reference_decode import decode
from attnopt.codegen.spec import SpanDecode

DENSE = 2**30


def ring(keys: torch.Tensor, sink: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache of `capacity` slots holds after keys (N, D), sinks first, then a ring: slots and their positions."""
    held, positions = torch.full((capacity, keys.shape[1]), float("nan")), torch.full((capacity,), -1)
    for position, key in enumerate(keys):
        slot = position if position < capacity else sink + (position - sink) % (capacity - sink)
        held[slot], positions[slot] = key, position
    return held, positions


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("length", [3, 12, 40])
def test_agrees_with_a_dense_cache_under_a_mask(length: int, tokens: int) -> None:
    """Four query heads over two KV heads; the first segment keeps the union of two spans, the second every key."""
    torch.manual_seed(length)
    sinks, windows = torch.tensor([2, 1, 0, 3]), torch.tensor([5, 8, DENSE, 4])
    q, k, v = torch.randn(1, 4, tokens, 8), torch.randn(2, length, 8), torch.randn(2, length, 6)
    sizes = [2 + 8 + tokens - 1, 48]
    slots = [ring(torch.cat((k[g], v[g]), 1), 2, size) for g, size in enumerate(sizes)]
    cache, positions = (torch.cat(parts) for parts in zip(*slots, strict=True))
    starts = torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32)
    filled = torch.tensor([[min(length, size) for size in sizes]], dtype=torch.int32)
    found = decode(
        q, cache[None, :, :8], cache[None, :, 8:], starts, filled, 0.3, sinks, windows,
        positions.int(), torch.tensor([length - tokens], dtype=torch.int32),
    )  # fmt: skip
    i, j = torch.arange(length - tokens, length)[:, None], torch.arange(length)
    keep = (j <= i) & ((j < sinks[:, None, None]) | (i - j < windows[:, None, None]))
    scores = (q[0] @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.3).masked_fill(~keep, float("-inf"))
    expected = torch.softmax(scores, -1).nan_to_num() @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_reads_filled_slots_only_and_gives_zero_where_there_are_none() -> None:
    q, k = torch.randn(2, 2, 1, 4), torch.full((2, 6, 4), float("nan"))
    k[0, :2] = 1.0
    k[1, 3:5] = 2.0
    starts, filled = torch.tensor([0, 3, 6]), torch.tensor([[2, 0], [0, 2]])
    found = decode(q, k, k, starts, filled, 1.0)
    assert found[:, :, 0, 0].tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_a_count_beyond_a_segment_is_the_segment() -> None:
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 6, 4)
    starts = torch.tensor([0, 3, 6])
    found = decode(q, k, k, starts, torch.tensor([[9, 3]]), 1.0)
    assert torch.equal(found, decode(q, k, k, starts, torch.tensor([[3, 3]]), 1.0))


def test_emitted_module(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    assert load(SpanDecode("reference", "float32", 4, 2, 8, 6)).decode is decode
    with pytest.raises(ValueError, match="no span decode kernel"):
        load(SpanDecode("mine", "float32", 4, 2, 8, 6))
