"""Attention to tokens that are selected while decoding, in plain PyTorch: what a selection is, said once.

A head at position p attends to the keys {j <= p : j < sink or p - j < recent or j in T}, exactly. T is what it selected
last: the `count` positions of the largest scores q.k up to the position of that step, all of them where there are
fewer; of equal scores the lowest position. It selects anew

    where it has selected nothing yet, and in the first step after a prompt, a chunk or a change of what is cached,
    where `every` steps have passed since (1: in each step),
    where q now.q then < similar |q now| |q then|, then being that step (similar 0: nobody looks).

A head that reads what an earlier layer selected has the T that the same head of that layer holds at this step. With
channels r > 0 the scores are sums over the r features that weigh most in its KV head: see `channels_of`.

`rows` says it of every row of a text at once, as the step of decoding that the row would be; `step` of one token
against a cache. Published forms: exact top-k reused by later layers is TidalDecode's (Yang et al.), over steps while
queries stay similar TokenSelect's (Wu et al.) and Recycled Attention's (Xu et al.), by important channels Double
Sparsity's (Yang et al., arXiv:2408.07092).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnopt.codegen.cache_prefill import taken, together

# Queries of a prompt, its last, by which features are weighed.
LAST = 64
# Scores of a chunk of rows, of all heads.
SCORES = 1 << 24


@dataclass(frozen=True)
class TokenRule:
    """How a head selects: `count` keys beside the first `sink` and the last `recent`, of the token itself too where
    recent is 1 or more. every: steps that a selection serves; similar: the cosine of queries below which it does not;
    channels: features that scores are made of, 0 for all."""

    count: int
    sink: int = 0
    recent: int = 0
    every: int = 1
    similar: float = 0.0
    channels: int = 0


def best(scores: Tensor, count: int) -> Tensor:
    """Which of scores (..., N) are the `count` largest, bool; of equal ones the first, and none that is -inf."""
    allowed = scores > -torch.inf
    if count >= scores.shape[-1]:
        return allowed
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    kept = (scores >= least) & allowed
    # Where none are equal there is nothing to choose; a GPU is not asked, which would be waited for.
    if scores.device.type == "cpu" and int(kept.sum(-1, dtype=torch.int32).amax()) <= count:
        return kept
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & allowed


def asking(q: Tensor, valid: Tensor | None = None) -> Tensor:
    """How much the last LAST queries that count ask of each feature: q (B, H, T, D), valid bool (B, T) -> the sums of
    |q|, (B, H, D)."""
    counts = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if valid is None else valid
    last = counts & (counts.flip(1).cumsum(1).flip(1) <= LAST)
    return wide(q).abs().masked_fill(~last[:, None, :, None], 0.0).sum(2)


def heaviest(of_q: Tensor, of_k: Tensor, count: int) -> Tensor:
    """The features of most weight, sums of |q| (B, H, D) of the query heads of a KV head times sums of |k| (B, G, D):
    int64 (B, G, count), the heaviest first and of equal ones the first."""
    batch, groups, dim = of_k.shape
    weight = of_q.view(batch, groups, -1, dim).sum(2) * of_k
    return weight.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def channels_of(q: Tensor, k: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """The `count` features of each KV head that weigh most in the scores of a prompt: int64 (B, G, count).

    q (B, H, T, D), k (B, G, T, D), valid bool (B, T): the tokens that count. A feature weighs the sum of |q| over the
    last LAST queries and the query heads of the KV head, times the sum of |k| over all keys.
    """
    of_k = wide(k).abs()
    return heaviest(asking(q, valid), (of_k if valid is None else of_k * valid[:, None, :, None]).sum(2), count)


def of_channels(x: Tensor, channels: Tensor) -> Tensor:
    """x (B, H, N, D) at the features `channels` of its KV head, int64 (B, G, r): (B, H, N, r)."""
    index = channels.repeat_interleave(x.shape[1] // channels.shape[1], 1)
    return x.gather(3, index[:, :, None].expand(-1, -1, x.shape[2], -1))


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, R, D) times k (B, G, N, D): (B, H, R, N)."""
    batch, heads, count, dim = q.shape
    scores = q.reshape(batch, k.shape[1], -1, dim) @ k.mT
    return scores.view(batch, heads, count, k.shape[2])


