"""New tokens of any number against a cache that holds some already, on the CPU: two attentions and their merge.

    the new keys    the span prefill kernel, whose sinks are what is left of them behind the old tokens
    the old ones    the slots of each KV head as they lie, under the mask that their positions say, in tiles of rows

put together by their rows' logsumexp (Milakov and Gimelshein, arXiv:1805.02867). Rows further from the old tokens than
the window see the sinks alone, so that a long chunk costs a short window no more than its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen.cache_prefill import columns, taken, together
from attnopt.codegen.emit import load
from attnopt.codegen.slots import held
from attnopt.codegen.spec import SpanPrefill

# Elements of one tile's mask, at most: 16 MB of float32.
TILE = 2**22


def chunk(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The output of a step, nothing written: arguments and result are those of attnopt/codegen/reference_cache.py."""
    if valid is not None and not bool(valid.all()):
        place, order = together(valid)
        q, k, v = (taken(x, order) for x in (q, k, v))
        found = taken(_chunk(q, k, v, keys, values, n, table, spans, scale), place)
        return found.masked_fill_(~valid[:, None, :, None], 0.0)
    return _chunk(q, k, v, keys, values, n, table, spans, scale)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, table: Tensor, spans: Tensor, scale: float
) -> Tensor:
    """`chunk` where all tokens count."""
    seen, (sinks, windows) = n.tolist(), columns(spans)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    if not out.numel():
        return out
    most = int(sinks.max())
    if min(seen) < most and min(seen) != max(seen):
        for entry in range(len(seen)):
            one = slice(entry, entry + 1)
            new, old = (q[one], k[one], v[one]), (keys[one], values[one], n[one])
            out[one] = _chunk(*new, *old, table, spans, scale)
        return out
    spec = SpanPrefill(
        "cpu", str(q.dtype).removeprefix("torch."), q.shape[1], k.shape[1], q.shape[3], v.shape[3], False
    )
    left = (sinks - min(seen)).clamp(min=0)
    near, near_lse = load(spec).prefill_lse(q, k, v, left, windows, scale)
    out.copy_(near)
    share = q.shape[1] // k.shape[1]
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    for group, (start, capacity, sink, _) in enumerate(table.tolist()):
        own = slice(group * share, (group + 1) * share)
        head = Head(start, capacity, sink, spans[own])
        for rows, far, far_lse in _old(q[:, own], keys, values, n, head, scale):
            part = out[:, own, rows]
            # A row may keep no key of either, and -inf less -inf has no value.
            ahead = (far_lse - near_lse[:, own, rows]).masked_fill_(far_lse == float("-inf"), float("-inf"))
            weight = torch.sigmoid(ahead)[..., None]
            part += (weight * (far.to(weight.dtype) - part)).to(part.dtype)
    return out


class Head(NamedTuple):
    """A KV head: its first slot, its slots, its sink, and the spans int32 (share, 2) of its query heads."""

    start: int
    capacity: int
    sink: int
    spans: Tensor


def _old(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, head: Head, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a chunk against the slots of one KV head: q (B, share, T, D) -> rows, (B, share, rows, Dv) and their
    logsumexp (B, share, rows), -inf where a row keeps no old key; nothing for rows that cannot."""
    batch, share, tokens, _ = q.shape
    least, most = (max(0, int(x)) for x in n.aminmax())
    filled = min(most, head.capacity)
    sinks, windows = head.spans.unbind(1)
    reach = int(windows.max())
    if least == filled == most > 0 and most + tokens <= int(windows.min()):
        # Every row keeps every slot: nothing to mask. 453 ms become 190 for 2048 rows after 8000 in bfloat16.
        slots = slice(head.start, head.start + filled)
        yield slice(0, tokens), *masked(q, keys[:, slots], values[:, slots], None, scale)
        return
    position = held(n, head.capacity, head.sink, filled)
    step = max(1, TILE // (batch * share * max(filled, 1)))
    first = 0
    while first < tokens:
        # The newest old key is one position before the first row.
        near = first + 1 < reach
        end = min(tokens, first + step, reach - 1 if near else tokens)
        live = filled if near else min(filled, int(sinks.max()))
        if not live:
            return
        keep = kept_old(position[:, :live], n + first, end - first, head.spans)
        slots = slice(head.start, head.start + live)
        yield slice(first, end), *masked(q[:, :, first:end], keys[:, slots], values[:, slots], keep, scale)
        first = end


def kept_old(positions: Tensor, at: Tensor, rows: int, spans: Tensor) -> Tensor:
    """Which slots that hold positions int (B, L), -1 for none, are kept from `rows` positions on, the first of which is
    at int (B,), by query heads of spans int (share, 2): bool (B, share, rows, L)."""
    sinks, windows = spans[:, :, None, None].unbind(1)
    here = positions[:, None, None, :]
    back = (at[:, None] + torch.arange(rows))[:, None, :, None] - here
    keep = (back < windows) | (here < sinks)
    keep &= (here >= 0) & (back >= 0)
    return keep


def masked(q: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, share, R, D), keys (B, L, D), values (B, L, Dv), keep bool (B, share, R, L), None for all -> out
    (B, share, R, Dv) and its rows' logsumexp (B, share, R)."""
    batch, share, rows, dim = q.shape
    length, width = values.shape[1:]
    flat = q.reshape(batch, 1, share * rows, dim)
    mask = None
    if keep is not None and not bool(keep.all()):
        # An empty slot may hold anything, NaN too, and a weight of 0 would not hide that.
        used = keep.flatten(1, 2).any(1)[..., None]
        keys, values = (x if bool(used.all()) else x.masked_fill(~used, 0.0) for x in (keys, values))
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, float("-inf")).view(batch, 1, -1, length)
    if dim != width:
        flat, keys = (F.pad(x, (0, max(0, width - dim))) for x in (flat, keys))
        values = F.pad(values, (0, max(0, dim - width)))
    parts = (x if x.stride(-1) == 1 else x.contiguous() for x in (flat, keys[:, None], values[:, None]))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, attn_mask=mask, scale=scale)
    out, lse = out[..., :width].view(batch, share, rows, width), lse.view(batch, share, rows)
    if keep is not None and mask is not None:
        dead = ~keep.any(-1)
        out, lse = out.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, float("-inf"))
    return out, lse
