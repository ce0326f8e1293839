"""Whether a rewrite that is right is also cheaper: what was measured, as conditions under which it is not.

Ratios are CPU time of what the site costs as it is over that of the rewrite, one attention of 8 heads of 64 compiled by
inductor on one thread of a Xeon with AMX, torch 2.13 (benchmarks/lowerings.py). Sizes known only at run time count as
what they were in the first call: a wrong guess costs time, never the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnopt import settings
from attnopt.ir import Region

ANY = ("float32", "bfloat16", "float16", "float64")
LOW = ("bfloat16", "float16")
HIGH = ("float32", "float64")


@dataclass(frozen=True)
class Facts:
    """What the time of an attention depends on. found: the pattern, "sdpa" or a written-out one."""

    found: str
    dtype: str
    queries: int
    keys: int
    dim: int
    dim_v: int
    window: int


@dataclass(frozen=True)
class Loss:
    """A lowering, named as reports name it, and where it costs more than it saves."""

    lowering: str
    device: str
    dtypes: tuple[str, ...]
    when: Callable[[Facts], bool]
    reason: str


# SPAN, FEATURE, ...: what lowerings are called in reports, their parameters aside.
SPAN = "span kernel"
FEATURE = "SDPA is_causal, padding folded into a feature"
PADDING = "SDPA with a broadcast padding mask"
AS_IT_WAS = "SDPA with the mask as it was"

LOSSES = (
    # Over a boolean N x N mask, float32 512 keys, windows 1/16, 1/8, 1/4, 1/2: 1.12 1.09 1.23 0.81; 256 keys: 0.54 0.51
    # 0.72 0.74. bfloat16 2048 keys: 2.8 2.4 1.8 1.7.
    Loss(SPAN, "cpu", ANY, lambda f: f.keys < 512, "below 512 keys the chunks of a window cost more than its mask"),
    Loss(SPAN, "cpu", HIGH, lambda f: 4 * f.window > f.keys, "the window is more than a quarter of the keys"),
    # Over a boolean N x N mask, float32: 64 keys 0.62, 128 0.72, 256 0.77, 512 0.99. bfloat16: 2048 keys 1.78.
    Loss(FEATURE, "cpu", HIGH, lambda f: f.keys < 1024, "below 1024 keys one more feature costs more than a mask"),
    Loss(FEATURE, "cpu", LOW, lambda f: f.keys < 256, "below 256 keys one more feature costs more than a mask"),
    # Written out, float32, one query of 512 keys, 8 over 2 heads: 0.75 to 0.81; bfloat16, 2048 keys: 1.11 to 1.26.
    Loss(PADDING, "cpu", HIGH, lambda f: f.queries == 1, "for one query the products are cheaper written out"),
    Loss(AS_IT_WAS, "cpu", HIGH, lambda f: f.queries == 1, "for one query the products are cheaper written out"),
    # Written out, float32, 8 keys: 0.85 to 0.95; 32 keys: 0.89 to 1.14; 64 keys: 1.06 to 1.21.
    Loss(PADDING, "cpu", HIGH, lambda f: f.keys < 32, "below 32 keys a call costs more than it saves"),
    Loss(AS_IT_WAS, "cpu", HIGH, lambda f: f.keys < 32, "below 32 keys a call costs more than it saves"),
)  # fmt: skip


def likely(size: Any) -> int:
    """A size, or what it was when the graph was traced; a large one where nothing is known."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2**20


def facts_of(region: Region) -> Facts:
    site = region.site
    queries, keys = (likely(x.meta["val"].shape[2]) for x in (region.q, region.k))
    return Facts(
        site.pattern, site.dtype, queries, keys, site.head_dim, site.head_dim_v, site.mask.window or 0,
    )  # fmt: skip


def against(lowering: str, device: str, region: Region) -> str:
    """Why a lowering does not pay for this site on this device; empty where it does, or nothing is known against it."""
    if settings.always():
        return ""
    facts = facts_of(region)
    for loss in LOSSES:
        named = lowering == loss.lowering or lowering.startswith(loss.lowering + ",")
        if named and device == loss.device and facts.dtype in loss.dtypes and loss.when(facts):
            return loss.reason
    return ""
