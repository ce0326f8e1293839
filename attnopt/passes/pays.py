"""Whether a rewrite that is right is also cheaper: what was measured, as conditions under which it is not.

Ratios are CPU time of what the site costs as it is over that of the rewrite, one attention of 8 heads of 64 compiled by
inductor on one thread of a Xeon with AMX, torch 2.13 (benchmarks/lowerings.py). Sizes known only at run time count as
what they were in the first call: a wrong guess costs time, never the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnopt import settings
from attnopt.codegen import native
from attnopt.ir import Region

ANY = ("float32", "bfloat16", "float16", "float64")
LOW = ("bfloat16", "float16")
HIGH = ("float32", "float64")


@dataclass(frozen=True)
class Facts:
    """What the time of an attention depends on. wide: heads over 128, or
    of unequal sizes; written: whether the products are written out; summed: whether a mask and a bias have to be added
    up before the call; training: whether gradients are needed; held: bytes of the keys and values of a KV head;
    grouped: whether query heads share KV heads; native: whether the compiled kernel of spans serves the site."""

    dtype: str
    queries: int
    keys: int
    window: int
    wide: bool
    written: bool
    summed: bool
    training: bool = False
    held: int = 0
    grouped: bool = False
    native: bool = False


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
RUNS = "SDPA is_causal on each sample's run of real tokens"
PACKED = "SDPA, query heads packed into rows"
PADDING = "SDPA with a broadcast padding mask"
AS_IT_WAS = "SDPA with the mask as it was"
# Nothing is known against it: it has not been timed on a GPU, and no other device takes it.
PRINTED = "kernel with the mask printed into it"
DOCUMENTS = "documents apart"
LIVE = "attention that reads the filled slots"
GROWN = "compiled kernel of one query"

LOSSES = (
    # Over a boolean N x N mask; windows of 1/16, 1/8, 1/4 and 1/2 of the keys. The compiled kernel, 8 heads over 2.
    # float32: 128 keys 0.64 0.66 0.67 0.63; 256 keys 1.35 1.34 1.20 1.07; 512 keys 2.9 2.6 2.1 1.8; 2048 keys 8.3 6.1
    # 4.1 2.7. bfloat16: 256 keys 0.81 0.81 0.76 0.73; 512 keys 1.87 1.78 1.54 1.32; 2048 keys 6.2 4.9 3.7 2.5.
    Loss(SPAN, "cpu", HIGH, lambda f: f.native and f.keys < 256, "below 256 keys it costs more than a mask"),
    Loss(SPAN, "cpu", LOW, lambda f: f.native and f.keys < 512, "below 512 keys it costs more than a mask"),
    # Out of torch's operators.
    # float32: 256 keys 0.54 0.51 0.72 0.74; 512 keys 1.12 1.09 1.23 0.81; 2048 keys 4.3 3.5 2.5 1.9.
    # bfloat16: 512 keys 0.59 0.57 0.81 0.78; 1024 keys, 1/16 and 1/4, 1.32 1.33; 2048 keys 2.8 2.4 1.8 1.7.
    # Of 8 heads over 2, whose rows make larger products: float32, 512 keys 2.43 1.93 1.60 1.19; 768 keys 3.6 2.9 2.1
    # 1.4. bfloat16, 512 keys 1.05 0.97 0.93 0.71; 768 keys 1.73 1.73 1.52 1.28. Over 4: 1.90 1.72 1.52 1.09 and 2.4 2.3
    # 1.9 1.4; 1.03 0.94 1.10 0.77 and 1.42 1.36 1.24 1.20.
    Loss(SPAN, "cpu", HIGH, lambda f: not f.native and f.keys < 512, "below 512 keys its chunks cost more than a mask"),
    Loss(SPAN, "cpu", LOW, lambda f: not f.native and f.keys < 768, "below 768 keys its chunks cost more than a mask"),
    Loss(
        SPAN,
        "cpu",
        LOW,
        lambda f: not f.native and f.keys < 1024 and not f.grouped,
        "below 1024 keys its chunks cost more than a mask where no heads share keys",
    ),
    Loss(
        SPAN,
        "cpu",
        ANY,
        lambda f: not f.native and f.keys < 1024 and (2 if f.grouped else 4) * f.window > f.keys,
        "its window is over a quarter of the keys, or over half where heads share them",
    ),
    # With the backward pass (benchmarks/cpu_backward.py), same windows.
    # float32: 512 keys 0.99 0.93 0.84 0.76; 1024 keys 1.65 1.47 1.31 1.14; 2048 keys 3.1 2.6 2.1 1.5.
    # bfloat16: 512 keys 0.70 0.69 0.71 0.80; 1024 keys 1.23 1.06 0.89 0.77; 2048 keys 2.3 1.8 1.6 1.3.
    Loss(
        SPAN, "cpu", ANY, lambda f: f.training and f.keys < 1024, "below 1024 keys its gradient costs more than a mask"
    ),
    Loss(
        SPAN,
        "cpu",
        LOW,
        lambda f: f.training and f.keys < 2048 and 8 * f.window > f.keys,
        "in training its window is over an eighth of the keys",
    ),
    # Over a boolean N x N mask; 1, 4 and 16 documents of equal length. float32: 256 keys 0.85 1.29 1.29; 512 keys 1.00
    # 2.21 3.18; 1024 keys 1.46 2.96 5.08; 2048 keys 1.86 3.67 7.62. bfloat16: 256 keys 0.71 0.77 0.70; 512 keys 1.02
    # 1.78 1.49; 1024 keys 1.46 2.46 3.07. With the backward pass, float32: 512 keys 0.92 2.12 3.21; 1024 keys 1.28 3.03
    # 5.71. bfloat16: 512 keys 0.89 0.93 1.00; 1024 keys 1.34 2.07 1.65.
    Loss(DOCUMENTS, "cpu", ANY, lambda f: f.keys < 512, "below 512 keys its calls cost more than a mask"),
    Loss(
        DOCUMENTS,
        "cpu",
        ANY,
        lambda f: f.training and f.keys < 1024,
        "below 1024 keys its gradient costs more than a mask",
    ),
    # Over a boolean N x N mask. float32: 64 keys 0.62, 128 0.72, 256 0.77, 512 0.99, 1024 1.31, 2048 1.84. bfloat16:
    # 512 keys 0.75, 1024 1.10, 2048 1.78.
    Loss(FEATURE, "cpu", ANY, lambda f: f.keys < 1024, "below 1024 keys one more feature costs more than a mask"),
    # Over a boolean N x N mask, 8 over 2 heads of 64, a batch of 1 and of 4. float32: 128 keys 0.47 0.80, 256 keys 0.79
    # 1.11, 512 keys 1.02 1.32, 1024 keys 1.50 1.96, 2048 keys 2.17 2.57. bfloat16: 256 keys 0.61 0.86, 512 keys 1.03
    # 1.19, 1024 keys 1.36 1.78, 2048 keys 2.15 2.67. The feature, in the same run: 512 keys 0.78 to 0.91, 1024 keys
    # 1.23 to 1.35, 2048 keys 1.70 to 1.96.
    Loss(RUNS, "cpu", ANY, lambda f: f.keys < 512, "below 512 keys cutting it into runs costs more than a mask"),
    # Over a grouped call, which reads keys and values once a query head; one query, 8 over 2 heads. float32, 2048 keys,
    # 1.5. float16 1.8 to 2.6 for 8 keys, 3.1 to 4.2 from 512 on. bfloat16, by what the keys and values of a KV head
    # take: up to 1 MiB 1.02 to 1.15 (heads of 256: 0.90), 2 MiB 1.10 to 1.21, 4 MiB 1.5 to 1.6, 8 MiB 1.6.
    Loss(
        PACKED,
        "cpu",
        ("bfloat16",),
        lambda f: not f.written and f.held < 2**21,
        "in bfloat16 a grouped call is as fast while a head's keys and values take less than 2 MiB",
    ),
    # Over the form that would be taken else (packed for one query of grouped heads, else one call with the mask as it
    # was) where every slot is filled, at its worst: what is not filled costs nothing. 8 over 2 heads and 8 over 8.
    # float32, one query: 256 slots 0.81 0.85, 512 slots 0.82 0.87, 1024 slots 0.96 1.22, 2048 slots 1.00 1.09; four:
    # 0.85 0.90, 0.98 1.00, 1.09 1.21, 1.34 1.21; 64: 0.68 0.78, 0.81 0.84, 0.88 0.98, 0.89 1.05. bfloat16, one query:
    # 0.92 0.79, 0.99 0.86, 0.92 0.88, 1.12 1.05; four: 0.93 0.98, 1.21 1.05, 1.44 1.22, 1.66 1.48; 64: 0.61 0.71, 0.73
    # 0.88, 0.83 1.08, 1.02 1.15.
    Loss(LIVE, "cpu", ANY, lambda f: f.keys < 1024, "below 1024 slots to look for those that are filled costs as much"),
    # Over SDPA, packed where heads share keys, at 1024, 2048, 4096, 8192 and 16384 keys. 8 over 2 heads, float32: heads
    # of 64 1.15 1.49 1.39 1.42 1.55, of 128 1.07 1.20 1.26 1.29 1.08; bfloat16: of 64 1.26 1.26 1.41 1.82 2.02, of 128
    # 1.27 1.46 1.82 1.78 1.62. 8 over 8, float32: of 64 1.05 1.14 1.12 1.25 1.22, of 128 0.91 0.98 0.90 1.03 0.94;
    # bfloat16: of 64 0.80 0.89 0.99 1.01 0.89, of 128 0.89 1.01 1.34 1.40 1.40. 512 keys 0.63 to 1.17.
    Loss(GROWN, "cpu", ANY, lambda f: f.keys < 1024, "below 1024 keys a call of SDPA is as fast"),
    Loss(
        GROWN,
        "cpu",
        ("float32",),
        lambda f: not f.grouped and (f.keys < 2048 or f.held > 512 * f.keys),
        "in float32 SDPA is as fast where no heads share keys, below 2048 of them or of more than 64 features",
    ),
    Loss(
        GROWN,
        "cpu",
        LOW,
        lambda f: not f.grouped and (f.keys < 4096 or f.held < 512 * f.keys),
        "in half precision SDPA is as fast where no heads share keys, below 4096 of them or of less than 128 features",
    ),
    # Over written out, one query, 8 over 2 heads. float32: 512 keys 0.75 to 0.81, 2048 keys 0.76 to 0.85. bfloat16:
    # 1.11 to 1.26. Without a mask 2.3, and packed 1.17 to 3.5: those are not refused.
    Loss(PADDING, "cpu", HIGH, lambda f: f.written and f.queries == 1, "one query is cheaper written out"),
    Loss(AS_IT_WAS, "cpu", HIGH, lambda f: f.written and f.queries == 1, "one query is cheaper written out"),
    # Over written out. float32: 8 keys 0.85 to 0.95, 32 keys 0.89 to 1.14, 64 keys 1.01 to 1.21. bfloat16: 8 keys 1.2
    # to 1.5.
    Loss(PADDING, "cpu", HIGH, lambda f: f.written and f.keys < 32, "below 32 keys the call costs more than it saves"),
    Loss(
        AS_IT_WAS, "cpu", HIGH, lambda f: f.written and f.keys < 32, "below 32 keys the call costs more than it saves"
    ),
    # Over written out, float32, 512 keys, heads of 256: 0.95 to 1.00; keys of 192 and values of 128, made equal: 0.88.
    # bfloat16 1.5 to 2.5.
    Loss(AS_IT_WAS, "cpu", HIGH, lambda f: f.written and f.wide and f.keys < 1024, "its heads are too wide to gain"),
    # Over written out, where the sum of mask and bias has to be made first. float32: 256 keys 0.90, 512 0.93, 1024
    # and 2048 1.05. bfloat16: 2048 keys 1.98. A bias that is there already: float32 256 keys 1.3, 512 keys 1.8.
    Loss(AS_IT_WAS, "cpu", HIGH, lambda f: f.summed and f.keys < 1024, "the sum of mask and bias costs what it saves"),
)


def likely(size: Any) -> int:
    """A size, or what it was when the graph was traced; a large one where nothing is known."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2**20


