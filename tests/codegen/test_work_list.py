"""Work lists: every tile once, longest first, well spread over the SMs, quick to make and kept."""

from __future__ import annotations

import heapq
import random
import time
from collections import OrderedDict

import pytest
import torch

from attnopt.codegen import work_list
from attnopt.codegen.reference_prefill import span_mask
from attnopt.codegen.work_list import OVERHEAD, WORKERS, build, live_blocks, work_lists

TILES = ((128, 64), (64, 64))
DENSE = 2**31 - 1


def tables(sinks: list[int] | int, windows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    sinks = [sinks] * len(windows) if isinstance(sinks, int) else sinks
    return torch.tensor(sinks, dtype=torch.int32), torch.tensor(windows, dtype=torch.int32)


def random_spans(seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(64, 2048) for _ in range(32)]


MIX = [DENSE] * 4 + [4096] * 4 + [2048] * 8 + [512] * 16
MIXTURES = {
    "2k, 2 dense": (2048, [DENSE] * 2 + [256] * 30),
    "2k, 1 dense": (2048, [DENSE] + [256] * 31),
    "2k, all dense": (2048, [DENSE] * 32),
    "2k, random": (2048, random_spans()),
    "4k, 1 dense": (4096, [DENSE] + [256] * 31),
    "4k, mix": (4096, MIX),
    "8k, 1 dense": (8192, [DENSE] + [256] * 31),
    "8k, 1 dense, last": (8192, [256] * 31 + [DENSE]),
    "8k, mix": (8192, MIX),
    "32k, 1 dense": (32768, [DENSE] + [256] * 31),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 129, 1000, 5000])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_tile_is_there_exactly_once(length: int, batch: int, kv_heads: int) -> None:
    sinks, windows = tables(64, [DENSE, 1, 512, 513, 2000, 100, DENSE, 0])
    covered = torch.zeros(batch, 8, length, dtype=torch.int64)
    for items, tiles, tile_class in build(sinks, windows, kv_heads, length, batch, TILES):
        assert items.dtype == torch.int32
        rows = TILES[tile_class][0]
        for item in items.tolist():
            tile, head, entry = item % tiles, item // tiles % 8, item // tiles // 8
            covered[entry, head, tile * rows : (tile + 1) * rows] += 1
    assert bool((covered == 1).all())


def test_an_empty_input_has_no_work() -> None:
    assert build(*tables(0, [1, 1]), 1, 0, 1, TILES) == []
    assert build(*tables(0, [1, 1]), 1, 10, 0, TILES) == []


@pytest.mark.parametrize("rows", [64, 128])
def test_live_blocks_are_those_that_the_mask_touches(rows: int) -> None:
    sinks, windows = tables([0, 1, 64, 65, 200, 0, 300], [1, 64, 65, 130, 1, DENSE, 17])
    length = 512
    counted = live_blocks(sinks, windows, length, (rows, 64))
    kept = span_mask(length, sinks, windows).view(7, length // rows, rows, length // 64, 64)
    assert torch.equal(counted, kept.any(4).any(2).sum(-1).int())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_longest_first_and_ties_by_kv_head(name: str, batch: int) -> None:
    length, spans = MIXTURES[name]
    sinks, windows = tables(64, spans)
    for items, tiles, tile_class in build(sinks, windows, 8, length, batch, TILES):
        cost = live_blocks(sinks, windows, length, TILES[tile_class])
        order = []
        for item in items.tolist():
            tile, head, entry = item % tiles, item // tiles % 32, item // tiles // 32
            order.append((-int(cost[head, tile]), entry, head // 4, tile, head))
        assert order == sorted(order)


def efficiency(length: int, spans: list[int], batch: int = 1) -> float:
    """Work / SMs ÷ makespan where each free SM takes the next tile; both launches are in flight, the long one first."""
    sinks, windows = tables(64, spans)
    costs: list[float] = []
    for items, _, tile_class in build(sinks, windows, 8, length, batch, TILES):
        rows = TILES[tile_class][0]
        cost = (live_blocks(sinks, windows, length, TILES[tile_class]) + OVERHEAD).double() * rows / 128
        costs += cost.repeat(batch, 1).reshape(-1)[items.long()].tolist()
    free = [0.0] * WORKERS
    for cost_of_item in costs:
        heapq.heapreplace(free, free[0] + cost_of_item)
    return sum(costs) / WORKERS / max(free)


@pytest.mark.parametrize("name", MIXTURES)
def test_work_is_spread_evenly(name: str) -> None:
    length, spans = MIXTURES[name]
    assert efficiency(length, spans) >= 0.94
    assert efficiency(length, spans, batch=4) >= 0.94


def test_windowed_heads_take_short_tiles() -> None:
    sinks, windows = tables(64, [DENSE, 512, 513, 4096] * 8)
    lists = build(sinks, windows, 8, 8192, 1, TILES)
    heads = [sorted({item // tiles for item in items.tolist()}) for items, tiles, _ in lists]
    assert [h % 4 for h in heads[1]] == [1] * 8 and {h % 4 for h in heads[0]} == {0, 2, 3}


def test_one_tile_class_makes_one_list() -> None:
    (only,) = build(*tables(64, MIX), 8, 4096, 1, TILES[1:])
    assert only.tile_class == 0 and len(only.items) == 32 * 64


def test_made_quickly() -> None:
    """About 2 ms for 128k tokens and 32 heads on a free core; 24 ms were seen on a busy one."""
    sinks, windows = tables(64, MIX)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        lists = build(sinks, windows, 8, 131072, 1, TILES)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    assert sum(w.items.nbytes for w in lists) <= 2**20


def test_too_many_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        build(*tables(0, [DENSE] * 64), 64, 2**20, 2**13, TILES)


def test_kept_until_a_table_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or tolist(t))
    sinks, windows = tables(4, [100, 200, 300, DENSE])
    first = work_lists(sinks, windows, 2, 777, 1, TILES)
    reads.clear()
    assert work_lists(sinks, windows, 2, 777, 1, TILES) is first and not reads
    assert work_lists(sinks, windows, 2, 778, 1, TILES) is not first
    assert work_lists(sinks.clone(), windows.clone(), 2, 777, 1, TILES) is first
    windows[3] = 5
    changed = work_lists(sinks, windows, 2, 777, 1, TILES)
    assert changed is not first and reads
    with torch.inference_mode():
        inferred = windows.clone()
        assert work_lists(sinks, inferred, 2, 777, 1, TILES) is changed


def test_old_lists_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_list, "KEPT_LISTS", 3)
    monkeypatch.setattr(work_list, "_lists", OrderedDict())
    sinks, windows = tables(4, [100, 200])
    made = [work_lists(sinks, windows, 2, length, 1, TILES) for length in (1, 2, 3, 4)]
    assert work_lists(sinks, windows, 2, 2, 1, TILES) is made[1]
    assert len(work_list._lists) == 3
    assert work_lists(sinks, windows, 2, 1, 1, TILES) is not made[0]
