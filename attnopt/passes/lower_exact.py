"""Exact mode: lower each remaining region to what computes the same, cheaper.

    sdpa(q, repeat(k), repeat(v), mask=bool N x N)  ->  sdpa(q, k, v, is_causal=True, enable_gqa=True)
    softmax(q @ k.T * s + mask) @ v                 ->  the same
    causal and pad[b, j]                            ->  sdpa on q, k, v with one more feature that hides padded keys
    sliding window                                  ->  attnopt::span_attention (reads only the window)

Nothing here changes a result beyond float tolerance, except in rows whose every key is masked: they become 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnopt.ir import Mask, Refusal, Region
from attnopt.passes.program import Builder, Program
from attnopt.passes.span import insert_span, key_padding
from attnopt.patterns import same

aten = torch.ops.aten
Build = Callable[[Region], Node]
# A score this far below the others is 0 after the soft-max in every dtype, and fits float16.
HIDDEN = -3.0e4
# Width added to the head dimension for the hiding feature.
EXTRA = 8


def sdpa(builder: Builder, region: Region, q: Node, k: Node, v: Node, mask: Node | None, causal: bool) -> Node:
    grouped = region.site.heads != region.site.kv_heads
    return builder.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=region.site.scale, enable_gqa=grouped
    )


def lower_plain(program: Program, causal: bool) -> Build:
    def build(region: Region) -> Node:
        return sdpa(Builder(program.gm, region.out), region, region.q, region.k, region.v, None, causal)

    return build


def lower_key_padding(program: Program) -> Build:
    """A (B, 1, 1, Sk) mask: the kernel broadcasts it, nothing of size Sq x Sk is made."""

    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        pad = key_padding(builder, region)
        mask = builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, pad, 1), 1)
        return sdpa(builder, region, region.q, region.k, region.v, mask, False)

    return build


def lower_causal_padding(program: Program) -> Build:
    """One more feature, 1 in q and hugely negative in a padded k, keeps the maskless causal kernel."""

    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        call = builder.call
        pad = key_padding(builder, region)
        q, k, v = region.q.meta["val"], region.k.meta["val"], region.v.meta["val"]
        dtype, heads, groups = q.dtype, region.site.heads, region.site.kv_heads
        hidden = call(aten.masked_fill.Scalar, call(aten.zeros_like.default, pad, dtype=dtype), call(aten.logical_not.default, pad), HIDDEN)
        column = call(aten.unsqueeze.default, call(aten.unsqueeze.default, hidden, 1), 3)
        column = call(aten.expand.default, column, [k.shape[0], groups, k.shape[2], 1])
        one = call(aten.new_ones.default, region.q, [q.shape[0], heads, q.shape[2], 1])
        wide_q = call(aten.constant_pad_nd.default, call(aten.cat.default, [region.q, one], 3), [0, EXTRA - 1])
        wide_k = call(aten.constant_pad_nd.default, call(aten.cat.default, [region.k, column], 3), [0, EXTRA - 1])
        wide_v = call(aten.constant_pad_nd.default, region.v, [0, EXTRA])
        wide = sdpa(builder, region, wide_q, wide_k, wide_v, None, True)
        out = call(aten.slice.Tensor, wide, 3, 0, region.site.head_dim_v)
        live = call(aten.gt.Scalar, call(aten.cumsum.default, call(aten._to_copy.default, pad, dtype=torch.int64), 1), 0)
        live = call(aten.unsqueeze.default, call(aten.unsqueeze.default, live, 1), 3)
        return call(aten.where.ScalarOther, live, out, 0.0)

    return build


def already_exact(region: Region) -> bool:
    """An SDPA call that has neither a mask operand nor a physical repeat of K and V."""
    anchor = region.anchor
    return (
        region.site.pattern == "sdpa"
        and region.mask_node is None
        and anchor.args[1] is region.k
        and anchor.args[2] is region.v
    )


def choose(program: Program, region: Region) -> tuple[Build, str] | Refusal:
    """What to lower to and what to call it, or why the site stays as it is."""
    mask: Mask = region.site.mask
    q, k = region.q.meta["val"], region.k.meta["val"]
    square = same(q.shape[2], k.shape[2])
    if already_exact(region):
        return Refusal("already a single attention call without a mask")
    if mask.kind == "none":
        if not mask.padded:
            return lower_plain(program, False), "SDPA without a mask"
        if region.site.pattern == "sdpa" and program.device == "cpu":
            # The kernel still visits every key: a broadcast mask saves memory, not work.
            return lower_key_padding(program), "SDPA, padding broadcast instead of materialised"
        return lower_key_padding(program), "SDPA with a broadcast padding mask"
    if mask.kind == "causal" and mask.offset == 0:
        if not mask.padded:
            return lower_plain(program, True), "SDPA is_causal"
        if not square or region.site.head_dim != region.site.head_dim_v:
            return Refusal("a padded causal mask over keys that are not the queries' own")
        if abs(region.site.scale * HIDDEN) < 1e3:
            return Refusal("a scale so small that padded keys could not be hidden")
        return lower_causal_padding(program), "SDPA is_causal, padding folded into a feature"
    if mask.kind == "sliding" and square:
        if program.needs_grad:
            return Refusal("the sliding-window kernel has no gradient yet")
        return insert_span(program, None), f"span kernel, window {mask.window}"
    return Refusal(f"no exact lowering for keys {mask} with {q.shape[2]} queries and {k.shape[2]} keys")


def run(program: Program) -> None:
    for region in program.pending:
        chosen = choose(program, region)
        if isinstance(chosen, Refusal):
            program.refuse(region, chosen.reason)
            continue
        build, lowering = chosen
        repeated = region.site.heads != region.site.kv_heads and region.anchor.args[1:2] != (region.k,)
        program.replace(region, build, lowering, note="K and V are not repeated" if repeated else "")


__all__: list[Any] = ["choose", "run"]
