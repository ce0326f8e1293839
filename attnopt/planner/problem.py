"""From a profile and a cost table to a knapsack, and from its solution to what a plan file says.

What is weighed (`OBJECTIVES`): "prefill", the time of every head's own span and far part. "decode" and "memory", the
keys that the cache keeps, the union over the query heads that share a KV head, and the states of far parts; where heads
select keys while decoding, what a step reads of them (attnopt/planner/steps.py). "mixed", half of prefill and half of
decode, as shares of dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from attnopt.cost import MARGIN, Costs, layer_cost
from attnopt.errors import ModelError, OptionError, ProfileError
from attnopt.ir import DENSE, Choice, Share, Site
from attnopt.plan import OBJECTIVES, Predicted
from attnopt.planner.extrapolate import carried_on
from attnopt.planner.interaction import correlations
from attnopt.planner.knapsack import GONE, Array, Choices, Problem, Solution, code_of, times_faster
from attnopt.planner.steps import key_bytes, read_of, step_share
from attnopt.planner.tried import FAMILIES, damage_of, forgotten_of, shares_at, tried_at
from attnopt.registry import CANDIDATES
from attnopt.strict_json import nearest
from attnopt.units import MIB

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile
    from attnopt.statistics import Observation

# What a nat per answer of the probe counts, in nats per token of text: docs/planner.md has what others keep.
RETRIEVAL = 0.05
Tables = Costs | Mapping[str, Costs]


def table_of(tables: Tables, site: Site) -> Costs:
    return tables[site.name] if isinstance(tables, Mapping) else tables


def make_problem(
    profile: Profile, tables: Tables, sites: Sequence[Site], target_length: int,
    lengths: Sequence[int] | None = None, objective: str = "prefill", retrieval: float = RETRIEVAL,
    fitted: Fitted | None = None, allow: Sequence[str] = FAMILIES, own: Mapping[str, Sequence[Choice]] | None = None,
    visits: Mapping[str, Mapping[int, Share]] | None = None,
) -> Problem:  # fmt: skip
    """The knapsack of a profile. `tables`: one cost table, or one per site name.

    A head's damage is the largest over the profiled `lengths` (default: all) and the planned one, if that is longer
    (attnopt/planner/extrapolate.py): the sum over heads then bounds the predicted damage of the plan at every one of
    them, and no length is bought at another's expense. retrieval: how much a nat per answer of the probe counts, in
    nats per token of text, where the profile holds one. fitted: what was tried besides spans, of which the families of
    `allow` are weighed; without it spans alone are. own: the choices that heads have in a plan, by site name: among
    the problem's, whether or not they are weighed, and allowed to their heads as far as the profile tells their damage.
    visits: what heads of that plan visit whose keys are selected, by site and head, for where `fitted` does not tell.
    """
    if objective not in OBJECTIVES:
        raise OptionError(f"{objective!r} is no objective.", nearest(objective, OBJECTIVES, "Use one of"))
    lengths = list(lengths or profile.lengths)
    wanted = [*lengths, target_length]
    grid = profile.header.grid
    candidates = [item for _, item in CANDIDATES]
    own_windows = {s.mask.window for s in sites}
    spaces = {own: [c for k in candidates for c in k.space(grid, wanted, own)] for own in own_windows}
    tried = {s.name: weighed_at(fitted, s, allow, target_length, objective) for s in sites}
    choices = (DENSE, *dict.fromkeys(c for s in sites for c in spaces[s.mask.window] if c != DENSE))
    choices = (*choices, *dict.fromkeys(c for found in tried.values() for c in found if c not in choices))
    held = {s.name: (own or {}).get(s.name, ()) for s in sites}
    choices = (*choices, *dict.fromkeys(c for heads in held.values() for c in heads if c not in choices))
    damage, forgotten = [], []
    cost: list[Array] = []
    span: list[Array] = []
    state: list[Array] = []
    reads: list[Array] = []
    own_keys: list[Array] = []
    for site in sites:
        seen, allowed = observed(profile, site, lengths), {*spaces[site.mask.window], *tried[site.name]}
        of_text = _damage(site, choices, allowed - {*tried[site.name]}, up_to(seen, target_length))
        for choice in tried[site.name]:
            of_text[:, choices.index(choice)] = damage_of(fitted, site, choice, seen, target_length)
        _own_damage(of_text, site, choices, held[site.name], up_to(seen, target_length))
        damage.append(of_text)
        lost = _forgotten(site, choices, allowed, tried[site.name], seen, fitted, target_length) if retrieval else 0.0
        forgotten.append(np.where(np.isfinite(of_text), retrieval * lost, 0.0))
        of_site = _costs(
            table_of(tables, site), site, choices, target_length, fitted, (visits or {}).get(site.name, {})
        )
        for of_kind, values in zip((cost, span, state, reads, own_keys), of_site, strict=True):
            of_kind.append(values)
    sharing = [s.heads // s.kv_heads for s in sites for _ in range(s.kv_heads)]
    problem = Problem(
        heads=tuple((s.name, h) for s in sites for h in range(s.heads)),
        choices=choices,
        damage=np.concatenate(damage) + np.concatenate(forgotten),
        cost=np.concatenate(cost),
        span=np.concatenate(span),
        site=np.repeat(np.arange(len(sites)), [s.heads for s in sites]),
        group_cost=np.array([table_of(tables, s).group_cost(target_length) for s in sites]),
        kind=kind_of(tables),
        unit="million kept pairs" if kind_of(tables) == "density" else "ms",
        length=target_length,
        kv=np.repeat(np.arange(len(sharing)), sharing),
        key_cost=np.zeros(len(sharing)),
        key_bytes=np.concatenate([np.full(s.kv_heads, key_bytes(s)) for s in sites]),
        correlate=cache(partial(correlations, profile, [s.name for s in sites], lengths)),
        retrieval=np.concatenate(forgotten),
        **(_beside_spans(choices, *map(np.concatenate, (span, state, reads, own_keys))) if any(tried.values()) else {}),
    )
    return weighed(problem, objective, tables, sites, np.concatenate(own_keys))


def weighed_at(
    fitted: Fitted | None, site: Site, allow: Sequence[str], length: int, objective: str
) -> list[Choice]:  # fmt: skip
    """What was tried at a site and may be worth something by an objective: what differs in decoding alone is not, where
    decoding does not count, and keeps the whole cache."""
    decoding = objective in ("decode", "mixed")
    return [c for c in tried_at(fitted, site, allow, length) if decoding or not CANDIDATES[c.candidate].decoded]


def left_dense(sites: Sequence[Site], allow: Sequence[str] = ()) -> tuple[str, ...]:
    """Of the sites where no candidate but dense can stand, why; one line for all that share a reason. allow: families
    weighed besides spans.

    ModelError where that is every site."""
    found: dict[str, list[str]] = {}
    for site in sites:
        others = [c for name, c in CANDIDATES if name != DENSE.candidate and c.family in ("", *allow)]
        refused = [candidate.refuse(site) for candidate in others]
        reasons = dict.fromkeys(no.reason for no in refused if no is not None)
        if all(no is not None for no in refused):
            found.setdefault("; ".join(reasons), []).append(site.name)
    if sum(map(len, found.values())) == len(sites):
        raise ModelError(
            f"No head of this model can be replaced: at {sites[0].name}, {next(iter(found))}.",
            "`attnopt profile` shows its heads; there is nothing to plan.",
        )
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: every head stays dense, at the cost of "
        f"plain dense attention: {reason}."
        for reason, names in found.items()
    )


def kept_dense(problem: Problem, protect: Mapping[str, Sequence[int]]) -> Problem:
    """The problem with nothing but dense for the heads of `protect`, by site name."""
    return closed(problem, protect, problem.choices[1:])


def closed(problem: Problem, heads: Mapping[str, Sequence[int]], choices: Sequence[Choice]) -> Problem:
    """The problem without some choices for `heads`, by site name."""
    damage, columns = problem.damage.copy(), [c for c, choice in enumerate(problem.choices) if choice in choices]
    rows = [h for h, (site, head) in enumerate(problem.heads) if head in heads.get(site, ())]
    damage[np.ix_(rows, columns)] = np.inf
    return replace(problem, damage=damage)


def _damage(site: Site, choices: Sequence[Choice], allowed: set[Choice], seen: Sequence[Observation]) -> Array:
    """Nats per token of every choice, (heads, C): the largest over `seen`; inf where a choice is not allowed."""
    damage = np.full((site.heads, len(choices)), np.inf)
    of_kind: dict[str, list[int]] = {}
    for c, choice in enumerate(choices):
        if choice in allowed:
            of_kind.setdefault(choice.candidate, []).append(c)
    for name, columns in of_kind.items():
        if CANDIDATES[name].refuse(site) is not None:
            continue
        damage[:, columns] = 0.0
        for observation in seen:
            some = [choices[c] for c in columns]
            found = (
                CANDIDATES[name].damages(observation, some, observation.length, site.mask.window) / observation.tokens
            )
            damage[:, columns] = np.maximum(damage[:, columns], found.numpy())
    return damage


def _forgotten(
    site: Site, choices: Sequence[Choice], allowed: set[Choice], tried: Sequence[Choice], seen: Sequence[Observation],
    fitted: Fitted | None, target: int,
) -> Array | float:  # fmt: skip
    """Nats per answer of the probe of every choice, (heads, C): as tried, or as of the span alone; 0 without one."""
    asked = [probed for o in seen if (probed := o.of_probe) is not None]
    if not asked:
        return 0.0
    lost = _damage(site, choices, allowed, up_to(asked, target))
    for choice in tried:
        if (own := forgotten_of(fitted, site, choice, seen, target)) is not None:
            lost[:, choices.index(choice)] = own
    return lost


def _own_damage(
    damage: Array, site: Site, choices: Sequence[Choice], own: Sequence[Choice], seen: Sequence[Observation]
) -> None:  # fmt: skip
    """Fill in `damage` (heads, C) where a head's own choice is a span that is not weighed at the site."""
    known = {c for c in own if CANDIDATES[c.candidate].far == "" and not np.isfinite(damage[:, choices.index(c)]).any()}
    found = _damage(site, choices, known, seen) if known else damage
    for head, choice in enumerate(own):
        if choice in known:
            damage[head, choices.index(choice)] = found[head, choices.index(choice)]


