"""Heads that select tokens while decoding, on a text all of whose rows are there: each row as its step would be.

Some read what an earlier attention selected, so that attentions of one run of a model leave on a Board what later ones
may ask for: queries and keys, of which a selection is made again where it is wanted, and the choices of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.candidates._tokens import Tokens, source_of
from attnopt.codegen.reference_tokens import Selection, TokenRule, channels_of, rows
from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice, Site
from attnopt.registry import CANDIDATES


@dataclass
class Posted:
    """One attention: q (B, H, N, D), k (B, G, N, D), pad bool (B, N) and its choices; None for choices that are not
    settled, as where each is tried, and for tensors that nobody may ask for any more."""

    q: Tensor | None
    k: Tensor | None
    pad: Tensor | None
    choices: tuple[Choice, ...] | None


@dataclass
class Board:
    """The attentions of one run so far, in their order. reach: how far back they are asked for, None for any number."""

    reach: int | None = None
    posted: dict[str, Posted] = field(default_factory=dict)

    def post(
        self, site: str, q: Tensor, k: Tensor, pad: Tensor | None, choices: Sequence[Choice] | None
    ) -> None:  # fmt: skip
        """An attention has its queries and keys. A site that was there begins another run."""
        if site in self.posted:
            self.posted.clear()
        self.posted[site] = Posted(q, k, pad, None if choices is None else tuple(choices))
        if self.reach is not None and len(self.posted) > self.reach + 1:
            old = list(self.posted.values())[-self.reach - 2]
            old.q = old.k = old.pad = None

    def before(self, site: str) -> list[Posted]:
        """The attentions before a site that was posted."""
        names = list(self.posted)
        return [self.posted[name] for name in names[: names.index(site)]]


def selections(choice: Choice, q: Tensor, k: Tensor, pad: Tensor | None) -> Tensor:
    """How many rows of a text every head selects at, int64 (H,), where all have this choice; 0 of those that read what
    another attention selected. Arguments as those of `write_rows`."""
    kind, params = CANDIDATES[choice.candidate], dict(choice.params)
    length, rule = q.shape[2], kind.token_rule(params)
    if kind.behind(params):
        return torch.zeros(q.shape[1], dtype=torch.int64, device=q.device)
    row = torch.arange(length, device=q.device)
    last = Selection.of(q, k, rule, pad).last if rule.similar else (row - row % rule.every).expand(q.shape[:3])
    counts = torch.full((q.shape[0], 1, 1), length, device=q.device) if pad is None else pad.sum(1)[:, None, None]
    return ((last == row) & (row < counts)).sum((0, 2))


def reach_of(choices: Iterator[Choice]) -> int:
    """How far back any of these asks."""
    kinds = ((CANDIDATES[c.candidate], dict(c.params)) for c in choices)
    return max((kind.behind(params) for kind, params in kinds if isinstance(kind, Tokens)), default=0)


def selecting(choices: Sequence[Choice]) -> tuple[int, ...]:
    """Positions of the heads whose steps of decoding select tokens."""
    return tuple(at for at, choice in enumerate(choices) if CANDIDATES[choice.candidate].decoded)


def as_prompt(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """What the heads do in a prompt: dense where only steps of decoding differ."""
    return tuple(DENSE if CANDIDATES[choice.candidate].decoded else choice for choice in choices)


def write_rows(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, choices: Sequence[Choice], site: Site, pad: Tensor | None,
    board: Board | None = None, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Write into out (B, H, N, Dv) the heads that select tokens, every row as its step of decoding would be.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), pad bool (B, N) true where a token counts. board: on which the site
    stands; needed where a head reads what an earlier attention selected, and PlanError without. lse (B, H, N), where it
    is wanted: written as well, the logsumexp of what each row attends to.
    """
    alike: dict[tuple[Choice, Choice | None], list[int]] = {}
    for head in selecting(choices):
        alike.setdefault((choices[head], _source(choices[head], head, site, board)), []).append(head)
    for (choice, source), heads in alike.items():
        kind, params = CANDIDATES[choice.candidate], dict(choice.params)
        rule, held, back = kind.token_rule(params), None, kind.behind(params)
        if source is not None and board is not None:
            earlier = board.before(site.name)[-back]
            if earlier.q is None or earlier.k is None or earlier.q.shape[1] <= heads[-1]:
                said = f"Head {heads[0]} of {site.name} reads the selection of an attention that left none for it."
                raise PlanError(said, "Run the whole model, layer after layer.")
            selects = CANDIDATES[source.candidate].token_rule(dict(source.params))
            queries, keys = _of(heads, earlier.q, earlier.k)
            held = Selection.of(queries, keys, selects, earlier.pad, _weighed(heads, earlier, selects))
        features = _weighed(heads, Posted(q, k, pad, None), rule)
        queries, keys, values = _of(heads, q, k, v)
        sums = None if lse is None else lse.new_empty(lse.shape[0], len(heads), lse.shape[2])
        out[:, heads] = rows(queries, keys, values, rule, site.scale, pad, held, features, sums)
        if lse is not None and sums is not None:
            lse[:, heads] = sums


def _source(choice: Choice, head: int, site: Site, board: Board | None) -> Choice | None:
    """What the head selects by from which a head with this choice reads. Where nothing is settled, it is one that
    selects as many tokens in every step."""
    kind, params = CANDIDATES[choice.candidate], dict(choice.params)
    back = kind.behind(params)
    if not back:
        return None
    earlier = [] if board is None else [posted.choices for posted in board.before(site.name)]
    if board is not None and back <= len(earlier) and earlier[-back] is None:
        return Choice.of(choice.candidate, {**params, "behind": 0})
    return source_of(site.name, head, choice, earlier)


def _of(heads: list[int], q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Some query heads, and the keys or values that each of them reads."""
    if len(heads) == q.shape[1]:
        return q, *others
    index = torch.tensor(heads, device=q.device)
    return q[:, index], *(x[:, index // (q.shape[1] // x.shape[1])] for x in others)


def _weighed(heads: list[int], of: Posted, rule: TokenRule) -> Tensor | None:
    """The features that the scores of some heads are made of: those of their KV heads, whatever else these serve."""
    if not rule.channels:
        return None
    assert of.q is not None and of.k is not None
    features = channels_of(of.q, of.k, rule.channels, of.pad)
    if len(heads) == of.q.shape[1]:
        return features
    return features[:, torch.tensor(heads, device=features.device) // (of.q.shape[1] // of.k.shape[1])]
