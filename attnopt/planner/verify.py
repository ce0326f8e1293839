"""Measure plans end to end and keep only what holds: a search over the front with few evaluations.

A budget holds where the upper one-sided 95 % bound of the measured increase is within it, at every length measured.
The prediction only says where to look; it may be wrong by any factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from attnopt.errors import BudgetError
from attnopt.plan import Budget, Measured, choices_id
from attnopt.planner.exact import compare
from attnopt.planner.frontier import Front, front
from attnopt.planner.knapsack import (
    Array,
    Choices,
    Limits,
    Problem,
    Solution,
    back_off,
    choices_from,
    settle,
    times_faster,
)

LEAST_SEQUENCES = 8  # fewer than these say nothing about their spread
RESAMPLES = 2000
# A point of the front must save this share of the dense cost over one that holds to be worth another measurement.
WORTHWHILE = 0.005
TYPICAL_LOSS = 2.5  # nats per token, for the first guess only


@dataclass(frozen=True)
class Evaluation:
    """One plan against dense on the same sequences of one length: per sequence, predicted tokens and sums of the dense
    and the planned loss; where both ran side by side also sums of KL(dense || planned), and the tokens whose most
    likely successor is the same. Nats."""

    length: int
    tokens: tuple[int, ...]
    dense: tuple[float, ...]
    planned: tuple[float, ...]
    kl: tuple[float, ...] = ()
    agree: tuple[int, ...] = ()


Evaluate = Callable[[Choices], Evaluation | Sequence[Evaluation]]


def paired_bound(differences: Sequence[float], weights: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """sum(differences) / sum(weights) over sequences, and its upper one-sided 95 % bound.

    Studentised paired bootstrap of the ratio (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5), which
    keeps its coverage with few and skewed sequences where a percentile bootstrap does not. weights: tokens for a mean
    per token, dense losses for a relative increase. Deterministic for a seed; infinite under two sequences.
    """
    d, w = np.asarray(differences, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    ratio = float(d.sum() / w.sum())
    if len(d) < 2:
        return ratio, math.inf
    error = float(_error(d, w, ratio))
    if error == 0.0:
        return ratio, ratio
    rng, studentised = np.random.default_rng(seed), []
    for rows in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * len(d) // 1_000_000)):
        picks = rng.integers(0, len(d), (len(rows), len(d)))
        again = d[picks].sum(1) / w[picks].sum(1)
        errors = _error(d[picks], w[picks], again[:, None])
        moved = again - ratio
        # A resample without spread says only on which side it lies.
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised.append(np.where(errors > 1e-12 * error, moved / errors, np.sign(moved) * np.inf))
    values = np.nan_to_num(np.concatenate(studentised), nan=0.0, posinf=np.inf, neginf=-np.inf)
    low = float(np.sort(values)[int(0.05 * len(values))])
    return ratio, ratio - low * error


def _error(d: Array, w: Array, ratio: Any) -> Any:
    """Standard error of sum(d) / sum(w) over the last axis, linearised."""
    n = d.shape[-1]
    return np.sqrt(n / (n - 1) * np.square(d - ratio * w).sum(-1)) / w.sum(-1)


def judge(evaluation: Evaluation, budget: Budget, split: str, choices: str, seed: int = 0) -> Measured:
    """The measurement as a plan file holds it; BudgetError if the text has too few sequences to bound anything."""
    count, tokens = len(evaluation.tokens), sum(evaluation.tokens)
    if count < LEAST_SEQUENCES:
        each = -(-tokens // count) if count else evaluation.length
        raise BudgetError(
            f"{count} sequences of {evaluation.length} tokens are too few to bound the loss on the {split} split.",
            f"Give at least {LEAST_SEQUENCES} ({LEAST_SEQUENCES * each} tokens), or use shorter sequences.",
        )
    if budget.kind == "kl" and not evaluation.kl:
        raise ValueError("a budget in KL needs the KL of every sequence")
    if not all(map(math.isfinite, (*evaluation.dense, *evaluation.planned, *evaluation.kl))):
        increase = upper = math.inf
    elif budget.kind == "kl":
        increase, upper = paired_bound(evaluation.kl, evaluation.tokens, seed)
    else:
        differences = [p - d for p, d in zip(evaluation.planned, evaluation.dense, strict=True)]
        increase, upper = (100 * x for x in paired_bound(differences, evaluation.dense, seed))
    dense, planned = sum(evaluation.dense) / tokens, sum(evaluation.planned) / tokens
    kl = sum(evaluation.kl) / tokens if evaluation.kl else None
    top1 = sum(evaluation.agree) / tokens if evaluation.agree else None
    return Measured(split, evaluation.length, count, tokens, dense, planned, increase, upper, choices, kl, top1)


def holds(measured: Measured, budget: Budget) -> bool:
    return measured.upper_95 <= budget.limit


def tokens_needed(measured: Measured, budget: Budget) -> int | None:
    """Tokens at which the bound would meet the limit if the mean stays (its width falls as 1 / sqrt(tokens)); None if
    the mean itself is over the limit, so that no text would do."""
    room, width = budget.limit - measured.increase, measured.upper_95 - measured.increase
    if not room > 0 or not math.isfinite(width):
        return None
    return math.ceil(measured.tokens * (width / room) ** 2)


def final_check(
    evaluations: Evaluation | Sequence[Evaluation], budget: Budget, choices: str, seed: int = 0, what: str = "The plan"
) -> tuple[Measured, ...]:
    """The final split, looked at once: its measurements, or BudgetError if one misses the budget. what: the plan, as
    that error describes it."""
    several = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    found = tuple(judge(e, budget, "final", choices, seed) for e in several)
    for measured in found:
        if not holds(measured, budget):
            raise BudgetError(
                f"On the final split the increase is at most {measured.upper_95:.4g}, over the budget of {budget} "
                f"(length {measured.length}, mean {measured.increase:.4g}). {what} held on the verify split only.",
                _more_text([measured], budget, "it") or "Ask for a larger budget, or profile and verify on more text.",
            )
    return found


def _more_text(measured: Sequence[Measured], budget: Budget, what: str) -> str:
    """How much text would tell whether `what` keeps the budget; empty where none would."""
    found = [(n, m) for m in measured if (n := tokens_needed(m, budget)) is not None and n > m.tokens]
    if not found:
        return ""
    needed, least = min(found, key=lambda pair: pair[0])
    samples = math.ceil(needed / least.tokens * least.sequences)
    return (
        f"The text is too short to tell whether {what} keeps the budget: about {needed} tokens are needed where there "
        f"are {least.tokens} (--samples {samples})."
    )


@dataclass(frozen=True)
class Record:
    """One evaluation of the loop: how the point was come by, what was predicted, what was measured, per length, and
    whether that is within `limit`: the part of the budget that the search keeps to, in the budget's unit."""

    step: str
    predicted: float
    cost: float
    measured: tuple[Measured, ...]
    holds: bool
    limit: float

    @property
    def worst(self) -> Measured:
        return max(self.measured, key=lambda m: m.upper_95)

    def __str__(self) -> str:
        verdict = f"{'holds' if self.holds else 'misses'} the search's {self.limit:.4g}"
        return (
            f"{self.step}: predicted {self.predicted:.3g} nats per token, cost {self.cost:.4g}; measured increase "
            f"{self.worst.increase:.4g}, at most {self.worst.upper_95:.4g} at length {self.worst.length}: {verdict}"
        )


