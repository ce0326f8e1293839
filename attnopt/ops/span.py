"""`attnopt::span_attention`: causal prefill whose heads keep spans of their own.

It has no gradient: passes never insert it into a graph that needs one.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.emit import load
from attnopt.codegen.spec import SpanPrefill

# Calls per emitted kernel, so that a test or a report can tell which kernel really ran.
launches: Counter[str] = Counter()


def windows_at(alphas: Tensor, betas: Tensor, length: int, model_window: int = 0) -> Tensor:
    """Windows int32 (H,) at `length` keys: clamp(floor(alpha + beta · N), 1, N), within the model's own if any."""
    windows = torch.floor(alphas.double() + betas.double() * length).clamp(1, max(1, length))
    return (windows.clamp(max=model_window) if model_window else windows).to(torch.int32)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, windows: Tensor, scale: float, pad: Tensor | None
) -> Tensor:
    """Run the emitted kernel of the current target on q (B, H, N, D), k and v (B, G, N, ·)."""
    spec = SpanPrefill(
        target=settings.target(q.device.type),
        dtype=str(q.dtype).removeprefix("torch."),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        padded=pad is not None,
    )
    module = load(spec)
    launches[spec.key()] += 1
    if q.device.type != "cpu":
        sinks, windows = on_device(tuple(sinks.tolist()), tuple(windows.tolist()), q.device)
    return module.prefill(q, k, v, sinks, windows, scale, pad)


@lru_cache(maxsize=4096)
def on_device(sinks: tuple[int, ...], windows: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables on a GPU, sent there once: a copy on every call would wait for the device every time."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in (sinks, windows))  # type: ignore[return-value]


@torch.library.custom_op("attnopt::span_attention", mutates_args=())
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    scale: float,
    model_window: int,
    min_length: int,
) -> Tensor:
    """Causal attention where head h keeps its first sinks[h] keys and a window of alphas[h] + betas[h] · N.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv); sinks, alphas int32 (H,) and betas float64 (H,) on the CPU;
    pad bool (B, N) true where a key counts; model_window: the model's own sliding window, 0 for none; below
    `min_length` keys every head is dense. Returns (B, H, N, Dv), physically (B, N, H, Dv).
    """
    length = q.shape[2]
    if length < min_length:
        alphas, betas = torch.full_like(alphas, length), torch.zeros_like(betas)
    windows = windows_at(alphas, betas, length, model_window)
    if model_window:
        # Sinks beyond the model's own window were never attended to.
        sinks = torch.zeros_like(sinks)
    out = prefill(q, k, v, sinks, windows, scale, pad)
    # The layout the fake promises; emitted kernels write it, so this copies nothing for them.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@span_attention.register_fake
def _(q, k, v, sinks, alphas, betas, pad, scale, model_window, min_length):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
