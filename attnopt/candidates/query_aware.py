"""query_aware: blocks by pooled scores where these prove right for the last queries, else along lines.

    P_c = softmax over c of scale mean(Q_last).mean_c(K)     T_c = their true mass in block c     D = sqrt(JS(P, T))

Each head asks for each prompt: where D < `trust`, the fewest blocks of all its rows together that reach `mass` of what
pooled scores promise; elsewhere the fewest keys and the fewest distances that reach `mass` of what the last queries
give them, as in vertical_slash (Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
Long-Sequence Inference", arXiv:2502.20766). JS is in nats, D at most 0.833. `least` holds either way: so many best
blocks of every row, or as many best keys and distances as fill so many blocks.

The last queries are as many as a block has. Both ways are computed, of shapes known beforehand, and one of them taken
on the device: the decision of a head costs no wait. In a chunk of a prompt the chunk's last queries decide, and its
rows alone share the mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.candidates import Param, Params
from attnopt.candidates._lines import blocks_on, slashes, verticals
from attnopt.candidates._selected import Selected
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, Last, any_of, blocks_of, masked_softmax, most, reaching

MOST_BLOCKS = 1 << 20


class QueryAware(Selected):
    name = "query_aware"
    family = "blocks"
    params = (
        Param("mass", float, 1 / 64, 1.0, 1 / 64),
        Param("trust", float, 0.0, 1.0, 1 / 64),
        Param("least", int, 0, MOST_BLOCKS),
    )

    def menu(self, length: int) -> list[Choice]:
        # The second is as published. Lines take many blocks, so that more trust is bolder.
        pairs = ((31 / 32, 3 / 32), (29 / 32, 3 / 32), (29 / 32, 1 / 4), (3 / 4, 1 / 4), (1 / 2, 1 / 4))
        own = [{"mass": mass, "trust": trust, "least": 2} for mass, trust in pairs]
        return [choice for params in own for choice in self.offered(params, length)]

    def scored(self, params: Params, length: int) -> int:
        """The last queries with every key besides."""
        return int(params["block"]) * length + super().scored(params, length)

    def keep(self, asked: Asked) -> Tensor:
        last = asked.last(asked.block)
        trusted = estimate_error(asked, last) < asked.settings["trust"]
        kept = torch.where(trusted[..., None, None], by_pooled(asked), by_lines(asked, last))
        return kept | (asked.setting("mass") >= 1.0)


def by_pooled(asked: Asked) -> Tensor:
    """bool (B, h, R, C): of all rows together, as published; what is lost is lost by rows whose mass is spread."""
    weights, mass = asked.pooled_weights, asked.setting("mass")
    fewest = reaching(weights.flatten(2), mass[..., 0]).unflatten(2, weights.shape[2:])
    return fewest | most(weights, asked.setting("least"))


def by_lines(asked: Asked, last: Last) -> Tensor:
    """bool (B, h, R, C)."""
    mass, least = asked.setting("mass")[..., 0], asked.setting("least")[..., 0] * asked.block
    kept = [reaching(line, mass) | most(line, least) for line in (verticals(last), slashes(last))]
    return blocks_on(kept[0], kept[1], asked)


def estimate_error(asked: Asked, last: Last) -> Tensor:
    """Root of the Jensen-Shannon divergence, in nats, between what pooled scores say of the last queries and the mass
    they give each block: (B, h)."""
    true = blocks_of(last.weights.sum(2)[..., None], asked.block)[0].sum((3, 4))
    true = true / true.sum(-1, keepdim=True).clamp(min=torch.finfo(true.dtype).tiny)
    counted = last.may.any(-1).sum(-1).clamp(min=1)
    mean = last.queries.sum(2) / counted[:, None, None]
    scores = (asked.pooled_keys @ mean[..., None])[..., 0] * asked.scale
    pooled = masked_softmax(scores, any_of(last.may.any(1), asked.block)[:, None])
    between = torch.special.entr((pooled + true) / 2).sum(-1)
    within = (torch.special.entr(pooled) + torch.special.entr(true)).sum(-1) / 2
    return (between - within).clamp(min=0).sqrt()


CANDIDATES.register("query_aware")(QueryAware())
