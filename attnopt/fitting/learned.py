"""Exponential maps trained on a head's own output, all heads of a site at once.

As Hedgehog (Zhang et al., arXiv:2402.04347) and LoLCATs (Zhang et al., arXiv:2410.10254) do, the loss is the error of
the head's output plus the cross-entropy of its attention weights, here those of the whole hybrid head under its one
normaliser. Every head has its own loss, in units of what dropping the far keys costs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.feature_maps import FeatureMap
from attnopt.fitting.hybrid import AT_ONCE, approximate, divergence, exact, squared_error
from attnopt.fitting.rows import Rows

# On the demo model 0.003 to 0.01 end alike after 200 steps; 0.03 does not get off its start.
RATE = 0.006
# Rows of a step.
ROWS = 64
# What the divergence of attention weights counts beside the error of outputs.
SHARE = 0.3
# Steps between two looks at the rows held out.
LOOK = 25


def trained(
    start: FeatureMap,
    rows: list[Rows],
    error_of: Callable[[FeatureMap], Tensor],
    metric: Tensor,
    scale: float,
    sink: int,
    windows: tuple[int, ...],
    steps: int,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> tuple[FeatureMap, Tensor]:
    """`start` after at most `steps` steps of Adam: per head the map with the least error on rows held out, and that
    error, float64 (H,). progress(step) is called after every one."""
    parameters = [x.clone().requires_grad_() for x in start.tensors]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    best, least = [x.clone() for x in start.tensors], error_of(start)
    for step in range(steps):
        part = rows[int(torch.randint(len(rows), (), generator=generator))]
        at = torch.randperm(part.at.numel(), generator=generator)[:ROWS].sort().values
        window = windows[int(torch.randint(len(windows), (), generator=generator))]
        optimiser.zero_grad()
        _backward(start.kind, parameters, Rows(part.q[:, at], part.at[at], part.k, part.v), metric, scale, sink, window)
        # Of a head whose loss is not finite nothing moves.
        for x in parameters:
            assert x.grad is not None
            x.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            now = FeatureMap(start.kind, *(x.detach().clone() for x in parameters))
            error = error_of(now)
            better = error < least
            for kept, x in zip(best, now.tensors, strict=True):
                kept[better] = x[better]
            least = torch.where(better, error, least)
        if progress is not None:
            progress(step + 1)
    return FeatureMap(start.kind, *best), least


def _backward(
    kind: str, parameters: list[Tensor], part: Rows, metric: Tensor, scale: float, sink: int, window: int
) -> None:
    """Add the gradient of every head's loss, some heads at a time."""
    heads = metric.shape[0]
    step = max(1, AT_ONCE // (part.at.numel() * part.k.shape[1]))
    for first in range(0, heads, step):
        some = torch.arange(first, min(first + step, heads))
        with torch.no_grad():
            head = exact(part, some, scale, sink, window)
            dropped = squared_error(head, head.near_out, metric[some]).mean(-1).clamp(min=1e-12)
            forgone = (head.lse - head.near_lse).mean(-1).clamp(min=1e-6)
        found = approximate(head, FeatureMap(kind, *(x[some] for x in parameters)))
        error = squared_error(head, found.out, metric[some]).mean(-1) / dropped
        (error + SHARE * divergence(head, found).mean(-1) / forgone).sum().backward()
