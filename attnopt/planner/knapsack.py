"""The planner's knapsack: one replacement per head, least predicted damage for a cost or least cost for a damage.

Damage is separable over heads (to second order, see attnopt/statistics) and so is cost, but for a fixed cost per
distinct span of a layer: a multiple-choice knapsack. `front` holds every Lagrangian optimum in milliseconds; `solve`
is exact (HiGHS), the spans of a layer included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from attnopt.errors import BudgetError, DependencyError
from attnopt.ir import Choice

Array = np.ndarray[Any, Any]
Choices = dict[str, tuple[Choice, ...]]


@dataclass(frozen=True)
class Problem:
    """H heads (all sites in order), C choices; ``choices[0]`` is dense.

    damage (H, C): predicted nats per token, inf where a choice is not allowed; cost (H, C): ms, or million kept pairs,
    at the planned length; span (H, C): a code, equal where two choices of one site are one span at that length;
    site (H,): index of the head's site; group_cost (sites,): cost of every distinct span of a site after the first.
    """

    heads: tuple[tuple[str, int], ...]
    choices: tuple[Choice, ...]
    damage: Array
    cost: Array
    span: Array
    site: Array
    group_cost: Array
    measured: bool = True

    def of(self, index: Array) -> Solution:
        """The solution that gives head h the choice ``index[h]``."""
        rows = np.arange(len(index))
        return Solution(index, float(self.damage[rows, index].sum()), self._cost(index))

    def _cost(self, index: Array) -> float:
        rows = np.arange(len(index))
        pairs = np.unique(np.stack([self.site, self.span[rows, index]]), axis=1)
        groups = np.bincount(pairs[0], minlength=len(self.group_cost)) - 1
        return float(self.cost[rows, index].sum() + (self.group_cost * groups).sum())

    @property
    def dense(self) -> Solution:
        return self.of(np.zeros(len(self.heads), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Solution:
    """``index`` (H,): each head's choice; the sums of damage (nats per token) and cost, fixed costs included."""

    index: Array
    damage: float
    cost: float


def choices_from(problem: Problem, solution: Solution) -> Choices:
    """Site name -> one Choice per query head, as a Plan holds them."""
    found: dict[str, list[Choice]] = {}
    for (name, _), choice in zip(problem.heads, solution.index, strict=True):
        found.setdefault(name, []).append(problem.choices[choice])
    return {name: tuple(choices) for name, choices in found.items()}


@dataclass(frozen=True, eq=False)
class Front:
    """Every point that is best for some price of a millisecond, from the least damage (0) to the least cost.

    Point k is `start` after the first k moves; each move gives one head its next choice. damage, cost (K + 1,): of
    point k, without the fixed cost of spans; damage never falls and cost never rises along it.
    """

    problem: Problem
    start: Array
    moves: Array
    damage: Array
    cost: Array

    def __len__(self) -> int:
        return len(self.damage)

    def point(self, k: int) -> Solution:
        index = self.start.copy()
        for head, choice in self.moves[:k]:
            index[head] = choice
        return self.problem.of(index)

    def within(self, damage: float) -> int:
        """The last point whose damage is at most `damage`."""
        return max(int(np.searchsorted(self.damage, damage, side="right")) - 1, 0)


def front(problem: Problem) -> Front:
    """Lower convex hull of (cost, damage) per head; the hulls' edges of all heads, merged by slope, are the front."""
    start = np.zeros(len(problem.heads), dtype=np.int64)
    edges: list[tuple[float, int, int, float, float]] = []
    for head, (damage, cost) in enumerate(zip(problem.damage, problem.cost, strict=True)):
        hull = _hull(damage, cost)
        start[head] = hull[0]
        slope = 0.0
        for a, b in pairwise(hull):
            more, saved = float(damage[b] - damage[a]), float(cost[a] - cost[b])
            slope = max(slope, more / saved)  # rising but for rounding, which must not swap two edges
            edges.append((slope, head, b, more, saved))
    edges.sort(key=lambda edge: edge[0])  # stable: the edges of one head stay in order
    rows = np.arange(len(start))
    steps = np.array([edge[3:] for edge in edges]).reshape(-1, 2)
    damage = problem.damage[rows, start].sum() + np.concatenate([[0.0], np.cumsum(steps[:, 0])])
    cost = problem.cost[rows, start].sum() - np.concatenate([[0.0], np.cumsum(steps[:, 1])])
    moves = np.array([edge[1:3] for edge in edges], dtype=np.int64).reshape(-1, 2)
    return Front(problem, start, moves, damage, cost)


