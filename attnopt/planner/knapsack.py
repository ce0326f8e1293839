"""The planner's knapsack: one replacement per head, least predicted damage for a cost or least cost for a damage.

Damage is separable over heads (to second order, see attnopt/statistics). Cost is not quite: a layer pays once for every
distinct span, and the cache keeps, for each KV head, the union over the query heads that share it. `frontier.py` finds
the whole front in a fraction of a second, `exact.py` one point with a proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from attnopt.ir import Choice

Array = np.ndarray[Any, Any]
Choices = dict[str, tuple[Choice, ...]]
# The group of heads without attention, which no kernel runs.
GONE = -1
# A length that no sum of keys reaches.
EVERY = 1 << 62


def code_of(sink: int, window: int, length: int) -> int:
    """A span as one number: equal where two rules are one span at `length`."""
    return (0 if window >= length else sink) << 32 | window


def kept_keys(codes: Array, length: int) -> Array:
    """Keys that a cache keeps of each span at `length`."""
    return np.minimum((codes >> 32) + (codes & 0xFFFFFFFF), length)


def unions(codes: Array, kv: Array) -> Array:
    """The most sinks and the widest window of the spans of heads (H,), for each of their KV heads, `kv` ascending."""
    first = np.flatnonzero(np.diff(kv, prepend=-1))
    sinks, windows = (np.maximum.reduceat(part, first) for part in (codes >> 32, codes & 0xFFFFFFFF))
    return np.asarray(sinks << 32 | windows)


def within(codes: Array, unions: Array, length: int) -> Array:
    """(U, S): whether span s keeps no key that union u drops."""
    sinks, windows = codes >> 32, codes & 0xFFFFFFFF
    most_sinks, most_windows = (unions >> 32)[:, None], (unions & 0xFFFFFFFF)[:, None]
    return (windows <= most_windows) & ((sinks <= most_sinks) | (most_windows + sinks >= length))


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to besides its budget of damage; None is no limit.

    spans: most distinct spans of one site; cost, memory: in the problem's units.
    """

    spans: int | None = None
    cost: float | None = None
    memory: float | None = None

    def allow(self, solution: Solution) -> bool:
        """Whether cost and memory are within the limits; the number of spans is the solver's own matter."""
        slack = 1 + 1e-9
        return (self.cost is None or solution.cost <= self.cost * slack) and (
            self.memory is None or solution.memory <= self.memory * slack
        )


def together(damage: Array, rho: Array) -> float:
    """The damage of all heads at once, from that of each alone (H,) and their correlation (H, H); at least 0."""
    z = np.sqrt(damage)
    return max(float(z @ rho @ z), 0.0)


