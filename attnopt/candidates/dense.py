"""dense: the head keeps every key its site's own mask keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.candidates import Candidate, Params
from attnopt.ir import DENSE, Choice, Refusal, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    import torch

    from attnopt.statistics import Grid, Observation


# A window no length reaches, within 32 bits.
UNBOUNDED = 1 << 30


class Dense(Candidate):
    """The span (0, N), or (0, own window): damage 0 at every length, at any site."""

    name = "dense"

    def space(self, grid: Grid, lengths: Sequence[int], own_window: int | None = None) -> list[Choice]:
        return [DENSE]

    def refuse(self, site: Site) -> Refusal | None:
        return None

    def damage(
        self, observation: Observation, params: Params, length: int, own_window: int | None = None
    ) -> torch.Tensor:
        return observation.t2.new_zeros(observation.t2.shape[0])

    def rule(self, params: Params) -> tuple[int, int, float]:
        return 0, UNBOUNDED, 0.0


CANDIDATES.register("dense", priority=10)(Dense())
