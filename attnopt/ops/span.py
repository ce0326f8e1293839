"""Causal prefill whose heads keep spans of their own.

attnopt::span_attention            the output alone, for graphs of which no gradient is asked
attnopt::span_attention_lse        the output and the logsumexp of its rows, which its gradient is made from
attnopt::span_attention_backward   that gradient, at q, k and v; it has none itself
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.emit import load
from attnopt.codegen.spec import SpanBackward, SpanPrefill

# Calls per emitted kernel, so that a test or a report can tell which kernel really ran. What goes to a compiled kernel
# without Python (attnopt/codegen/dispatch.cpp) is not counted.
launches: Counter[str] = Counter()


# The alpha of a head that keeps nothing, as another operator serves it: its rows are 0.
IDLE = -(2**31)


def windows_at(alphas: Tensor, betas: Tensor, length: int, model_window: int = 0) -> Tensor:
    """Windows int32 (H,) at `length` keys: clamp(floor(alpha + beta · N), 1, N), within the model's own if any; 0 where
    alpha is IDLE."""
    windows = torch.floor(alphas.double() + betas.double() * length).clamp(1, max(1, length))
    windows.masked_fill_(alphas == IDLE, 0)
    return (windows.clamp(max=model_window) if model_window else windows).to(torch.int32)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, windows: Tensor, scale: float, pad: Tensor | None
) -> Tensor:
    """Run the emitted kernel of the current target on q (B, H, N, D), k and v (B, G, N, ·)."""
    return kernel(SpanPrefill, q, k, v, pad).prefill(q, k, v, *beside(q, sinks, windows), scale, pad)


def kernel(family: type[SpanPrefill | SpanBackward], q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> ModuleType:
    """The emitted module of a family for these inputs and the current target, about to be called."""
    spec = family(
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
    return module


def beside(q: Tensor, sinks: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The tables on the device of q."""
    if q.device.type == "cpu":
        return sinks, windows
    return on_device(tuple(sinks.tolist()), tuple(windows.tolist()), q.device)


@lru_cache(maxsize=4096)
def on_device(sinks: tuple[int, ...], windows: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables on a GPU, sent there once: a copy on every call would wait for the device every time."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in (sinks, windows))  # type: ignore[return-value]


def spans_at(
    length: int, sinks: Tensor, alphas: Tensor, betas: Tensor, model_window: int, min_length: int
) -> tuple[Tensor, Tensor]:
    """Sinks and windows, int32 (H,) each, of the operators' tables at `length` keys."""
    if length < min_length:
        alphas, betas = torch.full_like(alphas, length), torch.zeros_like(betas)
    # Sinks beyond the model's own window were never attended to.
    return torch.zeros_like(sinks) if model_window else sinks, windows_at(alphas, betas, length, model_window)


def tokens_first(x: Tensor) -> Tensor:
    """(B, heads, N, D) laid out as (B, N, heads, D), which the fakes promise; emitted kernels write it already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_tokens_first(like: Tensor, width: int) -> Tensor:
    """An unwritten tensor of the shape of `like` (B, heads, N, ·) with `width` features, laid out as `tokens_first`."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


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
    spans = spans_at(q.shape[2], sinks, alphas, betas, model_window, min_length)
    return tokens_first(prefill(q, k, v, *spans, scale, pad))


@span_attention.register_fake
def _(q, k, v, sinks, alphas, betas, pad, scale, model_window, min_length):  # type: ignore[no-untyped-def]
    return empty_tokens_first(q, v.shape[3])


@torch.library.custom_op("attnopt::span_attention_lse", mutates_args=())
def span_attention_lse(
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
) -> tuple[Tensor, Tensor]:
    """As `span_attention`, and the natural logsumexp of each row's kept scores, (B, H, N) in float32 (float64 for
    float64 inputs), -inf where no key is kept. Both have gradients at q, k and v.
    """
    tables = beside(q, *spans_at(q.shape[2], sinks, alphas, betas, model_window, min_length))
    out, lse = kernel(SpanPrefill, q, k, v, pad).prefill_lse(q, k, v, *tables, scale, pad)
    return tokens_first(out), lse.contiguous()


@span_attention_lse.register_fake
def _(q, k, v, sinks, alphas, betas, pad, scale, model_window, min_length):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_tokens_first(q, v.shape[3]), lse


@torch.library.custom_op("attnopt::span_attention_backward", mutates_args=())
def span_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    scale: float,
    model_window: int,
    min_length: int,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, k and v of `span_attention_lse`, whose results were out and lse, for the gradients dout at out
    and dlse (B, H, N) at lse, None for none."""
    tables = beside(q, *spans_at(q.shape[2], sinks, alphas, betas, model_window, min_length))
    found = kernel(SpanBackward, q, k, v, pad).backward(dout, q, k, v, out, lse, *tables, scale, pad, dlse)
    dq, dk, dv = (tokens_first(x) for x in found)
    return dq, dk, dv


@span_attention_backward.register_fake
def _(dout, q, k, v, out, lse, sinks, alphas, betas, pad, scale, model_window, min_length, dlse=None):  # type: ignore[no-untyped-def]
    return tuple(empty_tokens_first(x, x.shape[3]) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, alphas, betas, pad, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, alphas, betas, pad)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    found = (None, None, None)
    if dout is None and dlse is not None:
        dout = torch.zeros_like(ctx.saved_tensors[3])
    if dout is not None:
        found = torch.ops.attnopt.span_attention_backward(dout, *ctx.saved_tensors, *ctx.numbers, dlse)
    return *found, *(None for _ in range(7))


def no_second(operator: str) -> Callable[..., None]:
    """The gradient of an operator's gradient, which there is not."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"attnopt::{operator} has no second derivative. "
            "Differentiate twice through the model as it was, uncompiled."
        )

    return refuse


span_attention_lse.register_autograd(_gradients, setup_context=_save)
span_attention_backward.register_autograd(no_second("span_attention"))
