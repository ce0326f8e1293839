"""How an emitted span decode checks and times itself: ``check(spec, decode)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.reference_decode import decode as reference
from attnopt.codegen.self_check import TOLERANCE, Check, Race
from attnopt.codegen.spec import SpanDecode

SCALE = 0.2
# Slots of a dense head, and batch entries, that are timed, by type of device.
TIMED = {"cuda": (32768, 16), "cpu": (8192, 1)}
# Sinks and windows that the heads take in turn.
SINKS, WINDOWS = (0, 3, 2, 0), (2**30, 20, 33, 7)


def check(spec: SpanDecode, decode: Callable[..., Tensor]) -> NoReturn:
    """Compare the function of an emitted file with the reference, time it against SDPA on a dense cache, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, decode, device), _races(spec, decode, device))


def _cache(
    spec: SpanDecode, capacities: list[int], batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k (B, C, D), v (B, C, Dv), starts (G + 1,) for segments of `capacities` slots."""
    torch.manual_seed(0)
    slots = sum(capacities)
    sizes = (spec.heads, spec.tokens, spec.head_dim), (slots, spec.head_dim), (slots, spec.head_dim_v)
    q, k, v = (torch.randn(batch, *size, device=device).to(getattr(torch, spec.dtype)) for size in sizes)
    starts = torch.tensor([0, *capacities], device=device).cumsum(0, dtype=torch.int32)
    return q, k, v, starts


def _checks(spec: SpanDecode, decode: Callable[..., Tensor], device: torch.device) -> Iterator[Check]:
    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    for length in (1, 65, 300):
        capacities = [length if group % 2 == 0 else min(length, 40) for group in range(spec.kv_heads)]
        q, k, v, starts = _cache(spec, capacities, 2, device)
        wide = q.double(), k.double(), v.double()
        filled = torch.stack((table(capacities), table([-(-size // 3) for size in capacities])))
        name = f"out, N = {length}, whole and a third filled"
        if not spec.positioned:
            expected = partial(reference, *wide, starts, filled, SCALE)
            wrong = partial(reference, *wide, starts, filled - 1, SCALE)
            yield Check(name, partial(decode, q, k, v, starts, filled, SCALE), expected, TOLERANCE[spec.dtype], wrong)
            continue
        # Each segment holds the last keys, in the order in which they came.
        positions = torch.cat([torch.arange(length - size, length, dtype=torch.int32) for size in capacities])
        sinks, windows = (table([values[h % 4] for h in range(spec.heads)]) for values in (SINKS, WINDOWS))
        last = table([length - spec.tokens, -(-length // 3)])
        rest = positions.to(device), last
        found = partial(decode, q, k, v, starts, filled, SCALE, sinks, windows, *rest)
        expected = partial(reference, *wide, starts, filled, SCALE, sinks, windows, *rest)
        off = partial(reference, *wide, starts, filled, SCALE, sinks, windows - 1, *rest)
        yield Check(name, found, expected, TOLERANCE[spec.dtype], off if length > 1 else None)


def _races(spec: SpanDecode, decode: Callable[..., Tensor], device: torch.device) -> Iterator[Race]:
    """A mixture of KV heads: 1/8 of them dense, 1/8 with 1/8 of the keys, 1/4 with 1/16, the rest with 1/64."""
    if spec.target == "reference" or spec.positioned:
        return
    length, batch = TIMED[device.type]
    share = [(g + 0.5) / spec.kv_heads for g in range(spec.kv_heads)]
    capacities = [length // (1 if s < 1 / 8 else 8 if s < 1 / 4 else 16 if s < 1 / 2 else 64) for s in share]
    q, k, v, starts = _cache(spec, capacities, batch, device)
    filled = torch.tensor([capacities] * batch, dtype=torch.int32, device=device)
    size = batch, spec.kv_heads, length
    keys, values = (torch.randn(*size, dim, device=device).to(q.dtype) for dim in (spec.head_dim, spec.head_dim_v))
    rows = q.reshape(batch, spec.kv_heads, -1, spec.head_dim)
    calls: dict[str, Callable[[], object]] = {
        "this kernel": partial(decode, q, k, v, starts, filled, SCALE),
        "SDPA, packed rows": partial(F.scaled_dot_product_attention, rows, keys, values, scale=SCALE),
        "SDPA, grouped": partial(F.scaled_dot_product_attention, q, keys, values, scale=SCALE, enable_gqa=True),
    }
    ideal = spec.kv_heads * length / sum(capacities)
    yield Race(f"N = {length}, batch {batch}, {ideal:.1f}× fewer slots", calls)
