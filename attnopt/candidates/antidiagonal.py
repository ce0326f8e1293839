"""antidiagonal: blocks of keys by sums along antidiagonals, which verticals and slashes cross.

    s_ab = scale / S * sum over t < S of q[aS + S-1-t].k[bS + t]     cells a of queries, b of keys, S positions each
    W_ab = softmax over b of s_ab                                    cells of which a pair is causal
    W_rc = sum of W_ab over the cells of block r and block c         the fewest blocks of a row that reach `mass`

(Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv:2503.16428.) With the S positions of a
cell side by side as features, those of the queries in reverse, all s_ab are one product of N/S by M/S: 1/S of the
products of dense attention. Unlike there, pairs of which one is padding are left out of the mean, and blocks that
always live are not counted toward `mass` before the others.

S being even, every pair that is looked at is an odd number of tokens apart: a slash at an even distance is seen only as
far as its neighbours weigh something too. What weighs alone is averaged with S - 1 others.

In a chunk of a prompt the scores are those of its queries; where it does not start at a multiple of S, cells at the
diagonal are cut elsewhere than in the whole prompt, and a block near it may be chosen otherwise.
"""

from __future__ import annotations

from torch import Tensor

from attnopt.candidates import Param, Params
from attnopt.candidates._selected import Selected
from attnopt.candidates._strided import Cells, block_weights, counting
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, blocks_of, reaching

STRIDES = (4, 8, 16)


class Antidiagonal(Selected):
    name = "antidiagonal"
    family = "blocks"
    params = (Param("mass", float, 1 / 64, 1.0, 1 / 64), Param("stride", int, STRIDES[0], STRIDES[-1], among=STRIDES))
    fixed = ("stride",)

    def menu(self, length: int) -> list[Choice]:
        tried = ((31 / 32, 8), (15 / 16, 16), (7 / 8, 8), (7 / 8, 16), (3 / 4, 16))
        return [c for mass, stride in tried for c in self.offered({"mass": mass, "stride": stride}, length)]

    def scored(self, params: Params, length: int) -> int:
        """Products of whole cells, as many positions each as `stride`, and no values."""
        return length**2 // (2 * int(params["stride"])) + super().scored(params, length)

    def keep(self, asked: Asked) -> Tensor:
        stride, mass = asked.fixed["stride"], asked.setting("mass")
        scaled = asked.q.index_select(1, asked.heads) * asked.scale
        queries = cells_of(scaled, asked, stride, asked.of_queries, reverse=True)
        keys = cells_of(asked.of_heads(asked.k), asked, stride, asked.pad)
        weights = block_weights(asked, queries, keys, stride, stride - 1, lambda cells: cells.sum((3, 5)))
        return reaching(weights, mass) | (mass >= 1.0)


def cells_of(x: Tensor, asked: Asked, stride: int, pad: Tensor | None, reverse: bool = False) -> Cells:
    """x (B, h, N, D) as cells of `stride` positions, which are features side by side; 0 where nothing counts."""
    counts = counting(pad, x.shape[2], x.device)[:, None, :, None]
    cut = [blocks_of(part, asked.block)[0].flatten(2, 3).unflatten(2, (-1, stride)) for part in (x, counts)]
    if pad is not None:
        cut[0] = cut[0].masked_fill(~cut[1], 0.0)
    if reverse:
        cut = [part.flip(3) for part in cut]
    return Cells(*(part.flatten(3) for part in cut))


CANDIDATES.register("antidiagonal")(Antidiagonal())
