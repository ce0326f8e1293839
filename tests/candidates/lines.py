"""Inputs whose attention is all vertical and slash lines; what a choice of blocks recalls; a window of as many."""

from __future__ import annotations

import math

import torch
from candidates.degenerate import HEADS, KV_HEADS, SCALE, Inputs
from torch import Tensor

from attnopt.selection import Asked


def striped(keys: tuple[int, ...], distances: tuple[int, ...], length: int, loud: float = 12.0) -> Inputs:
    """float64 q, k, v of one prompt for every KV head: all queries score `loud` at the keys named and at the distances
    named, and little elsewhere. Distances are features that turn with the position, all for one query and one key."""
    drawn = torch.Generator().manual_seed(7)
    at = torch.arange(length, dtype=torch.float64)
    # The sum of so many cosines of different speeds is large at the one distance where all are 1.
    speeds = torch.pi * torch.rand(64, generator=drawn, dtype=torch.float64)
    parts_q, parts_k = [torch.ones(length, 1, dtype=torch.float64)], [torch.zeros(length, 1, dtype=torch.float64)]
    parts_k[0][list(keys)] = loud / SCALE
    for distance in distances:
        for x, parts in ((at - distance, parts_q), (at, parts_k)):
            turned = torch.cat([(x[:, None] * speeds).cos(), (x[:, None] * speeds).sin()], -1)
            parts.append(turned * (loud / SCALE / len(speeds)) ** 0.5)
    noise = 0.03
    made = [
        torch.cat(parts, -1).expand(2, heads, -1, -1) + noise * torch.randn(
            2, heads, length, sum(p.shape[1] for p in parts), generator=drawn, dtype=torch.float64
        )
        for parts, heads in ((parts_q, HEADS), (parts_k, KV_HEADS))
    ]  # fmt: skip
    return made[0], made[1], torch.randn(2, KV_HEADS, length, 8, generator=drawn, dtype=torch.float64)


def weights_of(asked: Asked) -> Tensor:
    """Causal attention, (B, h, N, M); no padding and no window."""
    i, j = torch.arange(asked.offset, asked.k.shape[2])[:, None], torch.arange(asked.k.shape[2])
    scores = asked.queries @ asked.of_heads(asked.k).to(asked.wide).mT * asked.scale
    return scores.masked_fill(j > i, -torch.inf).softmax(-1)


def recalled(keep: Tensor, asked: Asked) -> Tensor:
    """Share of each query's attention that lies in the blocks of keep (B, h, R, C): (B, h, N)."""
    tokens = keep.repeat_interleave(asked.block, 2).repeat_interleave(asked.block, 3)
    return (weights_of(asked) * tokens[:, :, : asked.q.shape[2], : asked.k.shape[2]]).sum(-1)


def sink_window_of(keep: Tensor, asked: Asked) -> Tensor:
    """The first block and the last ones of each row, as many as `keep` (B, h, R, C) has there."""
    columns = torch.arange(asked.columns)
    last = asked.reach[1][:, None]
    return ((columns > last - (keep.sum(-1, keepdim=True) - 1)) | (columns == 0)) & (columns <= last)


def lines_by_hand(asked: Asked, b: int, h: int, last: int) -> tuple[dict[int, float], dict[int, float]]:
    """What the last queries that count give each key, and each distance."""
    keys, distances = dict[int, float](), dict[int, float]()
    k = asked.of_heads(asked.k)
    queries, offset = asked.queries.shape[2], asked.offset
    real = [True] * k.shape[2] if asked.pad is None else asked.pad[b].tolist()
    for i in [i for i in range(offset, offset + queries) if real[i]][-last:]:
        seen = [j for j in range(i + 1) if real[j] and (not asked.window or i - j < asked.window)]
        scores = {j: float(asked.queries[b, h, i - offset] @ k[b, h, j]) * asked.scale for j in seen}
        total = sum(math.exp(s) for s in scores.values())
        for j, score in scores.items():
            keys[j] = keys.get(j, 0.0) + math.exp(score) / total
            distances[i - j] = distances.get(i - j, 0.0) + math.exp(score) / total
    return keys, distances


def blocks_by_hand(asked: Asked, keys: list[int], distances: list[int]) -> Tensor:
    """bool (R, C): where a pair of a query and a key lies on a line."""
    found = torch.zeros(asked.rows, asked.columns, dtype=torch.bool)
    for i in range(asked.offset, asked.k.shape[2]):
        for j in range(asked.k.shape[2]):
            if j in keys or i - j in distances:
                found[(i - asked.offset) // asked.block, j // asked.block] = True
    return found