@dataclass(frozen=True)
class Problem:
    """H heads (all sites in order), C choices; ``choices[0]`` is dense.

    damage (H, C): predicted nats per token, inf where a choice is not allowed; cost (H, C): of a head by itself at the
    planned length; span (H, C): `code_of` the choice there; group (H, C): alike where two heads of a site are run
    together, of one span and one far part, `GONE` where nothing is run; empty where spans alone tell that. site (H,):
    index of the head's site; group_cost (sites,): cost of every group of a site after the first. kv (H,): index of the
    head's KV head, ascending; key_cost, key_bytes (KV heads,): cost and bytes of one key that the cache keeps, where
    the cache counts; reads (H, C): codes of what the heads of a KV head read together in a step of decoding, sinks and
    windows that add up whatever the length, empty where that is `span`, all that is kept; state (H, C): bytes it keeps
    of a head besides keys, empty for none. kind: where costs come from, "measured", "roofline", "density" or "bytes";
    unit: what they are in. correlate() -> (H, H): how heads' losses are correlated (attnopt/planner/interaction.py),
    empty where that is not known; asked for when it is needed.
    retrieval (H, C): the part of `damage` that is no loss on text, but of the probe's answers, weighed; empty for none.
    """

    heads: tuple[tuple[str, int], ...]
    choices: tuple[Choice, ...]
    damage: Array
    cost: Array
    span: Array
    site: Array
    group_cost: Array
    kind: str = "measured"
    unit: str = "ms"
    length: int = 1 << 30
    kv: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    key_cost: Array = field(default_factory=lambda: np.zeros(0))
    key_bytes: Array = field(default_factory=lambda: np.zeros(0))
    correlate: Callable[[], Array] = lambda: np.zeros((0, 0))
    retrieval: Array = field(default_factory=lambda: np.zeros((0, 0)))
    group: Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    state: Array = field(default_factory=lambda: np.zeros((0, 0)))
    reads: Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))

    @property
    def groups(self) -> Array:
        """`group`, or what stands for it. (H, C)"""
        return self.group if self.group.size else self.span

    @property
    def reading(self) -> Problem:
        """The problem whose spans are what decoding reads; itself where that is all that is kept."""
        if not self.reads.size:
            return self
        return replace(self, span=self.reads, reads=np.zeros((0, 0), dtype=np.int64), length=EVERY)

    @property
    def states(self) -> Array:
        """Bytes kept besides keys, (H, C)."""
        return self.state if self.state.size else np.zeros(self.cost.shape)

    @property
    def on_text(self) -> Array:
        """The damage on text alone, (H, C)."""
        return self.damage - self.retrieval if self.retrieval.size else self.damage

    def expected(self, solution: Solution) -> float:
        """Nats per token that a solution is expected to diverge by. Its `damage`, by which plans are searched, adds
        heads as if they were independent; this does not, where their correlation is known."""
        rho, damage = self.correlate(), self.on_text[np.arange(len(self.heads)), solution.index]
        return together(damage, rho) if len(rho) else float(damage.sum())

    @property
    def measured(self) -> bool:
        return self.kind == "measured"

    def of(self, index: Array) -> Solution:
        """The solution that gives head h the choice ``index[h]``."""
        rows = np.arange(len(index))
        kept = self.kept(index)
        cost = self._cost(index) + float((self.key_cost * self.reading.kept(index)).sum())
        memory = float((self.key_bytes * kept).sum()) + float(self.states[rows, index].sum())
        return Solution(index, float(self.damage[rows, index].sum()), cost, memory)

    def kept(self, index: Array) -> Array:
        """Keys kept by each KV head's cache: the union over the query heads that share it. (KV heads,)"""
        if not len(self.kv):
            return np.zeros(0)
        return kept_keys(unions(self.span[np.arange(len(index)), index], self.kv), self.length)

    def _cost(self, index: Array) -> float:
        rows = np.arange(len(index))
        pairs = np.unique(np.stack([self.site, self.groups[rows, index]]), axis=1)
        run = pairs[0, pairs[1] != GONE]
        groups = np.maximum(np.bincount(run, minlength=len(self.group_cost)) - 1, 0)
        return float(self.cost[rows, index].sum() + (self.group_cost * groups).sum())

    @property
    def dense(self) -> Solution:
        return self.of(np.zeros(len(self.heads), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Solution:
    """``index`` (H,): each head's choice; the sums of damage (nats per token), cost and cached bytes."""

    index: Array
    damage: float
    cost: float
    memory: float = 0.0


def times_faster(dense: float, cost: float) -> float:
    """dense / cost; a model without any attention left, which costs nothing, is no more than 1e9 times as fast."""
    return dense / max(cost, 1e-9 * dense)


def choices_from(problem: Problem, solution: Solution) -> Choices:
    """Site name -> one Choice per query head, as a Plan holds them."""
    found: dict[str, list[Choice]] = {}
    for (name, _), choice in zip(problem.heads, solution.index, strict=True):
        found.setdefault(name, []).append(problem.choices[choice])
    return {name: tuple(choices) for name, choices in found.items()}


def settle(problem: Problem, solution: Solution, max_spans: int | None = None) -> Solution:
    """Merge groups of a site where a group's fixed cost exceeds what it saves, and until `max_spans` are left.

    A group of heads joins another of its site (or dense) only if that damages none of them more.
    """
    index, of = solution.index.copy(), problem.groups
    for site, group_cost in enumerate(problem.group_cost):
        heads = np.flatnonzero(problem.site == site)
        while True:
            groups: dict[int, Array] = {
                int(group): heads[of[heads, index[heads]] == group]
                for group in np.unique(of[heads, index[heads]])
                if group != GONE
            }
            dense = int(of[heads[0], 0])
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


def _joined(problem: Problem, index: Array, heads: Array, group: int) -> Array | None:
    """The least damaging choice of a group for each of `heads`; None if one would be damaged more than now."""
    open_to = np.where(problem.groups[heads] == group, problem.damage[heads], np.inf)
    to = open_to.argmin(1)
    rows = np.arange(len(heads))
    return to if (open_to[rows, to] <= problem.damage[heads, index[heads]]).all() else None


def _change(problem: Problem, index: Array, heads: Array, to: Array, freed: float) -> float:
    return float((problem.cost[heads, to] - problem.cost[heads, index[heads]]).sum()) - freed


def back_off(problem: Problem, solution: Solution, n: int) -> Solution:
    """Make dense again the n heads with the largest damage for what they save."""
    rows = np.arange(len(solution.index))
    damage = problem.damage[rows, solution.index]
    saved = _shared(problem, 0 * solution.index) - _shared(problem, solution.index)
    ratio = np.where(saved > 0, damage / np.where(saved > 0, saved, 1.0), np.inf)
    ratio[solution.index == 0] = -np.inf
    index = solution.index.copy()
    worst = np.argsort(-ratio, kind="stable")[:n]
    index[worst] = 0
    return problem.of(index)


def _shared(problem: Problem, index: Array) -> Array:
    """Each head's own cost, and its part of what its KV head's cache costs. (H,)"""
    rows = np.arange(len(index))
    own = problem.cost[rows, index]
    if not problem.key_cost.any():
        return own
    heads_of = np.bincount(problem.kv)
    read = problem.reading
    return own + (problem.key_cost / heads_of)[problem.kv] * kept_keys(read.span[rows, index], read.length)
