"""One exact point by HiGHS, and how far the front's point is from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnopt.errors import BudgetError, DependencyError
from attnopt.planner.frontier import Front, front
from attnopt.planner.knapsack import GONE, Array, Limits, Problem, Solution, kept_keys, within

# Choices of all heads up to which HiGHS solves problems of shared costs: 6000 take 5 s, 50000 gave nothing in 30.
MOST_SHARED = 15_000


@dataclass(frozen=True, eq=False)
class Compared:
    """The better of the front's point and HiGHS's. gap: how much more, in percent, the front's point costs (or damages,
    where cost was limited) than the better one; or, where HiGHS found none but proved a bound, how much more at most
    than the best there is; None where it did neither. bound: how much less, in percent, the best plan of all could be
    than `solution`, as HiGHS proved; None where it proved nothing."""

    solution: Solution
    gap: float | None
    bound: float | None


def solve(
    problem: Problem, *, max_damage: float | None = None, max_cost: float | None = None, max_spans: int | None = None,
    max_memory: float | None = None, seconds: float = 10.0, gap: float = 1e-4,
) -> Solution:  # fmt: skip
    """Least cost within `max_damage`, or least damage within `max_cost`: the better of HiGHS's and the front's.
    `max_spans`: most distinct spans of one site; `max_memory`: cached bytes. BudgetError if nothing is within."""
    limits = Limits(spans=max_spans, memory=max_memory)
    return compare(front(problem, limits), max_damage=max_damage, max_cost=max_cost, seconds=seconds, gap=gap).solution


def compare(
    sweep: Front, *, max_damage: float | None = None, max_cost: float | None = None, seconds: float = 10.0,
    gap: float = 1e-4,
) -> Compared:  # fmt: skip
    """The front's point and HiGHS's within the same limits."""
    if (max_damage is None) == (max_cost is None):
        raise ValueError("give either max_damage or max_cost")
    if max_damage is not None and max_damage < 0:
        raise ValueError(f"max_damage is {max_damage}; no plan is better than dense by prediction")
    quick = sweep.pick(max_damage=max_damage, max_cost=max_cost)
    model = _Program(sweep.problem, sweep.limits)
    exact, bound = None, None
    if model.small:
        exact, bound = model.solve(max_damage, max_cost, seconds, gap)
    if exact is None and max_damage is not None and quick is not None:
        bound = _by_sites(sweep, max_damage, seconds) or bound
    both = [s for s in (quick, exact) if s is not None]
    if not both:
        least = float(sweep.cost[-1]) if len(sweep) else np.inf
        raise BudgetError(
            f"No plan costs at most {max_cost:g}; the cheapest costs about {least:g}."
            if max_cost is not None else "No plan is within the limits.",
            "Allow more, or profile narrower windows.",
        )  # fmt: skip

    def aim(solution: Solution) -> float:
        return solution.cost if max_damage is not None else solution.damage

    best = min(both, key=aim)
    more: float | None = 100 * (aim(quick) - aim(best)) / max(aim(best), 1e-300) if quick is not None else np.inf
    proved = None if bound is None else max(0.0, 100 * (1 - bound / aim(best))) if aim(best) > 0 else 0.0
    if exact is None:
        more = proved
    return Compared(best, more, proved)


def _by_sites(sweep: Front, max_damage: float, seconds: float) -> float | None:
    """A lower bound of the least cost within `max_damage`, where all sites at once are too many: at the front's own
    price of damage there the sites are independent (Lagrange), and each is solved by itself. None where memory or cost
    is limited, which ties them again."""
    problem, limits, k = sweep.problem, sweep.limits, sweep.within(max_damage)
    if limits.memory is not None or limits.cost is not None or len(sweep) < 2:
        return None
    a, b = max(k - 1, 0), min(k + 1, len(sweep) - 1)
    price = float((sweep.cost[a] - sweep.cost[b]) / max(sweep.damage[b] - sweep.damage[a], 1e-300))
    total, sites = -price * max_damage, np.unique(problem.site)
    for site in sites:
        part = _site(problem, int(site), price)
        _, bound = _Program(part, limits).solve(float(part.damage[np.isfinite(part.damage)].sum()), None,
                                                max(seconds / len(sites), 1.0), 1e-4)  # fmt: skip
        if bound is None:
            return None
        total += bound
    return total


def _site(problem: Problem, site: int, price: float) -> Problem:
    """One site alone, with a price of damage in its costs."""
    heads = np.flatnonzero(problem.site == site)
    damage = problem.damage[heads]
    of_kv = np.unique(problem.kv[heads]) if len(problem.kv) else np.zeros(0, dtype=np.int64)
    return replace(
        problem,
        heads=tuple(problem.heads[h] for h in heads),
        damage=damage,
        cost=problem.cost[heads] + price * np.where(np.isfinite(damage), damage, 0.0),
        span=problem.span[heads],
        reads=problem.reads[heads] if problem.reads.size else problem.reads,
        site=np.zeros(len(heads), dtype=np.int64),
        group_cost=problem.group_cost[[site]],
        kv=np.searchsorted(of_kv, problem.kv[heads]) if len(problem.kv) else problem.kv,
        key_cost=problem.key_cost[of_kv],
        key_bytes=problem.key_bytes[of_kv],
        retrieval=problem.retrieval[heads] if problem.retrieval.size else problem.retrieval,
        group=problem.group[heads] if problem.group.size else problem.group,
        state=problem.state[heads] if problem.state.size else problem.state,
    )


class _Program:
    """Binary x[h, c]: head h has choice c; y[s]: a site runs group s; z[g, u]: KV head g keeps union u.

    sum_c x = 1; x <= y of its group, if it has one; sum_u z = 1 and x <= the sum of z over the unions that hold its
    span; at most `limits.spans` y of one site; damage, cost and memory linear in x, y and z. A site whose heads are all
    gone is credited a group too many, so that a bound stays a bound.
    """

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self.problem, self.reading, self.limits = problem, problem.reading, limits
        self.rows, self.columns = np.nonzero(np.isfinite(problem.damage))
        codes = self.reading.span[self.rows, self.columns]
        groups = problem.groups[self.rows, self.columns]
        # The x that are run, and the group of each.
        self.run = np.flatnonzero(groups != GONE)
        self.spans, self.used = np.unique(
            np.stack([problem.site[self.rows], groups])[:, self.run], axis=1, return_inverse=True
        )
        self.used = self.used.reshape(-1)
        if not (limits.spans is not None or (problem.group_cost > 0).any()):
            self.spans = self.spans[:, :0]
        cached = bool(problem.key_cost.any()) or limits.memory is not None
        self.unions = self._unions(codes) if cached and len(problem.kv) else np.zeros((2, 0), dtype=np.int64)
        # Where each kind of variable begins, and their number.
        self.first_y = len(self.rows)
        self.first_z = self.first_y + self.spans.shape[1]
        self.count = self.first_z + self.unions.shape[1]

    @property
    def small(self) -> bool:
        """Whether HiGHS is likely to find anything in a minute: of problems with shared costs not the large ones."""
        return len(self.rows) <= MOST_SHARED or self.count == len(self.rows)

    def _unions(self, codes: Array) -> Array:
        """(2, Z): KV head and union, every one that its heads' choices could make."""
        kv, found = self.problem.kv[self.rows], []
        for g in range(int(kv[-1]) + 1):
            own = codes[kv == g]
            sinks, windows = np.unique(own >> 32), np.unique(own & 0xFFFFFFFF)
            found += [(g, s << 32 | w) for s in sinks for w in windows]
        return np.array(found, dtype=np.int64).T

    def solve(
        self, max_damage: float | None, max_cost: float | None, seconds: float, gap: float
    ) -> tuple[Solution | None, float | None]:
        """The best found in time that is within the limits, and the proved lower bound of what is minimised."""
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as error:
            raise DependencyError("The exact planner needs scipy.", "pip install scipy") from error
        problem, limits = self.problem, self.limits
        picked = problem.damage[self.rows, self.columns]
        kept = kept_keys(self.unions[1], self.reading.length)
        # HiGHS's tolerances are absolute: all sums in units of their own size.
        damage_unit = max_damage or max(float(np.median(picked)), 1e-12) * len(problem.heads)
        cost_unit = max(problem.dense.cost, 1e-300)
        damage = self._row(picked) / damage_unit
        key_cost, key_bytes = (a if len(a) else np.zeros(1) for a in (problem.key_cost, problem.key_bytes))
        of_kv = self.unions[0]
        cost = self._row(
            problem.cost[self.rows, self.columns], problem.group_cost[self.spans[0]], kept * key_cost[of_kv]
        ) / cost_unit  # fmt: skip
        # The first span of a site costs nothing.
        free = float(problem.group_cost.sum()) / cost_unit if self.spans.shape[1] else 0.0
        constraints = [LinearConstraint(*c) for c in self._structure()]
        if limits.memory is not None:
            memory = self._row(problem.states[self.rows, self.columns], None, kept * key_bytes[of_kv])
            constraints.append(LinearConstraint(memory[None] / max(limits.memory, 1e-300), -np.inf, 1))
        most_cost = min((c for c in (max_cost, limits.cost) if c is not None), default=None)
        if most_cost is not None:
            constraints.append(LinearConstraint(cost[None], -np.inf, most_cost / cost_unit + free))
        if max_damage is not None:
            constraints.append(LinearConstraint(damage[None], -np.inf, max_damage / damage_unit))
        objective, unit, offset = (cost, cost_unit, free) if max_damage is not None else (damage, damage_unit, 0.0)
        result = milp(
            objective, constraints=constraints, integrality=np.ones(self.count), bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )  # fmt: skip
        bound = getattr(result, "mip_dual_bound", None)
        bound = None if bound is None or not np.isfinite(bound) else (float(bound) - offset) * unit
        if result.x is None:
            return None, bound
        index = np.zeros(len(problem.heads), dtype=np.int64)
        chosen = result.x[: len(self.rows)] > 0.5
        index[self.rows[chosen]] = self.columns[chosen]
        solution = problem.of(index)
        sums = ((solution.damage, max_damage), (solution.cost, most_cost), (solution.memory, limits.memory))
        fits = all(most is None or value <= most * (1 + 1e-6) for value, most in sums)
        return (solution if fits else None), bound

    def _row(self, x: Array, y: Array | None = None, z: Array | None = None) -> Array:
        """Coefficients of all variables."""
        y = np.zeros(self.spans.shape[1]) if y is None else y[: self.spans.shape[1]]
        return np.concatenate([x, y, np.zeros(self.unions.shape[1]) if z is None else z])

    def _structure(self) -> list[tuple[Any, Any, Any]]:
        """Constraints (matrix, least, most) that make x one choice per head, and y and z what x uses."""
        from scipy.sparse import csr_array

        problem, each, count = self.problem, np.arange(len(self.rows)), len(self.rows)

        def matrix(values: Array, at: Array, where: Array, height: int) -> Any:
            return csr_array((values, (at, where)), shape=(height, self.count))

        found: list[tuple[Any, Any, Any]] = [
            (matrix(np.ones(count), self.rows, each, len(problem.heads)), 1, 1)
        ]  # fmt: skip
        if self.spans.shape[1]:
            both, run = np.concatenate([self.run, self.first_y + self.used]), len(self.run)
            link = matrix(np.repeat([1.0, -1.0], run), np.tile(np.arange(run), 2), both, run)
            found.append((link, -np.inf, 0))
        if self.limits.spans is not None:
            spans = np.arange(self.spans.shape[1])
            total = matrix(np.ones(len(spans)), self.spans[0], self.first_y + spans, len(problem.group_cost))
            found.append((total, -np.inf, self.limits.spans))
        if self.unions.shape[1]:
            unions = np.arange(self.unions.shape[1])
            one = matrix(np.ones(len(unions)), self.unions[0], self.first_z + unions, int(problem.kv[-1]) + 1)
            found.append((one, 1, 1))
            union, x = self._inside()
            values = np.concatenate([np.ones(count), -np.ones(len(x))])
            link = matrix(values, np.concatenate([each, x]), np.concatenate([each, self.first_z + union]), count)
            found.append((link, -np.inf, 0))
        return found

    def _inside(self) -> tuple[Array, Array]:
        """Every pair of a union and an x of the same KV head whose span lies inside it."""
        codes, kv = self.reading.span[self.rows, self.columns], self.problem.kv[self.rows]
        found = []
        for g in range(int(kv[-1]) + 1):
            unions, own = np.flatnonzero(self.unions[0] == g), np.flatnonzero(kv == g)
            u, x = np.nonzero(within(codes[own], self.unions[1, unions], self.reading.length))
            found.append((unions[u], own[x]))
        union, x = (np.concatenate(part) for part in zip(*found, strict=True))
        return union, x
