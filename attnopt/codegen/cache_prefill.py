"""A prompt into an empty cache: the span prefill kernel of the target, on tokens moved together.

Sinks and windows count tokens without padding: on the left it must not become sinks, between tokens not use up a
window. Behind the tokens it is harmless, a causal row never sees it. So the tokens of a row that count are moved to its
front, unpadded attention runs over all rows, and the results move back. Nothing waits for a GPU.

On the CPU, where the real tokens of a row mostly are one run, that run is a view, and nothing moves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnopt.codegen.emit import load
from attnopt.codegen.padding_cpu import real_runs
from attnopt.codegen.spec import SpanPrefill
from attnopt.codegen.work_list import read_table, tell_table


def prefill(target: str, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spans: Tensor, scale: float) -> Tensor:
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), valid bool (B, T) or None, spans int32 (H, 2) -> (B, H, T, Dv).

    Laid out as (B, T, H, Dv), 0 in rows that do not count. target: "cpu", "triton" or "reference".
    """
    batch, heads, tokens, dim = q.shape
    spec = SpanPrefill(target, str(q.dtype).removeprefix("torch."), heads, k.shape[1], dim, v.shape[3], False)
    kernel, tables = load(spec).prefill, columns(spans)
    if valid is None or not valid.numel():
        return kernel(q, k, v, *tables, scale)
    runs = real_runs(valid) if q.device.type == "cpu" else None
    if runs is None:
        place, order = together(valid)
        # In its own tile a row meets padding behind it with a weight of 0, which does not hide NaN.
        k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
        found = taken(kernel(*(taken(x, order) for x in (q, k, v)), *tables, scale), place)
        return found.masked_fill_(~valid[:, None, :, None], 0.0)
    if [run[1:] for run in runs] == [(batch, 0, tokens)]:
        return kernel(q, k, v, *tables, scale)
    out = q.new_zeros(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    for first, last, start, stop in runs:
        if start < stop:
            here = (x[first:last, :, start:stop] for x in (q, k, v))
            out[first:last, :, start:stop] = kernel(*here, *tables, scale)
    return out


def together(valid: Tensor) -> tuple[Tensor, Tensor]:
    """How the tokens that count move to the front of their row: valid bool (B, T) -> place, order int64 (B, T).

    A token that counts comes to place[b, t], which is 0 or more for others too; the front's j-th is token order[b, j],
    and behind the tokens that count follow the others.
    """
    place = (valid.cumsum(1) - 1).clamp_(min=0)
    return place, torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x (B, heads, T, D), index int64 (B, n) -> x[b, :, index[b]] as (B, heads, n, D), laid out as (B, n, heads, D)."""
    entry = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[entry, index].transpose(1, 2)


_columns: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # spans -> (version, sinks, windows)


def columns(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Sinks and windows int32 (H,) of spans (H, 2): the same two tensors as long as it does not change, because work
    lists are kept by table and reading a table waits for a GPU."""
    version = 0 if spans.is_inference() else spans._version
    known = _columns.get(spans)
    if known is None or known[0] != version:
        sinks, windows = (x.contiguous() for x in spans.unbind(1))
        if spans.is_cuda:
            values = read_table(spans)
            tell_table(sinks, values[::2])
            tell_table(windows, values[1::2])
        known = _columns[spans] = (version, sinks, windows)
    return known[1], known[2]
