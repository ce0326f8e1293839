"""Shared by the candidates that select tokens while decoding; attnopt/codegen/reference_tokens.py says what they do.

The whole cache is kept and prompts run as they are: only what a step of decoding reads differs. Damage is tried out on
text by `attnopt distill`, every row computed as the step it would be.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attnopt.candidates import Number, Param, Params, SpanCosts
from attnopt.candidates._tried import MOST_TOKENS, Tried
from attnopt.candidates.dense import UNBOUNDED
from attnopt.codegen.reference_tokens import TokenRule, rows
from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.feature_maps import FeatureMap
    from attnopt.statistics.trials import Share

PLAN = "Make a plan of this model: `attnopt profile`, `attnopt distill`, then `attnopt plan`."
CORRECT = 'Correct "behind" or "k" of the head, or let `attnopt plan` make the plan.'
# What is tried: shares of a text, and beside them the first tokens and the last.
OFFERED_SHARES = (32, 8)
OFFERED_SINK, OFFERED_RECENT = 4, 32
# Steps that a selection may serve at most.
MOST_STEPS = 1 << 16


class Tokens(Tried):
    """A head that attends, while decoding, to tokens that it selects."""

    family = "tokens"
    decoded = True
    kept = (Param("k", int, 1, MOST_TOKENS), Param("sink", int, 0, MOST_TOKENS), Param("recent", int, 0, MOST_TOKENS))

    def offered(self, own: Mapping[str, Number], length: int) -> list[Choice]:
        """Choices of these parameters for texts of `length` tokens: with a 32nd and an eighth of them, beside the first
        few and the last."""
        near = {"sink": OFFERED_SINK, "recent": OFFERED_RECENT}
        counts = dict.fromkeys(max(length // share, 1) for share in OFFERED_SHARES)
        return [Choice.of(self.name, {"k": count, **near, **own}) for count in counts]

    @abstractmethod
    def token_rule(self, params: Params) -> TokenRule:
        """How the head selects."""

    def behind(self, params: Params) -> int:
        """Attentions between the layer that selects and this one, whose head of the same number reads what was
        selected there; 0 where it selects itself."""
        return 0

    def rule(self, params: Params) -> tuple[int, int, float]:
        return 0, UNBOUNDED, 0.0

    def plain(self, params: Params) -> Choice:
        """What a profile knows of it: the sink and the recent keys without anything that is selected."""
        rule = self.token_rule(params)
        return Choice.of("sink_window", {"sink": rule.sink, "alpha": max(1, rule.recent), "beta": 0.0})

    def selecting(
        self, table: SpanCosts, params: Params, length: int, head_dim: int, share: Share | None = None
    ) -> tuple[float, float]:
        """Where it was not tried, how often queries are dissimilar is not known, and taken for every step."""
        rule = self.token_rule(params)
        often = share.visited if share is not None else 1.0 if rule.similar else 1 / rule.every
        features = min(rule.channels or head_dim, head_dim)
        found = 0.0 if self.behind(params) else often * table.scanned(length, features, head_dim)
        return found, table.gathered(length, min(rule.sink + rule.recent + rule.count, length))

    def reference(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: Params, scale: float,
        own_window: int | None = None, given: FeatureMap | torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Every row as a step of decoding. ValueError for heads that read another layer's selection, which is not
        among the arguments."""
        if self.behind(params):
            raise ValueError("these heads read what another layer selected: attnopt.codegen.reference_tokens.rows")
        return rows(q, k, v, self.token_rule(params), scale)


def source_of(site: str, head: int, choice: Choice, earlier: Sequence[Sequence[Choice] | None]) -> Choice | None:
    """What the head selects by whose tokens a head with this choice reads; None for one that selects itself.

    earlier: the choices of the attentions before this one, in their order, None for one that is dense. PlanError where
    there is no such head: the layer is not there, or its head of this number keeps a span, reads another's tokens, or
    selects other than as many. A dense head selects beside attending to every key, for those that ask it.
    """
    candidate, params = CANDIDATES[choice.candidate], dict(choice.params)
    back = candidate.behind(params) if isinstance(candidate, Tokens) else 0
    if not back:
        return None
    said = f"Head {head} of {site} reads the tokens that the attention {back} before it selected"
    if params["every"] != 1 or params["similar"]:
        raise PlanError(f"{said}, and is to select some itself.", 'Give it "every" 1 and "similar" 0.')
    if back > len(earlier):
        raise PlanError(f"{said}, and there are {len(earlier)} before it.", CORRECT)
    choices = earlier[-back] or ()
    source = choices[head] if head < len(choices) else DENSE
    if source == DENSE:
        return beside_every_key(int(choice["k"]))
    selects = CANDIDATES[source.candidate]
    if not isinstance(selects, Tokens) or selects.behind(dict(source.params)):
        raise PlanError(f"{said}, where that head selects none.", CORRECT)
    if source["k"] != choice["k"]:
        raise PlanError(f"{said}, which are {source['k']:g} and not {choice['k']:g}.", CORRECT)
    return source


def beside_every_key(count: int) -> Choice:
    """A head that attends to every key and selects `count` of them, for others to read."""
    own = {"k": count, "sink": 0, "recent": MOST_TOKENS, "every": 1, "similar": 0.0, "behind": 0}
    return Choice.of("top_tokens", own)


def with_sources(choices: Sequence[Sequence[Choice] | None], heads: Sequence[int]) -> list[tuple[Choice, ...] | None]:
    """The choices of layers in their order, None for a dense one, where dense heads select what later ones read of
    them. heads: of each layer."""
    found: list[list[Choice]] = [
        [DENSE] * n if of_layer is None else list(of_layer) for of_layer, n in zip(choices, heads, strict=True)
    ]
    for layer, of_layer in enumerate(choices):
        for head, choice in enumerate(of_layer or ()):
            back = int(dict(choice.params).get("behind", 0)) if CANDIDATES[choice.candidate].decoded else 0
            if 0 < back <= layer and head < heads[layer - back] and found[layer - back][head] == DENSE:
                found[layer - back][head] = beside_every_key(int(choice["k"]))
    return [None if set(of_layer) == {DENSE} else tuple(of_layer) for of_layer in found]
