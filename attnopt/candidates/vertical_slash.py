"""vertical_slash: blocks on the keys, and at the distances, that the last queries look at most.

    A = softmax(scale Q_last K^T)     vertical_j = sum_i A_ij     slash_d = sum_i A_i,i-d     the last 64 queries i

The `vertical` best keys and the `slash` best distances, each rounded out to whole blocks: a block is visited where it
holds such a key or where a query of it has a key at such a distance (Jiang et al., "MInference 1.0: Accelerating
Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", arXiv:2407.02490). What is forced there, 30 first keys
and 100 last distances, is here the first block and the diagonal, as for every selecting candidate.

In a chunk of a prompt the last queries are those of the chunk, for whose rows they speak; published code asks those of
the whole prompt, which must then be there. Where a prompt is padded on the right, the last that count.
"""

from __future__ import annotations

import torch

from attnopt.candidates import Param, Params
from attnopt.candidates._lines import blocks_on, slashes, verticals
from attnopt.candidates._selected import Selected
from attnopt.candidates._tried import MOST_TOKENS
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, most

# Queries that are asked, as published: fewer say little of the others, more cost more.
LAST = 64


class VerticalSlash(Selected):
    name = "vertical_slash"
    family = "blocks"
    params = (Param("vertical", int, 0, MOST_TOKENS), Param("slash", int, 1, MOST_TOKENS))

    def menu(self, length: int) -> list[Choice]:
        # A distance takes two blocks of every row, a key one, so that fewer distances than keys are bold.
        lines = ((128, 512), (64, 128), (128, 32), (16, 32), (32, 8))
        kept = [{"vertical": v, "slash": s} for v, s in lines if max(2 * s, 4 * v) <= length]
        return [choice for own in kept for choice in self.offered(own, length)]

    def scored(self, params: Params, length: int) -> int:
        """The last queries with every key, and their lines."""
        return LAST * length + super().scored(params, length)

    def keep(self, asked: Asked) -> torch.Tensor:
        last = asked.last(LAST)
        keys = most(verticals(last), asked.setting("vertical")[..., 0])
        distances = most(slashes(last), asked.setting("slash")[..., 0])
        return blocks_on(keys, distances, asked)


CANDIDATES.register("vertical_slash")(VerticalSlash())
