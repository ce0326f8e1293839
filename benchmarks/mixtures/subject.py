"""A model to mix replacements on: its text in three splits, its profile, its fits, and what a plan does to its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import hf, text
from attnopt.cost import Costs, CostTable
from attnopt.distill import Menu, distill_model
from attnopt.fitted import Fitted
from attnopt.instrument import Attention, Instrumented
from attnopt.ir import Choice, Site
from attnopt.measure import Spans
from attnopt.mixed import attend
from attnopt.planner import Problem
from attnopt.planner.costs import cost_tables, with_parts
from attnopt.planner.problem import make_problem
from attnopt.profiler import profile_model
from attnopt.registry import CANDIDATES
from attnopt.statistics import attention
from benchmarks.mixtures.documents import KINDS
from benchmarks.mixtures.trained import trained
from benchmarks.record import relative_error

Say = Callable[[str], None]
Choices = Mapping[str, Sequence[Choice]]
# Tokens on which operators are compared with the definition, which forms all pairs; and how far they may be off in
# float32, features being exponentials of sums of many terms.
CHECKED, TOLERANCE = 640, 1e-3


@dataclass(frozen=True)
class Sizes:
    """lengths: profiled and tried at, `samples` sequences each; length: planned for, and measured at on `final`
    sequences. features, ranks, windows, sinks, steps: what is fitted and tried."""

    lengths: tuple[int, ...]
    length: int
    samples: int
    final: int
    features: tuple[int, ...] = (32, 64)
    ranks: tuple[int, ...] = (8,)
    windows: tuple[int, ...] = (64, 256)
    sinks: tuple[int, ...] = (4,)
    steps: int = 300


@dataclass(frozen=True)
class Outcome:
    """Of a plan on held-out text: loss increase over dense in percent, and KL(dense || plan) in nats per token."""

    increase: float
    kl: float


class Subject:
    """name: "demo", which ships, or one of `KINDS`, which are trained here."""

    def __init__(self, name: str, sizes: Sizes, say: Say = print) -> None:
        self.name, self.sizes, self.say = name, sizes, say
        loaded = hf.load("demo" if name == "demo" else str(trained(KINDS[name], say=say)))
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.calibration = [r[None] for n in sizes.lengths for r in self.split("calibrate", n, sizes.samples)]
        say(f"{name}: profiling {len(self.calibration)} sequences")
        self.profile = profile_model(self.model, self.calibration)
        self.fitted = self._fitted()
        self.spans = Spans(self.model, self.fitted)
        self.spans.losses(self.split("verify", 64, 1), None)
        self.sites: list[Site] = list(self.spans.sites.values())
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[int, dict[str, Costs]] = {}
        self._checked: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def split(self, which: str, length: int, samples: int) -> Tensor:
        """Token ids int64 (samples, length)."""
        if self.name in KINDS:
            return KINDS[self.name].sequences(which, length, samples)
        tokens = text.stream([], self.tokenizer, which, 2 * samples * length)
        return text.sequences(tokens, length, samples, which)

    def _fitted(self) -> Fitted:
        """Fitted to three sequences, one of them held out, and tried on what was profiled."""
        sizes, longest = self.sizes, max(self.sizes.lengths)
        menu = Menu(sizes.features, sizes.ranks, sizes.windows, sizes.sinks, sizes.steps)
        self.say(f"{self.name}: fitting {menu.line}")
        return distill_model(self.model, self.apart(longest), self.calibration, menu, profile=self.profile)

    def apart(self, length: int) -> list[Tensor]:
        """Three sequences (1, length) of the calibration split that are not profiled."""
        if self.name in KINDS:
            return [row[None] for row in KINDS[self.name].sequences("calibrate", length, 3, seed=1)]
        used = {tuple(row[0, :64].tolist()) for row in self.calibration}
        rows = self.split("calibrate", length, 4 * self.sizes.samples + 3)
        return [row[None] for row in rows if tuple(row[:64].tolist()) not in used][-3:]

    def problem(self, length: int, objective: str, allowed: Sequence[str]) -> Problem:
        """The knapsack at `length` with the families allowed. Bytes need no times; those of prefill are taken once."""
        tables = CostTable.by_density() if objective == "memory" else self.tables(length)
        return make_problem(
            self.profile, tables, self.sites, length, objective=objective, fitted=self.fitted, allow=tuple(allowed)
        )

    def tables(self, length: int) -> dict[str, Costs]:
        if length not in self._tables:
            self.say(f"{self.name}: timing kernels at {length}")
            spans = cost_tables(self.sites, self.profile, "cpu", "cpu", [length], None)
            families = ("linear", "taylor", "compensation")
            self._tables[length] = with_parts(spans, self.sites, self.fitted, families, "cpu", "cpu", [length], None)
        return self._tables[length]

    def offers(self) -> list[str]:
        """On how many heads each family would be offered: below the damage of its own window at no length."""
        heads, said = sum(s.heads for s in self.sites), []
        choices = dict.fromkeys(c for s in self.sites for c in self.fitted.choices(s.name))
        for choice in choices:
            if CANDIDATES[choice.candidate].far not in ("linear", "mean"):
                continue
            count = sum(int(self.fitted.offered(s.name, choice).sum()) for s in self.sites)
            said.append(f"{choice} {count}")
        return [f"{self.name}: offered, of {heads} heads: {'; '.join(said)}."]

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of every site on `ids` (1, N)."""
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def observer(site: Site) -> Attention:
            def seen(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
                found[site.name] = q.clone(), k.clone(), v.clone()
                return attention(q, k, v, site.scale, pad, site.mask.window, site.softcap)

            return seen

        Instrumented(self.model, observer).logits(ids)
        return found

    @torch.no_grad()
    def dense_loss(self, length: int, samples: int) -> float:
        """Nats per token of the dense model on the final split."""
        ids, dense = self._dense(length, samples)
        return sum(F.nll_loss(d[:-1], row[1:]).item() for row, d in zip(ids, dense, strict=True)) / len(ids)

    def _dense(self, length: int, samples: int) -> tuple[Tensor, Tensor]:
        """Token ids of the final split and what dense predicts; of one length at a time, since that is large."""
        if length not in self._held:
            ids = self.split("final", length, samples)
            self.spans.set(None)
            self._held = {length: (ids, torch.stack([self._log_probs(row) for row in ids]))}
        return self._held[length]

    def _log_probs(self, row: Tensor) -> Tensor:
        return self.spans.instrumented.logits(row[None])[0].float().log_softmax(-1)

    @torch.no_grad()
    def measure(self, choices: Choices, length: int, samples: int) -> Outcome:
        """On the final split; the dense model's predictions are kept."""
        ids, dense = self._dense(length, samples)
        kl = loss = before = 0.0
        self.spans.set(choices)
        for row, wanted in zip(ids, dense, strict=True):
            found = self._log_probs(row)
            kl += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
            loss += F.nll_loss(found[:-1], row[1:], reduction="sum").item()
            before += F.nll_loss(wanted[:-1], row[1:], reduction="sum").item()
        self.spans.set(None)
        return Outcome(100 * (loss / before - 1), kl / ids.numel())

    @torch.no_grad()
    def error(self, choices: Choices) -> float:
        """The largest relative error of a site's operators against the candidates' own references in float64."""
        self._checked = self._checked or self.inputs(self.split("verify", CHECKED, 1))
        given, worst = self._checked, 0.0
        for site in self.sites:
            of_site = choices[site.name]
            found = attend(*given[site.name], of_site, site, self.fitted, None)
            worst = max(worst, relative_error(found, reference(site, of_site, self.fitted, *given[site.name])))
        return worst


def reference(site: Site, choices: Sequence[Choice], fitted: Fitted, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `attend` is to return, by the references of the candidates, head by head in float64."""
    share, heads = site.heads // site.kv_heads, []
    for h, choice in enumerate(choices):
        kind, params = CANDIDATES[choice.candidate], dict(choice.params)
        group = slice(h // share, h // share + 1)
        given = fitted.map_of(site.name, kind.map_name(params), [h]) if kind.map_name(params) else None
        given = fitted.mean_of(site.name, [h]) if kind.far == "gone" else given
        own = (x.double() for x in (q[:, h : h + 1], k[:, group], v[:, group]))
        heads.append(kind.reference(*own, params, site.scale, None, given))
    return torch.cat(heads, 1)
