"""Settings at which a candidate changes nothing. Each candidate's test lists its own as ``DEGENERATE``;
``test_degenerate.py`` holds all candidates to theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.candidates import Number
from attnopt.feature_maps import FeatureMap

HEADS, KV_HEADS, LENGTH, DIM, SCALE = 4, 2, 45, 8, 0.4
Inputs = tuple[Tensor, Tensor, Tensor]


def any_inputs() -> Inputs:
    """q (B, H, N, D), k and v (B, G, N, D), float64."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, LENGTH, DIM, generator=made, dtype=torch.float64) for n in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


@dataclass(frozen=True)
class Degenerate:
    """At `params` the candidate equals dense: on any inputs, or on those of a toy. given: what was fitted of the
    toy's heads."""

    why: str
    params: dict[str, Number]
    inputs: Callable[[], Inputs] = any_inputs
    given: Callable[[], FeatureMap | Tensor | None] = lambda: None
    own_window: int | None = None


def keys_alike() -> Inputs:
    """Keys that differ only where no query looks: all far keys weigh the same as their mean."""
    q, k, v = any_inputs()
    seen = torch.arange(DIM) < DIM // 2
    return q * seen, torch.where(seen, k[:, :, :1], k), v


def keys_of_a_codebook() -> Inputs:
    """Keys that are one of DIM vectors, the unit vectors: attention is linear in DIM features."""
    q, k, v = any_inputs()
    return q, torch.nn.functional.one_hot(k.argmax(-1), DIM).to(k.dtype), v


def alike_outputs() -> Inputs:
    """Values that are all the same: a head's output is a constant."""
    q, k, v = any_inputs()
    return q, k, v[:1, :, :1].expand_as(v)


def map_of(kind: str, wq: Tensor, wk: Tensor, bk: Tensor, u: Tensor) -> FeatureMap:
    """One map for every head: wq, wk (R, D), bk (R,), u (D,) or (H, D)."""
    zero = torch.zeros(HEADS)
    each = [x.float().expand(HEADS, *x.shape) for x in (wq, torch.zeros(len(wq)), wk, bk)]
    return FeatureMap(kind, each[0], each[1], zero, each[2], each[3], zero, u.float().expand(HEADS, DIM), zero)
