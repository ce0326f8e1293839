"""Shared by the candidates that `attnopt distill` tries out: where they stand, what they are worth, their reference.

    O_i = (sum_K e^{a_ij} v_j + sum_F W_ij v_j) / (sum_K e^{a_ij} + sum_F W_ij)        a_ij = scale q_i.k_j

K_i are the keys of a head's span, F_i = {j : s <= j <= i - w} those outside it, and W_ij the weights of the *far part*
that stands in for them: exp(shift_i) f_q(q_i).f_k(k_j) of a feature map, or exp(scale q_i.mean k) for their mean. One
normaliser serves both, as in LoLCATs (Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models",
arXiv:2410.10254).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attnopt.candidates import Candidate, Params, refuse_span
from attnopt.ir import Choice, Refusal, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.statistics import Grid, Observation

MOST_TOKENS = 1 << 30
# Bytes of a number of the running state, which is float32 whatever the model's dtype.
STATE_ITEM = 4


class Tried(Candidate):
    """A candidate whose damage was tried out on text and not read off a profile's sums: without `Fitted` it offers
    no choice. `damage` is that of its own span without the far part, which is what a profile knows of it."""

    def space(self, grid: Grid, lengths: Sequence[int], own_window: int | None = None) -> list[Choice]:
        return []

    def tried(self, fitted: Fitted, site: str) -> list[Choice]:
        return [choice for choice in fitted.choices(site) if choice.candidate == self.name]

    def refuse(self, site: Site) -> Refusal | None:
        no = refuse_span(site)
        if no is None and site.mask.window is not None:
            reason = f"its own window of {site.mask.window} keys leaves no far keys to stand in for"
            return Refusal(reason, site.name, site.source, code="far-needs-causal")
        return no

    def plain(self, params: Params) -> Choice:
        """The sink and window alone: what it is compared with."""
        return Choice.of("sink_window", dict(zip(("sink", "alpha", "beta"), self.rule(params), strict=True)))

    def damage(
        self, observation: Observation, params: Params, length: int, own_window: int | None = None
    ) -> torch.Tensor:
        return self.damages(observation, [Choice.of(self.name, params)], length, own_window)[:, 0]

    def damages(
        self, observation: Observation, choices: Sequence[Choice], length: int, own_window: int | None = None
    ) -> torch.Tensor:
        plain = [self.plain(dict(choice.params)) for choice in choices]
        return torch.as_tensor(CANDIDATES["sink_window"].damages(observation, plain, length, own_window))


def hybrid(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: int, window: int, scale: float, far: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Attention of q (B, H, N, D) over all keys of k, v (B, G, N, .), whose scores outside the span are `far`, the
    logarithms of W (B, H, N, N). Materialises both; wide as `far` is."""
    repeat, length = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = (x.to(far.dtype).repeat_interleave(repeat, 1) for x in (k, v))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    near = (j < sink) | (i - j < window)
    scores = torch.where(near, q.to(far.dtype) @ keys.mT * scale, far).masked_fill(j > i, float("-inf"))
    return (scores.softmax(-1) @ values).to(q.dtype)
