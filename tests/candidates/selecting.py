"""What tests of candidates that select blocks share: inputs as those of degenerate.py, in blocks of 16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from candidates.degenerate import SCALE, Inputs, any_inputs
from torch import Tensor

from attnopt.candidates import Number
from attnopt.candidates._selected import Selected, asked_of
from attnopt.selection import Asked, keep_of


def padded(length: int = 45) -> Tensor:
    """bool (2, N): padding on the left of one entry, with a whole block of it, and holes in the other."""
    pad = torch.ones(2, length, dtype=torch.bool)
    pad[0, :19], pad[1, 5:9], pad[1, 30] = False, False, False
    return pad


def in_topics() -> Inputs:
    """q, k, v whose blocks of 16 each have a direction of their own, so that some blocks matter more than others."""
    q, k, v = any_inputs()
    drawn = torch.Generator().manual_seed(3)
    of_q, of_k = (2 * torch.randn(*x.shape[:2], 3, x.shape[3], generator=drawn, dtype=x.dtype) for x in (q, k))
    block = torch.arange(q.shape[2]) // 16
    return q + of_q[:, :, block], k + of_k[:, :, block], v


def asked_for(
    kind: Selected, params: Mapping[str, Number], pad: Tensor | None = None, inputs: Inputs | None = None,
    window: int = 0, queries: int | None = None,
) -> Asked:  # fmt: skip
    """Of every head, all with these parameters; queries: how many of the last ones there are, a chunk of a prompt."""
    q, k, _ = in_topics() if inputs is None else inputs
    q = q if queries is None else q[:, :, q.shape[2] - queries :]
    table = torch.tensor([kind.settings(params)] * q.shape[1], dtype=torch.float64)
    return asked_of(kind, q, k, torch.arange(q.shape[1]), table, SCALE, pad, window)


def kept_by(kind: Selected, params: Mapping[str, Number], pad: Tensor | None = None, **of: object) -> Tensor:
    """What it says itself: bool (B, h, R, C), of what is possible."""
    asked = asked_for(kind, params, pad, **of)  # type: ignore[arg-type]
    return (kind.keep(asked) & asked.possible).expand(asked.q.shape[0], len(asked.heads), -1, -1)


def visits_by(kind: Selected, params: Mapping[str, Number], pad: Tensor | None = None, **of: object) -> Tensor:
    """What the kernel walks: bool (B, h, R, C)."""
    asked = asked_for(kind, params, pad, **of)  # type: ignore[arg-type]
    return keep_of(kind.select(asked), asked.columns)
