"""How an emitted step of the ragged cache checks and times itself: ``check(spec, step)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.self_check import TOLERANCE, Check, Race
from attnopt.codegen.spec import CacheStep

SCALE = 0.2
# A window that no ring holds: the KV head holds every token.
EVERY = 1 << 30
# Tokens of the cache, and batch entries, that are timed, by type of device.
TIMED = {"cuda": (32768, 16), "cpu": (8192, 1)}
# Sink and window that the KV heads take in turn; the second holds every token.
SPANS = ((4, 28), (0, EVERY), (0, 16), (20, 60))


def check(spec: CacheStep, step: Callable[..., Tensor]) -> NoReturn:
    """Compare the function of an emitted file with the reference, time it against SDPA on a dense cache, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, step, device), _races(spec, step, device))


def _tables(spec: CacheStep, length: int, device: torch.device, shares: bool = False) -> tuple[Tensor, Tensor, int]:
    """The table (G, 4) and spans (H, 2) of a mixture of KV heads, and all slots of it."""
    rows: list[tuple[int, int, int, int]] = []
    start = 0
    for group in range(spec.kv_heads):
        sink, window = SPANS[group % len(SPANS)]
        if shares:
            part = (group + 0.5) / spec.kv_heads
            window = length // (1 if part < 1 / 8 else 8 if part < 1 / 4 else 16 if part < 1 / 2 else 64)
            sink, window = (0, EVERY) if window == length else (0, window)
        capacity = -(-(length if window == EVERY else sink + window) // 16) * 16
        rows.append((start, capacity, sink, window))
        start += capacity
    spans = [(sink, min(window, length)) for _, _, sink, window in rows for _ in range(spec.heads // spec.kv_heads)]
    # Heads of one group need not be alike.
    spans = [(sink, window - h % 2 if window > 1 else window) for h, (sink, window) in enumerate(spans)]
    table, heads = (torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, spans))
    return table, heads, start


def _checks(spec: CacheStep, step: Callable[..., Tensor], device: torch.device) -> Iterator[Check]:
    length, batch = 150, 2
    table, spans, slots = _tables(spec, length, device)
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    tokens = (
        normal(batch, spec.heads, length, spec.head_dim),
        normal(batch, spec.kv_heads, length, spec.head_dim),
        normal(batch, spec.kv_heads, length, spec.head_dim_v),
    )
    counts = torch.rand(batch, length, device=device) < 0.9

    def run(kernel: Callable[..., Tensor], wide: bool, chunks: tuple[int, ...], off: int = 0) -> tuple[Tensor, ...]:
        """Outputs of every chunk, and what is left in the cache, whose empty slots begin as NaN."""
        kind = torch.float64 if wide else dtype
        cache = (
            torch.full((batch, slots, spec.head_dim), torch.nan, dtype=kind, device=device),
            torch.full((batch, slots, spec.head_dim_v), torch.nan, dtype=kind, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )
        own, at, found = spans - torch.tensor([0, off], dtype=torch.int32, device=device), 0, []
        for size in chunks:
            new = (x[:, :, at : at + size].to(kind) for x in tokens)
            found.append(kernel(*new, *cache, counts[:, at : at + size], table, own, SCALE, at == 0))
            at += size
        return torch.cat(found, 2), *(x.nan_to_num(0.0) for x in cache[:2])

    for name, chunks in (("a prompt and tokens", (120, *(1,) * 30)), ("chunks", (1, 50, 7, 92))):
        found, expected = partial(run, step, False, chunks), partial(run, reference, True, chunks)
        yield Check(
            f"out and cache, {name}", found, expected, TOLERANCE[spec.dtype], partial(run, reference, True, chunks, 1)
        )


def _races(spec: CacheStep, step: Callable[..., Tensor], device: torch.device) -> Iterator[Race]:
    """A mixture of KV heads: 1/8 of them dense, 1/8 with 1/8 of the keys, 1/4 with 1/16, the rest with 1/64."""
    if spec.target == "reference":
        return
    length, batch = TIMED[device.type]
    table, spans, slots = _tables(spec, length, device, shares=True)
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    q, k, v = (
        normal(batch, heads, 1, dim)
        for heads, dim in (
            (spec.heads, spec.head_dim),
            (spec.kv_heads, spec.head_dim),
            (spec.kv_heads, spec.head_dim_v),
        )
    )
    cache = normal(batch, slots, spec.head_dim), normal(batch, slots, spec.head_dim_v)
    keys, values = (normal(batch, spec.kv_heads, length, dim) for dim in (spec.head_dim, spec.head_dim_v))
    seen = torch.empty(batch, dtype=torch.int32, device=device)

    def ours() -> Tensor:
        return step(q, k, v, *cache, seen.fill_(length - 1), None, table, spans, SCALE, False)

    calls: dict[str, Callable[[], object]] = {
        "this kernel": ours,
        "SDPA, grouped": partial(F.scaled_dot_product_attention, q, keys, values, scale=SCALE, enable_gqa=True),
    }
    ideal = spec.kv_heads * length / slots
    yield Race(f"N = {length}, batch {batch}, {ideal:.1f}× fewer slots", calls)
