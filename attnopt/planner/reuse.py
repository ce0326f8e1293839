"""Which layers select tokens, and which read what an earlier one selected.

A head that reads another layer's tokens (`behind` attentions before) needs the head of the same number there to select
as many in every step, as it was tried, or to be dense. The knapsack knows no such conditions, so they are settled
before it: along the layers, the heads of one number form a chain, and at a price of damage the best chain is found
exactly, by dynamic programming over the layer that selected last. What no longer fits is closed; the rest is the
knapsack's to choose, dense always among it.

TidalDecode and DELTA name such layers by hand for each model; here what they damage was measured at every distance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from attnopt.planner.knapsack import Array, Limits, Problem, kept_keys
from attnopt.planner.problem import closed
from attnopt.registry import CANDIDATES

# Nats for a unit of cost, wider than any problem's, and how often the span between is halved: to a thousandth.
PRICES = 1e-12, 1e12
STEPS = 16


@dataclass(frozen=True, eq=False)
class Links:
    """The choices that select or read tokens, by column: `count` of tokens, 0 for every other choice; `behind`;
    `provides`, bool: whether it selects in every step, which is what reading another layer's tokens was tried with."""

    count: Array
    behind: Array
    provides: Array

    @property
    def counts(self) -> list[int]:
        """The numbers of tokens that some choice reads from an earlier layer."""
        return sorted({int(n) for n in self.count[self.behind > 0]})


def links_of(problem: Problem) -> Links:
    count, behind = (np.zeros(len(problem.choices), dtype=np.int64) for _ in range(2))
    provides = np.zeros(len(problem.choices), dtype=bool)
    for c, choice in enumerate(problem.choices):
        params = dict(choice.params)
        if "behind" in params and CANDIDATES[choice.candidate].decoded:
            count[c], behind[c] = params["k"], params["behind"]
            provides[c] = (params["every"], params["similar"], params["behind"]) == (1, 0, 0)
    return Links(count, behind, provides)


def settled(problem: Problem, nats: float) -> Problem:
    """The problem with its links settled for plans of about so much damage; itself where nothing is linked."""
    links = links_of(problem)
    if not links.counts:
        return problem
    rows, cost = chains_of(problem), shared_cost(problem)
    low, high = PRICES
    open_to = np.ones(problem.damage.shape, dtype=bool)
    for _ in range(STEPS):
        price = float(np.sqrt(low * high))
        fits = allowed(rows, links, solve(rows, problem.damage, price * cost, links), len(problem.heads))
        chosen = np.where(fits, problem.damage + price * cost, np.inf).argmin(1)
        if problem.damage[np.arange(len(chosen)), chosen].sum() <= nats:
            low, open_to = price, fits
        else:
            high = price
    return replace(problem, damage=np.where(open_to, problem.damage, np.inf))


def chains_of(problem: Problem) -> Array:
    """Rows of the problem, (layers, most heads of a layer): layer l's head of each number; -1 where it has none."""
    sites = list(dict.fromkeys(site for site, _ in problem.heads))
    rows = np.full((len(sites), 1 + max(head for _, head in problem.heads)), -1)
    for row, (site, head) in enumerate(problem.heads):
        rows[sites.index(site), head] = row
    return rows


def shared_cost(problem: Problem) -> Array:
    """Each head's own cost of each choice, and its part of what its KV head's cache costs, (H, C)."""
    if not len(problem.kv):
        return problem.cost
    part = (problem.key_cost / np.bincount(problem.kv))[problem.kv]
    read = problem.reading
    return problem.cost + part[:, None] * kept_keys(read.span, read.length)


@dataclass(frozen=True, eq=False)
class Roles:
    """Of every layer and head number (layers, n): provides: of how many tokens later layers read its selection, 0 for
    none; source, tokens: the layer whose selection is there to read and of how many, -1 and 0 for none."""

    provides: Array
    source: Array
    tokens: Array


def solve(rows: Array, damage: Array, priced: Array, links: Links) -> Roles:
    """The best chain for each head number, where a choice costs its damage and `priced` (H, C)."""
    layers, heads = rows.shape
    value = np.where(rows[..., None] >= 0, (damage + priced)[rows], 0.0)  # (layers, heads, C)
    free = value[..., links.behind == 0].min(-1)
    states = [(count, s) for s in range(layers) for count in links.counts]
    # best[state]: of the layers up to here, the last to select being `state`; None: none did, or for nobody.
    best: dict[tuple[int, int] | None, Array] = {None: np.zeros(heads)}
    came: dict[tuple[int, int], list[tuple[int, int] | None]] = {}
    reads = {state: np.zeros((layers, heads), dtype=bool) for state in states}
    for layer in range(layers):
        keys = list(best)
        every = np.stack([best[key] for key in keys])
        before, origin = every.min(0), every.argmin(0)
        for key in keys:
            if key is None:
                best[key] = best[key] + free[layer]
                continue
            here = (links.count == key[0]) & (links.behind == layer - key[1])
            shared = value[layer][:, here].min(-1) if here.any() else np.full(heads, np.inf)
            reads[key][layer] = shared < free[layer]
            best[key] = best[key] + np.minimum(shared, free[layer])
        for count in links.counts:
            provides = links.provides & (links.count == count)
            provides[0] = True
            best[count, layer] = before + value[layer][:, provides].min(-1)
            came[count, layer] = [keys[n] for n in origin]
    return _roles(rows, best, came, reads)


def _roles(
    rows: Array, best: dict[tuple[int, int] | None, Array], came: dict[tuple[int, int], list[tuple[int, int] | None]],
    reads: dict[tuple[int, int], Array],
) -> Roles:  # fmt: skip
    layers, heads = rows.shape
    provides, tokens = np.zeros((2, layers, heads), dtype=np.int64)
    source = np.full((layers, heads), -1)
    keys = list(best)
    ends = np.stack([best[key] for key in keys]).argmin(0)
    for head in range(heads):
        state, end = keys[ends[head]], layers
        while state is not None:
            count, first = state
            if reads[state][first:end, head].any():
                provides[first, head] = count
                source[first + 1 : end, head], tokens[first + 1 : end, head] = first, count
            state, end = came[state][head], first
    return Roles(provides, source, tokens)


def allowed(rows: Array, links: Links, roles: Roles, heads: int) -> Array:
    """Which choices fit the roles, bool (H, C): of a layer that others read, dense and selecting as many tokens in each
    step; of the others everything but to read what is not there."""
    fits = np.ones((heads, len(links.count)), dtype=bool)
    for layer, head in zip(*np.nonzero(rows >= 0), strict=True):
        row, source, provides = rows[layer, head], roles.source[layer, head], roles.provides[layer, head]
        there = (links.count == roles.tokens[layer, head]) & (links.behind == layer - source) & (source >= 0)
        fits[row] = (links.behind == 0) | there
        if provides:
            fits[row] = (links.count == provides) & links.provides
            fits[row, 0] = True
    return fits


def within_memory(problem: Problem, limits: Limits) -> Problem:
    """Without heads that select tokens, where the cache's memory is limited: they keep every key."""
    if limits.memory is None:
        return problem
    heads: dict[str, list[int]] = {}
    for site, head in problem.heads:
        heads.setdefault(site, []).append(head)
    kept = closed(problem, heads, [c for c in problem.choices if CANDIDATES[c.candidate].decoded])
    # What is left reads what it keeps.
    return replace(kept, reads=np.zeros((0, 0), dtype=np.int64))
