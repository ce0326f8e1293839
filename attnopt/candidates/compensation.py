"""compensation: the head keeps the first keys and the last ones, and one token stands for all that are dropped.

    W_ij = exp(scale q_i.mean k),    the mean over the dropped keys F_i: |F_i| exp(scale q_i.mean k) on their mean value

The token is RazorAttention's (Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
arXiv:2407.15891). No training; the state is a sum of keys and one of values. The span follows the elastic
rule of sink_window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnopt.candidates import Param, Params
from attnopt.candidates._tried import MOST_TOKENS, STATE_ITEM, Tried, hybrid
from attnopt.ir import Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.feature_maps import FeatureMap


class Compensation(Tried):
    name = "compensation"
    family = "compensation"
    far = "mean"
    params = (
        Param("sink", int, 0, MOST_TOKENS),
        Param("alpha", int, -MOST_TOKENS, MOST_TOKENS),
        Param("beta", float, 0.0, 1.0, 1 / 64),
    )

    def rule(self, params: Params) -> tuple[int, int, float]:
        return int(params["sink"]), int(params["alpha"]), float(params["beta"])

    def far_part(self, params: Params) -> tuple[str, int]:
        return "mean", 0

    def state_bytes(self, params: Params, site: Site, length: int) -> int:
        """Two sums and their count; query heads of one KV head and window could share them, which is not counted on."""
        return (site.head_dim + site.head_dim_v + 1) * STATE_ITEM

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Params, scale: float,
        own_window: int | None = None, given: FeatureMap | torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Every dropped key weighs the same: exp(scale q_i.mean k)."""
        sink, window = self.span(params, q.shape[2], own_window)
        wide = torch.promote_types(q.dtype, torch.float32)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        dropped = ((j >= sink) & (i - j >= window)).to(wide)
        keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        mean = dropped @ keys / dropped.sum(-1, keepdim=True).clamp_min(1)
        far = (q.to(wide) * mean).sum(-1, keepdim=True) * scale
        return hybrid(q, k, v, sink, window, scale, far.expand(*q.shape[:3], q.shape[2]))


CANDIDATES.register("compensation")(Compensation())
