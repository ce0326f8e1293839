"""What a replacement of any kind would do to the loss: tried on the very outputs, head by head.

With O' the output of a head under a choice, t_i = dO_i.(O'_i - O_i): the formula of the package, for replacements whose
delta O does not follow from the weights of kept keys. Every choice is computed once for all heads of a site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import Choice
from attnopt.statistics.observe import attention

SUMS = ("t2", "t1", "sample_sq")
# (choice, q, k, v, pad) -> output (B, H, N, Dv) of all heads of a site under one choice.
Replaced = Callable[[Choice, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(eq=False)
class Trials:
    """Sums of one site at one length, float64 (H, C) on the CPU: t2 sum t_i^2, t1 sum t_i, sample_sq the sum over
    samples of (sum_i t_i)^2. tokens: the summed weights of the tokens whose loss was taken."""

    choices: tuple[Choice, ...]
    t2: Tensor
    t1: Tensor
    sample_sq: Tensor
    tokens: float = 0.0

    @classmethod
    def zeros(cls, heads: int, choices: tuple[Choice, ...]) -> Trials:
        return cls(choices, *(torch.zeros(heads, len(choices), dtype=torch.float64) for _ in SUMS))

    @property
    def heads(self) -> int:
        return self.t2.shape[0]

    def damage(self, choice: Choice) -> Tensor:
        """Nats per token of every head, float64 (H,)."""
        return self.t2[:, self.choices.index(choice)] / 2 / max(self.tokens, 1e-9)

    def __iadd__(self, other: Trials) -> Trials:
        if (self.choices, self.heads) != (other.choices, other.heads):
            raise ValueError("trials of other choices or heads do not add")
        for name in SUMS:
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens
        return self


class Try(torch.autograd.Function):
    """Causal attention whose backward pass also adds to Trials; output and gradients are those of dense attention.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), pad bool (B, N) or None: as in `Observe`, and as there sums are
    added once per backward pass; rows that are padded count in none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        pad: Tensor | None,
        trials: Trials,
        replaced: Replaced,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pad)
        ctx.trials, ctx.replaced, ctx.numbers = trials, replaced, (scale, window, softcap)
        return attention(q, k, v, scale, pad, window, softcap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pad = ctx.saved_tensors
        # Again in float32: a difference of two outputs in bfloat16 would be one of their roundings.
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (x.detach().to(wide).requires_grad_() for x in (q, k, v))
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            scale, window, softcap = ctx.numbers
            out = attention(queries, keys, values, scale, pad, window, softcap)
        upstream = grads[0].to(wide)
        found = torch.autograd.grad(out, (queries, keys, values), upstream)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            add(ctx.trials, ctx.replaced, queries, keys, values, out, upstream, pad)
        return *(x.to(q.dtype) for x in found), *(None for _ in range(6))


def add(
    trials: Trials, replaced: Replaced, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, pad: Tensor | None
) -> None:
    """Add what every choice does to the outputs (B, H, N, Dv) whose gradient is `grad`; tokens count elsewhere."""
    dense, upstream = out.double(), grad.double()
    for column, choice in enumerate(trials.choices):
        t = ((replaced(choice, q, k, v, pad).double() - dense) * upstream).sum(-1)
        if pad is not None:
            t.masked_fill_(~pad[:, None], 0.0)
        by_sample = t.sum(-1)
        trials.t2[:, column] += t.square().sum((0, 2)).cpu()
        trials.t1[:, column] += by_sample.sum(0).cpu()
        trials.sample_sq[:, column] += by_sample.square().sum(0).cpu()
