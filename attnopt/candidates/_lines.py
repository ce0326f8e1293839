"""Vertical and slash lines of attention, from the weights of the last queries; shared by the candidates that follow
them.

A vertical line is a key that many queries look at, a slash a distance at which many look back. Both show in the last
queries of a prompt and hold for those before (Jiang et al., "MInference 1.0", arXiv:2407.02490).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.selection import Asked, Last, any_of


def verticals(last: Last) -> Tensor:
    """What the last queries give each key, (B, h, M)."""
    return last.weights.sum(2)


def slashes(last: Last) -> Tensor:
    """What they give to the key d positions before each of them, for every distance d: (B, h, M)."""
    distance = torch.arange(last.weights.shape[-1], device=last.at.device)
    key = (last.at[..., None] - distance)[:, None]  # (B | 1, 1, n, M)
    # A key before the first is read as one that many after the query, which weighs 0.
    key = key.remainder(last.weights.shape[-1])
    # Read where they stand and not added to where they go: sums come out the same every time, on any device.
    return last.weights.gather(-1, key.expand_as(last.weights)).sum(2)


def blocks_on(keys: Tensor, distances: Tensor, asked: Asked) -> Tensor:
    """The blocks that hold a kept key or are crossed by a kept distance: bool (B, h, R, C), of keys and distances bool
    (B, h, M)."""
    return any_of(keys, asked.block)[..., None, :] | crossed(distances, asked)


def crossed(distances: Tensor, asked: Asked) -> Tensor:
    """The blocks in which some query stands at a kept distance behind some key: bool (B, h, R, C)."""
    keys, block = asked.k.shape[2], asked.block
    row = torch.arange(asked.rows, device=distances.device)[:, None] * block + asked.offset
    column = torch.arange(asked.columns, device=distances.device) * block
    # Every distance between the nearest and the farthest pair of a block occurs in it.
    nearest = (row - (column + block - 1).clamp(max=keys - 1)).clamp(min=0)
    beyond = ((row + block).clamp(max=keys) - column).clamp(min=0)
    before = torch.nn.functional.pad(distances.cumsum(-1), (1, 0))  # kept ones under d, for d = 0 ... M
    return before[..., beyond] > before[..., nearest]
