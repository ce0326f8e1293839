"""The spans that are measured, inputs for them, and the error of a result too long to be compared whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.cost import kept_pairs

# Heads and their window, of 32 heads; 0 is dense. A KV head's query heads have one span.
MIXTURE = ((4, 0), (4, 4096), (8, 2048), (16, 512))
SINK = 64
ROWS = 48


@dataclass(frozen=True)
class Sizes:
    """What a run goes through. contexts: tokens in the cache, and batches in the order in which they are measured;
    shrink: divides windows and sinks, in a dry run."""

    heads: int = 32
    kv_heads: int = 8
    dims: tuple[int, ...] = (128, 64)
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    contexts: tuple[tuple[int, tuple[int, ...]], ...] = ((32768, (1, 8, 64, 2, 4, 16, 32)), (131072, (1, 8, 16)))
    checked: tuple[int, ...] = (1024, 1000, 1)
    shrink: int = 1


DRY = Sizes(32, 8, (16,), (128, 96), ((96, (1, 2)),), (64, 50, 1), 64)


@dataclass(frozen=True)
class Spans:
    """Per-head sinks and windows, named. A dense head has a window that no length reaches, and no sinks."""

    name: str
    sinks: tuple[int, ...]
    windows: tuple[int, ...]

    @classmethod
    def of(cls, name: str, windows: Sequence[int], sizes: Sizes, sink: int = SINK) -> Spans:
        held = tuple(w // sizes.shrink if w else 2**30 for w in windows)
        return cls(name, tuple(max(1, sink // sizes.shrink) if w else 0 for w in windows), held)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        sinks, windows = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.sinks, self.windows))
        return sinks, windows

    def pairs(self, length: int) -> int:
        """Kept query-key pairs of all heads."""
        return sum(kept_pairs(length, s, w) for s, w in zip(self.sinks, self.windows, strict=True))

    def keys(self, length: int) -> tuple[int, ...]:
        """Keys that the last query of each head keeps."""
        return tuple(min(length, s + w) for s, w in zip(self.sinks, self.windows, strict=True))


def mixture(sizes: Sizes) -> Spans:
    parts = [w for count, w in MIXTURE for _ in range(count * sizes.heads // 32)]
    return Spans.of("mixture", parts, sizes)


def uniform(window: int, sizes: Sizes) -> Spans:
    return Spans.of(f"W{window}", [window] * sizes.heads, sizes)


def dense(sizes: Sizes) -> Spans:
    return Spans.of("dense", [0] * sizes.heads, sizes)


def inputs(
    sizes: Sizes, dim: int, length: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model's projections lay them out: (B, heads, N, D), physically (B, N, heads, D)."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads, dim, device=device, dtype=dtype, generator=generator).transpose(1, 2)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    return q, k, v


def sampled_rows(spans: Spans, length: int) -> Tensor:
    """Query rows where kernels go wrong if anywhere: ends, edges of spans and of blocks; and others, spread."""
    edges = {0, 1, 63, 64, 127, 128, length - 1, length - 2, *spans.sinks, *spans.windows}
    edges |= {s + w + more for s, w in zip(spans.sinks, spans.windows, strict=True) for more in (-1, 0, 1)}
    spread = torch.linspace(0, length - 1, ROWS - min(ROWS // 2, len(edges))).long().tolist()
    return torch.tensor(sorted({r for r in [*edges, *spread] if 0 <= r < length}))


def sampled_error(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, found: Tensor) -> float:
    """Relative Frobenius error of `sampled_rows` against float64; infinite where any element is not finite.

    q, found (B, H, N, D), k, v (B, G, N, D): one KV head at a time, so that 131072 keys fit.
    """
    if found.shape != q.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    rows = sampled_rows(spans, q.shape[2]).to(q.device)
    column = torch.arange(k.shape[2], device=q.device)
    share = q.shape[1] // k.shape[1]
    away = norm = 0.0
    sinks, windows = spans.tables(q.device)
    for group in range(k.shape[1]):
        own = slice(group * share, (group + 1) * share)
        back = rows[:, None] - column[None, :]
        keep = (column < sinks[own, None, None]) | (back < windows[own, None, None])
        for entry in range(q.shape[0]):
            scores = q[entry, own][:, rows].double() @ k[entry, group].double().T * scale
            weights = scores.masked_fill(~(keep & (back >= 0)), float("-inf")).softmax(-1)
            expected = weights @ v[entry, group].double()
            away += float((found[entry, own][:, rows].double() - expected).square().sum())
            norm += float(expected.square().sum())
    return (away / norm) ** 0.5
