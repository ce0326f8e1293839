"""The problem that a plan was the answer to, posed once more from the plan and its profile.

    posed = pose(plan, profile)                      # sites as far as the plan and the stored cost tables tell them
    posed = pose(plan, profile, sites, tables=...)   # the sites of the model, and costs at hand

What a plan does not hold, the sizes of heads and what kernels cost, is taken from the model's sites, from the cost
tables that are stored on this machine under the plan's ids, or assumed; `Posed.notes` says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from attnopt import settings
from attnopt.cost import BlockTable, Costs, CostTable, FarTable, Joined, Roofline, StepTable, devices
from attnopt.errors import AttnoptError, OptionError, PlanError
from attnopt.fingerprint import mismatch
from attnopt.ir import Mask, Site
from attnopt.plan import Constraints, Plan
from attnopt.planner.constraints import limits_of, protected
from attnopt.planner.frontier import Front, front
from attnopt.planner.knapsack import Limits, Problem, Solution
from attnopt.planner.problem import RETRIEVAL, Tables, closed, kept_dense, make_problem
from attnopt.planner.reuse import settled, within_memory
from attnopt.planner.tried import not_pruned
from attnopt.planner.verify import TYPICAL_LOSS
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile

T = TypeVar("T", CostTable, FarTable, BlockTable, StepTable)
UNKNOWN_DIM = 64
# By what names of files begin with; any other is a table of spans.
KINDS: dict[str, type[FarTable] | type[BlockTable] | type[StepTable]] = {
    "far": FarTable, "blocks": BlockTable, "steps": StepTable,
}  # fmt: skip
Stored = CostTable | FarTable | BlockTable | StepTable


@dataclass(frozen=True, eq=False)
class Posed:
    """free: every head may be replaced; problem: without what was asked to stay; solution: the plan's own choices, of
    infinite damage where that is in a file of fits which was not given. sites: those of the model where `known`, else
    as far as they could be told; own_costs: whether costs are those that the plan was made with; tables: these costs.
    notes: what was assumed."""

    free: Problem
    problem: Problem
    limits: Limits
    solution: Solution
    sites: tuple[Site, ...]
    known: bool
    own_costs: bool
    tables: Tables
    notes: tuple[str, ...] = ()

    @cached_property
    def front(self) -> Front:
        return front(self.problem, self.limits)

    @property
    def price(self) -> float | None:
        """Nats per token for a unit of cost on the front, where the plan's cost lies; None on a front of one point."""
        cost, damage = self.front.cost, self.front.damage
        if len(cost) < 2:
            return None
        k = int(np.clip(np.searchsorted(-cost, -self.solution.cost * (1 + 1e-12)), 1, len(cost) - 1))
        return float((damage[k] - damage[k - 1]) / (cost[k - 1] - cost[k]))


def pose(
    plan: Plan, profile: Profile, sites: Sequence[Site] | None = None, fitted: Fitted | None = None,
    tables: Mapping[str, Costs] | None = None,
) -> Posed:  # fmt: skip
    """PlanError if the profile is not of the plan's model, or holds nothing of one of its sites."""
    different = mismatch(plan.fingerprint, profile.header.fingerprint)
    if different:
        raise PlanError(f"The profile is of another model than the plan: {different}.", "Give the plan's own profile.")
    missing = [name for name in plan.choices if name not in profile.sites]
    if missing:
        raise PlanError(f"The profile holds nothing of {missing[0]}.", "Give the profile the plan was made from.")
    stored = {} if tables is not None else stored_tables(plan.cost_table.split("+"))
    known = sites is not None
    dtype = next(iter(profile.header.dtypes), "float32")
    found = tuple(sites) if sites is not None else tuple(_site(plan, name, dtype, stored) for name in plan.choices)
    costs, own_costs = (tables, True) if tables is not None else _costs(plan, found, known, stored)
    notes = [] if own_costs else [_other_costs(plan)]
    if not known:
        sizes = "as the stored cost table has them" if stored else "taken as one KV head a head"
        notes.append(f"Sites are taken as plain causal attention, KV heads {sizes}; --model MODEL tells.")
    asked = plan.constraints if own_costs else replace(plan.constraints, min_speedup=None)
    weight = RETRIEVAL if asked.retrieval is None else asked.retrieval
    free = make_problem(
        profile, costs, found, plan.lengths.planned, objective=plan.objective, retrieval=weight, fitted=fitted,
        allow=asked.allow, own=plan.choices, visits=plan.visits,
    )  # fmt: skip
    problem, limits = _kept(free, found, asked, profile, plan.objective)
    dense_loss = next((at.dense_loss for at in plan.measured), TYPICAL_LOSS)
    problem = settled(within_memory(problem, limits), plan.budget.nats(dense_loss))
    if not len(front(problem, limits)):
        notes.append("The limits that the plan was asked for cannot be met at these costs; the front is without them.")
        limits = Limits(spans=limits.spans)
    index = np.array([free.choices.index(c) for s in found for c in plan.choices[s.name]], dtype=np.int64)
    if not np.isfinite(free.damage[np.arange(len(index)), index]).all():
        notes.append("What some of its choices lose stands in the file of fits: give --fitted.")
    return Posed(free, problem, limits, free.of(index), found, known, own_costs, costs, tuple(notes))


