"""Gradients of linear attention to far keys on the CPU, chunk by chunk, in two sweeps over a run's segments.

In the terms of attnopt/codegen/linear_cpu.py and with r_i = (dout_i, dlse_i - dout_i . out_i) / n_i, the gradient at
f_i . g_j is r_i . (v_j, 1). The features of queries thus gather from the state of the keys before them, forward; those
of keys, and values, from the sum of f_i r_iᵀ over the queries behind them, backward:

    df_i = sum (r_i . (v_j, 1)) g_j  +  S r_i         dg_j = sum (r_i . (v_j, 1)) f_i  +  T (v_j, 1)
    dv_j = sum (f_i . g_j) r_i  +  Tᵀ g_j             S: of all keys before the chunk; T: of all queries behind it

The features are made anew from q and k; n_i, the sum of f_i . g_j, is exp(lse_i - shift_i).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.feature_gradients import at_keys, at_queries
from attnopt.codegen.linear_cpu import Mapped, Run, _before, _keys, _products, _queries, _take, pieces, runs
from attnopt.feature_maps import FeatureMap


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: Tensor,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as those of attnopt.codegen.reference_linear.backward."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    mapped = Mapped.of(maps, wide)
    for run in runs(heads, sinks, windows, q.shape[0], q.shape[1] // max(1, k.shape[1]), q.shape[2]):
        own, fitted = mapped.heads(run.at), maps.of(run.at)
        state = torch.zeros(len(run.at), maps.width, v.shape[3] + 1, dtype=wide)
        for piece in pieces(run):
            x, f, shift = _queries(q, run, own, piece)
            _, g, values = _keys(k, v, pad, run, own, piece)
            rest, gradient = _rest(dout, dlse, out, lse, run, piece, shift)
            df = (rest @ values.mT).tril_() @ g + rest @ _before(g.mT @ values, state).mT
            first = run.sink + run.window + piece[0]
            dx = at_queries(x, fitted, f.flatten(1, 2), df.flatten(1, 2), gradient)
            dq[run.entry, :, first : first + x.shape[1]].index_copy_(0, run.heads, dx)
        state.zero_()
        for piece in reversed(pieces(run)):
            _, f, shift = _queries(q, run, own, piece)
            y, g, values = _keys(k, v, pad, run, own, piece)
            rest, _ = _rest(dout, dlse, out, lse, run, piece, shift)
            behind = _before((f.mT @ rest).flip(1), state).flip(1)
            dg = (rest @ values.mT).tril_().mT @ f + values @ behind.mT
            dvalues = _products(f, g, maps.kind).mT @ rest + g @ behind
            rows = slice(run.sink + piece[0], run.sink + piece[0] + y.shape[1])
            dy = at_keys(y, fitted, g.flatten(1, 2), dg.flatten(1, 2))
            if pad is not None:
                hidden = ~pad[run.entry, rows, None]
                dy, dvalues = dy.masked_fill_(hidden, 0.0), dvalues.flatten(1, 2).masked_fill_(hidden, 0.0)
            # Query heads that share a KV head add up.
            dk[run.entry, :, rows].index_add_(0, run.kv_heads, dy)
            dv[run.entry, :, rows].index_add_(0, run.kv_heads, dvalues.reshape(*y.shape[:2], -1)[..., :-1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _rest(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, run: Run, piece: tuple[int, int, int], shift: Tensor
) -> tuple[Tensor, Tensor]:
    """r (h, n, C, Dv + 1) of a segment, and dlse (h, rows); both 0 in rows without a key."""
    first, chunks, size = piece
    rows = run.sink + run.window + first, chunks * size
    dout, out = (_take(x[run.entry], run.at, *rows, shift.dtype) for x in (dout, out))
    dlse, lse = (_take(x[run.entry, :, :, None], run.at, *rows, shift.dtype) for x in (dlse, lse))
    there = lse > float("-inf")
    inverse = torch.where(there, (shift[..., None] - lse).exp(), 0.0)
    dlse = torch.where(there, dlse, 0.0)
    rest = torch.cat((dout, dlse - (dout * out).sum(-1, keepdim=True)), -1) * inverse
    return rest.unflatten(1, (chunks, size)), dlse[..., 0]
