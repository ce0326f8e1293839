"""Why one head has the choice it has: what else was weighed, what that would lose and cost, and what decided.

What a change costs is what the whole plan would, with this one head changed, so that what heads share, the spans of a
layer or a KV head's cache, counts as it did in the search. The planner takes what is worth its price (`Posed.price`):
of a head's candidates one on the lower hull of damage over cost, where its edges meet that price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attnopt.ir import DENSE, Choice, Share, Site
from attnopt.plan import Constraints, Plan
from attnopt.planner.again import Posed
from attnopt.planner.constraints import protected
from attnopt.planner.knapsack import GONE, Array
from attnopt.planner.options import hulls
from attnopt.planner.problem import table_of
from attnopt.planner.tried import not_pruned, refused, shares_at
from attnopt.registry import CANDIDATES
from attnopt.report.data.candidates import choice_facts, steps_of
from attnopt.report.data.plans import visited_text

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile

UNKNOWN = "not compared: what the chosen one loses stands in the file of fits, give --fitted"


@dataclass(frozen=True, eq=False)
class _Head:
    plan: Plan
    profile: Profile
    posed: Posed
    fitted: Fitted | None
    site: Site
    number: int

    @property
    def row(self) -> int:
        return self.posed.free.heads.index((self.site.name, self.number))

    @property
    def own(self) -> int:
        return int(self.posed.solution.index[self.row])

    @property
    def damage(self) -> Array:
        """Nats per token of every choice, as weighed, (C,)."""
        return np.asarray(self.posed.free.damage[self.row])

    @cached_property
    def spans(self) -> Array:
        """Distinct spans of the layer with each choice in place of the head's own, (C,)."""
        problem, index = self.posed.free, self.posed.solution.index
        others = [h for h in np.flatnonzero(problem.site == problem.site[self.row]) if h != self.row]
        beside = {int(problem.groups[h, index[h]]) for h in others} - {GONE}
        return np.array([len(beside | ({int(g)} - {GONE})) for g in problem.groups[self.row]])

    @cached_property
    def cost(self) -> Array:
        """The plan's cost with each choice in place of the head's own, (C,)."""
        found = []
        for c in range(len(self.posed.free.choices)):
            index = self.posed.solution.index.copy()
            index[self.row] = c
            found.append(self.posed.free.of(index).cost)
        return np.array(found)

    @cached_property
    def open(self) -> Array:
        """Whether the head may have a choice, by protection and the limit of spans as well, (C,). Its own it has."""
        most = self.posed.limits.spans
        allowed = np.isfinite(self.posed.problem.damage[self.row]) & (self.spans <= (most or math.inf))
        allowed[self.own] = math.isfinite(self.damage[self.own])
        return np.asarray(allowed)

    @cached_property
    def corners(self) -> dict[int, tuple[float, float]]:
        """The choices on the hull, and from which price to which each is best, in nats per unit of cost."""
        if not self.open.any():
            return {}
        damage, cost = (np.where(self.open, values, np.inf)[None] for values in (self.damage, self.cost))
        found = hulls(damage, cost)
        order = [int(c) for c in found.order[0] if c >= 0]
        slopes = [0.0, *map(float, found.slopes[0][: len(order) - 1]), math.inf]
        return {c: (slopes[n], slopes[n + 1]) for n, c in enumerate(order)}


def head_json(
    plan: Plan, profile: Profile, posed: Posed, site: str, head: int, fitted: Fitted | None = None
) -> dict[str, Any]:  # fmt: skip
    """One head's candidates, cheapest first. damages: nats per token of text at each profiled length; damage: as
    weighed (see `candidates_json`); share: of the budget, in nats; cost: share of dense pairs; change: of the plan, if
    this head alone had the choice, damage in nats per token and cost in `cost_unit`; hull: whether any price makes it
    the best; visits: of a choice that selects keys, what the head visits, recalls and pays for selecting. None
    where a figure is not known."""
    seen = _Head(plan, profile, posed, fitted, next(s for s in posed.sites if s.name == site), head)
    budget = budget_in_nats(plan)
    choices = dict.fromkeys(posed.free.choices[c] for c in range(len(seen.damage)) if math.isfinite(seen.damage[c]))
    tried = [] if fitted is None else [c for _, kind in CANDIDATES for c in kind.tried(fitted, site)]
    choices |= dict.fromkeys([DENSE, *tried, posed.free.choices[seen.own]])
    rows = sorted((_row(seen, choice, budget) for choice in choices), key=lambda r: (r["cost"] is None, r["cost"]))
    return {
        "head": f"{site}.{head}",
        "length": plan.lengths.planned,
        "cost_unit": posed.free.unit,
        "chosen": str(posed.free.choices[seen.own]),
        "reason": _reason(seen),
        "price": posed.price,
        "budget": {"limit": plan.budget.limit, "unit": plan.budget.unit, "nats": budget},
        "candidates": rows,
        "notes": [*_dense_here(plan), *posed.notes],
    }