def facts_of(region: Region, training: bool = False, sizes: tuple[int, int] | None = None) -> Facts:
    """What decides; `sizes`: queries and keys in place of those that were traced."""
    site = region.site
    queries, keys = sizes or (likely(region.q.meta["val"].shape[2]), likely(region.k.meta["val"].shape[2]))
    wide = site.head_dim > 128 or site.head_dim != site.head_dim_v
    summed = site.bias is not None and len(region.match.terms) > 1
    written = site.pattern != "sdpa"
    held = keys * (site.head_dim + site.head_dim_v) * region.k.meta["val"].element_size()
    grouped = site.heads > site.kv_heads
    # Asked for windows alone: the first answer compiles the kernel.
    windowed = site.mask.window is not None
    known = windowed and native.takes(getattr(torch, site.dtype), site.head_dim, site.head_dim_v)
    return Facts(
        site.dtype, queries, keys, site.mask.window or 0, wide, written, summed, training, held, grouped, known
    )


def against(
    lowering: str, device: str, region: Region, training: bool = False, sizes: tuple[int, int] | None = None
) -> str:
    """Why a lowering does not pay for this site on this device; empty where it does, or nothing is known against it."""
    if settings.always():
        return ""
    facts = facts_of(region, training, sizes)
    for loss in LOSSES:
        named = lowering == loss.lowering or lowering.startswith(loss.lowering + ",")
        if named and device == loss.device and facts.dtype in loss.dtypes and loss.when(facts):
            return loss.reason
    return ""
