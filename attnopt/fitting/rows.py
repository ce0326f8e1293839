"""What is kept of a site while the model runs over calibration text: some rows of queries, all keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import FittedError
from attnopt.statistics import attention


@dataclass(frozen=True, eq=False)
class Rows:
    """Of one sequence: queries q (H, M, D) at positions `at`, int64 (M,) ascending; keys k (G, N, D), values v
    (G, N, Dv). In the model's dtype."""

    q: Tensor
    at: Tensor
    k: Tensor
    v: Tensor

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v))


@dataclass(eq=False)
class Collected:
    """One site's share of the calibration text. outputs (H, Dv), fisher (H, Dv, Dv): sums over all `count` rows of the
    head's outputs and of dO dO^T, dO the gradient of the loss at them; float64."""

    scale: float
    rows: list[Rows] = field(default_factory=list)
    outputs: Tensor | None = None
    fisher: Tensor | None = None
    count: int = 0

    def mean(self) -> Tensor:
        """The heads' mean outputs, float32 (H, Dv)."""
        assert self.outputs is not None
        return (self.outputs / max(self.count, 1)).float()

    def metric(self) -> Tensor:
        """L (H, Dv, Dv) such that |L^T x|^2 is the mean of (dO.x)^2, with a tenth of it spread over all directions: the
        few that a gradient of so little text shows are not all there are."""
        assert self.fisher is not None
        fisher = self.fisher / max(self.count, 1)
        width = fisher.shape[-1]
        level = fisher.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
        floor = torch.eye(width, dtype=fisher.dtype, device=fisher.device) * level[:, None, None]
        return torch.linalg.cholesky((0.9 * fisher + 0.1 * floor) / level[:, None, None]).float()


def drawn_rows(length: int, first: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` positions from `first` on, ascending: those whose windows leave far keys."""
    first = min(first, length - 1)
    return first + torch.randperm(length - first, generator=generator)[:count].sort().values


class Collect(torch.autograd.Function):
    """Attention that keeps rows of what runs through it; arguments as of `attnopt.statistics.Observe`.

    Rows are kept in the backward pass, so that a forward pass that is recomputed is not kept twice.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, into: Collected, at: Tensor,
        window: int | None = None, softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        if pad is not None and not bool(pad.all()):
            raise FittedError("The text to fit on is padded.", "Give whole sequences.")
        ctx.save_for_backward(q, k, v, at)
        ctx.numbers, ctx.into = (scale, None, window, softcap), into
        return attention(q, k, v, *ctx.numbers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, at = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = attention(*inputs, *ctx.numbers)
        found = torch.autograd.grad(out, inputs, grads[0])
        into, (batch, _, length, _) = ctx.into, out.shape
        with torch.no_grad():
            upstream = grads[0].double()
            sums = out.double().sum((0, 2)), torch.einsum("bhni,bhnj->hij", upstream, upstream)
            into.outputs, into.fisher = (
                new if old is None else old + new for old, new in zip((into.outputs, into.fisher), sums, strict=True)
            )
            into.count += batch * length
            for n in range(batch):
                into.rows.append(Rows(q[n][:, at].clone(), at, k[n].clone(), v[n].clone()))
        return *found, *(None for _ in range(6))
