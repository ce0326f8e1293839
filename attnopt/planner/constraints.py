"""What a user may ask for besides a budget, as limits of the problem; and requests that contradict each other, refused
with what binds and the best that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from attnopt.errors import OptionError
from attnopt.ir import Site
from attnopt.plan import Budget, Constraints
from attnopt.planner.frontier import front
from attnopt.planner.knapsack import Array, Limits, Problem, times_faster
from attnopt.strict_json import nearest

if TYPE_CHECKING:
    from attnopt.profile_file import Profile

# A prediction that is over the budget by more than this is not worth measuring: it was never off by more than three.
HOPELESS = 10.0
# Distinct spans of one layer, where prefill counts: each costs a group of calls of its own.
MAX_SPANS = 4


def limits_of(problem: Problem, asked: Constraints, objective: str) -> Limits:
    """The limits in the problem's own units."""
    dense = problem.dense
    shares = [
        share for share in (
            asked.max_kv_memory, None if asked.max_kv_bytes is None else asked.max_kv_bytes / dense.memory
        ) if share is not None
    ]  # fmt: skip
    return Limits(
        spans=asked.max_rules or (MAX_SPANS if objective in ("prefill", "mixed") else None),
        cost=None if asked.min_speedup is None else dense.cost / asked.min_speedup,
        memory=min(shares) * dense.memory if shares else None,
    )


def protected(sites: Sequence[Site], asked: Constraints, profile: Profile) -> dict[str, list[int]]:
    """Heads to leave dense, by site name: those named, and the `protect_top` whose removal damages most."""
    found: dict[str, set[int]] = {}
    for text in asked.protect:
        for name, heads in _named(text, sites).items():
            found.setdefault(name, set()).update(heads)
    if asked.protect_top:
        removal = {s.name: _removal(profile, s) for s in sites}
        ranked = sorted(((-float(d), s.name, h) for s in sites for h, d in enumerate(removal[s.name])))
        for _, name, head in ranked[: asked.protect_top]:
            found.setdefault(name, set()).add(head)
    return {name: sorted(heads) for name, heads in found.items()}


def _removal(profile: Profile, site: Site) -> Array:
    """Damage of dropping every key of a head, nats per token, the largest over the lengths. (heads,)"""
    seen = [o for (name, _), o in profile.observations.items() if name == site.name]
    return np.max([(o.ablation_t2 / 2 / max(o.tokens, 1e-9)).numpy() for o in seen], axis=0)


def _named(text: str, sites: Sequence[Site]) -> dict[str, Sequence[int]]:
    """LAYER, a site's name, the beginning of one up to a dot, or its number in order; or LAYER.HEAD."""
    layer = _layer(text, sites)
    if layer:
        return {s.name: range(s.heads) for s in layer}
    name, _, head = text.rpartition(".")
    layer = _layer(name, sites)
    if len(layer) == 1 and head.isdecimal():
        if int(head) < layer[0].heads:
            return {layer[0].name: [int(head)]}
        raise OptionError(f"--protect {text}: {name} has heads 0 to {layer[0].heads - 1}.", "Name one of them.")
    names = [s.name for s in sites]
    raise OptionError(f"--protect {text}: there is no such layer or head.", nearest(text, names, "The layers are"))


def _layer(text: str, sites: Sequence[Site]) -> list[Site]:
    if text.isdecimal():
        return [sites[int(text)]] if int(text) < len(sites) else []
    return [s for s in sites if s.name == text or s.name.startswith(f"{text}.")]


def refuse_impossible(problem: Problem, limits: Limits, free: Problem) -> None:
    """OptionError where no choice of spans, whatever its damage, is within the limits. free: the same problem without
    protected heads."""
    dense = problem.dense
    parts = [limits.cost is not None and _short_of(problem, limits, free, False)]
    parts += [limits.memory is not None and _short_of(problem, limits, free, True)]
    for text in parts:
        if text:
            raise OptionError(*text)
    if (limits.cost is not None or limits.memory is not None) and not len(front(problem, limits)):
        fast = front(problem, replace(limits, cost=None))
        speed = times_faster(dense.cost, float(fast.cost[-1])) if len(fast) else 1.0
        raise OptionError(
            "The speed-up and the KV memory wanted can each be had, but not together: "
            f"within the memory, the most found is {speed:.2f} times.",
            "Ask for less of one of them.",
        )


