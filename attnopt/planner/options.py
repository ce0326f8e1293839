"""Heads that are decided together, and their joint choices worth considering.

What must be decided together depends on what a cost shares. Nothing shared: every head by itself. A cache: the query
heads of one KV head, for which all unions are enumerated and each head takes the best choice inside the union. A fixed
cost or a limit of distinct spans in a layer: the heads of a site, whose set of spans is improved by adding, dropping
and swapping spans at each of many prices (facility location; Arya et al., "Local search heuristics for k-median and
facility location problems", SIAM J. Comput. 33, 2004).

A "span" here is a group of `Problem.groups`: two of one window whose far parts differ are two. Heads that are gone are
in none: that choice is free of fixed costs and of limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attnopt.planner.knapsack import GONE, Array, Limits, Problem, kept_keys, within

# Prices tried for the joint choices of a site or KV head, spread over the prices at which its heads would move; more
# where there are few items, since a single option is then a larger part of the whole.
PRICES = 40
MOST_PRICES = 160
LEAST_PRICES = 12
OPTIONS = 1280
# More spans than this in one layer were never worth their fixed cost.
MOST_SPANS = 8


@dataclass(frozen=True, eq=False)
class Items:
    """I items and their options, padded with inf to O. damage, cost, memory (I, O); heads (I, n); index (I, O, n):
    the choice of each of its heads. Every head is in one item."""

    heads: Array
    index: Array
    damage: Array
    cost: Array
    memory: Array


def items_of(problem: Problem, limits: Limits, memory_prices: Sequence[float] = (0.0,)) -> list[Items]:
    """The items of a problem. memory_prices: cost of a cached byte, several where memory is limited. What is shared of
    a KV head is what decoding reads of its cache."""
    problem = problem.reading
    fixed = limits.spans is not None or bool((problem.group_cost > 0).any())
    cached = bool(problem.key_cost.any()) or any(memory_prices)
    if not fixed and not cached:
        return [_alone(problem)]
    return [_together(batch, fixed, limits.spans, memory_prices) for batch in _batches(problem, split=not fixed)]


def _alone(problem: Problem) -> Items:
    count, choices = problem.damage.shape
    allowed = np.isfinite(problem.damage)
    index = np.broadcast_to(np.arange(choices)[None, :, None], (count, choices, 1))
    cost = np.where(allowed, problem.cost, np.inf)
    return Items(np.arange(count)[:, None], index, problem.damage, cost, np.zeros_like(cost))


@dataclass(frozen=True, eq=False)
class _Batch:
    """B items of n heads each that know the same S spans; G KV heads in each. damage, cost (B, n, S): of the mildest
    choice of a span; choice (B, n, S): which that is; state (B, n, S): bytes it keeps besides keys. fixed (B,);
    key_cost, key_bytes (B, G); kept (U,): keys of each union; inside (U, S). dense, gone: the columns of the dense span
    and of heads without attention, -1 where there are none."""

    heads: Array
    damage: Array
    cost: Array
    choice: Array
    state: Array
    fixed: Array
    key_cost: Array
    key_bytes: Array
    span_keys: Array
    kept: Array
    inside: Array
    dense: int
    gone: int


def _batches(problem: Problem, split: bool) -> Iterator[_Batch]:
    """Items of one shape together. split: KV heads rather than sites are items."""
    kv = problem.kv if len(problem.kv) else np.arange(len(problem.heads))
    key_cost = problem.key_cost if len(problem.key_cost) else np.zeros(kv[-1] + 1)
    key_bytes = problem.key_bytes if len(problem.key_bytes) else np.zeros(kv[-1] + 1)
    owner = kv if split else problem.site
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    shapes: dict[tuple[int, int, bytes, bytes], list[Array]] = {}
    groups, states = problem.groups, problem.states
    for heads in np.split(np.arange(len(owner)), first[1:]):
        sharing = int((kv[heads] == kv[heads[0]]).sum())
        shape = len(heads), sharing, problem.span[heads[0]].tobytes(), groups[heads[0]].tobytes()
        shapes.setdefault(shape, []).append(heads)
    for (_, sharing, _, _), members in shapes.items():
        heads = np.stack(members)
        known, at, columns = np.unique(groups[heads[0, 0]], return_index=True, return_inverse=True)
        codes = problem.span[heads[0, 0], at]
        damage = np.full((*heads.shape, len(codes)), np.inf)
        cost, choice = np.zeros_like(damage), np.zeros(damage.shape, dtype=np.int64)
        state = np.zeros_like(damage)
        for c, s in enumerate(columns):
            better = problem.damage[heads, c] < damage[..., s]
            damage[..., s] = np.where(better, problem.damage[heads, c], damage[..., s])
            cost[..., s] = np.where(better, problem.cost[heads, c], cost[..., s])
            choice[..., s] = np.where(better, c, choice[..., s])
            state[..., s] = np.where(better, states[heads, c], state[..., s])
        sinks, windows = np.unique(codes >> 32), np.unique(codes & 0xFFFFFFFF)
        unions = np.array([s << 32 | w for s in sinks for w in windows])
        yield _Batch(
            heads, damage, cost, choice, state,
            np.zeros(len(heads)) if split else problem.group_cost[problem.site[heads[:, 0]]],
            key_cost[kv[heads[:, ::sharing]]], key_bytes[kv[heads[:, ::sharing]]],
            kept_keys(codes, problem.length), kept_keys(unions, problem.length),
            within(codes, unions, problem.length), int(columns[0]), 0 if known[0] == GONE else -1,
        )  # fmt: skip


def _together(batch: _Batch, fixed: bool, most: int | None, memory_prices: Sequence[float]) -> Items:
    """The best joint choices of every item at each of many prices of a unit of cost."""
    found = [np.full(batch.heads.shape, batch.dense)]
    for memory_price in memory_prices:
        key_price = batch.key_cost + memory_price * batch.key_bytes  # (B, G)
        share = np.repeat(key_price, batch.heads.shape[1] // key_price.shape[1], 1)[..., None] / (
            batch.heads.shape[1] // key_price.shape[1]
        )
        cost = batch.cost + memory_price * batch.state
        # What a head would pay by itself: its own cost, and the union's as if it were shared evenly.
        alone = cost + share * batch.span_keys
        prices = _prices(batch, alone, len(memory_prices))
        if not fixed:
            found += [_assigned(batch, batch.damage + p * cost, p[:, :, 0] * key_price)[0] for p in prices]
            continue
        slots = min(most or MOST_SPANS, len(batch.span_keys))
        weights = np.linspace(0, 1.5, 7) if len(batch.heads) < 16 and len(memory_prices) == 1 else (0.0, 0.5, 1.0)
        for weight in weights if key_price.any() else (0.0,):
            for order in (prices,) if key_price.any() else (prices, prices[::-1]):
                members = np.full((len(batch.heads), slots), -1)
                members[:, 0] = batch.dense
                for price in order:
                    judged = batch.damage + price * (cost + weight * share * batch.span_keys)
                    members = _improved(_or_gone(judged, batch.gone), price[:, 0, 0] * batch.fixed, members)
                    value, of_key = batch.damage + price * cost, price[:, :, 0] * key_price
                    picked, union = _assigned(batch, _only(value, members, batch.gone), of_key)
                    found.append(picked)
                    if union is not None:
                        # With the unions held, what is in them is free: the spans once more.
                        held = np.where(_inside(batch, union), value, np.inf)
                        again = _improved(_or_gone(held, batch.gone), price[:, 0, 0] * batch.fixed, members)
                        found.append(_assigned(batch, _only(value, again, batch.gone), of_key)[0])
    return _undominated(_items(batch, np.stack(found, 1)), with_memory=any(memory_prices))


def _prices(batch: _Batch, alone: Array, repeats: int) -> list[Array]:
    """Arrays (B, 1, 1): nats for a unit of cost, ascending, over the slopes of each item's own heads."""
    count = len(batch.heads)
    number = max(min(max(PRICES, OPTIONS // count), MOST_PRICES) // repeats, LEAST_PRICES)
    flat = (batch.heads.size, -1)
    order = hulls(batch.damage.reshape(flat), np.where(np.isfinite(batch.damage), alone, np.inf).reshape(flat))
    slopes = order.slopes.reshape(count, -1)
    if not slopes.shape[1]:
        return [np.ones((count, 1, 1))]  # every head has but one choice
    slopes = np.where(np.isfinite(slopes) & (slopes > 0), slopes, np.nan)
    # Heads with nothing but dense to choose have no slopes.
    slopes[np.isnan(slopes).all(1)] = 1.0
    quantiles = np.nanquantile(slopes, np.linspace(0, 1, number - 4), axis=1)
    ends = [quantiles[0] / 16, quantiles[0] / 3, quantiles[-1] * 3, quantiles[-1] * 1e3]
    return list(np.sort(np.stack([*ends, *quantiles]), 0)[:, :, None, None])


def _improved(value: Array, fixed: Array, members: Array) -> Array:
    """Spans of each item, (B, slots) with -1 for none, after moves that lower its heads' sum of `value` (B, n, S) at
    their best span plus `fixed` (B,) for every span."""
    members = members.copy()
    items, slots = np.arange(len(members)), members.shape[1]
    spans = value.shape[2]
    for _ in range(4 * slots):
        own = np.where(members[:, None] >= 0, np.take_along_axis(value, np.maximum(members, 0)[:, None], 2), np.inf)
        count = (members >= 0).sum(1)
        now = own.min(2).sum(1) + fixed * count
        totals = []
        for slot in range(slots):
            others = np.where(np.arange(slots) == slot, np.inf, own).min(2)
            taken = members[:, slot] >= 0
            swap = np.minimum(others[..., None], value).sum(1) + (fixed * (count + ~taken))[:, None]
            drop = np.where(taken & (count > 1), others.sum(1) + fixed * (count - 1), np.inf)
            totals += [swap, drop[:, None]]
        every = np.concatenate(totals, 1)
        best = every.argmin(1)
        gains = every[items, best] < now * (1 - 1e-12) - 1e-300
        if not gains.any():
            break
        slot, span = best // (spans + 1), best % (spans + 1)
        members[items[gains], slot[gains]] = np.where(span == spans, -1, span)[gains]
    return members


def _or_gone(value: Array, gone: int) -> Array:
    """`value` (B, n, S) where a head may also go, whatever spans there are."""
    return value if gone < 0 else np.minimum(value, value[..., gone : gone + 1])


def _only(value: Array, members: Array, gone: int) -> Array:
    """`value` (B, n, S), inf but for the spans of `members` (B, slots) and for going."""
    allowed = np.zeros((len(value), value.shape[2] + 1), dtype=bool)
    allowed[np.arange(len(value))[:, None], members] = True  # -1 is the column that is cut off
    allowed[:, gone] = True
    return np.where(allowed[:, None, :-1], value, np.inf)


def _assigned(batch: _Batch, value: Array, key_price: Array) -> tuple[Array, Array | None]:
    """The span (B, n) of every head that is best together, and the union (B, G) of every KV head: `value` (B, n, S) of
    a head by itself, and `key_price` (B, G) for every key of a union. All unions are tried; inside one, heads are
    independent. No union where keys cost nothing."""
    if not key_price.any():
        return value.argmin(2), None
    count, groups = key_price.shape
    best = np.full((count, groups), np.inf)
    union = np.zeros((count, groups), dtype=np.int64)
    for u, inside in enumerate(batch.inside):
        if not inside.any():
            continue
        total = value[..., inside].min(2).reshape(count, groups, -1).sum(2) + key_price * batch.kept[u]
        union = np.where(total < best, u, union)
        best = np.minimum(best, total)
    return np.where(_inside(batch, union), value, np.inf).argmin(2), union


def _inside(batch: _Batch, union: Array) -> Array:
    """(B, n, S): whether a span lies inside its KV head's union (B, G)."""
    return np.repeat(batch.inside[union], batch.heads.shape[1] // union.shape[1], 1)


def _items(batch: _Batch, spans: Array) -> Items:
    """Options from joint choices (B, O, n) of spans, with what they really damage, cost and keep."""

    def at(values: Array) -> Array:
        return np.take_along_axis(values, spans.transpose(0, 2, 1), 2).transpose(0, 2, 1)  # (B, O, n)

    count, options, heads = spans.shape
    groups = batch.key_cost.shape[1]
    gone = spans == batch.gone
    distinct = (np.diff(np.sort(spans, 2), axis=2) != 0).sum(2) - (gone.any(2) & ~gone.all(2))
    # The union over a KV head is the smallest that every one of its heads' spans lies inside.
    of_group = spans.reshape(count, options, groups, heads // groups)
    kept = np.full((count, options, groups), np.inf)
    for u, inside in enumerate(batch.inside):
        kept = np.where(inside[of_group].all(3) & (batch.kept[u] < kept), batch.kept[u], kept)
    damage = at(batch.damage).sum(2)
    cost = at(batch.cost).sum(2) + batch.fixed[:, None] * distinct + (batch.key_cost[:, None] * kept).sum(2)
    memory = (batch.key_bytes[:, None] * kept).sum(2) + at(batch.state).sum(2)
    return Items(batch.heads, at(batch.choice), damage, np.where(np.isfinite(damage), cost, np.inf), memory)


def _undominated(items: Items, with_memory: bool) -> Items:
    """The items without options that another is no worse than in damage and cost, and memory where it counts."""
    kept = []
    for damage, cost, memory in zip(items.damage, items.cost, items.memory, strict=True):
        _, order = np.unique(
            np.stack([damage, cost, memory if with_memory else 0 * cost], 1), axis=0, return_index=True
        )
        if not with_memory:
            # Ascending in damage: what is not cheaper than all before it is dominated.
            least = np.minimum.accumulate(np.concatenate([[np.inf], cost[order]]))[:-1]
            order = order[cost[order] < least]
        kept.append(order)
    most = max(map(len, kept))
    index = np.stack([np.pad(order, (0, most - len(order)), constant_values=-1) for order in kept])
    there, rows = index >= 0, np.arange(len(index))[:, None]
    damage, cost, memory = (
        np.where(there, values[rows, index], np.inf) for values in (items.damage, items.cost, items.memory)
    )
    return Items(items.heads, items.index[rows, index], damage, cost, memory)


@dataclass(frozen=True, eq=False)
class Hulls:
    """Lower convex hulls of I sets of points, padded to K corners. order (I, K): the point at each corner, from least
    damage to least cost, -1 after the last; slopes (I, K - 1): damage for a unit of cost saved, inf after the last."""

    order: Array
    slopes: Array


def hulls(damage: Array, cost: Array) -> Hulls:
    """damage, cost (I, O), inf where there is no point. Gift wrapping, all sets at once."""
    items = np.arange(len(damage))
    least = np.where(damage == damage.min(1, keepdims=True), cost, np.inf)
    at = least.argmin(1)
    order, slopes = [at], []
    while True:
        saved = cost[items, at][:, None] - cost
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = np.where(saved > 0, (damage - damage[items, at][:, None]) / saved, np.inf)
        steep = np.nanmin(np.where(np.isnan(slope), np.inf, slope), 1)
        more = np.isfinite(steep)
        if not more.any():
            break
        # Of several on one edge the farthest.
        tied = np.where(slope <= steep[:, None] * (1 + 1e-12), saved, -np.inf)
        at = np.where(more, tied.argmax(1), at)
        order.append(np.where(more, at, -1))
        slopes.append(np.where(more, steep, np.inf))
    shape = (len(damage), 0)
    return Hulls(np.stack(order, 1), np.stack(slopes, 1) if slopes else np.zeros(shape))
