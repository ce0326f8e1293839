"""Decoding over ragged per-head caches on the CPU: the compiled kernel, or SDPA on views where it does not serve.

Without that kernel (native.py), one SDPA call for each set of KV heads of equal length. The query heads of a KV head
are rows of one product, so that its keys are read once: ATen's grouped SDPA reads them once for every query head
(benchmarks/cpu_decode.py). Nothing of the cache is copied, and no slot beyond those that are filled is read: it may
hold anything, NaN too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.decode_list import capacities_of

# Slots of a head from which one head is shared among threads that would idle. Two threads, four rows of 128 bfloat16:
# 16384 slots take 1.00 ms whole and 0.52 in halves; the second call for an odd slot and the merge take 0.02 to 0.04,
# which is half of what 1024 slots take whole.
SPLIT_FROM = 2048


class Run(NamedTuple):
    """KV heads head, head + step, ... (`heads` of them) of one capacity; their segments begin at start, start + stride,
    ... in slots."""

    head: int
    step: int
    heads: int
    start: int
    stride: int
    capacity: int


class Call(NamedTuple):
    """Some KV heads in some batch entries, with equally many filled slots.

    which: those, as an index of a tensor (B, G, ...); shape: (entries, heads, filled slots); entry: the first batch
    entry; start and stride: where the segment of the first head begins and how far it is to the next, in slots.
    """

    which: tuple[slice, slice]
    shape: tuple[int, int, int]
    entry: int
    start: int
    stride: int

    @property
    def used(self) -> int:
        return self.shape[2]


class Kept(NamedTuple):
    """What queries keep of all slots: keep bool (B, S, T, C), and mask, which adds -inf to the rest, in q's dtype. S is
    the query heads of a KV head, or 1 where they keep the same and one row serves them."""

    keep: Tensor
    mask: Tensor


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    filled: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    windows: Tensor | None = None,
    positions: Tensor | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k (B, C, D), v (B, C, Dv), starts int (G + 1,), filled int (B, G) -> (B, H, T, Dv).

    Which slots a query keeps, and what positions need beside them: attnopt/codegen/reference_decode.py.
    """
    batch, heads, tokens, dim = q.shape
    groups, width = starts.shape[0] - 1, v.shape[2]
    fits = heads // groups * tokens <= native.MOST_ROWS and q.numel() and width
    if scale > 0 and fits and native.takes(q.dtype, dim, width):
        return native.decode(q, k, v, starts, filled, scale, sinks, windows, positions, at)
    table = tuple(starts.tolist())
    capacities_of(table)
    if table[-1] != k.shape[1]:
        raise ValueError(f"starts ends at {table[-1]}, and the cache has {k.shape[1]} slots")
    kept = None
    if positions is not None:
        assert sinks is not None and windows is not None and at is not None
        kept = _kept(positions.expand(batch, -1), at, tokens, spans_of_slots(table, *_values(sinks, windows)), q.dtype)
    packed = q.reshape(batch, groups, heads // groups * tokens, dim)
    if scale <= 0:  # SDPA hides keys before it scales
        packed, scale = packed * scale, 1.0
    plan = calls(table, tuple(map(tuple, filled.tolist())))
    if len(plan) == 1 and plan[0].shape[1] == groups and plan[0].used:
        return _attend(packed, k, v, scale, plan[0], kept).reshape(batch, heads, tokens, width)
    out = q.new_empty(batch, groups, packed.shape[2], width)
    for call in plan:
        if call.used:
            out[call.which] = _attend(packed[call.which], k, v, scale, call, kept)
        else:
            out[call.which] = 0.0
    return out.view(batch, heads, tokens, width)


@lru_cache(maxsize=1024)
def runs(starts: tuple[int, ...]) -> tuple[Run, ...]:
    """KV heads by equal capacity, then by equal distance from one to the next, both as heads and in memory."""
    found: list[Run] = []
    open_runs: dict[int, int] = {}
    for head, (start, capacity) in enumerate(zip(starts, capacities_of(starts), strict=False)):
        at = open_runs.get(capacity)
        if at is not None:
            run = found[at]
            last = run.head + (run.heads - 1) * run.step, run.start + (run.heads - 1) * run.stride
            step = head - last[0], start - last[1]
            if run.heads == 1 or step == (run.step, run.stride):
                found[at] = run._replace(step=step[0], stride=step[1], heads=run.heads + 1)
                continue
        open_runs[capacity] = len(found)
        found.append(Run(head, 1, 1, start, capacity, capacity))
    return tuple(found)


@lru_cache(maxsize=1024)
def calls(starts: tuple[int, ...], filled: tuple[tuple[int, ...], ...]) -> tuple[Call, ...]:
    """The SDPA calls for a cache: one for each run, and more where batch entries or heads of it differ in length."""
    found: list[Call] = []
    for run in runs(starts):
        last = run.head + (run.heads - 1) * run.step + 1
        kept = [[max(0, min(n, run.capacity)) for n in counts[run.head : last : run.step]] for counts in filled]
        entry = 0
        while entry < len(kept):
            own, end = kept[entry], entry + 1
            while end < len(kept) and kept[end] == own:
                end += 1
            if min(own) == max(own):
                found.append(_call(entry, end, run, own[0]))
            else:
                alone = (Run(run.head + i * run.step, 1, 1, run.start + i * run.stride, 0, 0) for i in range(run.heads))
                found += [_call(entry, end, *pair) for pair in zip(alone, own, strict=True)]
            entry = end
    return tuple(found)


def _call(entry: int, end: int, run: Run, used: int) -> Call:
    heads = slice(run.head, run.head + (run.heads - 1) * run.step + 1, run.step)
    return Call((slice(entry, end), heads), (end - entry, run.heads, used), entry, run.start, run.stride)


def _slots(x: Tensor, call: Call) -> Tensor:
    """The filled slots of a call, as a view (entries, heads, used, D) of x (B, C, D)."""
    batch, slot, last = x.stride()
    offset = x.storage_offset() + call.entry * batch + call.start * slot
    return x.as_strided((*call.shape, x.shape[2]), (batch, call.stride * slot, slot, last), offset)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, call: Call, kept: Kept | None) -> Tensor:
    """q (entries, heads, rows, D) of a call against its slots of k and v (B, C, ·) -> (entries, heads, rows, Dv)."""
    keys, values = _slots(k, call), _slots(v, call)
    if kept is not None:
        keep = _columns(kept.keep, call)
        if not bool(keep.all()):
            mask = _by_row(_columns(kept.mask, call), q)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
            # What SDPA makes of a row that keeps nothing differs between its kernels.
            return out.masked_fill_(~_by_row(keep.any(-1, keepdim=True), q), 0.0)
    if call.used >= SPLIT_FROM and min(call.shape[:2]) == 1 and keys.shape[3] == values.shape[3]:
        parts = torch.get_num_threads() // (call.shape[0] * call.shape[1])
        if parts > 1:
            return _split(q, keys, values, scale, parts)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (b, h, R, D), k and v (b, h, L, D) -> out (b, h, R, D), logsumexp (b, h, R) in at least float32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def _split(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: int) -> Tensor:
    """One batch entry, or one head, with its keys in parts that threads share: ATen gives a head's keys to one thread.

    The parts take the place of the axis of size 1, so that nothing is copied.
    """
    axis = 0 if q.shape[0] == 1 else 1
    size, rest = divmod(k.shape[2], parts)

    def in_parts(x: Tensor) -> Tensor:
        shape, strides = [*x.shape], [*x.stride()]
        shape[axis], shape[2], strides[axis] = parts, size, size * strides[2]
        return x.as_strided(shape, strides, x.storage_offset())

    shape = [*q.shape]
    shape[axis] = parts
    out, lse = _flash(q.expand(shape), in_parts(k), in_parts(v), scale)
    if rest:
        last, last_lse = _flash(q, k[:, :, -rest:], v[:, :, -rest:], scale)
        out, lse = torch.cat((out, last), axis), torch.cat((lse, last_lse), axis)
    return (out * torch.softmax(lse, axis)[..., None]).sum(axis, keepdim=True).to(q.dtype)


