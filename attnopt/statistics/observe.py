"""The attention that is observed: plain, or with a backward pass that fills an Observation."""

from __future__ import annotations

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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, window: int | None) -> Tensor:
    """The attention that is observed, without observing; shapes as in `Observe`. A row without any key gives 0."""
    if pad is None and (window is None or window >= q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    mask = causal_mask(q.shape[2], window, pad, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


class Observe(torch.autograd.Function):
    """Causal attention whose backward pass also fills an Observation. Output and gradients are those of SDPA.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), H a multiple of G (consecutive query heads share a KV head);
    pad bool (B, N), true where the key is kept (rows that are False count in no sum), or None; window: the model's
    own sliding window, or None. Returns (B, H, N, Dv).

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
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pad)
        ctx.scale, ctx.observation, ctx.window = scale, observation, window
        return attention(q, k, v, scale, pad, window)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pad = ctx.saved_tensors
        dq, dk, dv = stream(q, k, v, grads[0], ctx.scale, pad, ctx.observation, ctx.window)
        return dq, dk, dv, None, None, None, None


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
) -> None:
    """Add what needs no gradient (mass, entropy, mass_by_distance, mass_at_key, delta); the others stay as they are.

    factor (H, Dv, Dv): see `factor_of`. share: one block of rows in so many is looked at, drawn from `seed`.
    """
    starts = None if share == 1 else drawn_starts(q.shape[2], SPARSE_ROWS, share, seed)
    rows = ROWS if share == 1 else SPARSE_ROWS
    stream(q, k, v, None, scale, pad, observation, window, rows, factor, starts)
