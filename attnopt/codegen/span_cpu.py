"""Per-head sink + window causal prefill on the CPU: dense heads out of SDPA, the others in the compiled kernel.

Where that kernel does not serve (native.py says where), out of ATen's flash attention and strided copies. Heads of one
span that share a KV head become extra query rows of one call, so that K and V are read once and the products are large
enough: at 32 dims in bfloat16 a score costs 1.9 ns with 32 query rows a call, 1.0 with 256, 0.7 with 768 (0.8 in dense
causal attention). A windowed group of sink S and window W runs in two parts:

    rows below S + W    plain causal: the window still touches the sinks, every causal key is kept
    rows from S + W     chunks of C rows against [S sinks | W + C keys ending at the chunk's last row]; sinks and
                        window are disjoint here, and all chunks share one mask because all their bands look alike

From `Tuning.split_from` on, the W - C keys that every row of a chunk keeps take no mask: they are a call of their own
on overlapping views of K and V, merged with the masked edges [S sinks | first C keys | last C keys] by logsumexp.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.padding_cpu import Run, after_run, real_runs

# Score of a padded key: minus the square of this, times the scale. Finite in float16; exp of it is 0.
PENALTY = 2.0**15


@dataclass(frozen=True)
class Tuning:
    """Constants chosen by measurement (benchmarks/cpu_prefill.py). They change the time, never the result.

    rows: query rows (heads of a KV group x chunk rows) of one masked call; segment: elements of K copied at a time, so
    that copies stay in the cache; split_from: first window that is split into a middle and edges; extra: width of the
    padding feature.
    """

    rows: int = 192
    segment: int = 2**19
    split_from: int = 512
    extra: int = 1


@dataclass(frozen=True)
class Group:
    """Query heads of one span; `heads` lists `share` consecutive entries for each KV head of `kv_heads`."""

    sink: int
    window: int
    share: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


def tuning(dtype: torch.dtype, head_dim: int) -> Tuning:
    """The constants for a dtype and a head size, measured on one thread of a Xeon with AMX, torch 2.13.

    rows, share of the ideal at N = 4096, 8 over 4 heads, 32 sinks, rows 128, 192, 256, 384 (- is below the rest):
    bfloat16 D=32 W=64: .29 .30 .26 .24; W=256: .45 .48 .47 .45; D=128 W=256: - .39 .40 .40; W=1024: - - .59 .63;
    float32 D=32 W=64: .30 .31 .28 .24; W=256: .55 .55 .53 -; W=1024: .80 .84 .84 .76.
    segment 2**19 against 2**17 and 2**21, bfloat16 W=128, 256 rows: .35 .33 .31. split_from: W=1024 in bfloat16
    .70 split, .65 whole; W=512 .58, .53; W=256 .41, .48.

    Padding feature, time over unpadded causal SDPA at N = 4096 / 8192 (widths 1, 8, 16, 32):
    bfloat16 D=32: 1.55 1.13 1.07 1.12 / 1.55 1.10 1.06 1.14; D=64: 1.13 1.04 1.14 1.13 / 1.09 1.00 1.13 1.11;
    float32 D=32: 1.09 1.19 1.24 1.61 / 1.10 1.16 1.20 1.56; D=64: 1.06 1.11 1.11 1.30 / 1.05 1.10 1.10 1.30.
    An explicit mask: 2.0 to 2.7 as floats, 2.3 to 3.2 as booleans.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return Tuning(extra=16) if head_dim < 64 else Tuning(rows=384, extra=8)
    return Tuning(extra=1)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    windows: Tensor,
    scale: float,
    pad: Tensor | None = None,
    tune: Tuning | None = None,
) -> Tensor:
    """q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), sinks and windows int (H,), pad bool (B, N) -> (B, H, N, Dv).

    Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])`` and ``pad[b, j]``.
    A row with no kept key is 0. The result is laid out as (B, N, H, Dv), as SDPA's own result is.
    """
    return _prefill(q, k, v, sinks, windows, scale, pad, tune, None)


