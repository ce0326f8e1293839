"""Linear attention to far keys on the CPU, chunk by chunk with a running state: in the compiled kernel linear.cpp where
it can be had, else out of torch's matrix products, as are the gradients (linear_cpu_backward.py).

A row's far keys end w before it, so that against keys moved by w a head is plain causal linear attention: row r of a
run is query s + w + r, and its keys are s to s + r, where s is the sink. In chunks of C rows

    sums_r = sum over the chunk's keys up to r of (f_r . g_c) (v_c, 1)  +  f_r S      S: the same of all keys before it

(Lightning Attention, arXiv 2401.04658, algorithm 1; Mamba-2, arXiv 2405.21060, section 6), whose last column is the
normaliser. Features, products and state are float32 (float64 for float64 inputs), whatever the inputs are. They are
made for one segment of rows at a time, so that they stay in the cache, and never held for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen import linear_native
from attnopt.feature_maps import KEY_CAP, FeatureMap

# Rows of a chunk, and rows times heads of a segment. Microseconds of a token and head, backward, D = R = 64, float32,
# one thread of a Xeon with AVX-512, torch 2.13: chunks of 32, 64, 128 in segments of 2048 5.3, 5.1, 5.6; chunks of 64
# in segments of 1024, 4096, 8192 4.9, 5.1, 5.4.
CHUNK, SEGMENT = 64, 2048


@dataclass(frozen=True)
class Run:
    """Served heads of one span and sequence: `at`, their numbers among the served; heads, kv_heads: in the model.

    rows: queries from sink + window on, and as many keys from sink on.
    """

    entry: int
    at: Tensor
    heads: Tensor
    kv_heads: Tensor
    sink: int
    window: int
    rows: int


@dataclass(frozen=True)
class Mapped:
    """Maps of some heads, ready for products: wq, wk (h, D, R), bq, bk (h, 1, R), cq, ck (h, 1) or None where all are
    0, u (h, D, 1) and u0 (h, 1). Of kind "exp" u and u0 are part of wq and bq, for a row's largest exponent is in its
    shift anyway; then they are None.
    """

    kind: str
    wq: Tensor
    bq: Tensor
    cq: Tensor | None
    wk: Tensor
    bk: Tensor
    ck: Tensor | None
    u: Tensor | None
    u0: Tensor | None

    @classmethod
    def of(cls, maps: FeatureMap, dtype: torch.dtype) -> Mapped:
        wq, bq, cq, wk, bk, ck, u, u0 = (x.to(dtype) for x in maps.tensors)
        exponential = maps.kind == "exp"
        if exponential:
            wq, bq = wq + u[:, None], bq + u0[:, None]
        cq, ck = (x[:, None] if exponential and bool(x.any()) else None for x in (cq, ck))
        shifts = (None, None) if exponential else (u[:, :, None], u0[:, None])
        wq, wk = (x.mT.contiguous() for x in (wq, wk))
        return cls(maps.kind, wq, bq[:, None], cq, wk, bk[:, None], ck, *shifts)

    def packed(self) -> tuple[Tensor | None, ...]:
        """As the compiled kernel takes them: wk (h, R, D), and zeros for cq and ck that are None."""
        nothing = self.wq.new_zeros(self.wq.shape[0])
        cq, ck = (nothing if x is None else x for x in (self.cq, self.ck))
        return self.wq, self.bq, cq, self.wk.mT, self.bk, ck, self.u, self.u0

    def heads(self, at: Tensor) -> Mapped:
        held = (self.wq, self.bq, self.cq, self.wk, self.bk, self.ck, self.u, self.u0)
        return Mapped(self.kind, *(None if x is None else x[at] for x in held))

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (h, N, D) -> features (h, N, F) and shifts (h, N)."""
        y = torch.baddbmm(self.bq, x, self.wq)
        if self.u is not None:
            return _second_order(y), (x @ self.u)[..., 0] + self.u0
        most = y.amax(-1, keepdim=True)
        shift = most[..., 0] if self.cq is None else most[..., 0] - self.cq * x.square().sum(-1)
        return y.sub_(most).exp_(), shift

    def keys(self, x: Tensor) -> Tensor:
        """x (h, N, D) -> features (h, N, F)."""
        y = torch.baddbmm(self.bk, x, self.wk)
        if self.kind == "taylor":
            return _second_order(y)
        if self.ck is not None:
            y -= (self.ck * x.square().sum(-1))[..., None]
        return y.clamp_(max=KEY_CAP).exp_()


def _second_order(y: Tensor) -> Tensor:
    """y (h, N, R) -> [1, y, vec(y yᵀ) / sqrt 2], (h, N, 1 + R + R²)."""
    rank = y.shape[2]
    f = y.new_empty(*y.shape[:2], 1 + rank + rank**2)
    f[..., 0] = 1.0
    f[..., 1 : 1 + rank] = y
    torch.mul((y * math.sqrt(0.5))[..., None], y[..., None, :], out=f[..., 1 + rank :].unflatten(-1, (rank, rank)))
    return f


