"""proxy: blocks of keys by the attention of a few pooled heads, each head with a number of blocks of its own.

    Q_g, K_g = mean over the heads of group g of their queries, their keys
    A_rc     = max over the block of softmax(scale Q_g.K_g)        of every `stride`-th query and key
    n_h      = fewest blocks that hold `mass` of what the head's own last queries attend to, as many as a block has

A head visits, of every row of blocks, the n_h with the largest A (Wang et al., "ProxyAttn: Guided Sparse Attention via
Representative Heads", arXiv:2509.24745: heads agree on which keys matter, and differ in how many). A group is `group`
consecutive query heads of the model, whether they are served by this candidate or not, so a plan's choice for one head
does not change what another selects; where heads share keys, let it be a multiple of those that share. Keys between
strides are not seen.

In a chunk of a prompt, the last queries are the last of the chunk: every chunk has numbers of its own, where for the
whole prompt there is one. Padding is never among them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.candidates import Param, Params
from attnopt.candidates._selected import Selected
from attnopt.candidates._strided import Cells, block_weights, counting
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, blocks_of, most, reaching

STRIDES = (1, 2, 4, 8, 16)
# All heads of any model.
MOST_HEADS = 1 << 12


class Proxy(Selected):
    name = "proxy"
    family = "blocks"
    params = (
        Param("mass", float, 1 / 64, 1.0, 1 / 64),
        Param("group", int, 1, MOST_HEADS),
        Param("stride", int, STRIDES[0], STRIDES[-1], among=STRIDES),
    )
    fixed = ("group", "stride")

    def menu(self, length: int) -> list[Choice]:
        tried = ((31 / 32, 4, 4), (15 / 16, MOST_HEADS, 4), (7 / 8, 4, 4), (3 / 4, 4, 4), (1 / 2, 4, 8))
        named = [dict(zip(("mass", "group", "stride"), each, strict=True)) for each in tried]
        return [choice for own in named for choice in self.offered(own, length)]

    def scored(self, params: Params, length: int) -> int:
        """As if the head were alone in its group: every stride-th query with every stride-th key, without values; and
        its last queries with all keys."""
        cells = -(-length // int(params["stride"]))
        return cells**2 // 2 + int(params["block"]) * length + super().scored(params, length)

    def keep(self, asked: Asked) -> Tensor:
        mass = asked.setting("mass")
        attended = blocks_of(asked.last(asked.block).weights.sum(2)[..., None], asked.block)[0].sum((3, 4))
        number = reaching(attended, mass[..., 0]).sum(-1)[..., None, None]
        return most(self.shared(asked, asked.fixed["group"], asked.fixed["stride"]), number) | (mass >= 1.0)

    def shared(self, asked: Asked, group: int, stride: int) -> Tensor:
        """The weights of each head's group, (B, h, R, C). Only groups of heads that are served are looked at."""
        of_head = torch.arange(asked.q.shape[1], device=asked.q.device) // (asked.q.shape[1] // asked.k.shape[1])
        queries = of_groups(asked.q[:, :, ::stride] * asked.scale, group)
        keys = of_groups(asked.k[:, :, ::stride].index_select(1, of_head), group)
        served, few = asked.heads // group, len(asked.heads) < queries.shape[1]
        if few:
            queries, keys = queries.index_select(1, served), keys.index_select(1, served)
        cells = []
        for x, pad in ((queries, asked.of_queries), (keys, asked.pad)):
            counts = counting(pad, x.shape[2] * stride, x.device)[:, None, ::stride, None]
            cells.append(Cells(filled(x, asked.block // stride), filled(counts, asked.block // stride)))
        weights = block_weights(asked, cells[0], cells[1], stride, 0, lambda weights: weights.amax((3, 5)))
        return weights if few else weights.index_select(1, served)


def of_groups(x: Tensor, group: int) -> Tensor:
    """Mean over `group` consecutive heads of x (B, H, n, D): (B, groups, n, D); the last group may have fewer."""
    size = min(group, x.shape[1])
    missing = -x.shape[1] % size
    counted = F.pad(x.new_ones(x.shape[1]), (0, missing)).view(-1, size).sum(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    summed = F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).sum(2, dtype=wide)
    return (summed / counted[:, None, None]).to(x.dtype)


def filled(x: Tensor, per: int) -> Tensor:
    """x (B, h, n, D) filled up to whole blocks of `per` cells."""
    return blocks_of(x, per)[0].flatten(2, 3)


CANDIDATES.register("proxy")(Proxy())
