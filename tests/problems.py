"""Planner problems: of any damage and cost, and like those of a profile."""

from __future__ import annotations

import itertools

import numpy as np

from attnopt.cost import kept_pairs
from attnopt.ir import DENSE, Choice
from attnopt.planner import Problem
from attnopt.planner.knapsack import Array, code_of

LENGTH = 8192
SPANS = [(0, LENGTH), *itertools.product((0, 4, 16), (32, 64, 96, 128, 256, 384, 512, 1024, 2048, 4096))]


def spans_problem(
    damage: Array, cost: Array, sites: int, group_cost: float = 0.0, kv_heads: int = 0,
    spans: list[tuple[int, int]] = SPANS, key_cost: float = 0.0,
) -> Problem:  # fmt: skip
    """damage (H, C), cost (H, C) of equal sites; kv_heads: KV heads of a site, 0 for a problem without a cache."""
    count = len(damage)
    shared = kv_heads * sites
    cache = {
        "kv": np.repeat(np.arange(shared), count // shared),
        "key_cost": np.full(shared, key_cost),
        "key_bytes": np.full(shared, 2.0),
    } if kv_heads else {}  # fmt: skip
    return Problem(
        heads=tuple((f"layers.{h * sites // count}", h % (count // sites)) for h in range(count)),
        choices=(DENSE, *(Choice.of("sink_window", {"sink": s, "alpha": w, "beta": 0.0}) for s, w in spans[1:])),
        damage=damage,
        cost=cost,
        span=np.tile(np.array([code_of(s, w, LENGTH) for s, w in spans]), (count, 1)),
        site=np.arange(count) * sites // count,
        group_cost=np.full(sites, group_cost),
        length=LENGTH,
        **cache,
    )


def profile_like(
    sites: int, heads: int, seed: int, group_cost: float = 0.05, kv_heads: int = 0, prefill: float = 1.0,
    key_cost: float = 0.0, spans: list[tuple[int, int]] = SPANS,
) -> Problem:  # fmt: skip
    """Damage that falls as a power of the window, with a scale, a power and a use of sinks of each head's own; cost by
    kept pairs above a least cost. prefill: weight of that cost beside `key_cost` of a cached key."""
    rng = np.random.default_rng(seed)
    count = sites * heads
    sinks, windows = np.array(spans, dtype=np.float64).T
    scale, power = np.exp(rng.normal(-9, 2.5, (count, 1))), rng.uniform(0.3, 2, (count, 1))
    eased = 1 / (1 + 3 * rng.uniform(0, 1, (count, 1)) * np.minimum(sinks, 4) / 4)
    damage = scale * ((LENGTH / windows) ** power - 1) * eased * np.exp(rng.normal(0, 0.05, (count, len(spans))))
    damage[:, 0] = 0
    pairs = np.array([kept_pairs(LENGTH, s, w) for s, w in spans]) / kept_pairs(LENGTH, 0, LENGTH)
    cost = prefill * np.where(windows < LENGTH, np.maximum(pairs, 0.04) + 0.02, 1.0)
    return spans_problem(damage, np.tile(cost, (count, 1)), sites, group_cost, kv_heads, spans, key_cost)
