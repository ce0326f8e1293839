"""From a profile and measured costs to a knapsack, and from its solution to what a plan file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnopt.cost import MARGIN, CostTable, layer_cost
from attnopt.errors import ProfileError
from attnopt.ir import DENSE, Choice, Site
from attnopt.plan import Predicted
from attnopt.planner.knapsack import Array, Choices, Problem, Solution
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.profile_file import Profile


def make_problem(
    profile: Profile, tables: CostTable | Mapping[str, CostTable], sites: Sequence[Site], target_length: int,
    lengths: Sequence[int] | None = None, protect: Mapping[str, Sequence[int]] | None = None,
) -> Problem:  # fmt: skip
    """The knapsack of a profile. `tables`: one cost table, or one per site name; `protect`: heads to leave dense.

    A head's damage is the largest over the profiled `lengths` (default: all): the sum over heads then bounds the
    predicted damage of the plan at every one of them, and no length is bought at another's expense.
    """
    lengths = list(lengths or profile.lengths)
    wanted = [*lengths, target_length]
    grid = profile.header.grid
    candidates = [item for _, item in CANDIDATES]
    spaces = {s.name: [c for k in candidates for c in k.space(grid, wanted, s.mask.window)] for s in sites}
    choices = (DENSE, *dict.fromkeys(c for space in spaces.values() for c in space if c != DENSE))
    blocks: list[tuple[Array, Array, Array]] = []
    for site in sites:
        table = tables if isinstance(tables, CostTable) else tables[site.name]
        allowed = set(spaces[site.name])
        blocks.append(_block(profile, table, site, choices, allowed, lengths, target_length))
        for head in (protect or {}).get(site.name, ()):
            blocks[-1][0][head, 1:] = np.inf
    groups = [(tables if isinstance(tables, CostTable) else tables[s.name]).group_cost(target_length) for s in sites]
    return Problem(
        heads=tuple((s.name, h) for s in sites for h in range(s.heads)),
        choices=choices,
        damage=np.concatenate([b[0] for b in blocks]),
        cost=np.concatenate([b[1] for b in blocks]),
        span=np.concatenate([b[2] for b in blocks]),
        site=np.repeat(np.arange(len(sites)), [s.heads for s in sites]),
        group_cost=np.array(groups),
        measured=all(t.measured for t in ([tables] if isinstance(tables, CostTable) else tables.values())),
    )


def _block(
    profile: Profile, table: CostTable, site: Site, choices: Sequence[Choice], allowed: set[Choice],
    lengths: Sequence[int], target_length: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Damage, cost and span code of one site, each (heads, C)."""
    shape = (site.heads, len(choices))
    damage, cost, span = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape, dtype=np.int64)
    own = site.mask.window
    for c, choice in enumerate(choices):
        candidate, params = CANDIDATES[choice.candidate], dict(choice.params)
        sink, window = candidate.span(params, target_length, own)
        cost[:, c] = candidate.cost(table, params, target_length, own)
        span[:, c] = (0 if window >= target_length else sink) << 32 | window
        if choice not in allowed or candidate.refuse(site) is not None:
            continue
        damage[:, c] = 0.0
        for length in lengths:
            observation = profile.observations.get((site.name, length))
            if observation is None or observation.heads != site.heads or not observation.rows:
                raise ProfileError(
                    f"The profile holds nothing of {site.name} ({site.heads} heads) at length {length}.",
                    f"Profile this model at length {length}, or plan from lengths {list(profile.lengths)}.",
                )
            found = candidate.damage(observation, params, length, own) / observation.tokens
            damage[:, c] = np.maximum(damage[:, c], found.numpy())
    return damage, cost, span


def predicted_of(problem: Problem, solution: Solution) -> Predicted:
    """What the plan file says was expected."""
    dense = problem.dense.cost
    return Predicted(
        solution.damage, "measured" if problem.measured else "density", dense, solution.cost, dense / solution.cost
    )


def min_length_of(choices: Choices, sites: Sequence[Site], tables: CostTable | Mapping[str, CostTable]) -> int:
    """The measured length from which on these choices are cheaper than dense, MARGIN included; under it dense runs.
    One more than the longest measured length if they never are; 0 where nothing was measured."""
    of = {s.name: tables if isinstance(tables, CostTable) else tables[s.name] for s in sites}
    if not all(t.measured for t in of.values()):
        return 0
    lengths = sorted(set.intersection(*(set(t.lengths) for t in of.values())))
    if not lengths:
        return 0
    found = lengths[-1] + 1
    for length in reversed(lengths):
        planned = dense = 0.0
        for site in sites:
            table, own = of[site.name], site.mask.window
            spans = [CANDIDATES[c.candidate].span(dict(c.params), length, own) for c in choices[site.name]]
            planned += layer_cost(table, length, spans)
            dense += layer_cost(table, length, [CANDIDATES["dense"].span({}, length, own)] * site.heads)
        if planned >= (1 - MARGIN) * dense:
            break
        found = length
    return found
