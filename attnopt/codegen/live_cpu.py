"""Attention to a written cache on the CPU: of the buffers only the columns from the first to the last that is kept.

    mask   . . 1 1 1 1 . . . . . .        two pads, four tokens, six slots that nothing was written to yet
    read       k k k k                    one pass over booleans finds where; K and V are read as views

Entries of a batch that keep other columns are read by themselves where that leaves out enough. Between the first and
the last column the mask decides, as a mask does. The query heads of a KV head are rows of one product, so that its keys
are read once.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.reference_live import shown


class Columns(NamedTuple):
    """Columns first up to end of a buffer, of which every one counts, or a mask (b, 1, T | 1, end - first) says which.

    rows: bool (b, 1, T | 1, 1), which queries keep any; None where all do.
    """

    first: int
    end: int
    mask: Tensor | None
    rows: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The contract of attnopt/codegen/reference_live.py."""
    if not q.numel() or not v.shape[3]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    few = q.shape[1] // k.shape[1] * q.shape[2] <= native.MOST_ROWS
    if few and scale > 0 and native.takes(q.dtype, q.shape[3], v.shape[3]):
        found = native.live(q, k, v, mask, scale)
        if found is not None:
            return found
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    if mask is None:
        return _read(q, k, v, Columns(0, k.shape[2], None, None), scale)
    bounds = live_columns(mask)
    if len(bounds) > 1 and _apart(bounds):
        found = [_entry(q[n : n + 1], k[n : n + 1], v[n : n + 1], mask[n : n + 1], bounds[n], scale)
                 for n in range(len(bounds))]  # fmt: skip
        return torch.cat(found)
    filled = [pair for pair in bounds if pair[1]]
    whole = (min(f for f, _ in filled), max(e for _, e in filled)) if filled else (0, 0)
    return _entry(q, k, v, mask, whole, scale)


def live_columns(mask: Tensor) -> list[tuple[int, int]]:
    """For each batch entry of a mask (b, 1, T, C): the first kept column, and the one behind the last; or (0, 0)."""
    flags = shown(mask)
    flags = (flags.any(2) if flags.shape[2] > 1 else flags).reshape(flags.shape[0], -1).contiguous()
    count, found = flags.shape[1], []
    for row in range(flags.shape[0]):
        # Of 65536 columns this finds the last in 2 us, where torch's own search takes ten times as long.
        held = ctypes.string_at(flags.data_ptr() + row * count, count)
        found.append((max(held.find(b"\x01"), 0), held.rfind(b"\x01") + 1))
    return found


def _apart(bounds: list[tuple[int, int]]) -> bool:
    """Whether batch entries are read one by one: where a call for all would read a quarter more, and 1024 columns."""
    filled = [pair for pair in bounds if pair[1]]
    if not filled:
        return False
    together = len(bounds) * (max(e for _, e in filled) - min(f for f, _ in filled))
    return together - sum(e - f for f, e in filled) > max(1024, together // 5)


def _entry(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bounds: tuple[int, int], scale: float) -> Tensor:
    """Queries against the columns between two bounds."""
    first, end = bounds
    if first == end:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    cut = mask[..., first:end]
    keep = shown(cut)
    if bool(keep.all()):
        return _read(q, k, v, Columns(first, end, None if mask.dtype == torch.bool else cut, None), scale)
    rows = keep.any(-1, keepdim=True)
    return _read(q, k, v, Columns(first, end, cut, None if bool(rows.all()) else rows), scale)


def _read(q: Tensor, k: Tensor, v: Tensor, columns: Columns, scale: float) -> Tensor:
    batch, heads, tokens, dim = q.shape
    groups, width, dtype = k.shape[1], v.shape[3], q.dtype
    keys, values = (x[:, :, columns.first : columns.end] for x in (k, v))
    share, mask = heads // groups, columns.mask
    if share * tokens > native.MOST_ROWS:
        # Rows enough for a product of every head's own.
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        out = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=share > 1)
    else:
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.to(dtype)
            mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, share, 1)
        packed = q.reshape(batch, groups, share * tokens, dim)
        out = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)
        out = out.reshape(batch, heads, tokens, width)
    return out if columns.rows is None else out.masked_fill(~columns.rows, 0.0)