def _dense_here(plan: Plan) -> list[str]:
    """What is compared is what the heads would do; under the plan's break-even they do not."""
    n, least = plan.lengths.planned, plan.min_length
    return [f"Under {least} tokens the plan runs every head dense, also at the {n} compared here."] if n < least else []


def budget_in_nats(plan: Plan) -> float | None:
    """The budget in nats per token; None where that takes a dense loss and none was measured."""
    if plan.budget.kind == "kl":
        return plan.budget.limit
    losses = [m.dense_loss for m in plan.measured]
    return plan.budget.limit / 100 * max(losses) if losses else None


def _row(seen: _Head, choice: Choice, budget: float | None) -> dict[str, Any]:
    choices = seen.posed.free.choices
    at = choices.index(choice) if choice in choices else None
    damages = _damages(seen, choice)
    weighed = math.inf if at is None else float(seen.damage[at])
    damage = weighed if math.isfinite(weighed) else max(damages.values(), default=None)
    change = None
    if at is not None and math.isfinite(weighed) and math.isfinite(seen.damage[seen.own]):
        change = {"damage": weighed - float(seen.damage[seen.own]), "cost": float(seen.cost[at] - seen.cost[seen.own])}
    chosen, share = at == seen.own, _share(seen, choice)
    return {
        **choice_facts(choice, seen.plan.lengths.planned, share),
        "visits": _visits(seen, choice, share),
        "damage": damage,
        "damages": {str(n): value for n, value in damages.items()},
        "share": None if damage is None or not budget else damage / budget,
        "change": change,
        "hull": at in seen.corners,
        "chosen": chosen,
        "why": "chosen" if chosen else _closed(seen, choice, at) or _compared(seen, change),
    }


def _share(seen: _Head, choice: Choice) -> Share | None:
    """What the head visits under a choice that selects keys; None where that is not known."""
    heads = seen.site.heads
    found = shares_at(seen.fitted, seen.site.name, choice, seen.plan.lengths.planned, heads)[seen.number]
    own = choice == seen.posed.free.choices[seen.own]
    return found or (seen.plan.visits.get(seen.site.name, {}).get(seen.number) if own else None)


def _visits(seen: _Head, choice: Choice, share: Share | None) -> str:
    """`visited_text`, of blocks with "selection 0.12 of 0.9 ms"; empty where nothing is known."""
    kind, params, length = CANDIDATES[choice.candidate], dict(choice.params), seen.plan.lengths.planned
    known = {} if share is None else asdict(share)
    if kind.decoded:
        return visited_text({**steps_of(params, length), **known}, length)
    if share is None:
        return ""
    table, unit = table_of(seen.posed.tables, seen.site), "million kept pairs"
    unit = unit if table.kind == "density" else "ms"
    selection = table.selection_cost(length, kind.name, kind.timing(params), kind.scored(params, length))
    whole = kind.cost(table, params, length, seen.site.mask.window, share)
    return f"{visited_text(known, length)}, selection {selection:.3g} of {whole:.3g} {unit}"


def _damages(seen: _Head, choice: Choice) -> dict[int, float]:
    """Nats per token of text at each profiled length; empty where the file of fits would tell."""
    kind, params, site = CANDIDATES[choice.candidate], dict(choice.params), seen.site
    if kind.far:
        if seen.fitted is None or choice not in seen.fitted.choices(site.name):
            return {}
        return {n: float(seen.fitted.damage(site.name, n, choice)[seen.number]) for n in seen.profile.lengths}
    sums = {n: seen.profile.observations[site.name, n] for n in seen.profile.lengths}
    return {
        n: float(kind.damage(o, params, n, site.mask.window)[seen.number]) / max(1e-9, o.tokens)
        for n, o in sums.items()
    }


def protection(plan: Plan, profile: Profile, sites: Sequence[Site], site: str, head: int) -> str:
    """What was asked for that keeps a head dense; empty where nothing was."""
    for text in plan.constraints.protect:
        if head in protected(sites, Constraints(protect=(text,)), profile).get(site, ()):
            return f"protected by --protect {text}"
    top = plan.constraints.protect_top
    if top and head in protected(sites, Constraints(protect_top=top), profile).get(site, ()):
        return f"protected by --protect-top {top}: removing it is among what damages most"
    return ""


