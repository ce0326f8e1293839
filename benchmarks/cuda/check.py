"""What one check of a kernel is, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.self_check import Results
from benchmarks.cuda.device import Device
from benchmarks.spans import Sizes


@dataclass(frozen=True)
class Check:
    """found: what `kernel` computes; expected: the same in float64. A kernel that is wrong in one is not timed."""

    kernel: str
    what: str
    found: Callable[[], Results]
    expected: Callable[[], Results]
    tolerance: float


def random(device: Device, dtype: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device.where).to(getattr(torch, dtype))


def prefill_inputs(sizes: Sizes, dim: int, length: int, dtype: str, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, laid out as a model's projections do: (B, heads, N, D), physically (B, N, heads, D)."""
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    q, k, v = (random(device, dtype, 2, length, n, dim).transpose(1, 2) for n in heads)
    return q, k, v