def runs(heads: Tensor, sinks: Tensor, windows: Tensor, batch: int, share: int, length: int) -> Iterator[Run]:
    """The heads of equal span together, at most as many as a segment of whole chunks has room for."""
    spans: dict[tuple[int, int], list[int]] = {}
    for n, (sink, window) in enumerate(zip(sinks.tolist(), windows.tolist(), strict=True)):
        spans.setdefault((max(0, sink), max(0, window)), []).append(n)
    for (sink, window), members in spans.items():
        rows = length - sink - window
        if rows <= 0:
            continue
        most = SEGMENT // CHUNK
        for first in range(0, len(members), most):
            at = torch.tensor(members[first : first + most])
            own = heads.long()[at]
            for entry in range(batch):
                yield Run(entry, at, own, own // share, sink, window, rows)


def pieces(run: Run) -> list[tuple[int, int, int]]:
    """(first row, chunks, rows of a chunk) of the segments of a run; what is left at its end is a chunk of its own."""
    step = max(1, SEGMENT // (CHUNK * len(run.at)))
    whole = run.rows // CHUNK
    found = [(chunk * CHUNK, min(step, whole - chunk), CHUNK) for chunk in range(0, whole, step)]
    return [*found, (whole * CHUNK, 1, run.rows % CHUNK)] if run.rows % CHUNK else found


def _take(x: Tensor, heads: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows of some heads of x (heads, N, D), (h, count, D) in `dtype` and in one piece."""
    rows = x[:, first : first + count]
    return rows.index_select(0, heads).to(dtype, memory_format=torch.contiguous_format)


def _queries(q: Tensor, run: Run, maps: Mapped, piece: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (h, rows, D) of a segment, their features (h, n, C, F) and their shifts (h, rows)."""
    first, chunks, size = piece
    x = _take(q[run.entry], run.heads, run.sink + run.window + first, chunks * size, maps.wq.dtype)
    f, shift = maps.queries(x)
    return x, f.unflatten(1, (chunks, size)), shift


def _keys(
    k: Tensor, v: Tensor, pad: Tensor | None, run: Run, maps: Mapped, piece: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (h, rows, D) of a segment, their features (h, n, C, F), 0 in padding, and (v, 1), (h, n, C, Dv + 1)."""
    first, chunks, size = piece
    count, first = chunks * size, run.sink + first
    x = _take(k[run.entry], run.kv_heads, first, count, maps.wk.dtype)
    g = maps.keys(x)
    values = g.new_ones(len(run.at), count, v.shape[3] + 1)
    values[..., :-1] = v[run.entry, :, first : first + count].index_select(0, run.kv_heads)
    if pad is not None:
        # What lies in padding may be anything, NaN too.
        hidden = ~pad[run.entry, first : first + count, None]
        x, g, values = (t.masked_fill_(hidden, 0.0) for t in (x, g, values))
    return x, g.unflatten(1, (chunks, size)), values.unflatten(1, (chunks, size))


def _products(f: Tensor, g: Tensor, kind: str) -> Tensor:
    """f_r . g_c for the keys c <= r of each chunk, (h, n, C, C); 0 for others."""
    if kind == "exp":
        return (f @ g.mT).tril_()
    rank = math.isqrt(f.shape[-1])
    s = f[..., 1 : 1 + rank] @ g[..., 1 : 1 + rank].mT
    # 1 + s + s² / 2; the first feature of a key is 1, in padding 0.
    return s.mul(0.5).add_(1.0).mul_(s).add_(g[..., :1].mT).tril_()


def _before(added: Tensor, state: Tensor) -> Tensor:
    """What each chunk finds: state (h, F, W) and what the chunks before it added (h, n, F, W). Moves the state on."""
    sums = torch.cat((state[:, None], added), 1).cumsum_(1)
    state.copy_(sums[:, -1])
    return sums[:, :-1]


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of attnopt.codegen.reference_linear.prefill."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, count, length, _ = q.shape
    served, width = heads.shape[0], v.shape[3]
    out = v.new_empty(batch, length, served, width).transpose(1, 2)
    lse = torch.empty((batch, served, length), dtype=wide)
    mapped = Mapped.of(maps, wide)
    if out.numel() and not linear_native.unusable(q.dtype):
        linear_native.prefill(q, k, v, out, lse, heads, sinks, windows, mapped.packed(), maps.kind, pad)
        return out, lse
    out.zero_()
    lse.fill_(float("-inf"))
    for run in runs(heads, sinks, windows, batch, count // max(1, k.shape[1]), length):
        own = mapped.heads(run.at)
        state = torch.zeros(len(run.at), maps.width, width + 1, dtype=wide)
        for piece in pieces(run):
            _, f, shift = _queries(q, run, own, piece)
            _, g, values = _keys(k, v, pad, run, own, piece)
            sums = _products(f, g, maps.kind) @ values
            sums += f @ _before(g.mT @ values, state)
            sums = sums.flatten(1, 2)
            total = sums[..., -1].clamp_(min=0.0)
            rows = slice(run.sink + run.window + piece[0], run.sink + run.window + piece[0] + shift.shape[1])
            lse[run.entry, run.at, rows] = shift + total.log()
            # Where no key counts both are 0, and 0 / inf is 0.
            out[run.entry, run.at, rows] = (
                sums[..., :-1] / total.masked_fill_(total == 0, float("inf"))[..., None]
            ).to(v.dtype)
    return out, lse


def state(
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    query_heads: int,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> Tensor:
    """Arguments and result as those of attnopt.codegen.reference_linear.state."""
    wide = torch.promote_types(k.dtype, torch.float32)
    batch, kv_heads, length, _ = k.shape
    found = torch.zeros(batch, heads.shape[0], maps.width, v.shape[3] + 1, dtype=wide)
    mapped = Mapped.of(maps, wide)
    for run in runs(heads, sinks, windows, batch, query_heads // max(1, kv_heads), length):
        own = mapped.heads(run.at)
        for piece in pieces(run):
            _, g, values = _keys(k, v, pad, run, own, piece)
            found[run.entry].index_add_(0, run.at, (g.mT @ values).sum(1))
    return found
