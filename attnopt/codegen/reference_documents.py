"""Attention that stays inside documents in plain PyTorch, to test the CPU's against. Makes the mask; any device."""

from __future__ import annotations

import torch
from torch import Tensor


def document_mask(ids: Tensor, pad: Tensor | None, causal: bool, window: int) -> Tensor:
    """Keep-mask (B, N, N) of documents ids (E, B, N) and padding bool (B, N)."""
    keep = (ids[:, :, :, None] == ids[:, :, None, :]).all(0)
    row = torch.arange(ids.shape[2], device=ids.device)
    distance = row[:, None] - row
    keep = keep & (distance >= 0) if causal else keep
    keep = keep & (distance < window) if window else keep
    return keep if pad is None else keep & pad[:, None, :]


def prefill(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, pad: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of `documents_cpu.prefill`; differentiable. Scores in float32, or in float64 for
    float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeat, 1) for x in (k, v))
    keep = document_mask(ids, pad, causal, window)[:, None]
    dead = ~keep.any(-1, keepdim=True)
    scores = (q.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~(keep | dead), float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    return (weights @ values).to(q.dtype), scores.logsumexp(-1, keepdim=True)


def gradients(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    pad: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as those of `documents_cpu.gradients`, from the weights in full."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
    queries, go = q.to(wide), grad.to(wide)
    keys, values = (x.to(wide).repeat_interleave(repeat, 1) for x in (k, v))
    keep = document_mask(ids, pad, causal, window)[:, None]
    dead = ~keep.any(-1, keepdim=True)
    scores = (queries @ keys.mT * scale).masked_fill(~(keep | dead), float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    moved = go @ values.mT
    ds = weights * (moved - (moved * weights).sum(-1, keepdim=True)) * scale
    dk, dv = ds.mT @ queries, weights.mT @ go
    dk, dv = (x.unflatten(1, (groups, repeat)).sum(2) for x in (dk, dv))
    return (ds @ keys).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