def harmless(problem: Problem) -> Problem:
    """The problem as if nothing did any damage: its front is the one cheapest plan."""
    return replace(problem, damage=np.where(np.isfinite(problem.damage), 0.0, np.inf))


def _short_of(problem: Problem, limits: Limits, free: Problem, memory: bool) -> tuple[str, str] | None:
    """What to say where a limit of cost, or of memory, cannot be reached; None if it can."""

    def least(of: Problem, spans: int | None) -> float:
        if memory:
            nothing = np.zeros_like(of.group_cost)
            kept = np.zeros((0, 0), dtype=np.int64)
            of = replace(of, cost=of.states, group_cost=nothing, key_cost=of.key_bytes, reads=kept)
        return float(front(harmless(of), Limits(spans=spans)).cost[-1])

    wanted = limits.memory if memory else limits.cost
    assert wanted is not None
    best = least(problem, limits.spans)
    slack = 1 + 1e-9
    if best <= wanted * slack:
        return None
    if least(problem, None) <= wanted * slack:
        binds, remedy = f"at most {limits.spans} spans a layer", "Allow more rules a layer"
    elif least(free, limits.spans) <= wanted * slack:
        binds, remedy = "the protected heads, which stay dense,", "Protect fewer heads"
    else:
        binds, remedy = "the narrowest windows that were profiled", "Profile narrower windows, plan for a longer length"
    dense = problem.dense.memory if memory else problem.dense.cost
    if memory:
        share, least_share = wanted / dense, best / dense
        return (
            f"A KV cache of {share:.1%} of dense cannot be had: {binds} allow {least_share:.1%} at the least.",
            f"{remedy}, or ask for more memory.",
        )
    return (
        f"A speed-up of {dense / wanted:g} cannot be had: {binds} allow {dense / best:.2f} at the most.",
        f"{remedy}, or ask for less.",
    )


def refuse_contradiction(problem: Problem, limits: Limits, budget: Budget, dense_loss: float) -> None:
    """OptionError where the budget is predicted to be missed hopelessly by all that is within the limits."""
    most = budget.nats(dense_loss)
    # What is forgotten of the probe is no part of the budget.
    problem = replace(problem, damage=problem.on_text, retrieval=np.zeros((0, 0)))
    sweep = front(problem, limits)
    first = sweep.first
    if first and budget.limit > 0:
        return  # nothing contradicts it: measuring says whether it can be kept
    if len(sweep) <= first or sweep.damage[first] <= HOPELESS * most:
        return
    held = front(problem, replace(limits, cost=None, memory=None)).pick(max_damage=most)
    best, dense = held or problem.dense, problem.dense
    share = best.memory / dense.memory if dense.memory else 1.0
    if first:
        raise OptionError(
            f"The budget of {budget} binds: no head's mildest replacement is predicted to keep it.",
            f"Allow at least about {_increase(float(sweep.damage[1]), budget, dense_loss)}.",
        )
    wanted = [f"a speed-up of {dense.cost / limits.cost:g}"] if limits.cost is not None else []
    wanted += [f"a KV cache of {limits.memory / dense.memory:.1%} of dense"] if limits.memory is not None else []
    raise OptionError(
        f"A budget of {budget} contradicts {' and '.join(wanted)}. The budget binds: within it, a speed-up of "
        f"{times_faster(dense.cost, best.cost):.2f} and a KV cache of {share:.1%} are "
        f"predicted at best; what is wanted is predicted to need "
        f"{_increase(float(sweep.damage[0]), budget, dense_loss)}.",
        "Allow a larger budget, or ask for less.",
    )


def _increase(damage: float, budget: Budget, dense_loss: float) -> str:
    value = damage if budget.kind == "kl" else 100 * damage / dense_loss
    return f"{value:.3g} {budget.unit}"
