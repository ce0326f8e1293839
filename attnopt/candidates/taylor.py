"""taylor: soft-max over sinks and a short window, the second-order Taylor series of exp for everything farther.

    W_ij = exp(u.q_i) (1 + s + s^2 / 2),    s = y_q(q_i).y_k(k_j) in `rank` dimensions

The series is BASED's (Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff",
arXiv:2402.18668), taken around the mean key, exp(scale q.mean k) being an exact factor of a row. Positive for every s.
Needs no training: the `rank` directions are chosen in closed form. The state is 1 + rank + rank^2 features a head.
"""

from __future__ import annotations

from attnopt.candidates import Param, Params
from attnopt.candidates._tried import MOST_TOKENS
from attnopt.candidates.linear import Linear
from attnopt.registry import CANDIDATES

MOST_RANK = 32


class Taylor(Linear):
    name = "taylor"
    family = "taylor"
    params = (
        Param("sink", int, 0, MOST_TOKENS),
        Param("window", int, 1, MOST_TOKENS),
        Param("rank", int, 1, MOST_RANK),
    )

    def far_part(self, params: Params) -> tuple[str, int]:
        return "taylor", int(params["rank"])

    def width(self, params: Params) -> int:
        rank = int(params["rank"])
        return 1 + rank + rank**2


CANDIDATES.register("taylor")(Taylor())
