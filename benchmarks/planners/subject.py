"""The model that planners are compared on: its text in three splits, its sites, and what spans do to its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import hf, text
from attnopt.ir import Site
from attnopt.measure import Spans
from attnopt.planner.make import answered
from attnopt.probe import Probe, Recall
from benchmarks.planners import fixed
from benchmarks.planners.terms import Choices, span_of


@dataclass(frozen=True)
class Outcome:
    """Of a plan on held-out text: loss increase over the dense model in percent, and KL(dense || plan) in nats per
    token."""

    increase: float
    kl: float


class Subject:
    """One model, loaded in `dtype`; text: files, or by default the library's own source."""

    def __init__(self, name: str, dtype: str = "fp32", sources: Sequence[str] = ()) -> None:
        loaded = hf.load(name, hf.dtype_of(dtype), "cpu", "sdpa")
        self.name, self.model, self.tokenizer, self.sources = name, loaded.model.eval(), loaded.tokenizer, sources
        self.spans = Spans(self.model)
        self.spans.losses(self.split("verify", 64, 1), None)
        self.spans.instrumented.need_sites()
        self.sites: list[Site] = list(self.spans.sites.values())
        self.heads = {s.name: s.heads for s in self.sites}
        self._held: tuple[Tensor, Tensor] | None = None

    def split(self, which: str, length: int, samples: int) -> Tensor:
        """Sequences (samples, length) of one split."""
        tokens = text.stream(self.sources, self.tokenizer, which, 2 * samples * length)
        return text.sequences(tokens, length, samples, which)

    def density(self, choices: Choices, length: int) -> float:
        """Share of query-key pairs that a plan keeps, over all heads."""
        spans = [span_of(c, length) for of_site in choices.values() for c in of_site]
        return sum(fixed.density(length, s, w) for s, w in spans) / len(spans)

    @torch.no_grad()
    def hold_out(self, ids: Tensor) -> None:
        """Measure on `ids` (samples, N) from now on; the dense model's predictions are kept."""
        self.spans.set(None)
        self._held = ids, torch.stack([self._log_probs(row) for row in ids])

    def _log_probs(self, row: Tensor) -> Tensor:
        return self.spans.instrumented.logits(row[None])[0].float().log_softmax(-1)

    @torch.no_grad()
    def measure(self, choices: Choices) -> Outcome:
        assert self._held is not None, "hold_out first"
        ids, dense = self._held
        kl = loss = before = 0.0
        self.spans.set(choices)
        for row, expected in zip(ids, dense, strict=True):
            found = self._log_probs(row)
            kl += F.kl_div(found, expected, reduction="sum", log_target=True).item()
            loss += F.nll_loss(found[:-1], row[1:], reduction="sum").item()
            before += F.nll_loss(expected[:-1], row[1:], reduction="sum").item()
        self.spans.set(None)
        return Outcome(100 * (loss / before - 1), kl / ids.numel())

    def recalled(
        self, choices: Choices | None, probe: Probe, length: int, documents: int, seed: str = "held out"
    ) -> Recall:
        """What a plan leaves of the model's retrieval: answers of random key-value lines, see attnopt.probe."""
        return answered(self.spans, choices, probe.documents(length, documents, seed))
