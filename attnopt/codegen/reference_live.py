"""Attention to a written cache in plain PyTorch: what other kernels of `attnopt::live_attention` are tested with."""

from __future__ import annotations

import torch
from torch import Tensor


def shown(mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, lets a query see a key: bool of its shape."""
    return mask if mask.dtype == torch.bool else mask > float("-inf")


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in a dtype. The least number of a wider one becomes the least of this one, not -inf: a row that
    has it everywhere is still an average."""
    if mask.dtype == dtype:
        return mask
    least = mask.clamp(min=max(torch.finfo(mask.dtype).min, torch.finfo(dtype).min))
    return torch.where(shown(mask), least, mask).to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, H, T, D), k (B, G, C, D), v (B, G, C, Dv), mask (B | 1, 1, T | 1, C) -> (B, H, T, Dv).

    mask: bool, true where a key is kept, or floating, added to the scores, minus infinity where a key is not kept; None
    keeps all. What a column holds that no query of its batch entry keeps does not matter, NaN neither. Scores and
    soft-max in float32, or in float64 for float64 inputs. A row that keeps nothing is 0.
    """
    batch, heads, tokens, dim = q.shape
    groups, slots = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide).reshape(batch, groups, heads // groups, tokens, dim) @ k.to(wide).mT[:, :, None] * scale
    values = v.to(wide)
    keep = torch.ones(batch, 1, tokens, slots, dtype=torch.bool, device=q.device)
    if mask is not None:
        keep = keep & shown(mask)
        scores = scores if mask.dtype == torch.bool else scores + added(mask, wide)[:, :, None]
        values = values.masked_fill(~keep.any(2)[..., None], 0.0)
    scores = scores.masked_fill(~keep[:, :, None], float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(~keep.any(-1)[:, :, None, :, None], 0.0)
    return (weights @ values[:, :, None]).reshape(batch, heads, tokens, v.shape[3]).to(q.dtype)
