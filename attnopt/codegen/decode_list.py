"""How an emitted decode kernel divides a ragged cache: chunks of equal length, the same for every batch entry.

An item is one int32, ``c * G + g``: chunk c of the segment of KV head g. Whole chunks come first, then what is left of
each segment, longest first, so that the GPU's own dispatcher is a longest-processing-time scheduler. The list depends
on capacities alone. How many slots are filled is read on the device, and a chunk without any ends at once, so that one
list, and one captured CUDA graph, serves a cache while it grows.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from attnopt.codegen.work_list import WORKERS, read_table

# Slots per block of keys: chunks are whole blocks.
BLOCK = 64
# What an item costs beyond its slots, in slots: to start, and to write a partial result that is read again. A model's
# figure, not measured.
OVERHEAD = 64
# Programs that an SM holds at once in the model.
PER_SM = 2
# Quarters of its longest segment to which a cache is filled, and how much each counts: it grows through all of them,
# and then rings stay full. For the full cache alone, dense heads would take chunks as long as the slots allow, which
# leaves half of the programs idle at half the length.
LIFE = {4: 3, 3: 1, 2: 1, 1: 1}
# Programs with a long segment, as many times as the GPU holds at once, from which segments are not divided for several
# tiles of rows: partial results would take more memory than the keys.
ENOUGH = 4
CHUNKS = (*range(BLOCK, 512, BLOCK), *range(512, 2048, 256), *range(2048, 8193, 1024))


class DecodeList(NamedTuple):
    """items: int32 (count,), parts: int32 (G,), where the partial results of a head begin, -1 if one chunk holds its
    segment; split: int32, the KV heads with partial results; chunk: slots; partials: partial results of an entry;
    slots: of all segments."""

    items: torch.Tensor
    parts: torch.Tensor
    split: torch.Tensor
    chunk: int
    partials: int
    slots: int


@lru_cache(maxsize=1024)
def capacities_of(starts: tuple[int, ...]) -> tuple[int, ...]:
    """Slots of each KV head. ValueError where the segments do not lie one after the other from slot 0 on."""
    capacities = tuple(end - start for start, end in pairwise(starts))
    if starts[0] != 0 or any(capacity < 0 for capacity in capacities):
        raise ValueError(f"segments of a cache begin at 0 and follow each other, not at {starts}")
    return capacities


def makespan(capacities: tuple[int, ...], batch: int, chunk: int, slots: int) -> int:
    """Modelled time, in slots read one after the other, until `slots` programs at a time have done every item."""
    whole, over = divmod(batch * sum(c // chunk for c in capacities), slots)
    free = [(whole + 1) * (chunk + OVERHEAD)] * over + [whole * (chunk + OVERHEAD)] * (slots - over)
    heapq.heapify(free)
    for rest in sorted((c % chunk for c in capacities if c % chunk), reverse=True):
        for _ in range(batch):
            heapq.heapreplace(free, free[0] + rest + OVERHEAD)
    return max(free)


@lru_cache(maxsize=256)
def chunk_of(capacities: tuple[int, ...], batch: int, slots: int = PER_SM * WORKERS) -> int:
    """The chunk with the least modelled makespan over a `LIFE`, the longest of equals: fewer partial results."""
    longest = max(capacities, default=0)

    def cost(chunk: int) -> int:
        levels = ((longest * quarters // 4, weight) for quarters, weight in LIFE.items())
        parts = ((tuple(min(size, level) for size in capacities), weight) for level, weight in levels)
        return sum(weight * makespan(part, batch, chunk, slots) for part, weight in parts)

    return min(reversed([chunk for chunk in CHUNKS if chunk - BLOCK < longest] or [BLOCK]), key=cost)


def build(starts: tuple[int, ...], batch: int, slots: int = PER_SM * WORKERS, tiles: int = 1) -> DecodeList:
    """The list of a cache whose KV head g has the slots starts[g] up to starts[g + 1] of each of `batch` entries, each
    item of which is read by `tiles` programs."""
    capacities = capacities_of(starts)
    chunk, groups = chunk_of(capacities, batch * tiles, slots), len(capacities)
    longest = max(capacities, default=0)
    if tiles > 1 and batch * tiles * sum(2 * capacity > longest for capacity in capacities) >= ENOUGH * slots:
        chunk = max(chunk, longest)
    items, parts, split, partials = [], [], [], 0
    for group, capacity in enumerate(capacities):
        # A segment without slots has an item too: it writes zeros.
        count = max(1, -(-capacity // chunk))
        items += [(min(chunk, capacity - c * chunk), c * groups + group) for c in range(count)]
        parts.append(partials if count > 1 else -1)
        if count > 1:
            split.append(group)
            partials += count
    items.sort(key=lambda item: -item[0])
    lists = [code for _, code in items], parts, split
    first, second, third = (torch.tensor(codes, dtype=torch.int32) for codes in lists)
    return DecodeList(first, second, third, chunk, partials, starts[-1])


@lru_cache(maxsize=256)
def _built(starts: tuple[int, ...], batch: int, device: torch.device, tiles: int = 1) -> DecodeList:
    workers = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else WORKERS
    built = build(starts, batch, PER_SM * workers, tiles)
    return built._replace(**{name: getattr(built, name).to(device) for name in ("items", "parts", "split")})


def decode_list(starts: torch.Tensor, batch: int) -> DecodeList:
    """`build` for a table int32 (G + 1,) on any device, where the list then lies too; kept per table and batch.

    A table on a GPU is read once, before a graph is captured: its values may not change afterwards.
    """
    return _built(read_table(starts), batch, starts.device)


def cache_list(table: torch.Tensor, batch: int, tiles: int) -> DecodeList:
    """`build` for a cache whose KV head g has table[g] = (start, capacity, ...), int32 (G, ...), as `decode_list` does.

    ValueError where the segments do not follow each other.
    """
    values, columns = read_table(table), table.shape[1]
    starts = (*values[::columns], values[-columns] + values[1 - columns])
    if tuple(values[1::columns]) != capacities_of(starts):
        raise ValueError(f"segments of a cache follow each other, not those of {values}")
    return _built(starts, batch, table.device, tiles)
