"""What a step of decoding reads of the cache, where heads select: for the costs of a problem, and for a plan's own.

Spans of the query heads of one KV head are read as their union. A head that selects reads its own keys, as often as
there are such heads; what finding them takes is once for the query heads of a KV head. Everything is in keys, with
their values, that are read in order: what others take as much as, a cost table tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnopt.candidates._tokens import with_sources
from attnopt.codegen import native
from attnopt.cost import Costs, itemsize
from attnopt.ir import DENSE, Choice, Share, Site
from attnopt.planner.knapsack import EVERY, Choices, code_of, kept_keys, unions
from attnopt.planner.tried import shares_at
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted


def key_bytes(site: Site) -> int:
    """Bytes of K and V that one KV head keeps of a token."""
    return (site.head_dim + site.head_dim_v) * itemsize(site.dtype)


def read_of(table: Costs, site: Site, choice: Choice, length: int, share: Share | None) -> tuple[int, float]:
    """What a head reads at a step: the code of what is shared in its KV head, a span, or in the place of a sink the
    keys that selecting takes; and the keys that it reads by itself, or what its part of the call takes as long as."""
    candidate, params = CANDIDATES[choice.candidate], dict(choice.params)
    if not candidate.decoded:
        sink, window = candidate.span(params, length, site.mask.window)
        return code_of(sink, window, length), 0.0 if candidate.far == "gone" else table.overhead(length)
    found, own = candidate.selecting(table, params, length, site.head_dim, share)
    return math.ceil(found) << 32, own


def layer_keys(
    table: Costs, site: Site, choices: Sequence[Choice], length: int, fitted: Fitted | None = None
) -> float:  # fmt: skip
    """What a step of one layer with these choices reads, for each of its KV heads together."""
    shares = [shares_at(fitted, site.name, c, length, site.heads)[h] for h, c in enumerate(choices)]
    read = [read_of(table, site, c, length, share) for c, share in zip(choices, shares, strict=True)]
    selects = any(CANDIDATES[c.candidate].decoded for c in choices)
    kv = np.arange(site.heads) // (site.heads // site.kv_heads)
    shared = kept_keys(unions(np.array([code for code, _ in read]), kv), EVERY if selects else length)
    return float(shared.sum()) + sum(own for _, own in read)


def step_share(
    choices: Choices, sites: Sequence[Site], tables: Mapping[str, Costs], length: int, fitted: Fitted | None
) -> float:  # fmt: skip
    """What a step with these choices takes of a dense one, dense heads that others read included, which select too."""
    layers = with_sources([choices[s.name] for s in sites], [s.heads for s in sites])
    planned = dense = 0.0
    for site, layer in zip(sites, layers, strict=True):
        table = tables[site.name]
        unit = table.key_time or key_bytes(site)
        planned += unit * layer_keys(table, site, layer or (DENSE,) * site.heads, length, fitted)
        dense += unit * layer_keys(table, site, (DENSE,) * site.heads, length)
    return planned / dense


def fallen_back(choices: Choices, sites: Sequence[Site], target: str) -> tuple[str, ...]:
    """Where heads that select run without a kernel of their own on a target, and what that means; a line for each
    reason."""
    found: dict[str, list[str]] = {}
    for site in sites:
        heads = [c for c in choices[site.name] if CANDIDATES[c.candidate].decoded]
        dtype = getattr(torch, site.dtype)
        if not heads or target == "triton":
            continue
        if target != "cpu":
            why = "which without Triton look at every key in each step, also where nothing is selected"
        elif not native.takes(dtype, site.head_dim, site.head_dim_v, "tokens"):
            reason = native.unusable(dtype, "tokens") or f"heads of {site.head_dim} and {site.head_dim_v} features"
            why = f"which copy every key where they select: the compiled kernel cannot be used, {reason}"
        else:
            continue
        found.setdefault(why, []).append(site.name)
    more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in found.items()}
    return tuple(
        f"{names[0]}{more[why]}: tokens are selected by torch's operators, {why}." for why, names in found.items()
    )
