"""Feature maps: what stands in for the soft-max of far keys, one map per head.

A map gives row i and key j of a head the weight W_ij = exp(shift_i) f_q(q_i).f_k(k_j), which stands for
exp(scale q_i.k_j); the scale is in the map. Two kinds, R the rows of the projections:

    exp     f_q = exp(E - max E), E = wq q + bq - cq |q|^2, shift = max E + u.q + u0
            f_k = exp(min(wk k + bk - ck |k|^2, KEY_CAP))                                       F = R features
    taylor  f = [1, y, vec(y y^T) / sqrt 2] with y = w x + b, shift = u.q + u0                  F = 1 + R + R^2

"exp" holds the positive random features of Performer (Choromanski et al., arXiv:2009.14794, lemma 1) and learned maps
in the manner of Hedgehog (Zhang et al., arXiv:2402.04347); "taylor" is the second order of BASED (Arora et al.,
arXiv:2402.18668), 1 + s + s^2/2 > 0 for every s = y_q.y_k. exp(scale q.mu), mu a mean key, is an exact factor of a
row's weights: u = scale mu leaves k - mu to the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("exp", "taylor")
# Exponent of a key's feature: e^40 = 2.4e17, of which 2^60 still add up to a float32.
KEY_CAP = 40.0
NAMES = ("wq", "bq", "cq", "wk", "bk", "ck", "u", "u0")


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """The maps of h heads, float32: wq, wk (h, R, D); bq, bk (h, R); cq, ck, u0 (h,); u (h, D). A "taylor" map has no
    use for cq and ck, which are 0 there."""

    kind: str
    wq: Tensor
    bq: Tensor
    cq: Tensor
    wk: Tensor
    bk: Tensor
    ck: Tensor
    u: Tensor
    u0: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which operators take them: wq, bq, cq, wk, bk, ck, u, u0."""
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def heads(self) -> int:
        return self.wq.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.wq.shape[1]

    @property
    def width(self) -> int:
        """Features F of a key."""
        return self.rank if self.kind == "exp" else 1 + self.rank + self.rank**2

    def of(self, heads: Sequence[int] | Tensor) -> FeatureMap:
        """The maps of some of the heads, in the order given."""
        at = torch.as_tensor(heads, dtype=torch.long, device=self.wq.device)
        return FeatureMap(self.kind, *(x[at] for x in self.tensors))

    def to(self, device: torch.device | str) -> FeatureMap:
        return FeatureMap(self.kind, *(x.to(device) for x in self.tensors))

    def problem(self, head_dim: int | None = None) -> str:
        """What is wrong with it, or an empty string: unknown kind, shapes that do not agree, numbers not finite."""
        if self.kind not in KINDS:
            return f"a feature map is {' or '.join(KINDS)}, not {self.kind!r}"
        if self.wq.ndim != 3 or not self.wq.shape[1]:
            return f"wq is {tuple(self.wq.shape)}, expected (heads, features, head dimension)"
        heads, rank, dim = self.wq.shape
        if head_dim is not None and dim != head_dim:
            return f"it maps {dim} numbers where a head has {head_dim}"
        for name, shape in shapes(heads, rank, dim).items():
            held = getattr(self, name)
            if tuple(held.shape) != shape or held.dtype != torch.float32:
                found = f"{str(held.dtype).removeprefix('torch.')} {tuple(held.shape)}"
                return f"{name} is {found}, expected float32 {shape}"
            if not bool(held.isfinite().all()):
                return f"{name} is not finite"
        return ""


def shapes(heads: int, rank: int, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a map's tensors, by name."""
    return {
        "wq": (heads, rank, dim), "bq": (heads, rank), "cq": (heads,),
        "wk": (heads, rank, dim), "bk": (heads, rank), "ck": (heads,),
        "u": (heads, dim), "u0": (heads,),
    }  # fmt: skip


def query_features(x: Tensor, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """Of queries x (..., h, N, D): features (..., h, N, F) and the shift of each row (..., h, N), to which W is
    exp(shift) f_q.f_k. float32 (float64 for float64 inputs)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    wq, bq, cq, _, _, _, u, u0 = (t.to(x.device, x.dtype) for t in map.tensors)
    shift = (x * u[:, None]).sum(-1) + u0[:, None]
    if map.kind == "taylor":
        return _second_order(x @ wq.mT + bq[:, None]), shift
    exponents = x @ wq.mT + bq[:, None] - cq[:, None, None] * x.square().sum(-1, keepdim=True)
    most = exponents.amax(-1, keepdim=True)
    return (exponents - most).exp(), shift + most[..., 0]


def key_features(x: Tensor, map: FeatureMap) -> Tensor:
    """Of keys x (..., h, N, D): features (..., h, N, F), float32 (float64 for float64 inputs)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    wk, bk, ck = (t.to(x.device, x.dtype) for t in (map.wk, map.bk, map.ck))
    projected = x @ wk.mT + bk[:, None]
    if map.kind == "taylor":
        return _second_order(projected)
    return (projected - ck[:, None, None] * x.square().sum(-1, keepdim=True)).clamp(max=KEY_CAP).exp()


def _second_order(y: Tensor) -> Tensor:
    """[1, y, vec(y y^T) / sqrt 2] (..., 1 + R + R^2) of y (..., R): products of two are 1 + s + s^2 / 2."""
    squares = (y[..., :, None] * y[..., None, :]).flatten(-2) / math.sqrt(2.0)
    return torch.cat((torch.ones_like(y[..., :1]), y, squares), -1)
