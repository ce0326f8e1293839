"""The whole Pareto front of a problem, in a fraction of a second.

The options of every item (see `options.py`) have a lower convex hull of damage over cost. The edges of all hulls,
merged by slope, are a walk from the least damage to the least cost; every point of it is best for some price. Between
two points, the options of all items are combined anew, by a knapsack in coarse steps of the budget (`Front.pick`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attnopt.planner.knapsack import Array, Limits, Problem, Solution
from attnopt.planner.options import Items, hulls, items_of

# Prices of a cached byte, in units of what a byte of the dense cache costs, tried where memory is limited.
MEMORY_PRICES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
# `Front.pick`: single changes at most; steps of the budget; items times options times steps that are worth the time.
CHANGES = 200
STEPS = 4000
MOST_STEPS = 40_000_000


@dataclass(frozen=True, eq=False)
class Walk:
    """From option `start` (I,) of every item, each move (item, option) in turn."""

    start: Array
    moves: Array

    def at(self, step: int) -> Array:
        taken = self.start.copy()
        for item, option in self.moves[:step]:
            taken[item] = option
        return taken


@dataclass(frozen=True, eq=False)
class Front:
    """K points within the limits; along them damage never falls and cost falls. The first is dense where the limits
    let it be. damage, cost, memory (K,)."""

    problem: Problem
    limits: Limits
    items: tuple[Items, ...]
    walks: tuple[Walk, ...]
    where: Array  # (K, 2): walk, step
    damage: Array
    cost: Array
    memory: Array

    def __len__(self) -> int:
        return len(self.damage)

    @property
    def first(self) -> int:
        """The first point that replaces anything."""
        return 0 if len(self) and (self.point(0).index != 0).any() else 1

    def point(self, k: int) -> Solution:
        return self._solution(self._taken(k))

    def within(self, damage: float) -> int:
        """The last point whose damage is at most `damage`; the first if none is."""
        return max(int(np.searchsorted(self.damage, damage, side="right")) - 1, 0)

    def pick(self, *, max_damage: float | None = None, max_cost: float | None = None) -> Solution | None:
        """About the least cost within `max_damage`, or the least damage within `max_cost`; None if no point is."""
        by_cost = max_damage is None
        limit = max_cost if max_damage is None else max_damage
        assert limit is not None
        if by_cost:
            k = int(np.searchsorted(-self.cost, -limit * (1 + 1e-12)))
        else:
            k = int(np.searchsorted(self.damage, limit * (1 + 1e-12), side="right")) - 1
        return self._spent(self._taken(k) if 0 <= k < len(self) else None, limit, by_cost)

    def _taken(self, k: int) -> Array:
        walk, step = self.where[k]
        return self.walks[walk].at(step)

    def _spent(self, taken: Array | None, limit: float, by_cost: bool) -> Solution | None:
        """What was taken, or the options combined anew, after single changes that use up what is left of the limit."""
        damage, cost, memory = _sums(self.items)
        gain, spend = (damage, cost) if by_cost else (cost, damage)
        rows = np.arange(len(damage))
        most = np.inf if self.limits.memory is None else self.limits.memory
        if damage.size * STEPS <= MOST_STEPS and limit > 0:
            anew = _knapsack(gain, spend, limit)
            if anew is not None and memory[rows, anew].sum() <= most:
                taken = anew if taken is None else min(taken, anew, key=lambda t: gain[rows, t].sum())
        if taken is None:
            return None
        for _ in range(CHANGES):
            left = limit - spend[rows, taken].sum()
            room = most - memory[rows, taken].sum()
            more = spend - spend[rows, taken][:, None]
            better = gain[rows, taken][:, None] - gain
            fits = (more <= left) & (memory - memory[rows, taken][:, None] <= max(room, 0.0)) & np.isfinite(gain)
            better = np.where(fits & (better > 0), better, 0.0)
            item, option = np.unravel_index(int(better.argmax()), better.shape)
            if better[item, option] <= 1e-12 * abs(gain[rows, taken].sum()):
                break
            taken[item] = option
        return self._solution(taken)

    def _solution(self, taken: Array) -> Solution:
        index, first = np.zeros(len(self.problem.heads), dtype=np.int64), 0
        for items in self.items:
            count = len(items.heads)
            index[items.heads] = items.index[np.arange(count), taken[first : first + count]]
            first += count
        return self.problem.of(index)


def front(problem: Problem, limits: Limits | None = None) -> Front:
    """Every point that is best for some price of a unit of cost (and of a cached byte, where memory is limited)."""
    limits = limits or Limits()
    dense, unit = problem.dense, 0.0
    tight = limits.memory is not None and dense.memory > limits.memory
    if tight:
        unit = max(dense.cost, 1e-300) / dense.memory
    items = tuple(items_of(problem, limits, [unit * p for p in MEMORY_PRICES] if tight else (0.0,)))
    damage, cost, memory = _sums(items)
    prices = unit * np.geomspace(1e-2, 1e3, 60) if tight else np.zeros(0)
    walks, points = [], []
    for n, price in enumerate((0.0, *prices)):
        walk, sums = _walk(damage, cost, memory, price)
        walks.append(walk)
        points.append(np.concatenate([np.stack([np.full(len(sums), n), np.arange(len(sums))], 1), sums], 1))
    every = np.concatenate(points)
    slack = 1 + 1e-9
    kept = np.ones(len(every), dtype=bool)
    if limits.memory is not None:
        kept &= every[:, 4] <= limits.memory * slack
    if limits.cost is not None:
        kept &= every[:, 3] <= limits.cost * slack
    every = every[kept]
    every = every[np.lexsort((every[:, 3], every[:, 2]))]
    # Not dominated: cheaper than all that damage less.
    least = np.minimum.accumulate(np.concatenate([[np.inf], every[:, 3]]))[:-1] if len(every) else every[:, 3]
    every = every[every[:, 3] < least]
    return Front(problem, limits, items, tuple(walks), every[:, :2].astype(np.int64), *every[:, 2:].T)


def _walk(damage: Array, cost: Array, memory: Array, memory_price: float) -> tuple[Walk, Array]:
    """The hulls' edges of all items, merged by slope; and damage, cost and memory (steps + 1, 3) along them."""
    paid = cost + memory_price * memory if memory_price else cost
    hull = hulls(damage, paid)
    start = hull.order[:, 0]
    item, edge = np.nonzero(hull.order[:, 1:] >= 0)
    before, after = hull.order[item, edge], hull.order[item, edge + 1]
    # Rising along a hull but for rounding, which must not swap two edges of one item.
    slopes = np.maximum.accumulate(np.where(hull.order[:, 1:] >= 0, hull.slopes, 0.0), 1)[item, edge]
    order = np.argsort(slopes, kind="stable")
    rows = np.arange(len(start))
    sums = []
    for values in (damage, cost, memory):
        steps = (values[item, after] - values[item, before])[order]
        sums.append(values[rows, start].sum() + np.concatenate([[0.0], np.cumsum(steps)]))
    return Walk(start, np.stack([item, after], 1)[order]), np.stack(sums, 1)