def _values(sinks: Tensor, windows: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sinks.tolist()), tuple(windows.tolist())


# A table takes 8 bytes a slot and row, of the 512 that a slot of 128 bfloat16 takes itself.
@lru_cache(maxsize=64)
def spans_of_slots(starts: tuple[int, ...], sinks: tuple[int, ...], windows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sinks and windows int32 (S, 1, C) of the query heads that read a slot; S as in `Kept`."""
    share = len(windows) // (len(starts) - 1)
    sizes = torch.tensor(capacities_of(starts))
    with torch.inference_mode(False):
        tables = [torch.tensor(x, dtype=torch.int32).view(-1, share) for x in (sinks, windows)]
        if all(bool((x == x[:, :1]).all()) for x in tables):
            tables = [x[:, :1] for x in tables]
        sink, window = (x.repeat_interleave(sizes, 0).t()[:, None].contiguous() for x in tables)
    return sink, window


def _kept(positions: Tensor, at: Tensor, tokens: int, spans: tuple[Tensor, Tensor], dtype: torch.dtype) -> Kept | None:
    """What T queries from the positions at (B,) on keep of slots that hold positions (B, C); None if they keep all."""
    sink, window = spans
    held = positions[:, None, None, :]
    back = (at[:, None] + torch.arange(tokens, dtype=at.dtype))[:, None, :, None] - held
    keep = (back < window) | (held < sink)
    keep = (keep & (back >= 0)).contiguous()
    if bool(keep.all()):
        return None
    return Kept(keep, torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf")))


def _columns(x: Tensor, call: Call) -> Tensor:
    """The filled slots of a call, as a view (entries, heads, S, T, used) of x (B, S, T, C), which is contiguous."""
    batch, head, row, _ = x.stride()
    shape = (*call.shape[:2], x.shape[1], x.shape[2], call.used)
    offset = x.storage_offset() + call.entry * batch + call.start
    return x.as_strided(shape, (batch, call.stride, head, row, 1), offset)


def _by_row(x: Tensor, q: Tensor) -> Tensor:
    """x (entries, heads, S, T, n) -> (entries, heads, rows, n) for q (entries, heads, rows, D); rows are by head."""
    return x.expand(-1, -1, q.shape[2] // x.shape[3], -1, -1).flatten(2, 3)
