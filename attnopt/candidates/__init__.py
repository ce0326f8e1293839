"""What one head's attention may be replaced by: one file per candidate, found through ``registry.CANDIDATES``.

A candidate reads facts (a Site), statistics (an Observation, or what was Fitted and tried) and a cost table; it never
sees a graph. See docs/add-a-candidate.md. Names used here: ``length`` is the total number of keys N, ``own_window`` the
site's own sliding window (None for plain causal attention), ``params`` a mapping from parameter name to number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from attnopt.ir import Choice, Refusal, Share, Site
from attnopt.units import number_text

if TYPE_CHECKING:
    import torch

    from attnopt.feature_maps import FeatureMap
    from attnopt.fitted import Fitted
    from attnopt.statistics import Grid, Observation

Number = int | float
Params = Mapping[str, Number]


class SpanCosts(Protocol):
    """A table of prefill costs, in milliseconds per head. far_cost: of what stands in for the keys outside a span, a
    feature map of `kind` ("exp", "taylor") and `rank`, or their mean ("mean", 0). block_cost: of a walk over the share
    `visited` of all causal blocks of that size, of which `skipped` are skipped by their scores; selection_cost: of what
    candidate `name` selects them by, with settings `timed`, or, where nothing is timed, as so many `pairs` cost. Of a
    step of decoding, in keys that are read in order: scanned, one selection of a KV head by `features` of the `dim` of
    its keys; gathered, the `count` keys that a query head holds the places of."""

    def cost(self, length: int, sink: int, window: int) -> float: ...

    def far_cost(self, length: int, kind: str, rank: int) -> float: ...

    def block_cost(self, length: int, block: int, visited: float, skipped: float) -> float: ...

    def selection_cost(self, length: int, name: str, timed: tuple[float, ...], pairs: int) -> float: ...

    def scanned(self, length: int, features: int, dim: int) -> float: ...

    def gathered(self, length: int, count: int) -> float: ...


@dataclass(frozen=True)
class Param:
    """One parameter: ``kind`` is int or float; a float is a multiple of ``step`` so that it is exact in a file. Where
    ``among`` is given, one of these."""

    name: str
    kind: type
    least: float
    most: float
    step: float = 0.0
    among: tuple[Number, ...] = ()

    def problem(self, value: object) -> str:
        """What is wrong with `value`, or an empty string."""
        wanted = "a whole number" if self.kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return f"{self.name} must be {wanted}, not {value!r}"
        if not self.least <= value <= self.most:
            least, most = number_text(self.least), number_text(self.most)
            return f"{self.name} must be between {least} and {most}, not {value!r}"
        if self.step and value / self.step != round(value / self.step):
            return f"{self.name} must be a multiple of {number_text(self.step)}, not {value!r}"
        if self.among and value not in self.among:
            return f"{self.name} must be one of {', '.join(map(str, self.among))}, not {value!r}"
        return ""


class Candidate(ABC):
    """One replacement of a head's attention. Stateless: one instance serves every site.

    family: what `--allow` calls it; candidates without one are always weighed. far: what stands in for the keys outside
    its span, under one normaliser with them: "" nothing, "mean" one token, "linear" a fitted feature map; "gone" says
    that no attention is left at all and the head is a constant, "selected" that its keys are chosen while running.
    decoded: only steps of decoding differ from dense; a prompt, and every compiled prefill, runs as it is.
    """

    name: ClassVar[str]
    params: ClassVar[tuple[Param, ...]] = ()
    family: ClassVar[str] = ""
    far: ClassVar[str] = ""
    decoded: ClassVar[bool] = False

    def problem(self, params: Params) -> str:
        """What is wrong with `params`, or an empty string."""
        missing = [p.name for p in self.params if p.name not in params]
        return (
            f"{', '.join(missing)} is missing"
            if missing
            else next((text for p in self.params if (text := p.problem(params[p.name]))), "")
        )

    def misfit(self, params: Params, site: Site) -> str:
        """What of `params` cannot be at a site where the candidate can stand, or an empty string."""
        return ""

    @abstractmethod
    def space(self, grid: Grid, lengths: Sequence[int], own_window: int | None = None) -> list[Choice]:
        """The choices worth weighing at `lengths`: few spans, and none narrower than the profile observed."""

    def tried(self, fitted: Fitted, site: str) -> list[Choice]:
        """The choices worth weighing at a site because `attnopt distill` tried them there; none for a candidate whose
        damage a profile tells."""
        return []

    def menu(self, length: int) -> list[Choice]:
        """What `attnopt distill` tries of it on texts of `length` tokens: few settings, from careful to bold. None for
        a candidate whose damage a profile tells."""
        return []

    @abstractmethod
    def refuse(self, site: Site) -> Refusal | None:
        """Why this candidate cannot stand at `site`, or None if it can."""

    @abstractmethod
    def damage(
        self, observation: Observation, params: Params, length: int, own_window: int | None = None
    ) -> torch.Tensor:
        """Predicted divergence from the dense model, per head (heads,), in nats summed over the observed rows."""

    def damages(
        self, observation: Observation, choices: Sequence[Choice], length: int, own_window: int | None = None
    ) -> torch.Tensor:
        """`damage` of several choices, (heads, choices); worth writing out where they share work."""
        import torch

        return torch.stack([self.damage(observation, dict(c.params), length, own_window) for c in choices], -1)

    @abstractmethod
    def rule(self, params: Params) -> tuple[int, int, float]:
        """Lowering for prefill and cache: (sink, alpha, beta), which the run-time operator evaluates at any length.
        Key j is kept where j < sink or i - j < window(N), window(N) = clamp(floor(alpha + beta * N), 1, N)."""

    def span(self, params: Params, length: int, own_window: int | None = None) -> tuple[int, int]:
        """The rule at one length: (sink, window). Far sinks are hidden from a site with a sliding window of its own,
        so there the sink is 0 and the window at most its own."""
        sink, alpha, beta = self.rule(params)
        window = min(max(math.floor(alpha + beta * length), 1), length)
        return (sink, window) if own_window is None else (0, min(window, own_window))

    def selecting(
        self, table: SpanCosts, params: Params, length: int, head_dim: int, share: Share | None = None
    ) -> tuple[float, float]:
        """What a step of decoding takes beside its span, as many keys as take the same to read in order: what finding
        keys takes on average, once for the query heads of a KV head, and what the head's own reading of them does.
        head_dim: the site's; share: as in `cost`, of steps of decoding those that select."""
        return 0.0, 0.0

    def far_part(self, params: Params) -> tuple[str, int]:
        """Kind and rank of what stands in for far keys, as cost tables know it; ("", 0) for nothing."""
        return "", 0

    def map_name(self, params: Params) -> str:
        """The fitted maps it needs, as `Fitted.maps` calls them, e.g. "linear/64"; "" where it needs none."""
        return ""

    def method(self, params: Params) -> str:
        """Where keys are selected: the candidate and the size of its blocks, as its operator knows them."""
        return ""

    def settings(self, params: Params) -> tuple[float, ...]:
        """Where keys are selected: the parameters as numbers, in the order of `params`."""
        return ()

    def state_bytes(self, params: Params, site: Site, length: int) -> int:
        """What a cache of `length` tokens keeps of one query head beyond its span's keys."""
        return 0

    def cost(
        self, table: SpanCosts, params: Params, length: int, own_window: int | None = None, share: Share | None = None
    ) -> float:  # fmt: skip
        """Milliseconds of one head's prefill at `length`. share: what the head visits of the blocks it could, where
        keys are selected; None where that is not known."""
        span = table.cost(length, *self.span(params, length, own_window))
        kind, rank = self.far_part(params)
        return span + table.far_cost(length, kind, rank) if kind else span

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Params, scale: float,
        own_window: int | None = None, given: FeatureMap | torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Plain PyTorch: q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv) -> (B, H, N, Dv), all heads alike. given: what
        was fitted of these heads, where it needs that: their maps, or their mean outputs (H, Dv)."""
        import torch

        from attnopt.codegen.reference_prefill import prefill

        sink, window = self.span(params, q.shape[2], own_window)
        sinks = torch.full((q.shape[1],), sink, device=q.device)
        return prefill(q, k, v, sinks, torch.full_like(sinks, window), scale)


def refuse_span(site: Site) -> Refusal | None:
    """The sites a (sink, window) table cannot describe; shared by every candidate that lowers to one."""
    mask = site.mask
    if mask.kind not in ("causal", "sliding"):
        reason = f"its mask is {mask.kind!r}; spans need a causal one"
        return Refusal(reason, site.name, site.source, code="span-needs-causal")
    if mask.offset != 0:
        reason = f"its queries are shifted by {mask.offset} against its keys, expected 0"
        return Refusal(reason, site.name, site.source, code="span-needs-prefill")
    if not site.plain:
        reason = f"spans know a scale and a simple mask only, and this is {site.canonical}"
        return Refusal(reason, site.name, site.source, code="span-needs-plain")
    if site.head_dim != site.head_dim_v:
        reason = f"spans need values as wide as keys, these are {site.head_dim_v} and {site.head_dim}"
        return Refusal(reason, site.name, site.source, code="span-needs-equal-widths")
    wide = [load for load in mask.loads if not set(load.dims) <= {"b", "j"}]
    if wide:
        reason = f"its mask reads {wide[0]}, which is more than padding of keys"
        return Refusal(reason, site.name, site.source, code="span-needs-plain")
    return None