def _kept(
    free: Problem, sites: Sequence[Site], asked: Constraints, profile: Profile, objective: str
) -> tuple[Problem, Limits]:  # fmt: skip
    """As `make_plan` poses it, but for heads that no projection lets go of, which only the model tells."""
    problem = free
    if "prune" in asked.allow:
        kept = {site: list(heads) for site, heads in not_pruned(profile, [s.name for s in sites]).items()}
        problem = closed(problem, kept, [c for c in free.choices if CANDIDATES[c.candidate].far == "gone"])
    problem = kept_dense(problem, protected(sites, asked, profile))
    limits = limits_of(problem, asked, objective)
    return problem, limits


def _other_costs(plan: Plan) -> str:
    return (
        f"Costs are pairs of query and key here: the plan's own, {plan.predicted.cost} in {plan.predicted.unit} "
        f"({plan.cost_table or 'no table named'}), are not stored on this machine."
    )


def stored_tables(ids: Sequence[str]) -> dict[str, Stored]:
    """Those of the cost tables in ATTNOPT_CACHE that have one of these ids; damaged ones are passed over."""
    found: dict[str, Stored] = {}
    folder = settings.cache_dir() / "costs"
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            table = KINDS.get(path.name.partition("_")[0], CostTable).load(path)
        except AttnoptError:
            continue
        if table.id in ids:
            found[table.id] = table
    return found


def _of_heads(stored: Mapping[str, Stored], heads: int, kind: type[T]) -> T | None:
    """The one table of sites with so many heads; None where there is none, or two."""
    tables = [t for t in stored.values() if isinstance(t, kind) and dict(t.key).get("heads") == str(heads)]
    return tables[0] if len(tables) == 1 else None


def told_sites(plan: Plan) -> tuple[Site, ...] | None:
    """The plan's sites, their sizes from the cost tables it was made with; None where those are not stored here."""
    stored = stored_tables(plan.cost_table.split("+"))
    if any(_of_heads(stored, len(heads), CostTable) is None for heads in plan.choices.values()):
        return None
    return tuple(_site(plan, name, "float32", stored) for name in plan.choices)


def _site(plan: Plan, name: str, dtype: str, stored: Mapping[str, Stored]) -> Site:
    """What can be told of a site without its model."""
    heads = len(plan.choices[name])
    table = _of_heads(stored, heads, CostTable)
    key = dict(table.key) if table is not None else {}
    kv_heads, dim = int(key.get("kv_heads", heads)), int(key.get("head_dim", UNKNOWN_DIM))
    dtype = key.get("dtype", dtype)
    path, _, ordinal = name.rpartition("#") if re.search(r"#\d+$", name) else (name, "", "0")
    return Site(path, int(ordinal), "", heads, kv_heads, dim, dim, 1.0, dtype, Mask(causal=True))


def _costs(
    plan: Plan, sites: Sequence[Site], known: bool, stored: Mapping[str, Stored]
) -> tuple[Mapping[str, Costs] | Costs, bool]:  # fmt: skip
    """The plan's own costs, or pairs counted; and whether they are its own."""
    by_density = CostTable.by_density()
    if plan.cost_table == by_density.id:
        return by_density, True
    named = re.fullmatch(r"roofline-(.+)-tp(\d+)-[0-9a-f]+", plan.cost_table.split("+")[0])
    if named and known and named[1] in devices():
        device, parallel = devices()[named[1]], int(named[2])
        try:
            peaks: dict[str, Costs] = {
                s.name: Roofline(device, s.dtype, s.heads, s.kv_heads, s.head_dim, s.head_dim_v, parallel)
                for s in sites
            }
        except OptionError:
            peaks = {}
        if peaks and {t.id for t in peaks.values()} == set(plan.cost_table.split("+")):
            return peaks, True
    found: dict[str, Costs] = {}
    for site in sites:
        table, far = _of_heads(stored, site.heads, CostTable), _of_heads(stored, site.heads, FarTable)
        blocks, steps = _of_heads(stored, site.heads, BlockTable), _of_heads(stored, site.heads, StepTable)
        if table is None:
            return by_density, False
        parts = far, blocks, steps
        found[site.name] = Joined(table, *parts) if any(part is not None for part in parts) else table
    # Every table that the plan names takes part, or times of far parts would be missing.
    used = {part for t in found.values() for part in t.id.split("+")}
    return (found, True) if used == set(plan.cost_table.split("+")) else (by_density, False)
