"""Attention to a written cache on the CPU: of the buffers only the columns from the first to the last that is kept.

    mask   . . 1 1 1 1 . . . . . .        two pads, four tokens, six slots that nothing was written to yet
    read       k k k k                    one pass over booleans finds where; K and V are read as views

That is what torch's operators do here. The compiled kernel, live.cpp, skips columns that no row keeps between the first
and the last as well, and leaves masks of very many short runs to them.

Entries of a batch that keep other columns are read by themselves where that leaves out enough. Between the first and
the last column the mask decides, as a mask does, whatever is stored where it hides. The query heads of a KV head are
rows of one product, so that its keys are read once.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.reference_live import added, shown


class Columns(NamedTuple):
    """Columns first up to end of a buffer, 0 to 0 where none is kept; `rows`: whether every query keeps one of them."""

    first: int
    end: int
    rows: bool

    @property
    def size(self) -> int:
        return self.end - self.first


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The contract of attnopt/codegen/reference_live.py."""
    _, heads, tokens, dim = q.shape
    width = v.shape[3]
    if q.numel() and width and heads // k.shape[1] * tokens <= native.MOST_ROWS and scale > 0:
        found = native.live(q, k, v, mask, scale) if native.takes(q.dtype, dim, width) else None
        if found is not None:
            return found
    return _attend(q, k, v, mask, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same out of torch's operators."""
    if not q.numel() or not v.shape[3]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    if mask is None:
        return _read(q, k, v, None, scale)
    flags = shown(mask).contiguous()
    columns = live_columns(flags)
    if len(columns) > 1 and _apart(columns):
        entries = [slice(n, n + 1) for n in range(len(columns))]
        return torch.cat([_entries(q[n], k[n], v[n], mask[n], flags[n], columns[n], scale) for n in entries])
    return _entries(q, k, v, mask, flags, columns, scale)


def live_columns(flags: Tensor) -> list[Columns]:
    """For each batch entry of a contiguous mask bool (b, 1, T, C): from the first column that is kept to the last."""
    entries, _, tokens, count = flags.shape
    found = []
    for entry in range(entries):
        first, end, rows = count, 0, True
        for row in range(entry * tokens, (entry + 1) * tokens):
            # The last of 65536 columns takes 2 us to find this way, and by torch's operators ten times as long.
            held = ctypes.string_at(flags.data_ptr() + row * count, count)
            at = held.find(1)
            if at < 0:
                rows = False
            else:
                first, end = min(first, at), max(end, held.rfind(1) + 1)
        found.append(Columns(min(first, end), end, rows))
    return found


def _apart(columns: list[Columns]) -> bool:
    """Whether batch entries are read one by one: where a call for all would read a quarter more, and 1024 columns."""
    together = len(columns) * _union(columns).size
    return together - sum(c.size for c in columns) > max(1024, together // 5)


def _union(columns: list[Columns]) -> Columns:
    filled = [c for c in columns if c.end]
    ends = (min(c.first for c in filled), max(c.end for c in filled)) if filled else (0, 0)
    return Columns(*ends, all(c.rows for c in columns))


def _entries(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, flags: Tensor, columns: list[Columns], scale: float
) -> Tensor:
    """Batch entries against the columns that any of them keeps."""
    one = _union(columns)
    if not one.size:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    keys, values = (x[:, :, one.first : one.end] for x in (k, v))
    cut, keep = (x[..., one.first : one.end] for x in (mask, flags))
    used = keep.any(2)[..., None]
    if not bool(used.all()):
        # What nobody wrote may be anything, NaN too, and a weight of 0 would not hide that.
        keys, values = (x if _finite(x) else x.masked_fill(~used, 0.0) for x in (keys, values))
    # Of several tokens one does not see another: not worth a look.
    whole = mask.dtype == torch.bool and mask.shape[2] == 1 and bool(keep.all())
    out = _read(q, keys, values, None if whole else cut, scale)
    return out if one.rows else out.masked_fill(~keep.any(-1, keepdim=True), 0.0)


def _finite(x: Tensor) -> bool:
    """False where there is a NaN or an infinity, or too large a sum: it takes a tenth of the time that a copy does."""
    # A head at a time: of a part of a buffer in bfloat16 the sum of all makes a copy in float32.
    return bool(x.sum((2, 3)).isfinite().all())


def _read(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, H, T, D) against keys (B, G, n, D) and values (B, G, n, Dv), mask (B | 1, 1, T | 1, n) or None."""
    batch, heads, tokens, dim = q.shape
    groups, width = keys.shape[1], values.shape[3]
    share = heads // groups
    if mask is not None and mask.dtype != torch.bool:
        mask = added(mask, q.dtype)
    if share * tokens > native.MOST_ROWS:
        # Rows enough for a product of every head's own.
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=share > 1)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, share, 1)
    packed = q.reshape(batch, groups, share * tokens, dim)
    out = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)
    return out.reshape(batch, heads, tokens, width)
