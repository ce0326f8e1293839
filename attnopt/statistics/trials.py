"""What a replacement of any kind would do to the loss: tried on the very outputs, head by head.

With O' the output of a head under a choice, t_i = dO_i.(O'_i - O_i): the formula of the package, for replacements whose
delta O does not follow from the weights of kept keys. Every choice is computed once for all heads of a site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import WHOLE, Choice, Share
from attnopt.statistics.observe import attention

SUMS = ("t2", "t1", "sample_sq")
# What heads whose keys are selected while running really visited and kept.
VISITED = ("possible", "visited", "skipped", "recalled")
# Of a retrieval probe.
ASKED = "asked_t2"
HELD = (*SUMS, *VISITED, ASKED)
# Of a sum that was not given: zeros.
NOTHING = torch.zeros(0, 0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a selection kept of dense attention: blocks possible, listed and skipped, int (H, 3), and every row's share
    of the dense soft-max mass, float (B, H, N)."""

    blocks: Tensor
    recalled: Tensor


# (choice, q, k, v, pad) -> output (B, H, N, Dv) of all heads of a site under one choice; and what was kept, where keys
# are selected.
Replaced = Callable[[Choice, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, "Kept | None"]]


@dataclass(eq=False)
class Trials:
    """Sums of one site at one length, float64 (H, C) on the CPU: t2 sum t_i^2, t1 sum t_i, sample_sq the sum over
    samples of (sum_i t_i)^2. tokens: the summed weights of the tokens whose loss was taken.

    Of choices that select keys: possible, visited, skipped, blocks of keys, and recalled, the sum over `rows` rows of
    the share of dense mass that was attended to; 0 of other choices. asked_t2: t2 of a retrieval probe, of `asked`
    tokens, which counts in nothing else here."""

    choices: tuple[Choice, ...]
    t2: Tensor
    t1: Tensor
    sample_sq: Tensor
    tokens: float = 0.0
    possible: Tensor = NOTHING
    visited: Tensor = NOTHING
    skipped: Tensor = NOTHING
    recalled: Tensor = NOTHING
    rows: float = 0.0
    asked_t2: Tensor = NOTHING
    asked: float = 0.0

    def __post_init__(self) -> None:
        for name in HELD:
            if getattr(self, name) is NOTHING:
                setattr(self, name, torch.zeros_like(self.t2))

    @classmethod
    def zeros(cls, heads: int, choices: tuple[Choice, ...]) -> Trials:
        return cls(choices, *(torch.zeros(heads, len(choices), dtype=torch.float64) for _ in SUMS))

    @property
    def heads(self) -> int:
        return self.t2.shape[0]

    def damage(self, choice: Choice) -> Tensor:
        """Nats per token of every head, float64 (H,)."""
        return self.t2[:, self.choices.index(choice)] / 2 / max(self.tokens, 1e-9)

    def forgotten(self, choice: Choice) -> Tensor | None:
        """Nats per token of the probe's answers, float64 (H,); None where no probe was tried."""
        return self.asked_t2[:, self.choices.index(choice)] / 2 / self.asked if self.asked else None

    def shares(self, choice: Choice) -> tuple[Share, ...]:
        """What every head kept, where keys are selected; WHOLE of any other choice."""
        c = self.choices.index(choice)
        columns = zip(*(getattr(self, name)[:, c].tolist() for name in VISITED), strict=True)
        return tuple(
            Share(visited / possible, skipped / max(visited, 1.0), min(recalled / max(self.rows, 1.0), 1.0))
            if possible
            else WHOLE
            for possible, visited, skipped, recalled in columns
        )

    def as_probe(self) -> Trials:
        """What was tried on a probe, to be added to what was on other text."""
        return replace(Trials.zeros(self.heads, self.choices), asked_t2=self.t2, asked=self.tokens)

    def __iadd__(self, other: Trials) -> Trials:
        if (self.choices, self.heads) != (other.choices, other.heads):
            raise ValueError("trials of other choices or heads do not add")
        for name in HELD:
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens
        self.rows += other.rows
        self.asked += other.asked
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
    counted = q.shape[0] * q.shape[2] if pad is None else int(pad.sum())
    trials.rows += counted
    for column, choice in enumerate(trials.choices):
        found, kept = replaced(choice, q, k, v, pad)
        t = ((found.double() - dense) * upstream).sum(-1)
        if pad is not None:
            t.masked_fill_(~pad[:, None], 0.0)
        by_sample = t.sum(-1)
        trials.t2[:, column] += t.square().sum((0, 2)).cpu()
        trials.t1[:, column] += by_sample.sum(0).cpu()
        trials.sample_sq[:, column] += by_sample.square().sum(0).cpu()
        if kept is not None:
            recalled = kept.recalled if pad is None else kept.recalled.masked_fill(~pad[:, None], 0.0)
            sums = (*kept.blocks.double().unbind(-1), recalled.double().sum((0, 2)))
            for name, values in zip(VISITED, sums, strict=True):
                getattr(trials, name)[:, column] += values.cpu()