def observed(profile: Profile, site: Site, lengths: Sequence[int]) -> list[Observation]:
    """The site's observations at the profiled `lengths`."""
    found = []
    for length in lengths:
        seen = profile.observations.get((site.name, length))
        if seen is None or seen.heads != site.heads or not seen.rows:
            raise ProfileError(
                f"The profile holds nothing of {site.name} ({site.heads} heads) at length {length}.",
                f"Profile this model at length {length}, or plan from lengths {list(profile.lengths)}.",
            )
        found.append(seen)
    return found


def up_to(seen: Sequence[Observation], target: int) -> list[Observation]:
    """Observations of one site, and the longest carried on to `target` where that is longer."""
    longest = max(seen, key=lambda o: o.length)
    return [*seen, carried_on(longest, target)] if target > longest.length else list(seen)


def _costs(
    table: Costs, site: Site, choices: Sequence[Choice], length: int, fitted: Fitted | None,
    visits: Mapping[int, Share],
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Cost, span code, state bytes, and what decoding reads, the code of what KV heads share and the keys of a head's
    own, of every choice, each (heads, C): heads differ where they select keys."""
    shape = site.heads, len(choices)
    cost, state, own_keys = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    span, reads = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for c, choice in enumerate(choices):
        candidate, params, own = CANDIDATES[choice.candidate], dict(choice.params), site.mask.window
        found = shares_at(fitted, site.name, choice, length, site.heads)
        shares = [visits.get(head) if share is None else share for head, share in enumerate(found)]
        if candidate.far != "selected" or candidate.refuse(site) is None:
            of_share = {share: candidate.cost(table, params, length, own, share) for share in set(shares)}
            cost[:, c] = [of_share[share] for share in shares]
        sink, window = candidate.span(params, length, own)
        span[:, c] = code_of(sink, window, length)
        for head, share in enumerate(shares):
            reads[head, c], own_keys[head, c] = read_of(table, site, choice, length, share)
        state[:, c] = candidate.state_bytes(params, site, length)
    return cost, span, state, reads, own_keys


def _beside_spans(
    choices: Sequence[Choice], span: Array, state: Array, reads: Array, own_keys: Array
) -> dict[str, Array]:  # fmt: skip
    """What a Problem holds where choices are more than spans: two of one span are apart where their far parts are, or
    what selects their keys."""
    kinds = [(CANDIDATES[c.candidate], dict(c.params)) for c in choices]
    parts = [(kind.method(params), 0) if kind.far == "selected" else kind.far_part(params) for kind, params in kinds]
    number = {part: n for n, part in enumerate(dict.fromkeys(parts))}
    each = np.stack([span.ravel(), reads.ravel(), np.ceil(own_keys).astype(np.int64).ravel()])
    of_span = np.unique(each, axis=1, return_inverse=True)[1].reshape(span.shape)
    group = of_span * len(number) + np.array([number[part] for part in parts])
    found = {"group": np.where([kind.far == "gone" for kind, _ in kinds], GONE, group), "state": state}
    return found | ({"reads": reads} if any(kind.decoded for kind, _ in kinds) else {})


def kind_of(tables: Tables) -> str:
    """Where costs come from; the least certain of several."""
    kinds = {t.kind for t in (tables.values() if isinstance(tables, Mapping) else [tables])}
    return next(kind for kind in ("density", "roofline", "measured") if kind in kinds)


def weighed(problem: Problem, objective: str, tables: Tables, sites: Sequence[Site], own_keys: Array) -> Problem:
    """The problem with the costs of an objective, from one with those of prefill. own_keys (H, C): that a step of
    decoding reads of a head by itself."""
    if objective == "prefill":
        return problem
    per_kv = [table_of(tables, s).key_time for s in sites for _ in range(s.kv_heads)]
    times = np.array([t for t in per_kv if t is not None])
    timed = objective != "memory" and len(times) == len(per_kv)
    keys = times if timed else problem.key_bytes / MIB
    # A state costs as many bytes of keys do; decoding reads and writes it, every token, unless it is there to select.
    passes = np.array([0 if CANDIDATES[c.candidate].decoded else 2 for c in problem.choices])
    passes = np.ones_like(passes) if objective == "memory" else passes
    states = passes * problem.states * (keys / problem.key_bytes)[problem.kv][:, None]
    states += 0 if objective == "memory" else own_keys * keys[problem.kv][:, None]
    if objective != "mixed":
        unit = "ms a token" if timed else "MiB read a token" if objective == "decode" else "MiB of cache"
        return replace(
            problem, cost=states, group_cost=np.zeros_like(problem.group_cost), key_cost=keys,
            kind=problem.kind if timed else "bytes", unit=unit,
        )  # fmt: skip
    dense = 2 * problem.dense.cost
    dense_keys = 2 * float((keys * problem.kept(np.zeros(len(problem.heads), dtype=np.int64))).sum())
    dense_keys += 2 * float(states[:, 0].sum())
    return replace(
        problem, cost=problem.cost / dense + states / dense_keys, group_cost=problem.group_cost / dense,
        key_cost=keys / dense_keys,
        kind=problem.kind if timed else f"{problem.kind} and bytes", unit="share of dense",
    )  # fmt: skip


def predicted_of(problem: Problem, solution: Solution, gap: float | None = None) -> Predicted:
    """What the plan file says was expected. gap: see `exact.Compared`, None where nothing was compared."""
    dense = problem.dense
    return Predicted(
        problem.expected(solution),
        problem.kind,
        problem.unit,
        dense.cost,
        solution.cost,
        times_faster(dense.cost, solution.cost),
        solution.memory / dense.memory if dense.memory else 1.0,
        gap,
    )


def min_length_of(
    choices: Choices, sites: Sequence[Site], tables: Tables, fitted: Fitted | None = None, objective: str = "prefill"
) -> int:  # fmt: skip
    """The measured length from which on these choices are cheaper than dense, MARGIN included; under it dense runs.
    One more than the longest measured length if they never are; 0 where nothing was measured of what the objective
    weighs."""
    of = {s.name: table_of(tables, s) for s in sites}
    if not all(t.kind == "measured" for t in of.values()):
        return 0
    stepped = objective in ("decode", "mixed") and all(t.key_time is not None for t in of.values())
    if not stepped and objective not in ("prefill", "mixed"):
        return 0
    lengths = sorted(set.intersection(*(set(t.lengths) for t in of.values())))
    if not lengths:
        return 0
    found = lengths[-1] + 1
    for length in reversed(lengths):
        shares = [prefill_share(choices, sites, of, length, fitted)] if objective != "decode" else []
        shares += [step_share(choices, sites, of, length, fitted)] if stepped else []
        if sum(shares) >= (1 - MARGIN) * len(shares):
            break
        found = length
    return found


def prefill_share(
    choices: Choices, sites: Sequence[Site], tables: Mapping[str, Costs], length: int, fitted: Fitted | None
) -> float:  # fmt: skip
    """What a prefill with these choices costs of a dense one."""
    planned = dense = 0.0
    for site in sites:
        table, own = tables[site.name], site.mask.window
        planned += planned_cost(table, length, choices[site.name], own, site.name, fitted)
        dense += layer_cost(table, length, [CANDIDATES["dense"].span({}, length, own)] * site.heads)
    return planned / dense


def planned_cost(
    table: Costs, length: int, choices: Sequence[Choice], own: int | None, site: str = "", fitted: Fitted | None = None
) -> float:
    """One layer's cost with these choices, in the table's unit. fitted: what heads that select keys visited."""
    spans, methods, beside = [], set(), 0.0
    for head, choice in enumerate(choices):
        kind, params = CANDIDATES[choice.candidate], dict(choice.params)
        if kind.far == "selected":
            share = shares_at(fitted, site, choice, length, len(choices))[head]
            beside += kind.cost(table, params, length, own, share)
            methods.add(kind.method(params))
        elif kind.far != "gone":
            spans.append(kind.span(params, length, own))
            beside += table.far_cost(length, *kind.far_part(params)) if kind.far else 0.0
    near = layer_cost(table, length, spans) if spans else 0.0
    further = max(len(methods) - (not spans), 0)
    return near + beside + table.group_cost(length) * further
