"""How an emitted span prefill checks and times itself: ``check(spec, prefill, prefill_lse)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.reference_prefill import prefill_lse as reference_lse
from attnopt.codegen.self_check import TOLERANCE, Check, Race, Results
from attnopt.codegen.spec import SpanBackward, SpanPrefill

SCALE = 0.2
# It is float32 whatever the dtype; from bfloat16, ATen's flash kernel on the CPU errs by 4e-6.
TOLERANCE_LSE = 1e-4
# Tokens that are timed, by type of device.
TIMED = {"cuda": 16384, "cpu": 2048}
# Sinks and windows that the heads take in turn: none, inside a block, a block, and more than there is.
SINKS, WINDOWS = (0, 5, 64, 100), (2**30, 1, 40, 130)


def check(spec: SpanPrefill, prefill: Callable[..., Tensor], prefill_lse: Callable[..., Results]) -> NoReturn:
    """Compare both functions of an emitted file with the reference, time the first against dense SDPA, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, prefill, prefill_lse, device), _races(spec, prefill, device))


def tables_of(spec: SpanPrefill | SpanBackward, device: torch.device) -> tuple[Tensor, Tensor]:
    """sinks, windows int32 (H,)."""
    sinks, windows = (
        torch.tensor([values[h % 4] for h in range(spec.heads)], dtype=torch.int32, device=device)
        for values in (SINKS, WINDOWS)
    )
    return sinks, windows


def padding_of(spec: SpanPrefill | SpanBackward, length: int, device: torch.device) -> Tensor | None:
    """pad bool (2, N): a third of the first entry, on the left. None if the spec knows no padding."""
    first = torch.tensor([[length // 3], [0]], device=device)
    return torch.arange(length, device=device) >= first if spec.padded else None


def inputs_of(
    spec: SpanPrefill | SpanBackward, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model's projections lay them out: (B, heads, N, dim), physically (B, N, heads, dim)."""
    torch.manual_seed(0)
    sizes = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim_v)
    made = [torch.randn(batch, length, *size, device=device).to(getattr(torch, spec.dtype)) for size in sizes]
    q, k, v = (t.transpose(1, 2) for t in made)
    return q, k, v


def _checks(
    spec: SpanPrefill, prefill: Callable[..., Tensor], prefill_lse: Callable[..., Results], device: torch.device
) -> Iterator[Check]:
    sinks, windows = tables_of(spec, device)
    tolerance = TOLERANCE[spec.dtype]
    for length in (1, 65, 200):
        inputs = inputs_of(spec, 2, length, device)
        rest = SCALE, padding_of(spec, length, device)
        found = partial(prefill, *inputs, sinks, windows, *rest)
        expected, wrong = (partial(reference, *_wide(inputs), sinks, windows + more, *rest) for more in (0, 1))
        # One token keeps itself whatever its window.
        yield Check(f"out, N = {length}", found, expected, tolerance, wrong if length > 1 else None)
    off = [F.pad(t, (1, 0))[..., 1:] for t in inputs]
    yield Check("out, no row aligned", partial(prefill, *off, sinks, windows, *rest), expected, tolerance, wrong)
    with_lse = partial(prefill_lse, *inputs, sinks, windows, *rest)
    yield Check("out, LSE beside it", lambda: with_lse()[0], expected, tolerance, wrong)
    lse, wrong_lse = (partial(reference_lse, *_wide(inputs), sinks, windows + more, *rest) for more in (0, 1))
    yield Check("LSE", lambda: with_lse()[1], lambda: lse()[1], TOLERANCE_LSE, lambda: wrong_lse()[1])


def _wide(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.double() for t in inputs)
    return q, k, v


def mixture_of(spec: SpanPrefill | SpanBackward, length: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """sinks, windows int32 (H,) and by how much they lessen the pairs: an eighth of the heads is dense, an eighth has a
    window of an eighth of the keys, a quarter of 1/16, the rest of 1/64."""
    share = [(h + 0.5) / spec.heads for h in range(spec.heads)]
    parts = [1 if s < 1 / 8 else 8 if s < 1 / 4 else 16 if s < 1 / 2 else 64 for s in share]
    windows = torch.tensor([length // part for part in parts], dtype=torch.int32, device=device)
    sinks = torch.full_like(windows, 16)
    rows = torch.arange(1, length + 1, device=device)[:, None]
    kept = torch.minimum(rows, windows + sinks).sum().item()
    return sinks, windows, spec.heads * length * (length + 1) / 2 / kept


def _races(spec: SpanPrefill, prefill: Callable[..., Tensor], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference":
        return
    length = TIMED[device.type]
    q, k, v = inputs_of(spec, 1, length, device)
    sinks, windows, ideal = mixture_of(spec, length, device)
    pad = torch.ones(1, length, dtype=torch.bool, device=device) if spec.padded else None
    mask = None
    if pad is not None:
        # What a padded model is run with: the mask, written out.
        pad[:, : length // 100] = False
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_() & pad[:, None, None, :]
    dense = partial(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE, enable_gqa=True
    )
    own = partial(prefill, q, k, v, sinks, windows, SCALE, pad)
    yield Race(f"N = {length}, {ideal:.1f}× fewer pairs", {"this kernel": own, "dense SDPA": dense})
