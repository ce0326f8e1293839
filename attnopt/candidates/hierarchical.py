"""hierarchical: blocks of keys by a search that halves ranges, of which each row of blocks keeps `count`.

    1. cut the blocks that a row may see, from the first with a key that counts, into `count` ranges
    2. halve each; score the halves by their middle key, max over the row's queries of q.k; keep the best `count`
    3. do 2 again until a range is a block

(Lee et al., "A Training-Free Sub-quadratic Cost Model Serving Framework with Hierarchically Pruned Attention",
arXiv:2406.09827.) Of C blocks, 2 count log2(C / count) keys are looked at for each row of blocks, not all: what is
alone among unlike keys is met by chance. Rows that see no more than `count` blocks visit them all. Padding is never the
middle key, and no query of a row scores for others what it may not see. Published settings add a window of recent keys;
here only what always lives is added, the first block and the row's own.

In a chunk of a prompt a row searches all keys before it, as in the whole prompt; only where rows are cut differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.candidates import Param, Params
from attnopt.candidates._selected import Selected
from attnopt.candidates._strided import counting, rows_at_once
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, blocks_of

MOST_RANGES = 1 << 12


class Hierarchical(Selected):
    name = "hierarchical"
    family = "blocks"
    params = (Param("count", int, 1, MOST_RANGES),)
    fixed = ("count",)

    def menu(self, length: int) -> list[Choice]:
        shares = (2, 4, 8, 16)
        counts = sorted({max(length // (64 * share), 1) for share in shares}, reverse=True)
        return [choice for count in counts for choice in self.offered({"count": count}, length)]

    def scored(self, params: Params, length: int) -> int:
        """Every query with the halves of `count` ranges at every step, without values."""
        columns = -(-length // int(params["block"]))
        count = min(int(params["count"]), columns)
        return length * count * (-(-columns // count) - 1).bit_length() + super().scored(params, length)

    def keep(self, asked: Asked) -> Tensor:
        count = min(asked.fixed["count"], asked.columns)
        each = rows_at_once(asked, len(asked.heads) * 2 * count * max(asked.q.shape[3], asked.block))
        rows = (slice(first, min(first + each, asked.rows)) for first in range(0, asked.rows, each))
        middles = Middles(asked)
        return torch.cat([self.found(asked, middles, count, part) for part in rows], 2)

    def found(self, asked: Asked, middles: Middles, count: int, rows: slice) -> Tensor:
        """What some rows of blocks keep: bool (B, h, rows, C)."""
        first, last = (x[rows, None] for x in asked.reach)
        # Not from padding on the left: of such a prompt others would be found than of it alone.
        first = torch.maximum(first, asked.begins[:, None])  # (B | 1, rows, 1)
        seen = (last + 1 - first).clamp(min=0)
        cuts = (first + torch.arange(count + 1, device=first.device) * seen // count)[:, None]
        shape = asked.q.shape[0], len(asked.heads), len(last), count
        start, end = cuts[..., :-1].expand(shape), cuts[..., 1:].expand(shape)
        longest = -(-asked.columns // count)
        # Half of n blocks is (n + 1) // 2.
        for _ in range((longest - 1).bit_length()):
            half = (start + end + 1) // 2
            start, end = torch.cat([start, half], -1), torch.cat([half, end], -1)
            best = middles.scores(start, end, rows).sort(dim=-1, descending=True, stable=True).indices[..., :count]
            start, end = start.gather(-1, best), end.gather(-1, best)
        kept = torch.zeros(*shape[:3], asked.columns + 1, dtype=torch.bool, device=first.device)
        return kept.scatter_(-1, torch.where(start < end, start, asked.columns), True)[..., :-1]


class Middles:
    """The middle keys of ranges of blocks, of those that count, and how rows of blocks score them."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.keys = asked, asked.of_heads(asked.k)
        counts = counting(asked.pad, asked.k.shape[2], asked.q.device)
        # Where the keys that count stand, in order, and how many there are before each block.
        self.places = (~counts).to(torch.int8).argsort(dim=-1, stable=True)
        in_block = blocks_of(counts[:, None, :, None], asked.block, False)[0].sum((1, 3, 4))
        self.before = F.pad(in_block.cumsum(-1), (1, 0))
        self.queries = blocks_of(asked.queries, asked.block)[0]
        counts = counting(asked.of_queries, asked.q.shape[2], asked.q.device)
        self.counts = blocks_of(counts[:, None, :, None], asked.block, False)[0]

    def scores(self, start: Tensor, end: Tensor, rows: slice) -> Tensor:
        """Of the ranges of blocks from start to before end, (B, h, rows, n): the largest score that a query of the row
        gives their middle key; the least number if none may see it, -inf if no key of the range counts."""
        asked, shape = self.asked, start.shape
        low, high = (self.before.expand(shape[0], -1).gather(1, x.flatten(1)).view(shape) for x in (start, end))
        middle = ((low + high) // 2).clamp(max=asked.k.shape[2] - 1)
        at = self.places.expand(shape[0], -1).gather(1, middle.flatten(1)).view(shape)
        keys = self.keys.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, self.keys.shape[3]))
        found = self.queries[:, :, rows] @ keys.view(*shape, -1).to(asked.wide).mT * asked.scale
        i = torch.arange(asked.rows * asked.block, device=at.device).view(-1, asked.block)[rows] + asked.offset
        apart = i[..., None] - at[..., None, :]
        seen = (apart >= 0) & self.counts[:, :, rows]
        if asked.window:
            seen = seen & (apart < asked.window)
        best = found.masked_fill(~seen, torch.finfo(found.dtype).min).amax(-2)
        return best.masked_fill(low == high, -torch.inf)


CANDIDATES.register("hierarchical")(Hierarchical())