def _closed(seen: _Head, choice: Choice, at: int | None) -> str:
    """Why a choice could not be taken; empty where it could."""
    kind, site = CANDIDATES[choice.candidate], seen.site.name
    asked = protection(seen.plan, seen.profile, seen.posed.sites, site, seen.number)
    if asked and choice != DENSE:
        return asked
    if kind.family and kind.family not in seen.plan.constraints.allow:
        return f"not weighed: the plan was made without --allow {kind.family}"
    if kind.family and seen.fitted is not None and (no := refused(seen.fitted, site, seen.number, choice)):
        return f"not offered: {no}"
    kept = not_pruned(seen.profile, [site]).get(site, {}) if kind.far == "gone" else {}
    if seen.number in kept:
        return f"not pruned: {kept[seen.number]}"
    most = seen.posed.limits.spans
    if at is not None and most is not None and seen.spans[at] > most:
        return f"its span would be number {seen.spans[at]} of the layer, and {most} are the limit"
    if at is None or not seen.open[at]:
        return "cannot stand here"
    return ""


def _compared(seen: _Head, change: dict[str, float] | None) -> str:
    """A choice that could have been taken, against the head's own and the plan's price."""
    if change is None:
        return UNKNOWN
    unit, price = seen.posed.free.unit, seen.posed.price
    # Rounding of sums is no difference.
    worse, dearer = change["damage"], change["cost"]
    dearer = 0.0 if abs(dearer) <= 1e-9 * seen.posed.solution.cost else dearer
    if worse == 0 and dearer == 0:
        return f"the same at {seen.plan.lengths.planned} tokens"
    if worse > 0 and dearer == 0 and seen.posed.free.key_cost.any():
        return "saves nothing: the other heads of its KV head keep these keys anyway"
    if worse >= 0 and dearer >= 0:
        return "no better on either count"
    if worse <= 0 and dearer <= 0:
        whose = "the search" if seen.posed.own_costs else "the plan's own costs"
        return f"better on both counts with the other heads as they are: {whose} had it otherwise"
    rate = abs(worse / dearer)
    sum_of = f"{abs(worse):.3g} nats {'more' if worse > 0 else 'less'} for {abs(dearer):.3g} {unit} "
    sum_of += "less" if worse > 0 else "more"
    if not price:
        return sum_of
    times = f"{rate / price:.3g} times the price"
    if (worse > 0) == (rate > price):
        return f"{sum_of}: {times}"
    return f"{sum_of}: {times}, so by itself it would pay; the point that was measured has it otherwise"


def _reason(seen: _Head) -> str:
    """Why the head's own choice is what it is."""
    plan, own, price = seen.plan, seen.own, seen.posed.price
    choice = seen.posed.free.choices[own]
    asked = protection(plan, seen.profile, seen.posed.sites, seen.site.name, seen.number)
    if asked and choice == DENSE:
        return asked
    edited = "The plan was edited after it was measured. " if plan.edited else ""
    if not math.isfinite(seen.damage[own]):
        return edited + UNKNOWN
    if choice == DENSE and seen.open.sum() == 1:
        others = [c for name, c in CANDIDATES if name != DENSE.candidate and not c.family]
        no = next((r for c in others if (r := c.refuse(seen.site)) is not None), None)
        return f"nothing else can stand here{f': {no.reason}' if no is not None else ''}"
    pays = "" if price is None else f"the plan pays {price:.3g}"
    unit = seen.posed.free.unit
    if own in seen.corners:
        low, high = seen.corners[own]
        upto = f"nats per {unit} on" if math.isinf(high) else f"to {high:.3g} nats per {unit}"
        of = f"best of {int(seen.open.sum())} candidates at prices from {low:.3g} {upto}"
        fits = price is None or low * (1 - 1e-6) <= price <= high * (1 + 1e-6)
        joined = f", and {pays}" if pays and fits else f", while {pays}: {_otherwise(seen)}" if pays else ""
        return f"{edited}{of}, with the other heads as they are{joined}"
    return f"{edited}best at no single price, with the other heads as they are ({pays} nats per {unit}): " + _otherwise(
        seen
    )


def _otherwise(seen: _Head) -> str:
    """What decides where the price alone does not."""
    if not seen.posed.own_costs:
        return "the plan was made with other costs than these"
    if seen.plan.edited:
        return "its choices are not the planner's"
    return "heads are taken whole and their combination was searched for, to use up what was left of the budget"
