"""pruned: the head becomes a constant, its mean output on calibration text.

Mean ablation, as structured pruning folds it into the output projection's bias (An et al., "Fluctuation-based Adaptive
Structured Pruning for Large Language Models", arXiv:2312.11983): W_O of the head times the mean is one more
bias, and the head's query, key, value and output slices are gone (attnopt/passes/prune.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attnopt.candidates import Params, SpanCosts
from attnopt.candidates._tried import Tried
from attnopt.ir import Choice, Refusal, Share, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.feature_maps import FeatureMap
    from attnopt.statistics import Observation


class Pruned(Tried):
    """Gone at every length, also under the plan's `min_length`: the weights are."""

    name = "pruned"
    family = "prune"
    far = "gone"

    def refuse(self, site: Site) -> Refusal | None:
        """Whether the projections can be cut is seen in the graph only (attnopt/planner/cuttable.py)."""
        if not site.heads:
            return Refusal("it has no number of heads to remove some of", site.name, site.source, code="symbolic-heads")
        return None

    def damages(
        self, observation: Observation, choices: Sequence[Choice], length: int, own_window: int | None = None
    ) -> torch.Tensor:
        """A profile knows only of removing the head without its mean."""
        return observation.ablation_t2[:, None].expand(-1, len(choices)) / 2

    def rule(self, params: Params) -> tuple[int, int, float]:
        """The narrowest span there is, should a kernel meet one."""
        return 0, 1, 0.0

    def span(self, params: Params, length: int, own_window: int | None = None) -> tuple[int, int]:
        """No keys at all."""
        return 0, 0

    def cost(
        self, table: SpanCosts, params: Params, length: int, own_window: int | None = None, share: Share | None = None
    ) -> float:  # fmt: skip
        """Nothing of its attention is left. What its projections no longer cost is not counted."""
        return 0.0

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Params, scale: float,
        own_window: int | None = None, given: FeatureMap | torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert isinstance(given, torch.Tensor)
        return given.to(q.dtype)[None, :, None].expand(q.shape[0], q.shape[1], q.shape[2], -1)


CANDIDATES.register("pruned")(Pruned())
