"""linear: soft-max over sinks and a short window, exponential features for everything farther.

    W_ij = exp(shift_i) f_q(q_i).f_k(k_j),    f of `features` exponentials, random or learned head by head

The state is features x (Dv + 1) numbers a head, whatever the length. Positive random features are Performer's
(Choromanski et al., arXiv:2009.14794), learned ones in the manner of Hedgehog (Zhang et al., arXiv:2402.04347); see
attnopt/feature_maps.py.
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

MOST_FEATURES = 1024


class Linear(Tried):
    name = "linear"
    family = "linear"
    far = "linear"
    params = (
        Param("sink", int, 0, MOST_TOKENS),
        Param("window", int, 1, MOST_TOKENS),
        Param("features", int, 1, MOST_FEATURES),
    )

    def rule(self, params: Params) -> tuple[int, int, float]:
        return int(params["sink"]), int(params["window"]), 0.0

    def far_part(self, params: Params) -> tuple[str, int]:
        return "exp", int(params["features"])

    def map_name(self, params: Params) -> str:
        return f"{self.name}/{self.far_part(params)[1]}"

    def width(self, params: Params) -> int:
        """Features F of a key."""
        return int(params["features"])

    def state_bytes(self, params: Params, site: Site, length: int) -> int:
        return self.width(params) * (site.head_dim_v + 1) * STATE_ITEM

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Params, scale: float,
        own_window: int | None = None, given: FeatureMap | torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The scale of far keys is in the maps."""
        from attnopt.feature_maps import FeatureMap, key_features, query_features

        assert isinstance(given, FeatureMap)
        of_q, shift = query_features(q, given)
        of_k = key_features(k.repeat_interleave(q.shape[1] // k.shape[1], 1), given)
        far = (of_q @ of_k.mT).log() + shift[..., None]
        return hybrid(q, k, v, *self.span(params, q.shape[2], own_window), scale, far)


CANDIDATES.register("linear")(Linear())
