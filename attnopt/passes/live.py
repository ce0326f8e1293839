"""Read of a written cache the part that was written: the fixed buffers of transformers' StaticCache, above all.

    k' = index_copy(keys, 2, at, k)                               k' = index_copy(keys, 2, at, k)
    sdpa(q, repeat(k'), repeat(v'), mask (B, 1, T, C))     ->     live_attention(q, k', v', mask, scale)
    k' = cat([past, k], 2); sdpa(one query, k', v')        ->     live_attention(q, k', v', None, scale)

The buffers have room for all that may come, and are read whole at every step, under a mask that is mostly an input:
nothing in the graph says where it ends. The operator looks for the first and the last column that is kept when it runs,
which is right for every mask. What writes the buffers stays as it was, and in place (tests/test_cache_in_place.py).
A cache that is concatenated has no slots to leave out: of it the compiled kernel reads every key once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from attnopt import ops  # noqa: F401  (registers the operator)
from attnopt.codegen import native
from attnopt.codegen.native import MOST_ROWS
from attnopt.ir import Region
from attnopt.passes.exact_forms import mask_read_once, varies_over
from attnopt.passes.program import Builder, Program
from attnopt.patterns import checked, same

# Caches whose tensors have more room than tokens. "ring": full or not, a mask says what counts.
FIXED = ("write", "ring")


def on_live_columns(program: Program, region: Region) -> bool:
    """Whether the operator may stand for the site: buffers of a fixed size under a mask that all heads share.

    Without a mask every column counts. Under ``is_causal`` one new query keeps key 0 alone.
    """
    masked = any(not checked(term) for term in region.match.terms) and not region.match.causal
    known = program.device == "cpu" or (program.device == "cuda" and few_rows(region))
    if not (known and masked and region.site.kv in FIXED and not program.needs_grad):
        return False
    varies = varies_over(region)
    return "j" in varies and "h" not in varies


def on_grown(program: Program, region: Region) -> bool:
    """Whether the operator may stand for one query on the CPU against keys that grow, with a kernel compiled for it."""
    site = region.site
    one = program.device == "cpu" and not program.needs_grad and same(region.q.meta["val"].shape[2], 1)
    if not (one and site.kv == "cat" and site.heads and site.scale > 0 and few_rows(region)):
        return False
    # A causal call keeps key 0 alone for its one query; a mask without columns of its own has not those of the keys.
    varies, masked = varies_over(region), any(not checked(term) for term in region.match.terms)
    shared = not region.match.causal and "h" not in varies and ("j" in varies or not masked)
    return shared and native.takes(getattr(torch, site.dtype), site.head_dim, site.head_dim_v)


def few_rows(region: Region) -> bool:
    """Whether the query heads of a KV head have few rows together, for which a GPU repeats the mask."""
    tokens = region.q.meta["val"].shape[2]
    return isinstance(tokens, int) and tokens * region.site.heads <= MOST_ROWS * max(region.site.kv_heads, 1)


def lower_live(program: Program) -> Callable[[Region], Node]:
    """A builder of the operator's call for one region."""

    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        mask = mask_read_once(program, builder, region, hidden=True)
        op = torch.ops.attnopt.live_attention.default
        return builder.call(op, region.q, region.k, region.v, mask, region.site.scale)

    return build
