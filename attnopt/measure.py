"""Measure what spans do to a model's loss: one captured graph per length, spans swapped between runs.

The spans run through the very kernels a plan runs through, so what is verified is what is shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt import ops
from attnopt.instrument import Attention, Instrumented
from attnopt.ir import DENSE, Choice, Site
from attnopt.passes.span import tables
from attnopt.statistics import attention

Choices = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True)
class Sequences:
    """Per-sequence sums over predicted tokens: `tokens` counted, `loss` in nats, `kl` to the dense model in nats."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def mean_loss(self) -> float:
        return sum(self.loss) / max(1, sum(self.tokens))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / max(1, sum(self.tokens))


class Spans:
    """A model whose heads' spans can be set and reset; dense to begin with. Evaluation only, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.instrumented = Instrumented(model, self._attention)
        self._tables: dict[str, dict[str, Tensor]] = {}

    @property
    def sites(self) -> dict[str, Site]:
        return self.instrumented.sites

    def set(self, choices: Choices | None) -> None:
        """Spans of the sites named; every other site is dense. A head count that does not fit is an error."""
        self._tables = {}
        for name, of_site in (choices or {}).items():
            if any(c != DENSE for c in of_site):
                self._tables[name] = tables(of_site, len(of_site))

    def _attention(self, site: Site) -> Attention:
        window = site.mask.window

        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            held = self._tables.get(site.name)
            if held is None:
                return attention(q, k, v, site.scale, pad, window)
            windows = ops.windows_at(held["alphas"], held["betas"], q.shape[2], window or 0)
            return ops.prefill(
                q, k, v, held["sinks"] if not window else torch.zeros_like(held["sinks"]), windows, site.scale, pad
            )

        return attend

    @torch.no_grad()
    def losses(
        self, ids: Tensor, choices: Choices | None, divergence: bool = False, progress: Callable[[], None] | None = None
    ) -> Sequences:
        """Next-token losses of `ids` (samples, N) under `choices`; `divergence` also runs dense and fills `kl`."""
        tokens, losses, kls = [], [], []
        for row in ids:
            self.set(choices)
            logits = self.instrumented.logits(row[None])[0, :-1].float()
            losses.append(F.cross_entropy(logits, row[1:], reduction="sum").item())
            kl = 0.0
            if divergence:
                self.set(None)
                dense = self.instrumented.logits(row[None])[0, :-1].float()
                kl = F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True).item()
            kls.append(kl)
            tokens.append(row.numel() - 1)
            if progress is not None:
                progress()
        self.set(None)
        return Sequences(tuple(tokens), tuple(losses), tuple(kls))
