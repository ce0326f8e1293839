"""The attention that is observed: plain, or with a backward pass that fills an Observation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.statistics.blocks import ROWS, drawn_starts, stream
from attnopt.statistics.records import Observation

# Rows of a block where only some are looked at: fewer at a time are seen at more places of the text.
SPARSE_ROWS = 32


def causal_mask(length: int, window: int | None, pad: Tensor | None, device: torch.device) -> Tensor:
    """Keep-mask bool, (N, N) or with `pad` (B, 1, N, N)."""
    i = torch.arange(length, device=device)
    keep = i <= i[:, None]
    if window is not None:
        keep &= i[:, None] - i < window
    return keep if pad is None else keep & pad[:, None, None, :]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, window: int | None, softcap: float = 0.0
) -> Tensor:
    """The attention that is observed, without observing; shapes as in `Observe`. A row without any key gives 0."""
    if softcap:
        return capped_attention(q, k, v, scale, pad, window, softcap)
    if q.shape[3] != v.shape[3]:
        return of_unequal_widths(q, k, v, scale, pad, window)
    if pad is None and (window is None or window >= q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    mask = causal_mask(q.shape[2], window, pad, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def of_unequal_widths(q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, window: int | None) -> Tensor:
    """`attention` with features of zeros where they are missing: otherwise SDPA forms an N x N tensor."""
    width, narrow = max(q.shape[3], v.shape[3]), v.shape[3]
    q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    return attention(q, k, v, scale, pad, window)[..., :narrow]


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, window: int | None, softcap: float
) -> Tensor:
    """`attention` with scores c tanh(s / c), which SDPA does not know: block by block of rows, so in O(N) memory.

    Sums in float32 (float64 for float64 inputs).
    """
    (batch, heads, length, _), kv_heads, wide = q.shape, k.shape[1], torch.promote_types(q.dtype, torch.float32)
    queries = q.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    keys, values = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    out = []
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        low = 0 if window is None else max(0, start - window + 1)
        scores = queries[..., start:stop, :].to(wide) * scale @ keys[..., low:stop, :].mT
        i, j = torch.arange(start, stop, device=q.device)[:, None], torch.arange(low, stop, device=q.device)
        keep = (j <= i) if window is None else (j <= i) & (i - j < window)
        if pad is not None:
            keep = keep & pad[:, None, None, None, low:stop]
        weights = torch.softmax(((scores / softcap).tanh() * softcap).masked_fill(~keep, -math.inf), -1)
        weights = weights.masked_fill(~keep.any(-1, keepdim=True), 0.0)
        out.append((weights @ values[..., low:stop, :]).to(q.dtype))
    return torch.cat(out, 3).flatten(1, 2)


class Observe(torch.autograd.Function):
    """Causal attention whose backward pass also fills an Observation. Output and gradients are those of SDPA.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), H a multiple of G (consecutive query heads share a KV head);
    pad bool (B, N), true where the key is kept (rows that are False count in no sum), or None; window: the model's
    own sliding window, or None; softcap: c where scores are c tanh(s / c), 0 where they are s. Returns (B, H, N, Dv).

    Statistics are added in backward and nowhere else, once per backward pass: a forward that is recomputed
    (checkpointing) does not count twice, several label draws from one forward count as several samples. So the
    gradient must reach the output: at least one of q, k, v has to require it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        pad: Tensor | None,
        observation: Observation,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pad)
        ctx.scale, ctx.observation, ctx.window, ctx.softcap = scale, observation, window, softcap
        return attention(q, k, v, scale, pad, window, softcap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pad = ctx.saved_tensors
        dq, dk, dv = stream(q, k, v, grads[0], ctx.scale, pad, ctx.observation, ctx.window, softcap=ctx.softcap)
        return dq, dk, dv, None, None, None, None, None


def measure_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    pad: Tensor | None,
    observation: Observation,
    window: int | None = None,
    factor: Tensor | None = None,
    share: int = 1,
    seed: int = 0,
    softcap: float = 0.0,
) -> None:
    """Add what needs no gradient (mass, entropy, mass_by_distance, mass_at_key, delta); the others stay as they are.

    factor (H, Dv, Dv): see `factor_of`. share: one block of rows in so many is looked at, drawn from `seed`.
    """
    starts = None if share == 1 else drawn_starts(q.shape[2], SPARSE_ROWS, share, seed)
    rows = ROWS if share == 1 else SPARSE_ROWS
    stream(q, k, v, None, scale, pad, observation, window, rows, factor, starts, softcap)
