"""Measure what a plan's choices do to a model's loss: one captured graph per length, choices swapped between runs.

Heads run through the very operators a plan runs through (attnopt/mixed.py), so what is verified is what is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.board import Board, reach_of
from attnopt.errors import PlanError
from attnopt.instrument import Attention, Instrumented
from attnopt.ir import DENSE, Choice, Site
from attnopt.mixed import Mixture
from attnopt.statistics import attention

if TYPE_CHECKING:
    from attnopt.fitted import Fitted

# Rows of logits in float32 at a time: 1024 x a 128k vocabulary is half a gigabyte.
ROWS = 1024
Choices = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True)
class Sequences:
    """Per-sequence sums over predicted tokens: `tokens` counted, `loss` in nats, `kl` to the dense model in nats; and,
    where the dense model ran beside, its loss and the tokens whose most likely successor is the same."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]
    kl: tuple[float, ...]
    dense: tuple[float, ...] = ()
    agree: tuple[int, ...] = ()

    @property
    def mean_loss(self) -> float:
        return sum(self.loss) / max(1, sum(self.tokens))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / max(1, sum(self.tokens))


class Spans:
    """A model whose heads' choices can be set and reset; dense to begin with. Evaluation only, batch by batch.

    fitted: the feature maps and mean outputs of choices that need them; it may be changed between runs.
    """

    def __init__(self, model: nn.Module, fitted: Fitted | None = None) -> None:
        self.model, self.fitted = model, fitted
        self.instrumented = Instrumented(model, self._attention)
        self._choices: dict[str, tuple[Choice, ...]] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._board = Board(0)

    @property
    def sites(self) -> dict[str, Site]:
        return self.instrumented.sites

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set(self, choices: Choices | None) -> None:
        """Choices of the sites named; every other site is dense. A head count that does not fit is an error."""
        given = {name: tuple(of_site) for name, of_site in (choices or {}).items()}
        self._choices = {name: of_site for name, of_site in given.items() if any(c != DENSE for c in of_site)}
        self._mixtures = {}
        self._board = Board(reach_of(choice for of_site in self._choices.values() for choice in of_site))

    def _mixture(self, site: Site) -> Mixture | None:
        if site.name not in self._mixtures and site.name in self._choices:
            self._mixtures[site.name] = Mixture(self._choices[site.name], site, self.fitted, board=self._board)
        return self._mixtures.get(site.name)

    def _attention(self, site: Site) -> Attention:
        window = site.mask.window

        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            mixture = self._mixture(site)
            self._board.post(site.name, q, k, pad, self._choices.get(site.name, (DENSE,) * site.heads))
            if mixture is None:
                return attention(q, k, v, site.scale, pad, window, site.softcap)
            if not mixture.spanned:
                return mixture.constants(attention(q, k, v, site.scale, pad, window, site.softcap))
            if not site.plain or site.head_dim != site.head_dim_v:
                raise PlanError(f"No kernel runs spans at {site.name}: {site.canonical}.", "Keep its heads dense.")
            return mixture(q, k, v, pad)

        return attend

    def logits(self, ids: Tensor, choices: Choices | None) -> Tensor:
        """Logits (B, N, V) of `ids` (B, N) under `choices`, which stay set."""
        self.set(choices)
        return self.instrumented.logits(ids)

    @torch.no_grad()
    def losses(
        self, ids: Tensor, choices: Choices | None, divergence: bool = False, progress: Callable[[], None] | None = None
    ) -> Sequences:
        """Next-token losses of `ids` (samples, N) under `choices`; `divergence` also runs dense and fills `kl`, `dense`
        and `agree`."""
        found = []
        for row in ids:
            planned = self.logits(row[None], choices)[0, :-1]
            dense = self.logits(row[None], None)[0, :-1] if divergence else None
            found.append(_compared(planned, dense, row[1:]))
            if progress is not None:
                progress()
        self.set(None)
        losses, kls, dense_losses, agree = zip(*found, strict=True) if found else ((), (), (), ())
        tokens = (ids.shape[1] - 1,) * len(found)
        return Sequences(tokens, losses, kls, *((dense_losses, agree) if divergence else ()))


def _compared(planned: Tensor, dense: Tensor | None, labels: Tensor) -> tuple[float, float, float, int]:
    """Sums over rows of the planned loss, KL(dense || planned), the dense loss and the agreement of the most likely
    token; logits (N, V), a few rows in float32 at a time."""
    loss = kl = dense_loss = 0.0
    agree = 0
    for at in range(0, len(labels), ROWS):
        rows, wanted = planned[at : at + ROWS].float(), labels[at : at + ROWS].to(planned.device)
        loss += F.cross_entropy(rows, wanted, reduction="sum").item()
        if dense is None:
            continue
        other = dense[at : at + ROWS].float()
        dense_loss += F.cross_entropy(other, wanted, reduction="sum").item()
        kl += F.kl_div(rows.log_softmax(-1), other.log_softmax(-1), reduction="sum", log_target=True).item()
        agree += int((rows.argmax(-1) == other.argmax(-1)).sum())
    return loss, kl, dense_loss, agree
