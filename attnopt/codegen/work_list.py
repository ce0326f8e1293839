"""The order in which an emitted prefill kernel takes its tiles: longest first, so that none is left for the end.

An item is one int32, ``(b * H + h) * tiles + t``: one tile of query rows of one head. A plain 1-D grid over the list
makes the GPU's own dispatcher a longest-processing-time scheduler. Heads with short spans take tiles of fewer rows
(less of each tile is masked away), so there are at most two lists, one per tile class.

A list decides order and tile size only, and holds every tile exactly once whatever the tables say: the kernels read the
spans themselves, so a stale list can cost time but never a wrong result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Up to this many live keys per row a head takes short tiles: a window of 512 and one block of sinks.
SHORT_SPAN = 512 + 64
# What starting and storing a tile costs, in key blocks.
OVERHEAD = 2
# No tile may last longer than this part of an even share of all the work, else tiles are made shorter.
LONGEST_SHARE = 0.9
# SMs assumed where no device can be asked (an H100 or H200).
WORKERS = 132
KEPT_LISTS = 256

Tile = tuple[int, int]  # query rows, keys per block


class WorkList(NamedTuple):
    """items: int32 (count,) on the tables' device; tiles: query tiles of a head; tile_class: index of the launch."""

    items: torch.Tensor
    tiles: int
    tile_class: int


def live_blocks(sinks: torch.Tensor, windows: torch.Tensor, length: int, tile: Tile) -> torch.Tensor:
    """Key blocks that each query tile visits: sinks, windows int (H,) -> int32 (H, tiles).

    The last tile counts as if it were full, so that a head's counts never fall from one tile to the next.
    """
    rows, keys = tile
    sinks = sinks[:, None].clamp(0, length).to(torch.int32)
    windows = windows[:, None].clamp(0, length).to(torch.int32)
    first = torch.arange(0, length, rows, dtype=torch.int32)[None, :]
    left = (first - windows + 1).clamp_(min=0).div_(keys, rounding_mode="floor")
    return torch.minimum(-(-sinks // keys), left) + (first // keys + -(-rows // keys) - left)


def tile_classes(
    sinks: torch.Tensor, windows: torch.Tensor, length: int, batch: int, tiles: Sequence[Tile], workers: int = WORKERS
) -> torch.Tensor:
    """Which of `tiles` (long first) each head takes: int64 (H,).

    All heads take the short tile where one long tile would last about as long as all the work, spread evenly.
    """
    last = len(tiles) - 1
    span = (sinks.to(torch.int64) + windows.to(torch.int64)).clamp(max=length)
    classes = torch.where(span <= SHORT_SPAN, last, 0)
    if last and bool((classes == 0).any()):
        cost = live_blocks(sinks, windows, length, tiles[0]) + OVERHEAD
        longest = int(cost[classes == 0].max())
        if longest * workers > LONGEST_SHARE * int(cost.sum()) * batch:
            classes.fill_(last)
    return classes


def _longest_first(cost: torch.Tensor) -> torch.Tensor:
    """Stable order of a flat int32 tensor, largest first. numpy sorts 16-bit keys by radix, four times faster."""
    top = int(cost.max())
    if top < 2**15:
        try:
            return torch.from_numpy((top - cost).to(torch.int16).numpy().argsort(kind="stable"))
        except (ImportError, RuntimeError):  # torch without numpy
            pass
    return torch.sort(cost, stable=True, descending=True).indices


def build(
    sinks: torch.Tensor,
    windows: torch.Tensor,
    kv_heads: int,
    length: int,
    batch: int,
    tiles: Sequence[Tile],
    workers: int = WORKERS,
) -> list[WorkList]:
    """Work lists of CPU tables sinks, windows int (H,), long tiles first; none for an empty input.

    Equal costs keep the order (batch entry, KV head, query tile, query head), so that tiles which read the same keys
    run side by side and meet in the L2 cache.
    """
    heads = len(sinks)
    if not length or not batch or not heads:
        return []
    classes = tile_classes(sinks, windows, length, batch, tiles, workers)
    group = torch.arange(heads) // (heads // kv_heads)
    lists = []
    for index, tile in enumerate(tiles):
        count = -(-length // tile[0])
        if batch * heads * count >= 2**31:
            raise ValueError(f"{batch} × {heads} heads × {count} query tiles do not fit the int32 codes of a work list")
        chosen = torch.nonzero(classes == index)[:, 0]
        if not len(chosen):
            continue
        cost = live_blocks(sinks[chosen], windows[chosen], length, tile) + OVERHEAD
        code = (chosen[:, None] * count + torch.arange(count)).to(torch.int32)
        size = torch.bincount(group[chosen], minlength=kv_heads).tolist()
        # One KV head after the other, and within it tile by tile across its query heads.
        code = torch.cat([part.t().reshape(-1) for part in code.split(size)])
        cost = torch.cat([part.t().reshape(-1) for part in cost.split(size)])
        if batch > 1:
            code = (torch.arange(batch, dtype=torch.int32)[:, None] * (heads * count) + code).reshape(-1)
            cost = cost.repeat(batch)
        lists.append(WorkList(code[_longest_first(cost)], count, index))
    return lists


_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # table -> (version, its values)
_lists: OrderedDict[tuple, list[WorkList]] = OrderedDict()


def read_table(table: torch.Tensor) -> tuple[int, ...]:
    """Values of a table, row by row. Reading a CUDA tensor waits for the device: once per tensor and version."""
    version = 0 if table.is_inference() else table._version
    known = _values.get(table)
    if known is None or known[0] != version:
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a kernel's table is read once, outside a CUDA graph: call it once with this very tensor before it is "
                "captured (under torch.compile, torch._dynamo.mark_static_address keeps it the same)"
            )
        known = (version, tuple(table.flatten().tolist()))
        _values[table] = known
    return known[1]


def tell_table(table: torch.Tensor, values: Sequence[int]) -> None:
    """What `read_table` would find in a table that was made of these values: nobody has to wait for the device then."""
    _values[table] = (0 if table.is_inference() else table._version, tuple(values))


def work_lists(
    sinks: torch.Tensor, windows: torch.Tensor, kv_heads: int, length: int, batch: int, tiles: Sequence[Tile]
) -> list[WorkList]:
    """`build` for tables int (H,) on any device, where the lists then lie too; kept per table values and shape."""
    device = sinks.device
    key = (read_table(sinks), read_table(windows), kv_heads, length, batch, tuple(tiles), device)
    found = _lists.get(key)
    if found is None:
        workers = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else WORKERS
        built = build(torch.tensor(key[0]), torch.tensor(key[1]), kv_heads, length, batch, tiles, workers)
        found = _lists[key] = [item._replace(items=item.items.to(device)) for item in built]
        if len(_lists) > KEPT_LISTS:
            _lists.popitem(last=False)
    else:
        _lists.move_to_end(key)
    return found


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the second of two launches, one per device."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
