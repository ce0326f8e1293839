"""Shared by the candidates that score every stride-th position: weights of cells of positions, reduced to blocks.

A cell is `stride` positions that follow each other; a block holds block / stride of them. The weights are a soft-max
over the cells of keys that a cell of queries may see. Cells of queries times cells of keys are more than a selection
may hold: they are made for some rows of blocks at a time, as many as the shapes say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.selection import Asked, masked_softmax

# Numbers held at once: on the CPU few enough to stay in its caches, elsewhere enough for kernels that fill the device.
HELD = 1 << 18
HELD_BY_OTHERS = 1 << 25


class Cells(NamedTuple):
    """vectors (B, p, n, E) of n cells, each of E / D positions; counts bool (B | 1, 1, n, E / D), which of these count.
    n fills whole blocks. vectors are of the inputs' dtype, as which they are multiplied; soft-maxes are wide."""

    vectors: Tensor
    counts: Tensor


def counting(pad: Tensor | None, length: int, device: torch.device) -> Tensor:
    """bool (B | 1, length)."""
    return torch.ones(1, length, dtype=torch.bool, device=device) if pad is None else pad


def rows_at_once(asked: Asked, each: int) -> int:
    """Rows of blocks whose tensors of `each` numbers a row are held at once."""
    held = HELD if asked.q.device.type == "cpu" else HELD_BY_OTHERS
    return max(held // max(each * asked.q.shape[0], 1), 1)


def block_weights(
    asked: Asked, queries: Cells, keys: Cells, stride: int, apart: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B, p, R, C): what `reduce` leaves of the weights (B, p, rows, cells, columns, cells) of the cells of each block.

    A score is the mean of the products of the positions of two cells, pair by pair, over pairs of which both count.
    apart: by how much the distance of a pair may differ from that of the first positions of its cells; cells weigh
    something if one of their pairs may be causal and within the model's own window.
    """
    per, columns = asked.block // stride, asked.columns
    each = rows_at_once(asked, queries.vectors.shape[1] * per * per * columns)
    found = []
    for first in range(0, asked.rows, each):
        rows = slice(first * per, (first + each) * per)
        end = min((first + each) * asked.block, asked.q.shape[2])
        last = (end - 1 + asked.offset) // asked.block
        seen = slice(0, (last + 1) * per)
        scores = queries.vectors[:, :, rows] @ keys.vectors[:, :, seen].mT
        pairs = queries.counts[:, :, rows].to(scores.dtype) @ keys.counts[:, :, seen].to(scores.dtype).mT
        a = (torch.arange(scores.shape[2], device=scores.device)[:, None] + rows.start) * stride + asked.offset
        b = torch.arange(scores.shape[3], device=scores.device) * stride
        live = (b <= a + apart) & (pairs > 0)
        if asked.window:
            live = live & (b > a - apart - asked.window)
        weights = masked_softmax(scores.to(asked.wide).div_(pairs.clamp(min=1)), live)
        cells = weights.unflatten(3, (-1, per)).unflatten(2, (-1, per))
        found.append(F.pad(reduce(cells), (0, columns - last - 1)))
    return torch.cat(found, 2)
