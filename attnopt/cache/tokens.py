"""How the heads of a layer select tokens while decoding, made of a plan: what `attnopt::attend_tokens` reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.cache.layout import Layout
from attnopt.candidates._tokens import PLAN, Tokens, source_of, with_sources
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.codegen.work_list import tell_table
from attnopt.errors import PlanError
from attnopt.ir import Choice, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.plan import Plan


@dataclass(frozen=True)
class TokenTable:
    """rules: how each query head selects, None for one that does not; behind: attentions between it and the layer that
    it reads from, 0 where it selects itself."""

    rules: tuple[TokenRule | None, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, choices: Sequence[Choice], site: Site, earlier: Sequence[Sequence[Choice] | None]) -> TokenTable | None:
        """The table for one choice per query head of a site; None where none selects. earlier: the choices of the
        layers before it, in their order. PlanError for what no cache can serve."""
        rules: list[TokenRule | None] = []
        behind = []
        for head, choice in enumerate(choices):
            candidate, params = CANDIDATES[choice.candidate], dict(choice.params)
            rule, back = None, 0
            if isinstance(candidate, Tokens):
                no = candidate.refuse(site)
                if no is not None:
                    raise PlanError(f"Head {head} of {site.name} cannot select tokens: {no.reason}.", PLAN)
                source_of(site.name, head, choice, earlier)
                rule, back = candidate.token_rule(params), candidate.behind(params)
            rules.append(rule)
            behind.append(back)
        return cls(tuple(rules), tuple(behind)) if any(rules) else None

    @property
    def most(self) -> int:
        """Tokens that a head selects at most."""
        return max(rule.count for rule in self.rules if rule is not None)

    @property
    def features(self) -> int:
        """Features of a KV head's keys that are kept beside them, 0 where none are."""
        return max(rule.channels for rule in self.rules if rule is not None)

    @property
    def sources(self) -> tuple[int, ...]:
        """How far behind the layers are that are read from."""
        return tuple(sorted({back for back in self.behind if back}))

    def nbytes(self, layout: Layout, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one row's layer holds to select, beside its keys and values."""
        per_head = 4 * min(self.most, layout.length) + 4 + head_dim * dtype.itemsize
        per_feature = layout.slots * dtype.itemsize + 8 * len(layout.starts)
        return len(self.rules) * per_head + min(self.features, head_dim) * per_feature

    def tensors(self, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """int32 (H, 6) and float32 (H,): `rules` and `similar` of attnopt/codegen/reference_token_step.py, for a cache
        of `length` tokens."""
        rows = [
            (0, 0, 0, 0, 0, -1)
            if rule is None
            else (
                min(rule.count, length),
                min(rule.sink, length),
                min(rule.recent, length),
                rule.every,
                rule.channels,
                self.sources.index(back) if back else -1,
            )
            for rule, back in zip(self.rules, self.behind, strict=True)
        ]
        with torch.inference_mode(False):
            rules = torch.tensor(rows, dtype=torch.int32, device=device)
            similar = torch.tensor([rule.similar if rule else 0.0 for rule in self.rules], device=device)
        if not torch.compiler.is_compiling():
            tell_table(rules, [x for row in rows for x in row])
        return rules, similar

    def quick(self, layout: Layout, device: torch.device | str) -> Tensor:
        """A layout's table, int32 (G, 4), with which a single token's spans are looked at: a KV head none of whose
        query heads has a span is not read."""
        share = len(self.rules) // len(layout.starts)
        windows = [
            1 if all(self.rules[group * share : (group + 1) * share]) else window
            for group, window in enumerate(layout.windows)
        ]
        rows = list(zip(layout.starts, layout.capacities, layout.sinks, windows, strict=True))
        with torch.inference_mode(False):
            made = torch.tensor(rows, dtype=torch.int32, device=device)
        if not torch.compiler.is_compiling():
            tell_table(made, [x for row in rows for x in row])
        return made


def token_tables(choices: Sequence[Sequence[Choice] | None], sites: Sequence[Site]) -> list[TokenTable | None]:
    """The table of every layer in their order; choices: None for a layer that is dense."""
    found: list[TokenTable | None] = []
    choices = with_sources(choices, [site.heads for site in sites])
    for at, (of_site, site) in enumerate(zip(choices, sites, strict=True)):
        found.append(None if of_site is None else TokenTable.of(of_site, site, choices[:at]))
    return found


def tokens_of(plan: Plan | None, sites: Sequence[Site], length: int) -> list[TokenTable | None]:
    """The tables of a plan's sites, in the order of their layers, in a cache of `length` tokens: below the plan's least
    length every head is dense."""
    if plan is None or length < plan.min_length:
        return [None] * len(sites)
    return token_tables([plan.choices.get(site.name) for site in sites], sites)
