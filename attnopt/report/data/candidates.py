"""What every head could have been replaced by, and what that was predicted to lose, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from attnopt.candidates import Params
from attnopt.cost import CostTable
from attnopt.ir import Choice, Share
from attnopt.plan import Plan
from attnopt.planner.again import Posed, pose
from attnopt.planner.tried import shares_at
from attnopt.registry import CANDIDATES
from attnopt.report.cells import far_of, rounded
from attnopt.units import number_text

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile


# Counts and windows from which on nothing is left away by them.
NO_LIMIT = 1 << 20


def label(choice: Choice) -> str:
    """A choice in few words: "window 128, sink 4", "window N/8", "linear 64, window 128", "pooled, mass 0.75, block
    64", "top_tokens, k 64, sink 4, recent 32, every 8"; of one that selects keys without what leaves nothing away."""
    kind = CANDIDATES[choice.candidate]
    if far_of(kind) in ("selected", "tokens"):
        given = {p.name: choice[p.name] for p in kind.params}
        idle = {p.name for p in kind.params if given[p.name] in (0, min(p.least, 0)) or given[p.name] >= NO_LIMIT}
        shown = (f"{name} {number_text(value)}" for name, value in given.items() if name not in idle)
        return ", ".join([kind.name, *shown])
    params = {name: value for name, value in choice.params if name not in ("alpha", "beta", "window", "sink")}
    given = dict(choice.params)
    alpha, beta = given.get("alpha", given.get("window", 0)), given.get("beta", 0)
    share = f"N/{1 / beta:g}" if beta and 1 / beta == round(1 / beta) else f"{beta:g} N"
    window = " + ".join([*([f"{alpha:g}"] if alpha or not beta else []), *([share] if beta else [])])
    name = "" if choice.candidate == "sink_window" else choice.candidate
    words = [" ".join([name, *(f"{value:g}" for value in params.values())]).strip()]
    words += [f"window {window}"] if {"alpha", "window"} & set(given) else []
    words += [f"sink {given['sink']:g}"] if given.get("sink") else []
    return ", ".join(word for word in words if word)


def choice_facts(choice: Choice, length: int, share: Share | None = None) -> dict[str, Any]:
    """A choice at a length. sink, window: of its span, None where it is dense there or gone; far: what stands in for
    the keys outside; cost: share of dense's query-key pairs, where a far part, or a selection of blocks, counts as the
    pairs of equal work, and tokens that are selected while decoding as what a step attends to. share: what a head
    visits that selects its keys; without it the cost of one that selects blocks is not known."""
    kind, params, table = CANDIDATES[choice.candidate], dict(choice.params), CostTable.by_density()
    sink, window = kind.span(params, length)
    spans, far, cost = 0 < window < length, far_of(kind), None
    if far == "tokens":
        cost = steps_of(params, length)["attended"] / length
    elif far != "selected" or share is not None:
        cost = kind.cost(table, params, length, None, share) / table.cost(length, 0, length)
    return {
        "choice": str(choice), "label": label(choice), "candidate": choice.candidate, "sink": sink if spans else None,
        "window": window if spans else None, "far": far, "cost": cost,
    }  # fmt: skip


def steps_of(params: Params, length: int) -> dict[str, Any]:
    """Of a head that selects tokens while decoding, at a total `length`. attended: keys that a step attends to, at
    most; every: steps that a selection serves; behind: attentions between the one that selects and this, 0 where it
    selects itself."""
    near = params["k"] + params["sink"] + params["recent"]
    return {"attended": min(int(near), length), "every": int(params["every"]), "behind": int(params.get("behind", 0))}


def _mean_share(plan: Plan, posed: Posed, fitted: Fitted | None, choice: Choice) -> Share | None:
    """Of a choice that selects keys, what heads visit of the text tried, as far as it is known: their mean."""
    length, known = plan.lengths.planned, list[Share]()
    for site in posed.sites:
        own = {h: share for h, share in plan.visits.get(site.name, {}).items() if plan.choices[site.name][h] == choice}
        tried = enumerate(shares_at(fitted, site.name, choice, length, site.heads))
        known += [share for _, share in tried if share is not None] or own.values()
    return mean_share(known)


def mean_share(shares: Sequence[Share]) -> Share | None:
    """None of none."""
    columns = zip(*map(astuple, shares), strict=True)
    return Share(*(sum(column) / len(shares) for column in columns)) if shares else None


def candidates_json(
    plan: Plan, profile: Profile, fitted: Fitted | None = None, posed: Posed | None = None
) -> dict[str, Any]:  # fmt: skip
    """Damages as the planner weighs them: nats per token, the largest over the profiled lengths and the planned one,
    and what is lost of the probe's answers, weighed; None where a choice cannot stand or its damage is not known."""
    posed = posed or pose(plan, profile, fitted=fitted)
    problem, length = posed.free, plan.lengths.planned
    taken = set(posed.solution.index.tolist())
    columns = [c for c in range(len(problem.choices)) if c in taken or math.isfinite(problem.damage[:, c].min())]
    place = {c: n for n, c in enumerate(columns)}
    sites: dict[str, dict[str, list[Any]]] = {}
    for h, (site, _) in enumerate(problem.heads):
        held = sites.setdefault(site, {"damage": [], "chosen": []})
        held["damage"].append([rounded(float(problem.damage[h, c])) for c in columns])
        held["chosen"].append(place[int(posed.solution.index[h])])
    choices = [
        choice_facts(c, length, _mean_share(plan, posed, fitted, c)) for c in (problem.choices[c] for c in columns)
    ]
    for facts in choices:
        facts["cost"] = rounded(facts["cost"])
    return {"length": length, "unit": "nats per token", "choices": choices, "sites": sites}
