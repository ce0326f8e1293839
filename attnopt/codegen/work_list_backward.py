"""The order in which an emitted backward kernel takes its tiles of keys: longest first, as in work_list.py.

An item is one int32, ``(b * G + g) * tiles + t``: one tile of the keys of one KV head, whose program goes through the
queries of every head that reads them. So dk and dv are written once, and no two programs add to the same place.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from attnopt.codegen.work_list import KEPT_LISTS, OVERHEAD, Tile, WorkList, _longest_first, read_table


def query_blocks(sinks: torch.Tensor, windows: torch.Tensor, length: int, tile: Tile) -> torch.Tensor:
    """Blocks of query rows that each tile of keys is seen by: sinks, windows int (H,) -> int64 (H, tiles).

    A sink is seen by every later row, another key by the window rows that begin with its own.
    """
    rows, keys = tile
    sinks, windows = (x[:, None].clamp(0, length).long() for x in (sinks, windows))
    first = torch.arange(0, length, keys)[None, :]
    end = torch.where(first < sinks, length, (first + keys - 1 + windows).clamp(max=length))
    return -(-(end - first) // rows)


def build_keys(
    sinks: torch.Tensor, windows: torch.Tensor, kv_heads: int, length: int, batch: int, tile: Tile
) -> WorkList | None:
    """The list of CPU tables sinks, windows int (H,) for tiles of (query rows, keys); None for an empty input."""
    if not length or not batch or not len(sinks):
        return None
    cost = query_blocks(sinks, windows, length, tile).unflatten(0, (kv_heads, -1)).sum(1) + OVERHEAD
    tiles = cost.shape[1]
    if batch * kv_heads * tiles >= 2**31:
        raise ValueError(f"{batch} × {kv_heads} KV heads × {tiles} key tiles do not fit the int32 codes of a work list")
    order = _longest_first(cost.reshape(-1).to(torch.int32))
    # The same tile of every sample side by side: they last equally long.
    entry = torch.arange(batch)[None, :] * (kv_heads * tiles)
    return WorkList((order[:, None] + entry).reshape(-1).to(torch.int32), tiles, 0)


_lists: OrderedDict[tuple, WorkList | None] = OrderedDict()


def key_list(
    sinks: torch.Tensor, windows: torch.Tensor, kv_heads: int, length: int, batch: int, tile: Tile
) -> WorkList | None:
    """`build_keys` for tables int (H,) on any device, where the list then lies too; kept per table values and shape."""
    key = (read_table(sinks), read_table(windows), kv_heads, length, batch, tile, sinks.device)
    if key in _lists:
        _lists.move_to_end(key)
        return _lists[key]
    made = build_keys(torch.tensor(key[0]), torch.tensor(key[1]), kv_heads, length, batch, tile)
    _lists[key] = None if made is None else made._replace(items=made.items.to(sinks.device))
    if len(_lists) > KEPT_LISTS:
        _lists.popitem(last=False)
    return _lists[key]
