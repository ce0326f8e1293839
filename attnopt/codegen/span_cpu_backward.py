"""Gradients of the per-head sink + window prefill on the CPU, out of ATen's flash backward and strided copies.

The flash backward makes a block of weights anew from the scores and the logsumexp of their rows. Given the logsumexp
and the output over *all* kept keys, it yields what a part of the keys adds to the gradients, so that parts need no
merging: they are summed. Heads are grouped and packed as in attnopt/codegen/span_cpu.py, whose two parts return:

    rows below S + W    plain causal
    rows from S + W     chunks of C rows against [S sinks | W + C keys ending at the chunk's last row]; what the chunks
                        of one call add to dk and dv is summed column block by column block, so that no two overlap

Only the windows are read. Memory beyond the gradients is that of one call's copies, `Tuning.segment`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen.span_cpu import Group, Tuning, _chunks, _gather, _take, _widen, band_mask, group_heads


def tuning(dtype: torch.dtype, head_dim: int) -> Tuning:
    """The constants of the backward for a dtype and a head size.

    `split_from` is the first window whose chunks have twice the rows; nothing is split here, as no part needs merging.

    Measured on one thread of a Xeon with AMX, torch 2.13: share of the ideal over the dense backward at N = 4096, 8
    over 4 heads, 32 sinks, rows 192, 384, 768. bfloat16 D=64 W=256: .39 .39 .33; W=1024: .53 .55 .65; D=128 W=256: .32
    .31 .29; W=1024: .46 .48 .59. float32 D=64 W=256: .44 .40 .32; W=1024: .69 .71 .67; D=128 W=256: .45 .41 .36;
    W=1024: .71 .68 .68. segment 2**19 against 2**17 and 2**21, 384 rows, D=64 W=256: bfloat16 .39 .38 .38, float32 .40
    .41 .34.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return Tuning(rows=384, split_from=1024, extra=16 if head_dim < 64 else 8)
    return Tuning(rows=192, split_from=2**30, extra=1)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor,
    windows: Tensor,
    scale: float,
    pad: Tensor | None = None,
    tune: Tuning | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q (B, H, N, D), k (B, G, N, D) and v (B, G, N, Dv) of a prefill whose output `out` has the gradient
    dout (B, H, N, Dv) and whose rows have the logsumexp lse (B, H, N), natural and -inf where no key is kept. dlse
    (B, H, N): the gradient of lse itself, None for none.

    The gradients are laid out as (B, N, heads, ·). Sums over queries are in float32 (float64 for float64 inputs).
    """
    dim, dim_v, length = q.shape[3], v.shape[3], q.shape[2]
    if pad is not None and bool(pad.all()):
        pad = None
    tune = tune or tuning(q.dtype, dim)
    dq, dk, dv = (_gradient(x, x.dtype) for x in (q, k, v))
    if not q.numel() or not v.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    groups = group_heads(sinks.tolist(), windows.tolist(), k.shape[1], length)
    # Rows without a key: exp(score - inf) is 0, and so are their weights.
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    given = scale
    q, k, v, scale = _widen(q, k, v, scale, pad, tune.extra)
    if dlse is not None:
        q, k, v = (_room(x, dim_v, tune.extra) for x in (q, k, v))
    dout, out = (F.pad(x, (0, v.shape[3] - dim_v)) for x in (dout, out))
    if dlse is not None:
        dout, out = _with_lse(dout, out, dlse, dim_v)
    dout, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, q, k, v))
    if len(groups) == 1 and groups[0].window == length:
        found = _flash(dout, q, k, v, out, lse, scale, causal=True)
    else:
        found = _grouped(dout, q, k, v, out, lse, groups, scale, tune)
    # Where the scale went into q, so does its derivative.
    factor = given / scale if scale else 1.0
    dq.copy_(found[0][..., :dim] if factor == 1.0 else found[0][..., :dim] * factor)
    return dq, dk.copy_(found[1][..., :dim]), dv.copy_(found[2][..., :dim_v])


def _room(x: Tensor, dim_v: int, extra: int) -> Tensor:
    """`x` (B, heads, N, D) with zeros as features up to `dim_v` and the two that `_with_lse` needs."""
    wanted = dim_v + -(-2 // extra) * extra
    return x if x.shape[3] >= wanted else F.pad(x, (0, wanted - x.shape[3]))


def _with_lse(dout: Tensor, out: Tensor, dlse: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
    """dout and out such that dout_i . out_i is less by dlse_i: 1 times -dlse_i in features in which all values are 0.

    Two of them: in bfloat16 the second holds what rounding took from the first.
    """
    wide = -dlse.to(torch.promote_types(out.dtype, torch.float32))
    first = wide.to(out.dtype)
    dout, out = dout.clone(), out.clone()
    dout[..., dim_v : dim_v + 2] = 1.0
    out[..., dim_v], out[..., dim_v + 1] = first, (wide - first).to(out.dtype)
    return dout, out


def _gradient(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of `like` (B, heads, N, ·), laid out as (B, N, heads, ·)."""
    return torch.zeros_like(like.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _flash(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, dout, out (b, h, R, D), k and v (b, g, L, D); lse (b, h, R); mask (R, L) in q's dtype."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _grouped(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: list[Group],
    scale: float,
    tune: Tuning,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group by group: a KV head gathers from every group that reads it."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = _gradient(q, q.dtype), _gradient(k, wide), _gradient(v, wide)
    for group in groups:
        heads, kv_heads = (torch.tensor(x) for x in (group.heads, group.kv_heads))
        of_queries = [_take(x, group.heads) for x in (dout, q, out, lse)]
        of_keys = [_take(x, group.kv_heads) for x in (k, v)]
        targets = _gradient(of_queries[1], q.dtype), *(_gradient(x, wide) for x in of_keys)
        _group(of_queries, of_keys, targets, group, scale, tune)
        dq.index_copy_(1, heads, targets[0])
        dk.index_add_(1, kv_heads, targets[1])
        dv.index_add_(1, kv_heads, targets[2])
    return dq, dk, dv


def _group(
    of_queries: list[Tensor],
    of_keys: list[Tensor],
    targets: tuple[Tensor, Tensor, Tensor],
    group: Group,
    scale: float,
    tune: Tuning,
) -> None:
    """One span: dout, q, out (B, kv * share, N, D) and lse (B, kv * share, N); k and v (B, kv, N, D). What it adds to
    the gradients goes into `targets`, zeros of the shapes of q, k and v.
    """
    dout, q, out, lse = of_queries
    length, start = q.shape[2], group.sink + group.window
    if start == 0:
        return
    dout_, q_, out_, lse_, k_, v_ = (x[:, :, :start] for x in (*of_queries, *of_keys))
    for target, found in zip(targets, _flash(dout_, q_, k_, v_, out_, lse_, scale, causal=True), strict=True):
        target[:, :, :start].copy_(found)
    packed = (len(group.kv_heads), group.share)
    of_queries = [x.unflatten(1, packed) for x in (dout, q, out, lse[..., None])]
    dq = targets[0].unflatten(1, packed)
    rows_of_call = tune.rows * (2 if group.window >= tune.split_from else 1)
    # Chunks longer than their span would mostly compute what the mask hides.
    most = max(1, min(rows_of_call // group.share, start, length - start))
    copied = group.sink + group.window + most
    step = max(1, tune.segment // (q.shape[0] * packed[0] * copied * q.shape[3]))
    for first, count, rows in _runs(start, length, most, step):
        flat = [
            _chunks(x, first, count, rows, rows).reshape(-1, packed[0], packed[1] * rows, x.shape[-1])
            for x in of_queries
        ]
        found = _chunk_gradients(flat, of_keys, targets[1:], first, count, rows, group, scale)
        found = found.unflatten(0, (-1, count)).unflatten(3, (group.share, rows))
        _chunks(dq, first, count, rows, rows).copy_(found)


def _runs(start: int, length: int, most: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(first row, chunks, rows of each) of every call, `most` rows a chunk but for a ragged first: no row twice."""
    whole, ragged = divmod(length - start, most)
    if ragged:
        yield start, 1, ragged
    for chunk in range(0, whole, step):
        yield length - (whole - chunk) * most, min(step, whole - chunk), most


def _chunk_gradients(
    of_queries: list[Tensor],
    of_keys: list[Tensor],
    targets: tuple[Tensor, ...],
    first: int,
    count: int,
    rows: int,
    group: Group,
    scale: float,
) -> Tensor:
    """Chunks against [sinks | window]: dout, q, out (B * count, kv, share * rows, D), lse the same with D = 1. Adds to
    `targets`, dk and dv (B, kv, N, D), and returns dq of the chunks, of q's shape.
    """
    dout, q, out, lse = of_queries
    sink, window = group.sink, group.window
    keys, values = (_gather(x, sink, ((first - window, window + rows),), count, rows) for x in of_keys)
    mask = band_mask(sink, window, rows, group.share, False, q.dtype)
    dq, *gathered = _flash(dout, q, keys, values, out, lse.squeeze(-1), scale, mask)
    for target, found in zip(targets, gathered, strict=True):
        found = found.unflatten(0, (-1, count))
        if sink:
            target[:, :, :sink] += found[:, :, :, :sink].sum(1, dtype=target.dtype)
        for at in range(0, window + rows, rows):
            size = min(rows, window + rows - at)
            columns = found[:, :, :, sink + at : sink + at + size]
            _chunks(target, first - window + at, count, rows, size).add_(columns)
    return dq