@dataclass(frozen=True, eq=False)
class Selection:
    """What heads select along a text: q (B, H, N, D), k (B, G, N, D), whose tokens that count are the first of each
    row. channels: the features that scores are made of, int64 (B, G, r), None for all. Nothing is kept but these: which
    keys a row holds is found when it is asked for."""

    q: Tensor
    k: Tensor
    rule: TokenRule
    channels: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, rule: TokenRule, pad: Tensor | None = None, channels: Tensor | None = None
    ) -> Selection:
        """Arguments as those of `rows`."""
        if channels is None and rule.channels:
            channels = channels_of(q, k, rule.channels, pad)
        if pad is not None:
            q, k = (_packed(x, pad) for x in (q, k))
        return cls(q, k, rule, channels)

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor]:
        q, k = wide(self.q), wide(self.k)
        return (q, k) if self.channels is None else (of_channels(q, self.channels), of_channels(k, self.channels))

    @cached_property
    def last(self) -> Tensor:
        """The row at which each row's selection was made, int64 (B, H, N): ascending, at most the row itself."""
        batch, heads, length, _ = self.q.shape
        row = torch.arange(length, device=self.q.device)
        if not self.rule.similar:
            return (row - row % self.rule.every).expand(batch, heads, length)
        following, selects = self._following(), torch.zeros(batch, heads, length + 1, dtype=torch.bool)
        selects = selects.to(self.q.device)
        selects[..., 0] = True
        # Rows reached from the first by any number of steps: by 1, 2, 4, ... of them.
        for _ in range(max(1, length).bit_length()):
            selects = (
                selects
                | torch.zeros_like(selects, dtype=torch.int32)
                .scatter_add_(2, following, selects.to(torch.int32))
                .bool()
            )
            following = following.gather(2, following)
        return torch.where(selects[..., :length], row, 0).cummax(-1).values

    def _following(self) -> Tensor:
        """The row that selects next after each that does, int64 (B, H, N + 1); N where none does."""
        q, rule = wide(self.q), self.rule
        batch, heads, length, _ = q.shape
        norm = q.norm(dim=-1)
        found = torch.full((batch, heads, length + 1), length, dtype=torch.int64, device=q.device)
        size = chunk_of(batch * heads, length)
        for first in range(0, length, size):
            last = min(first + size, length)
            stop = min(length, last + rule.every)
            i, j = torch.arange(first, last, device=q.device)[:, None], torch.arange(first, stop, device=q.device)
            near = rule.similar * norm[:, :, first:last, None] * norm[:, :, None, first:stop]
            ends = (q[:, :, first:last] @ q[:, :, first:stop].mT < near) | (j - i >= rule.every)
            ends &= j > i
            here = first + ends.to(torch.uint8).argmax(-1)
            found[..., first:last] = torch.where(ends.any(-1), here, length)
        return found

    def at(self, first: int, last: int) -> Tensor:
        """The keys that rows first .. last - 1 hold: bool (B, H, last - first, last)."""
        q, k = self._scored
        if self.rule.similar:
            of = self.last[:, :, first:last]
            queries = q.gather(2, of[..., None].expand(-1, -1, -1, q.shape[3]))
            return self._chosen(queries, of[..., None], k[:, :, :last])
        every = self.rule.every
        begin = first - first % every
        of = torch.arange(begin, last, every, device=q.device)
        chosen = self._chosen(q[:, :, of], of[:, None], k[:, :, :last])
        return chosen[:, :, torch.arange(first - begin, last - begin, device=q.device) // every]

    def _chosen(self, q: Tensor, at: Tensor, k: Tensor) -> Tensor:
        scores = grouped(q, k)
        later = torch.arange(k.shape[2], device=q.device) > at
        return best(scores.masked_fill(later, -torch.inf), self.rule.count)


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunk_of(heads: int, length: int) -> int:
    """Rows whose scores are formed at once."""
    return max(1, min(length, SCORES // max(1, heads * length)))


def _packed(x: Tensor, pad: Tensor) -> Tensor:
    """x (B, ·, N, D) with the tokens that count at the front of their row, zeros for the others behind them."""
    return taken(x.masked_fill(~pad[:, None, :, None], 0.0), together(pad)[1])


def rows(
    q: Tensor, k: Tensor, v: Tensor, rule: TokenRule, scale: float, pad: Tensor | None = None,
    source: Selection | None = None, channels: Tensor | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Every row of a text as the step of decoding it would be, counted from the first: (B, H, N, Dv).

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), pad bool (B, N) true where a token counts: only these have
    positions, and rows of the others are 0. source: what an earlier layer's same heads selected along this text; then
    only the sink and the recent keys of `rule` say anything. channels int64 (B, G, r): features that scores are made
    of; None weighs them over the whole text, which stands for the prompt. Nothing of N x N is formed; scores and
    soft-max in float32, or in float64 for float64 inputs. lse (B, H, N), where it is wanted: written, the logsumexp of
    the scores of each row's keys, -inf in a row that does not count.
    """
    selection = Selection.of(q, k, rule, pad, channels) if source is None else source
    if pad is not None:
        q, k, v = (_packed(x, pad) for x in (q, k, v))
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, heads, length, v.shape[3])
    sums = wide(q).new_empty(batch, heads, length)
    keys, values = wide(k), wide(v)
    size = chunk_of(batch * heads, length)
    for first in range(0, length, size):
        last = min(first + size, length)
        i, j = torch.arange(first, last, device=q.device)[:, None], torch.arange(last, device=q.device)
        keep = selection.at(first, last) | (j < rule.sink) | (i - j < rule.recent)
        scores = grouped(wide(q[:, :, first:last]), keys[:, :, :last]) * scale
        scores.masked_fill_(~(keep & (j <= i)), -torch.inf)
        sums[:, :, first:last] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        here = weights.view(batch, k.shape[1], -1, last) @ values[:, :, :last]
        out[:, :, first:last] = here.view(batch, heads, last - first, -1).to(q.dtype)
    if lse is not None:
        at = sums if pad is None else taken(sums[..., None], together(pad)[0])[..., 0]
        lse.copy_(at if pad is None else at.masked_fill_(~pad[:, None], -torch.inf))
    if pad is None:
        return out
    return taken(out, together(pad)[0]).masked_fill_(~pad[:, None, :, None], 0.0)
