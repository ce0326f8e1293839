"""pooled: blocks of keys whose mean key scores high with the mean query, by cumulative mass and by number.

    W_rc = softmax over c of scale mean_r(q).mean_c(k)    the fewest blocks of a row that reach `mass`, `count` at most

The top-k of MInference's block-sparse heads (Jiang et al., arXiv:2407.02490), the cumulative mass and the test of
blocks of SpargeAttn's first stage (Zhang et al., arXiv:2502.18137): where the queries, or keys, of a block are less
alike than `alike` (mean cosine), its mean says little, and it is visited by all, or visits all, that it may.
"""

from __future__ import annotations

import torch

from attnopt.candidates import Param
from attnopt.candidates._selected import Selected
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, alikeness, most, reaching

MOST_BLOCKS = 1 << 20


class Pooled(Selected):
    name = "pooled"
    family = "blocks"
    params = (
        Param("mass", float, 1 / 64, 1.0, 1 / 64),
        Param("count", int, 1, MOST_BLOCKS),
        Param("alike", float, -1.0, 1.0, 1 / 64),
    )

    def menu(self, length: int) -> list[Choice]:
        every = {"count": MOST_BLOCKS, "alike": -1.0}
        by_mass = [{**every, "mass": mass} for mass in (31 / 32, 7 / 8, 3 / 4)]
        tested = {**every, "mass": 7 / 8, "alike": 1 / 4}
        eighth = {**every, "mass": 1.0, "count": max(length // 512, 1)}
        return [choice for own in (*by_mass, tested, eighth) for choice in self.offered(own, length)]

    def keep(self, asked: Asked) -> torch.Tensor:
        mass, count = asked.setting("mass"), asked.setting("count")
        kept = reaching(asked.pooled_weights, mass) & most(asked.pooled_weights, count)
        # What weighs nothing in numbers this wide, too.
        kept = kept | ((mass >= 1.0) & (count >= asked.columns))
        least = asked.setting("alike")[..., 0]
        rows = alikeness(asked.queries, asked.block, asked.of_queries) < least
        columns = alikeness(asked.of_heads(asked.k).to(asked.wide), asked.block, asked.pad) < least
        return kept | rows[..., :, None] | columns[..., None, :]


CANDIDATES.register("pooled")(Pooled())