def prefill_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    windows: Tensor,
    scale: float,
    pad: Tensor | None = None,
    tune: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefill`, and the logsumexp of each row's kept scores: natural, (B, H, N) in float32 (float64 for float64
    inputs), -inf where no key is kept.
    """
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return _prefill(q, k, v, sinks, windows, scale, pad, tune, lse), lse


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    windows: Tensor,
    scale: float,
    pad: Tensor | None,
    tune: Tuning | None,
    lse: Tensor | None,
) -> Tensor:
    """The output; logsumexps are written to `lse` (B, H, N) if it is given."""
    batch, heads, length, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    tune, ours = tune or tuning(q.dtype, q.shape[3]), native.takes(q.dtype, q.shape[3], width)
    if pad is not None and lse is not None:
        pad = None if bool(pad.all()) else pad
    elif pad is not None:
        runs = real_runs(pad) if pad.numel() else []
        if runs is not None:
            return _in_runs(q, k, v, sinks, windows, scale, runs, tune)
    groups = group_heads(sinks.tolist(), windows.tolist(), k.shape[1], length)
    if len(groups) == 1 and groups[0].window == length and batch and length and lse is None:
        return _all_dense(q, k, v, scale, pad, tune)
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    if not out.numel():
        return out
    if idle := [head for group in groups if not group.sink + group.window for head in group.heads]:
        out[:, idle] = 0.0
        if lse is not None:
            lse[:, idle] = float("-inf")
        groups = [group for group in groups if group.sink + group.window]
    if ours:
        # Dense heads are SDPA's, but where padding has holes.
        spared = [group for group in groups if pad is None and group.window == length]
        chosen = [head for group in groups if group not in spared for head in group.heads]
        if chosen:
            native.prefill(q, k, v, out, lse, sinks, windows, pad, chosen, scale)
        groups = spared
    if not groups:
        return out
    q, k, v, scale = _widen(q, k, v, scale, pad, tune.extra)
    # ATen's flash kernel, called without SDPA's own checks, reads features one after the other.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    for group in groups:
        whole = len(group.heads) == heads
        target = out if whole else out.new_empty(batch, length, len(group.heads), width).transpose(1, 2)
        sums = None if lse is None else lse.new_empty(batch, len(group.heads), length)
        taken = _take(q, group.heads), _take(k, group.kv_heads), _take(v, group.kv_heads)
        _group(*taken, target, sums, group, scale, tune)
        if pad is not None:
            dead = ~live_rows(pad, group.sink, group.window)[:, None, :]
            target.masked_fill_(dead[..., None], 0.0)
            if sums is not None:
                sums.masked_fill_(dead, float("-inf"))
        if not whole:
            out.index_copy_(1, torch.tensor(group.heads), target)
        if lse is not None and sums is not None:
            lse.index_copy_(1, torch.tensor(group.heads), sums)
    return out


def _in_runs(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, windows: Tensor, scale: float, runs: list[Run], tune: Tuning
) -> Tensor:
    """`prefill` where the real tokens of every sample are one run: each run is attention of its own, on views."""
    batch, heads, length, _ = q.shape
    if [run[1:] for run in runs] == [(batch, 0, length)]:
        return prefill(q, k, v, sinks, windows, scale, None, tune)
    out = torch.zeros(batch, length, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    for first, last, start, stop in runs:
        if start == stop:
            continue
        here = [x[first:last] for x in (q, k, v, out)]
        rows, keys, values, target = (x[:, :, start:stop] for x in here)
        kept = (sinks - start).clamp(min=0)
        target.copy_(prefill(rows, keys, values, kept, windows, scale, None, tune))
        if stop == length:
            continue
        for group in group_heads(kept.tolist(), windows.tolist(), k.shape[1], length - start):
            late = _take(here[0][:, :, stop:], group.heads)
            held, given = (_take(x, group.kv_heads) for x in (keys, values))
            index = torch.tensor(group.heads)
            for row, result in after_run(late, held, given, group.sink, group.window, scale):
                here[3][:, :, stop + row : stop + row + result.shape[2]].index_copy_(1, index, result)
    return out


def causal_padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, scale: float, extra: int | None = None) -> Tensor:
    """Causal attention under a padding mask with no mask tensor. Shapes and layout as `prefill`; traceable.

    One more feature, constant in q and very negative in the keys that are padded, makes their weights exactly 0 and
    the kept scores exactly what they were, so `is_causal` stays. `extra` is the width that feature is rounded up to.
    """
    width = v.shape[3]
    extra = tuning(q.dtype, q.shape[3]).extra if extra is None else extra
    q, k, v, scale = _widen(q, k, v, scale, pad, extra)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    dead = pad.cumsum(1) == 0
    return out.transpose(1, 2)[..., :width].masked_fill(dead[:, :, None, None], 0.0).contiguous().transpose(1, 2)


def _all_dense(q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, tune: Tuning) -> Tensor:
    if pad is not None:
        return causal_padded(q, k, v, pad, scale, tune.extra)
    width = v.shape[3]
    q, k, v, scale = _widen(q, k, v, scale, None, tune.extra)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)[..., :width].contiguous().transpose(1, 2)  # SDPA keeps the layout of q


def live_rows(pad: Tensor, sink: int, window: int) -> Tensor:
    """Rows that keep at least one key, bool (B, N), for a span and a padding mask bool (B, N), true where kept."""
    count = F.pad(pad.long().cumsum(1), (1, 0))
    row = torch.arange(pad.shape[1], device=pad.device)
    in_window = count[:, 1:] - count[:, (row + 1 - window).clamp(0)]
    return (in_window + count[:, (row + 1).clamp(max=sink)]) > 0


def group_heads(sinks: list[int], windows: list[int], kv_heads: int, length: int) -> list[Group]:
    """Heads by equal span, then by how many of them share a KV head. A span that covers `length` is (0, length)."""
    share = len(sinks) // kv_heads
    spans: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for head, (sink, window) in enumerate(zip(sinks, windows, strict=True)):
        sink, window = max(sink, 0), max(window, 0)
        span = (0, length) if sink + window >= length else (sink, window)
        spans[span][head // share].append(head)
    groups = []
    for (sink, window), by_kv in sorted(spans.items()):
        for size in sorted({len(heads) for heads in by_kv.values()}):
            kept = [kv for kv in sorted(by_kv) if len(by_kv[kv]) == size]
            heads = tuple(head for kv in kept for head in by_kv[kv])
            groups.append(Group(sink, window, size, heads, tuple(kept)))
    return groups


def _take(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """x[:, heads]: a view where the heads are consecutive."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return x.narrow(1, heads[0], len(heads))
    return x.index_select(1, torch.tensor(heads, device=x.device))


def _widen(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, extra: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Equal feature widths, which the flash kernel asks for, and the padding feature if there is a padding mask."""
    dim, dim_v = q.shape[3], v.shape[3]
    if pad is None:
        width = max(dim, dim_v)
        if dim < width:
            q, k = F.pad(q, (0, width - dim)), F.pad(k, (0, width - dim))
        return q, k, F.pad(v, (0, width - dim_v)) if dim_v < width else v, scale
    if scale < 1e-4:  # the penalty is multiplied by the scale: keep it negative and large
        q, scale = q * scale, 1.0
    width = max(dim + extra, dim_v)
    feature = torch.where(pad, 0.0, -PENALTY).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
    q = torch.cat((q, q.new_full((1, 1, 1, 1), PENALTY).expand(*q.shape[:3], 1)), -1)
    k = torch.cat((k, feature), -1)
    rest = width - dim - 1
    if rest:
        q, k = F.pad(q, (0, rest)), F.pad(k, (0, rest))
    return q, k, F.pad(v, (0, width - dim_v)) if dim_v < width else v, scale


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """q (b, h, R, D), k and v (b, g, L, D), mask (R, L) in q's dtype -> out (b, h, R, D), logsumexp (b, h, R)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=mask, scale=scale
    )


def _group(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, group: Group, scale: float, tune: Tuning
) -> None:
    """One span: q (B, kv * share, N, D), k and v (B, kv, N, D) into out (B, kv * share, N, Dv) and lse, if it is given,
    (B, kv * share, N).
    """
    length, start = q.shape[2], group.sink + group.window
    result, sums = _flash(q[:, :, :start], k[:, :, :start], v[:, :, :start], scale, causal=True)
    out[:, :, :start].copy_(result[..., : out.shape[3]])
    if lse is not None:
        lse[:, :, :start].copy_(sums)
    if start == length:
        return
    packed = (len(group.kv_heads), group.share)
    q, out = q.unflatten(1, packed), out.unflatten(1, packed)
    lse = None if lse is None else lse.unflatten(1, packed)[..., None]
    rows = max(1, min(tune.rows // group.share, length - start))
    split = group.window >= tune.split_from and group.window > rows
    copied = group.sink + (2 * rows if split else group.window + rows)
    step = max(1, tune.segment // (k.shape[0] * k.shape[1] * copied * k.shape[3]))
    for first, count in _runs(start, length, rows, step):
        chunk_q = _chunks(q, first, count, rows, rows)  # (B, count, kv, share, rows, D)
        flat_q = chunk_q.reshape(-1, packed[0], group.share * rows, q.shape[-1])
        attend = _split if split else _whole
        result, sums = attend(flat_q, k, v, first, count, rows, group, scale)
        result = result[..., : out.shape[-1]].unflatten(0, (-1, count)).unflatten(3, (group.share, rows))
        _chunks(out, first, count, rows, rows).copy_(result)
        if lse is not None:
            sums = sums.unflatten(0, (-1, count)).unflatten(3, (group.share, rows))
            _chunks(lse, first, count, rows, rows).copy_(sums[..., None])


def _runs(start: int, length: int, rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(first row, chunks) of each call: chunks end at `length`; a ragged head is one more chunk, partly redone."""
    whole = (length - start) // rows
    if whole * rows != length - start:
        yield start, 1
    for chunk in range(0, whole, step):
        yield length - (whole - chunk) * rows, min(step, whole - chunk)


def _chunks(x: Tensor, first: int, count: int, stride: int, size: int) -> Tensor:
    """Windows of x (B, ..., N, D) along N as a view (B, count, ..., size, D), `stride` apart; they may overlap."""
    row = x.stride(-2)
    shape = (x.shape[0], count, *x.shape[1:-2], size, x.shape[-1])
    strides = (x.stride(0), stride * row, *x.stride()[1:])
    return x.as_strided(shape, strides, x.storage_offset() + first * row)


def _whole(
    q: Tensor, k: Tensor, v: Tensor, first: int, count: int, rows: int, group: Group, scale: float
) -> tuple[Tensor, Tensor]:
    """Chunks against [sinks | window] under one mask: q (B * count, kv, share * rows, D) -> the same shape, and the
    rows' logsumexp.
    """
    sink, window = group.sink, group.window
    pieces = ((first - window, window + rows),)
    keys, values = (_gather(x, sink, pieces, count, rows) for x in (k, v))
    return _flash(q, keys, values, scale, band_mask(sink, window, rows, group.share, False, q.dtype))


def _split(
    q: Tensor, k: Tensor, v: Tensor, first: int, count: int, rows: int, group: Group, scale: float
) -> tuple[Tensor, Tensor]:
    """As `_whole`, the keys that all rows keep without a mask, then merged with [sinks | both edges] by logsumexp."""
    sink, window = group.sink, group.window
    keys, values = (_chunks(x, first - window + rows, count, rows, window - rows).flatten(0, 1) for x in (k, v))
    inner, inner_lse = _flash(q, keys, values, scale)
    keys, values = (_gather(x, sink, ((first - window, rows), (first, rows)), count, rows) for x in (k, v))
    outer, outer_lse = _flash(q, keys, values, scale, band_mask(sink, window, rows, group.share, True, q.dtype))
    share = torch.sigmoid(outer_lse - inner_lse).to(q.dtype).unsqueeze(-1)
    return torch.lerp(inner, outer, share), torch.logaddexp(inner_lse, outer_lse)


def _gather(x: Tensor, sink: int, pieces: tuple[tuple[int, int], ...], count: int, rows: int) -> Tensor:
    """Sinks, then windows (first row, size) for each of `count` chunks: x (B, kv, N, D) -> (B * count, kv, keys, D)."""
    size = sink + sum(size for _, size in pieces)
    keys = x.new_empty(x.shape[0], count, x.shape[1], size, x.shape[3])
    keys[:, :, :, :sink] = x[:, None, :, :sink]
    at = sink
    for first, size in pieces:
        keys[:, :, :, at : at + size] = _chunks(x, first, count, rows, size)
        at += size
    return keys.flatten(0, 1)


@lru_cache(maxsize=64)
def band_mask(sink: int, window: int, rows: int, share: int, edges: bool, dtype: torch.dtype) -> Tensor:
    """Additive mask (share * rows, keys) of a chunk: 0 where kept, -inf elsewhere. In q's dtype and cached, because
    SDPA converts a boolean mask on every call.

    Window keys begin `window` rows before the chunk, so row r keeps columns r + 1 to r + window of them; with
    ``edges`` only the first and the last `rows` of those columns are there.
    """
    with torch.inference_mode(False):
        offset = torch.arange(window + rows) - torch.arange(rows)[:, None]
        keep = (offset >= 1) & (offset <= window)
        if edges:
            keep = torch.cat((keep[:, :rows], keep[:, window:]), 1)
        keep = torch.cat((torch.ones(rows, sink, dtype=torch.bool), keep), 1)
        return torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, float("-inf")).repeat(share, 1)
