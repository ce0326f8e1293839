"""Blocks of keys that blocks of queries visit, chosen while running: geometry, what always lives, scores to lists.

N queries are the last of M >= N keys, as in a prefill (M = N) or a chunk of one. Row block r holds the queries from
r * block on, column block c the keys from c * block on; R and C count them. All tensors have shapes known beforehand
and nothing here waits for a device. Shapes: B batch, H query heads, G KV heads, h the query heads served, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lists(NamedTuple):
    """counts int32 (B, h, R), blocks int32 (B, h, R, C): row block r visits ``blocks[..., r, :counts[..., r]]``."""

    counts: Tensor
    blocks: Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """What a selection is made from. q (B, H, N, D), k (B, G, M, D); heads and kv int64 (h,): the query heads served
    and the KV heads they read; settings: parameter name -> (h,) in float32, one value for each head; pad bool (B, M)
    true where a key counts; window: the model's own, 0 for none; fixed: parameters that all heads share because shapes
    depend on them. Tensors lie on one device."""

    q: Tensor
    k: Tensor
    heads: Tensor
    kv: Tensor
    settings: dict[str, Tensor]
    scale: float
    block: int
    pad: Tensor | None = None
    window: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def wide(self) -> torch.dtype:
        """Of scores: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def rows(self) -> int:
        return -(-self.q.shape[2] // self.block)

    @property
    def columns(self) -> int:
        return -(-self.k.shape[2] // self.block)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    def setting(self, name: str) -> Tensor:
        """One parameter of every head, (h, 1, 1)."""
        return self.settings[name][:, None, None]

    @cached_property
    def queries(self) -> Tensor:
        """(B, h, N, D), wide."""
        return self.q.index_select(1, self.heads).to(self.wide)

    def of_heads(self, x: Tensor) -> Tensor:
        """What each served head reads of x (B, G, ...), which is one for each KV head: (B, h, ...)."""
        return x.index_select(1, self.kv)

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """First and last column block that a row block may see of causal attention, int64 (R,) each; the last is where
        its last query stands."""
        start = torch.arange(self.rows, device=self.q.device) * self.block + self.offset
        end = (start + self.block - 1).clamp(max=self.k.shape[2] - 1)
        first = (start - self.window + 1).clamp(min=0) if self.window else torch.zeros_like(start)
        return first // self.block, end // self.block

    @cached_property
    def real(self) -> Tensor:
        """bool (B | 1, C): column blocks that hold a key that counts."""
        if self.pad is None:
            return torch.ones(1, self.columns, dtype=torch.bool, device=self.q.device)
        return any_of(self.pad, self.block)

    @cached_property
    def begins(self) -> Tensor:
        """The first column block that holds a key that counts, int64 (B | 1, 1): where a padded prompt begins."""
        return self.real.to(torch.int8).argmax(-1, keepdim=True)

    @cached_property
    def possible(self) -> Tensor:
        """bool (B | 1, 1, R, C): blocks that hold a key some query of the row block may see."""
        c = torch.arange(self.columns, device=self.q.device)
        first, last = self.reach
        seen = (c >= first[:, None]) & (c <= last[:, None])
        return seen & self.real[:, None, None, :]

    @cached_property
    def always(self) -> Tensor:
        """bool (B | 1, 1, R, C): the first block with a key that counts, where sinks are, and the diagonal: every block
        in which a query of the row block stands."""
        c = torch.arange(self.columns, device=self.q.device)
        start = (torch.arange(self.rows, device=self.q.device) * self.block + self.offset) // self.block
        own = (c >= start[:, None]) & (c <= self.reach[1][:, None])
        return own | (c == self.begins)[:, None, None, :]

    @property
    def every(self) -> Lists:
        """All blocks that may be seen: dense attention."""
        return lists_of(self.possible.expand(self.q.shape[0], len(self.heads), -1, -1))

    @cached_property
    def pooled_keys(self) -> Tensor:
        """Mean key of each block, over the keys that count: (B, h, C, D), wide."""
        return self.of_heads(pooled(self.k.to(self.wide), self.block, self.pad))

    @cached_property
    def pooled_queries(self) -> Tensor:
        """Mean query of each row block, (B, h, R, D), wide; padding as in `pooled_keys`."""
        return pooled(self.queries, self.block, self.of_queries)

    @property
    def of_queries(self) -> Tensor | None:
        """The padding at the queries, (B, N)."""
        return None if self.pad is None else self.pad[:, self.offset :]

    @cached_property
    def pooled_weights(self) -> Tensor:
        """Soft-max of each row block's mean query over the mean keys of the blocks it may see, (B, h, R, C), wide; 0
        in a row block of padding alone."""
        weights = masked_softmax(self.pooled_queries @ self.pooled_keys.mT * self.scale, self.possible)
        if self.of_queries is None:
            return weights
        return weights.masked_fill(~any_of(self.of_queries, self.block)[:, None, :, None], 0.0)

    def last(self, count: int) -> Last:
        """The last `count` queries that count, fewer where there are not so many."""
        count, device = min(count, self.q.shape[2]), self.q.device
        place = torch.arange(1, self.q.shape[2] + 1, device=device)[None]
        if self.of_queries is not None:
            place = place * self.of_queries
        # The largest are the last; 0 is a query that does not count, of which the first then stands in.
        place = place.topk(count).values.flip(-1)
        counted, at = place > 0, (place - 1).clamp(min=0)
        taken = at.expand(self.q.shape[0], -1)[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        queries = self.q.gather(2, taken).index_select(1, self.heads).to(self.wide)
        queries = queries.masked_fill(~counted[:, None, :, None], 0.0)
        at = at + self.offset
        apart = at[..., None] - torch.arange(self.k.shape[2], device=device)
        may = (apart >= 0) & (apart < self.window) if self.window else apart >= 0
        may = may & counted[..., None]
        if self.pad is not None:
            may = may & self.pad[:, None, :]
        # Scaled before the product, which is the larger by far.
        scores = (queries * self.scale) @ self.of_heads(self.k).to(self.wide).mT
        return Last(at, may, queries, masked_softmax(scores, may[:, None]))


class Last(NamedTuple):
    """The last queries that count, in their order. at int64 (B | 1, n): where they stand among the keys; may bool
    (B | 1, n, M): the keys each may see, none where a prompt has fewer than n; queries (B, h, n, D) and weights
    (B, h, n, M), soft-max over all keys as attention has it, both wide and 0 where a prompt has fewer."""

    at: Tensor
    may: Tensor
    queries: Tensor
    weights: Tensor


def blocks_of(x: Tensor, block: int, fill: float | bool = 0.0) -> tuple[Tensor, int]:
    """x (B, h, N, D) cut into blocks, the last one filled up: (B, h, blocks, block, D); and how many were filled in."""
    missing = -x.shape[2] % block
    if missing:
        x = F.pad(x, (0, 0, 0, missing), value=fill)
    return x.unflatten(2, (-1, block)), missing


def any_of(x: Tensor, block: int) -> Tensor:
    """Whether a block of x bool (..., N) holds any: (..., blocks)."""
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)


def pooled(x: Tensor, block: int, pad: Tensor | None = None) -> Tensor:
    """Mean of each block of x (B, h, N, D) over what pad (B, N) counts: (B, h, blocks, D), 0 where that is nothing."""
    counted = x.new_ones(1, 1, x.shape[2], 1) if pad is None else pad[:, None, :, None].to(x.dtype)
    # Filled and not multiplied: what stands at padding may be no number.
    x = x if pad is None else x.masked_fill(~pad[:, None, :, None], 0.0)
    return blocks_of(x, block)[0].sum(3) / blocks_of(counted, block)[0].sum(3).clamp(min=1)


def alikeness(x: Tensor, block: int, pad: Tensor | None = None) -> Tensor:
    """Mean cosine between the vectors of each block of x (B, h, N, D), each with each and itself: (B, h, blocks). Where
    it is small, a block's mean says little of it (Zhang et al., "SpargeAttn", arXiv:2502.18137)."""
    return pooled(F.normalize(x, dim=-1), block, pad).square().sum(-1)


def masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Soft-max over the last dimension where `keep`; 0 in a row that keeps nothing. Overwrites scores."""
    # Not -inf, of which a row of nothing else would make NaN.
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill_(~keep, least).softmax(-1).mul_(keep.any(-1, keepdim=True))


def reaching(weights: Tensor, mass: Tensor) -> Tensor:
    """The fewest entries along the last dimension whose sum reaches the share `mass` of the sum of all of them: bool,
    as weights (..., n); mass broadcasts against (..., 1). All of them at a mass of 1; nothing of what is 0."""
    largest, order = weights.sort(dim=-1, descending=True, stable=True)
    before = largest.cumsum(-1) - largest
    taken = (before < mass * largest.sum(-1, keepdim=True)) | (mass >= 1.0)
    return torch.zeros_like(taken).scatter_(-1, order, taken & (largest > 0))


def most(weights: Tensor, count: Tensor) -> Tensor:
    """The `count` largest entries along the last dimension, of those above 0: bool, as weights (..., n); count
    broadcasts against (..., 1)."""
    largest, order = weights.sort(dim=-1, descending=True, stable=True)
    taken = torch.arange(weights.shape[-1], device=weights.device) < count
    return torch.zeros_like(taken.expand(weights.shape)).scatter_(-1, order, taken & (largest > 0))


def lists_of(keep: Tensor) -> Lists:
    """The lists of bool (B, h, R, C), ascending."""
    columns = keep.shape[-1]
    counts = keep.sum(-1, dtype=torch.int32)
    place = torch.where(keep, keep.cumsum(-1) - 1, columns)
    numbers = torch.arange(columns, dtype=torch.int32, device=keep.device).expand(keep.shape)
    blocks = torch.zeros(*keep.shape[:-1], columns + 1, dtype=torch.int32, device=keep.device)
    return Lists(counts, blocks.scatter_(-1, place, numbers)[..., :columns])


def keep_of(lists: Lists, columns: int) -> Tensor:
    """What `lists_of` was given: bool (B, h, R, columns)."""
    listed = torch.arange(lists.blocks.shape[-1], device=lists.counts.device) < lists.counts[..., None]
    place = torch.where(listed, lists.blocks.long(), columns)
    keep = torch.zeros(*lists.counts.shape, columns + 1, dtype=torch.bool, device=lists.counts.device)
    return keep.scatter_(-1, place, True)[..., :columns]