def _hull(damage: Array, cost: Array) -> list[int]:
    """Choices on one head's lower hull, from the least damage to the least cost; slopes rise along it."""
    hull: list[int] = []
    for c in np.lexsort((cost, damage)):
        if not np.isfinite(damage[c]) or (hull and cost[c] >= cost[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (damage[b] - damage[a]) * (cost[b] - cost[c]) < (damage[c] - damage[b]) * (cost[a] - cost[b]):
                break
            hull.pop()
        hull.append(int(c))
    return hull


def settle(problem: Problem, solution: Solution, max_spans: int | None = None) -> Solution:
    """Merge spans of a site where a group's fixed cost exceeds what it saves, and until `max_spans` are left.

    A group of heads joins another span of its site (or dense) only if that damages none of them more.
    """
    index = solution.index.copy()
    for site, group_cost in enumerate(problem.group_cost):
        heads = np.flatnonzero(problem.site == site)
        while True:
            groups: dict[int, Array] = {
                int(code): heads[problem.span[heads, index[heads]] == code]
                for code in np.unique(problem.span[heads, index[heads]])
            }
            dense = int(problem.span[heads[0], 0])
            merges = [
                (change, source, to, into)
                for source, moved in groups.items()
                for into in {*groups, dense} - {source}
                if (to := _joined(problem, index, moved, into)) is not None
                for change in [_change(problem, index, moved, to, float(group_cost) if into in groups else 0.0)]
            ]
            best = min(merges, key=lambda m: (m[0], m[1], m[3]), default=None)
            over = max_spans is not None and len(groups) > max_spans
            if best is None or (best[0] >= 0 and not over):
                break
            if over and best[3] not in groups and best[0] >= 0:
                # Dense as a new span frees nothing by itself: prefer joining one that is there.
                best = min((m for m in merges if m[3] in groups), key=lambda m: (m[0], m[1], m[3]), default=best)
            index[groups[best[1]]] = best[2]
    return problem.of(index)


def _joined(problem: Problem, index: Array, heads: Array, code: int) -> Array | None:
    """The least damaging choice of span `code` for each of `heads`; None if one would be damaged more than now."""
    open_to = np.where(problem.span[heads] == code, problem.damage[heads], np.inf)
    to = open_to.argmin(1)
    rows = np.arange(len(heads))
    return to if (open_to[rows, to] <= problem.damage[heads, index[heads]]).all() else None


def _change(problem: Problem, index: Array, heads: Array, to: Array, freed: float) -> float:
    return float((problem.cost[heads, to] - problem.cost[heads, index[heads]]).sum()) - freed


def solve(
    problem: Problem, *, max_damage: float | None = None, max_cost: float | None = None, max_spans: int | None = None,
    seconds: float = 10.0, gap: float = 1e-4,
) -> Solution:  # fmt: skip
    """Least cost within `max_damage`, or least damage within `max_cost`: HiGHS, or the front's point if it finds no
    better one in `seconds`. `max_spans`: most distinct spans of one site. BudgetError if nothing is so cheap."""
    if (max_damage is None) == (max_cost is None):
        raise ValueError("give either max_damage or max_cost")
    if max_damage is not None and max_damage < 0:
        raise ValueError(f"max_damage is {max_damage}; no plan is better than dense by prediction")
    both = (
        _from_front(problem, max_damage, max_cost, max_spans),
        _exact(problem, max_damage, max_cost, max_spans, seconds, gap),
    )
    found = [solution for solution in both if solution is not None]
    if not found:
        least = front(problem).cost[-1]
        raise BudgetError(
            f"No plan costs at most {max_cost:g}; the cheapest costs about {least:g}.",
            "Allow more, or profile narrower windows.",
        )
    return min(found, key=lambda s: s.cost if max_damage is not None else s.damage)


def _from_front(
    problem: Problem, max_damage: float | None, max_cost: float | None, max_spans: int | None
) -> Solution | None:
    sweep = front(problem)
    if max_damage is not None:
        return settle(problem, sweep.point(sweep.within(max_damage)), max_spans)
    assert max_cost is not None
    first = int(np.searchsorted(-sweep.cost, -max_cost * (1 + 1e-12)))
    # Fixed costs may ask for more moves than the hull's own sum does.
    for k in (*range(first, len(sweep), max(1, (len(sweep) - first) // 50)), len(sweep) - 1):
        point = settle(problem, sweep.point(k), max_spans)
        if point.cost <= max_cost * (1 + 1e-12):
            return point
    return None


def _exact(
    problem: Problem, max_damage: float | None, max_cost: float | None, max_spans: int | None, seconds: float,
    gap: float,
) -> Solution | None:  # fmt: skip
    """HiGHS on x[h, c] = 1 where head h has choice c and y[s] = 1 where a site uses span s: sum_c x = 1, x <= y,
    and at most `max_spans` y of one site. None if it found nothing in time, or there is nothing."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise DependencyError("The exact planner needs scipy.", "pip install scipy") from error
    rows, columns = np.nonzero(np.isfinite(problem.damage))
    count = len(rows)
    keys, used = np.unique(np.stack([problem.site[rows], problem.span[rows, columns]]), axis=1, return_inverse=True)
    used = used.reshape(-1)
    grouped = max_spans is not None or bool((problem.group_cost > 0).any())
    spans = keys.shape[1] if grouped else 0
    fixed = problem.group_cost[keys[0]] if grouped else np.zeros(0)
    # HiGHS's tolerances are absolute: both sums in units of their own size.
    damage_unit = max_damage or max(float(np.median(problem.damage[rows, columns])), 1e-12) * len(problem.heads)
    cost_unit = max(problem.dense.cost, 1e-12)
    damage = np.concatenate([problem.damage[rows, columns], np.zeros(spans)]) / damage_unit
    cost = np.concatenate([problem.cost[rows, columns], fixed]) / cost_unit
    free = float(problem.group_cost.sum()) / cost_unit if grouped else 0.0  # the first span of a site costs nothing

    def matrix(values: Array, at: Array, where: Array, height: int) -> Any:
        return csr_array((values, (at, where)), shape=(height, count + spans))

    pick = matrix(np.ones(count), rows, np.arange(count), len(problem.heads))
    constraints = [LinearConstraint(pick, 1, 1)]
    if grouped:
        each = np.arange(count)
        link = matrix(np.repeat([1.0, -1.0], count), np.tile(each, 2), np.concatenate([each, count + used]), count)
        constraints.append(LinearConstraint(link, -np.inf, 0))
    if max_spans is not None:
        total = matrix(np.ones(spans), keys[0], count + np.arange(spans), len(problem.group_cost))
        constraints.append(LinearConstraint(total, -np.inf, max_spans))
    if max_damage is not None:
        objective, bounded, most = cost, damage, max_damage / damage_unit
    else:
        assert max_cost is not None
        objective, bounded, most = damage, cost, max_cost / cost_unit + free
    constraints.append(LinearConstraint(bounded[None], -np.inf, most))
    result = milp(
        objective, constraints=constraints, integrality=np.ones(count + spans), bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )  # fmt: skip
    if result.x is None:
        return None
    index = np.zeros(len(problem.heads), dtype=np.int64)
    chosen = result.x[:count] > 0.5
    index[rows[chosen]] = columns[chosen]
    solution = problem.of(index)
    over = solution.damage / damage_unit - most if max_damage is not None else solution.cost / cost_unit + free - most
    return solution if over <= 1e-6 else None


def back_off(problem: Problem, solution: Solution, n: int) -> Solution:
    """Make dense again the n heads with the largest damage for what they save."""
    rows = np.arange(len(solution.index))
    damage = problem.damage[rows, solution.index]
    saved = problem.cost[:, 0] - problem.cost[rows, solution.index]
    ratio = np.where(saved > 0, damage / np.where(saved > 0, saved, 1.0), np.inf)
    ratio[solution.index == 0] = -np.inf
    index = solution.index.copy()
    worst = np.argsort(-ratio, kind="stable")[:n]
    index[worst] = 0
    return problem.of(index)