def _knapsack(gain: Array, spend: Array, limit: float) -> Array | None:
    """The option (I,) of every item with the least sum of `gain` (I, O) and a sum of `spend` (I, O) within `limit`,
    every option's spending rounded up to a whole step of the limit; None if that leaves nothing."""
    base = spend.min(1)
    room = limit - base.sum()
    if not room > 0:
        return None
    steps = np.ceil((spend - base[:, None]) / room * STEPS * (1 - 1e-12))
    best = np.zeros(STEPS + 1)
    came = np.zeros((len(gain), STEPS + 1), dtype=np.int64)
    for item, (of_item, wanted) in enumerate(zip(gain, steps, strict=True)):
        least = np.full(STEPS + 1, np.inf)
        for option in np.flatnonzero(np.isfinite(of_item) & (wanted <= STEPS)):
            step = int(wanted[option])
            total = best[: STEPS + 1 - step] + of_item[option]
            better = total < least[step:]
            least[step:][better] = total[better]
            came[item, step:][better] = option
        best = least
    taken, left = np.zeros(len(gain), dtype=np.int64), STEPS
    for item in reversed(range(len(gain))):
        taken[item] = came[item, left]
        left -= int(steps[item, taken[item]])
    return taken if np.isfinite(best[STEPS]) else None


def _sums(items: Iterable[Items]) -> tuple[Array, Array, Array]:
    """Damage, cost and memory (I, O) of the options of all items."""
    every = list(items)
    return _joined([i.damage for i in every]), _joined([i.cost for i in every]), _joined([i.memory for i in every])


def _joined(parts: list[Array]) -> Array:
    """Rows of several arrays under one another, padded with inf."""
    width = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=np.inf) for p in parts])