@dataclass(frozen=True, eq=False)
class Verified:
    """The fastest solution found within the budget, its measurements on the verify split, and the whole search.
    undecided: how much text would tell whether a faster one holds, or an empty string; gap: percent by which the
    front's plan was dearer, where it was compared with an exact one."""

    solution: Solution
    measured: tuple[Measured, ...]
    records: tuple[Record, ...]
    undecided: str = ""
    gap: float | None = None


@dataclass(eq=False)
class _Search:
    problem: Problem
    evaluate: Evaluate
    budget: Budget
    seed: int
    most: int
    report: Callable[[Record], None] | None
    exact: float | None = None
    records: list[Record] = field(default_factory=list)
    best: tuple[Solution, Record] | None = None
    seen: dict[bytes, Record] = field(default_factory=dict)
    gaps: dict[bytes, float] = field(default_factory=dict)

    def try_point(self, solution: Solution, step: str) -> Record:
        """Evaluate a solution (once), remember it if it is the cheapest that holds."""
        key = solution.index.tobytes()
        if key in self.seen:
            return self.seen[key]
        choices = choices_from(self.problem, solution)
        result = self.evaluate(choices)
        several = [result] if isinstance(result, Evaluation) else list(result)
        found = tuple(judge(e, self.budget, "verify", choices_id(choices), self.seed) for e in several)
        record = Record(
            step, self.problem.expected(solution), solution.cost, found, all(holds(m, self.budget) for m in found),
            self.budget.limit,
        )  # fmt: skip
        self.seen[key] = record
        self.records.append(record)
        if self.report is not None:
            self.report(record)
        if record.holds and (self.best is None or solution.cost < self.best[0].cost):
            self.best = solution, record
        return record

    def solution(self, sweep: Front, k: int) -> Solution:
        """About the cheapest within point k's damage; the cheapest, where an exact plan is wanted."""
        damage = float(sweep.damage[k])
        if self.exact is None:
            found = sweep.pick(max_damage=damage)
            assert found is not None  # point k itself is within
            return found
        compared = compare(sweep, max_damage=damage, seconds=self.exact)
        if compared.gap is not None:
            self.gaps[compared.solution.index.tobytes()] = compared.gap
        return compared.solution

    @property
    def left(self) -> int:
        return self.most - len(self.records)


