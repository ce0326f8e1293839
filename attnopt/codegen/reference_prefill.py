"""The plain-PyTorch target: what every other target is tested against. Materialises the mask; any device."""

from __future__ import annotations

import torch

from attnopt.codegen.spec import SpanPrefill
from attnopt.registry import TARGETS


def span_mask(length: int, sinks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Keep-mask (H, N, N) of per-head sinks and windows: ``j <= i and (j < sink or i - j < window)``."""
    i = torch.arange(length, device=sinks.device)[:, None]
    j = torch.arange(length, device=sinks.device)[None, :]
    kept = (j < sinks.view(-1, 1, 1)) | (i - j < windows.view(-1, 1, 1))
    return (j <= i) & kept


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
    pad: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), sinks and windows int (H,), pad bool (B, N) -> (B, H, N, Dv).

    Scores and soft-max in float32, or in float64 for float64 inputs. A row with no kept key is 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(repeat, 1)
    values = v.to(wide).repeat_interleave(repeat, 1)
    keep = span_mask(q.shape[2], sinks, windows)[None]
    if pad is not None:
        keep = keep & pad[:, None, None, :]
    scores = (q.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~keep, float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(~keep.any(-1, keepdim=True), 0.0)
    return (weights @ values).to(q.dtype)


@TARGETS.register("reference span_prefill")
class Reference:
    @staticmethod
    def emit(spec: SpanPrefill) -> str:
        return f'"""{spec}."""\n\nfrom attnopt.codegen.reference_prefill import prefill\n\n__all__ = ["prefill"]\n'
