"""The plain-PyTorch target: what every other target is tested against. Materialises the mask; any device."""

from __future__ import annotations

import torch

from attnopt.codegen.self_check import footer
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
    return prefill_lse(q, k, v, sinks, windows, scale, pad)[0]


def prefill_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
    pad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `prefill`, and the logsumexp of each row's kept scores (B, H, N): natural, wide, -inf where none is kept."""
    scores, values = masked_scores(q, k, v, sinks, windows, scale, pad)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - finite(lse)[..., None])
    return (weights @ values).to(q.dtype), lse


def masked_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
    pad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B, H, N, N), -inf where no key is kept, and the values of every query head (B, H, N, Dv); both wide."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeat, 1) for x in (k, v))
    keep = span_mask(q.shape[2], sinks, windows)[None]
    if pad is not None:
        keep = keep & pad[:, None, None, :]
    return (q.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~keep, float("-inf")), values


def finite(lse: torch.Tensor) -> torch.Tensor:
    """A row without a kept key has the logsumexp -inf; 0 in its place makes the weights of that row 0, not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


@TARGETS.register("reference span_prefill")
class Reference:
    @staticmethod
    def emit(spec: SpanPrefill) -> str:
        names = "prefill, prefill_lse"
        listed = ", ".join(f'"{name}"' for name in names.split(", "))
        text = f'"""{spec}."""\n\nfrom attnopt.codegen.reference_prefill import {names}\n\n__all__ = [{listed}]\n'
        return text + footer(spec, "self_check_prefill", names)
