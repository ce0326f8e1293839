"""Decoding over ragged per-head caches on the CPU: one SDPA call for each set of KV heads of equal length, on views.

The query heads of a KV head are rows of one product, so that its keys are read once: ATen's grouped SDPA reads them
once for every query head (benchmarks/cpu_decode.py). Nothing of the cache is copied, and no slot beyond those that are
filled is read: it may hold anything, NaN too.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Slots of a head from which one head is worth sharing among threads that would idle; below, the second call and the
# merge (about 40 us) take what the other thread saves: 512 slots of 128 bfloat16 take 25 us.
SPLIT_FROM = 4096


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


class Spans(NamedTuple):
    """What narrows the slots that a query keeps: positions int (B, C), rows int (B, T), sinks and windows int
    (G, share)."""

    sinks: Tensor
    windows: Tensor
    positions: Tensor
    rows: Tensor


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
    spans = None
    if positions is not None:
        assert sinks is not None and windows is not None and at is not None
        rows = at[:, None] + torch.arange(tokens)
        spans = Spans(sinks.view(groups, -1), windows.view(groups, -1), positions.expand(batch, -1), rows)
    packed = q.reshape(batch, groups, heads // groups * tokens, dim)
    if scale <= 0:  # SDPA hides keys before it scales
        packed, scale = packed * scale, 1.0
    plan = calls(tuple(starts.tolist()), tuple(map(tuple, filled.tolist())))
    if len(plan) == 1 and plan[0].shape[1] == groups and plan[0].used:
        return _attend(packed, k, v, scale, plan[0], spans).reshape(batch, heads, tokens, width)
    out = q.new_empty(batch, groups, packed.shape[2], width)
    for call in plan:
        if call.used:
            out[call.which] = _attend(packed[call.which], k, v, scale, call, spans)
        else:
            out[call.which] = 0.0
    return out.view(batch, heads, tokens, width)


@lru_cache(maxsize=1024)
def runs(starts: tuple[int, ...]) -> tuple[Run, ...]:
    """KV heads by equal capacity, then by equal distance from one to the next, both as heads and in memory."""
    found: list[Run] = []
    open_runs: dict[int, int] = {}
    for head, (start, end) in enumerate(pairwise(starts)):
        at = open_runs.get(end - start)
        if at is not None:
            run = found[at]
            last = run.head + (run.heads - 1) * run.step, run.start + (run.heads - 1) * run.stride
            step = head - last[0], start - last[1]
            if run.heads == 1 or step == (run.step, run.stride):
                found[at] = run._replace(step=step[0], stride=step[1], heads=run.heads + 1)
                continue
        open_runs[end - start] = len(found)
        found.append(Run(head, 1, 1, start, end - start, end - start))
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


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, call: Call, spans: Spans | None) -> Tensor:
    """q (entries, heads, rows, D) of a call against its slots of k and v (B, C, ·) -> (entries, heads, rows, Dv)."""
    mask = None if spans is None else _mask(call, spans, q.dtype)
    keys, values = _slots(k, call), _slots(v, call)
    if mask is not None:
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        # What SDPA makes of a row of -inf differs between its kernels.
        return out.masked_fill(mask.amax(-1, keepdim=True) == float("-inf"), 0.0)
    if call.used >= SPLIT_FROM and call.shape[0] == 1 and keys.shape[3] == values.shape[3]:
        parts = torch.get_num_threads() // call.shape[1]
        if parts > 1:
            return _split(q, keys, values, scale, parts)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (b, h, R, D), k and v (b, h, L, D) -> out (b, h, R, D), logsumexp (b, h, R) in at least float32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def _split(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: int) -> Tensor:
    """One batch entry with its keys in parts that threads share: ATen gives a head's keys to one thread."""
    size, rest = divmod(k.shape[2], parts)

    def in_parts(x: Tensor) -> Tensor:
        shape, strides = (parts, x.shape[1], size, x.shape[3]), (size * x.stride(2), *x.stride()[1:])
        return x.as_strided(shape, strides, x.storage_offset())

    out, lse = _flash(q.expand(parts, -1, -1, -1), in_parts(k), in_parts(v), scale)
    if rest:
        last, last_lse = _flash(q, k[:, :, -rest:], v[:, :, -rest:], scale)
        out, lse = torch.cat((out, last)), torch.cat((lse, last_lse))
    return (out * torch.softmax(lse, 0)[..., None]).sum(0, keepdim=True).to(q.dtype)


def _mask(call: Call, spans: Spans, dtype: torch.dtype) -> Tensor | None:
    """Additive mask (entries, heads, rows, used) of what the queries of a call do not keep; None if they keep all."""
    (entries, heads), share = call.which, spans.windows.shape[1]
    held = _slots(spans.positions[:, :, None], call).squeeze(3)[:, :, None, None, :]
    rows = spans.rows[entries]
    back = rows[:, None, None, :, None] - held
    sinks, windows = spans.sinks[heads], spans.windows[heads]
    if bool((sinks == sinks[:, :1]).all()) and bool((windows == windows[:, :1]).all()):
        # One row serves all query heads of a KV head.
        sinks, windows = sinks[:, :1], windows[:, :1]
    keep = (back < windows[:, :, None, None]) | (held < sinks[:, :, None, None])
    keep &= back >= 0
    if bool(keep.all()):
        return None
    mask = torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf"))
    return mask.expand(-1, -1, share, -1, -1).flatten(2, 3)