def verify_loop(
    problem: Problem, evaluate: Evaluate, budget: Budget, *, share: float = 1.0, seed: int = 0,
    max_evaluations: int = 8, limits: Limits | None = None, exact: float | None = None,
    dense_loss: float = TYPICAL_LOSS, report: Callable[[Record], None] | None = None,
) -> Verified:  # fmt: skip
    """The fastest plan whose measured bound keeps the budget, within `limits`.

    `evaluate(choices)` measures on the verify split, at one length or several; each call is a Record, given to
    `report` as it is made. The search starts where the prediction meets the budget (`dense_loss` turns percent into
    nats), closes in between the last point that holds and the first that misses, and at the end takes the latter's
    worst heads back to dense. share: of the budget that the search keeps to; exact: seconds that HiGHS may take over
    each point, None for the front's own. BudgetError if nothing held: the closest plan, by how much it missed, or how
    much text would decide.
    """
    limits, asked = limits or Limits(), budget
    budget = replace(budget, limit=share * budget.limit)
    sweep = front(problem, limits)
    # Dense is no plan; but where the limits leave it out, or something does no damage, the mildest point is one.
    lowest = sweep.first
    if len(sweep) <= lowest:
        raise BudgetError("No replacement of any head is cheaper than dense here.", "Plan for a longer length.")
    search = _Search(problem, evaluate, budget, seed, max_evaluations, report, exact)
    limit = budget.nats(dense_loss)
    missed = _close_in(search, sweep, limit, lowest)
    if missed is not None:
        _restore(search, *missed, limits)
    what = "a plan" if search.best is None else "a cheaper plan"
    undecided = _more_text([m for r in search.records for m in r.measured if not holds(m, budget)], budget, what)
    if search.best is None:
        closest = min(search.records, key=lambda r: r.worst.upper_95)
        raise BudgetError(
            f"No plan was found within the budget of {asked}. The closest of {len(search.records)} measured: "
            f"{_described(problem, closest)}.",
            undecided or "Ask for a larger budget, or profile with wider windows.",
        )
    solution, record = search.best
    gap = search.gaps.get(solution.index.tobytes())
    return Verified(solution, record.measured, tuple(search.records), undecided, gap)


