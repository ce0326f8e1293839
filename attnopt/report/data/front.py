"""The Pareto front that a plan was picked from, beside what was measured, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnopt.plan import Plan
from attnopt.planner.again import Posed
from attnopt.planner.knapsack import Solution
from attnopt.planner.verify import Record
from attnopt.report.cells import rounded

POINTS = 160  # of the front that are kept, evenly over its costs: more are not told apart in a chart


def front_json(plan: Plan, posed: Posed, records: Sequence[Record] = ()) -> dict[str, Any]:
    """points: by cost, ascending, predicted divergence in nats per token and cost in `unit`; the plan's own point is
    among them, chosen. kv_memory: share of dense, None where the sizes of heads are assumed. measured: every plan of
    the search and the plan's last check, at the worst length, increase and bound in the budget's unit."""
    problem, front = posed.problem, posed.front
    wanted = np.linspace(front.cost[-1], front.cost[0], POINTS) if len(front) > POINTS else front.cost
    at = sorted({int(np.abs(front.cost - cost).argmin()) for cost in wanted})
    near = np.flatnonzero(np.isclose(front.cost, posed.solution.cost, rtol=1e-9))
    same = [k for k in near if (front.point(int(k)).index == posed.solution.index).all()]
    points = [_point(posed, front.point(k), chosen=False) for k in at if k not in same]
    own = _point(posed, posed.solution, chosen=True)
    own["predicted"] = rounded(plan.predicted.kl_nats_per_token) if own["predicted"] is None else own["predicted"]
    points.append(own)
    return {
        "length": plan.lengths.planned,
        "unit": problem.unit,
        "plan_unit": plan.predicted.unit,
        "price": None if posed.price is None else rounded(posed.price),
        "budget": {"limit": plan.budget.limit, "unit": plan.budget.unit},
        "points": sorted(points, key=lambda p: (p["cost"], -(p["predicted"] or 0.0))),
        "measured": _measured(plan, posed, records),
    }


def _point(posed: Posed, solution: Solution, chosen: bool) -> dict[str, Any]:
    problem, dense = posed.problem, posed.problem.dense.memory
    # The plan's own choices may stand where the front's may not: protected heads of an edited plan, for example.
    of = posed.free if chosen else problem
    predicted = of.expected(solution) if math.isfinite(solution.damage) else math.inf
    sized = posed.known or posed.own_costs
    return {
        "predicted": rounded(predicted),
        "cost": rounded(solution.cost),
        "kv_memory": rounded(solution.memory / dense) if sized and dense else None,
        "chosen": chosen,
    }


def _measured(plan: Plan, posed: Posed, records: Sequence[Record]) -> list[dict[str, Any]]:
    """records are those of the plan's own search: their costs are in the plan's unit, as are those of `posed`."""
    found = [
        {
            "predicted": rounded(r.predicted), "cost": rounded(r.cost), "increase": rounded(r.worst.increase),
            "upper_95": rounded(r.worst.upper_95), "holds": r.holds,
        }
        for r in records if posed.own_costs
    ]  # fmt: skip
    last = [m for m in plan.measured if m.split == "final"] or list(plan.measured)
    if last and not plan.edited:
        worst = max(last, key=lambda m: m.upper_95)
        found.append({
            "predicted": rounded(plan.predicted.kl_nats_per_token), "cost": rounded(posed.solution.cost),
            "increase": rounded(worst.increase), "upper_95": rounded(worst.upper_95),
            "holds": all(m.upper_95 <= plan.budget.limit for m in last),
        })  # fmt: skip
    return found