def _described(problem: Problem, record: Record) -> str:
    faster, worst = times_faster(problem.dense.cost, record.cost), record.worst
    return (
        f"{faster:.2f} times as fast as dense by its costs, measured increase {worst.increase:.4g}, "
        f"at most {worst.upper_95:.4g}, at length {worst.length}"
    )


def _close_in(search: _Search, sweep: Front, first: float, lowest: int) -> tuple[Solution, float] | None:
    """Narrow the front between a point that holds and one that misses; the latter, with its bound over the limit."""
    low, high = lowest - 1, len(sweep)
    held: tuple[float, float] | None = None
    missed: tuple[float, float] | None = None
    nearest: tuple[Solution, float] | None = None
    enough = WORTHWHILE * search.problem.dense.cost
    k = min(max(_start(search.problem, sweep, first), lowest), len(sweep) - 1)
    # The last evaluation is kept for taking heads back, unless nothing holds yet.
    while search.left > (1 if search.best is not None else 0):
        solution = search.solution(sweep, k)
        record = search.try_point(solution, f"point {k} of {len(sweep) - 1}")
        limit = search.budget.limit
        ratio = record.worst.upper_95 / limit if limit > 0 else math.inf
        at = max(float(sweep.damage[k]), 1e-12 * float(sweep.damage[-1]), 1e-300)
        if record.holds:
            low, held = k, (at, ratio)
        else:
            high, missed, nearest = k, (at, ratio), (solution, ratio)
        if high - low < 2 or (search.best is not None and sweep.cost[max(low, 0)] - sweep.cost[high - 1] < enough):
            break
        k = min(max(sweep.within(_aim(held, missed)), low + 1), high - 1)
    return nearest


def _start(problem: Problem, sweep: Front, limit: float) -> int:
    """The last point that is expected to keep to `limit` nats per token."""
    low, high = 0, len(sweep)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if problem.expected(sweep.point(middle)) <= limit else (low, middle)
    return low


def _aim(held: tuple[float, float] | None, missed: tuple[float, float] | None) -> float:
    """The predicted damage to try next, from (damage, bound / limit) of the nearest points that hold and miss; aimed a
    little inside the limit. A power law between two points; one point is scaled, by a bounded factor."""
    if held is None and missed is not None:
        return missed[0] * min(max(0.8 / missed[1], 0.02), 0.8)
    if missed is None and held is not None:
        return held[0] * (min(max(0.9 / held[1], 1.3), 8.0) if held[1] > 0 else 8.0)
    assert held is not None and missed is not None
    share = 0.5
    if held[1] > 0 and math.isfinite(missed[1]) and missed[1] > held[1]:
        share = min(max(math.log(0.95 / held[1]) / math.log(missed[1] / held[1]), 0.15), 0.85)
    return math.exp((1 - share) * math.log(held[0]) + share * math.log(missed[0]))


def _restore(search: _Search, missed: Solution, ratio: float, limits: Limits) -> None:
    """With what evaluations are left: the point that missed, its worst heads dense again until it should hold."""
    problem, aim = search.problem, 0.9
    replaced = int((missed.index != 0).sum())
    while search.left > 0 and math.isfinite(ratio):
        target = missed.damage * aim / ratio
        n = next((n for n in range(1, replaced) if back_off(problem, missed, n).damage <= target), replaced)
        solution = settle(problem, back_off(problem, missed, n), limits.spans)
        least = search.best[0].cost if search.best is not None else problem.dense.cost
        if n == replaced or solution.cost > least - WORTHWHILE * problem.dense.cost or not limits.allow(solution):
            return
        if search.try_point(solution, f"{n} heads taken back").holds:
            return
        aim *= 0.6
