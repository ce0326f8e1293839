"""Exact mode: lower each remaining region to what computes the same, cheaper.

    sdpa(q, repeat(k), repeat(v), mask=bool N x N)  ->  sdpa(q, k, v, is_causal=True, enable_gqa=True)
    softmax(q @ k.T * s + mask) @ v                 ->  the same
    softmax(q @ k.T * s + any mask or bias) @ v     ->  sdpa(q, k, v, mask as it was), where no closed form helps
    causal and pad[b, j]                            ->  sdpa on q, k, v with one more feature that hides padded keys
    sliding window                                  ->  attnopt::span_attention (reads only the window)

Nothing here changes a result beyond float tolerance, except in rows whose every key is masked: they become 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnopt.codegen.span_cpu import PENALTY, tuning
from attnopt.ir import Mask, Refusal, Region
from attnopt.passes.arrange import operand_mask
from attnopt.passes.program import Builder, Program
from attnopt.passes.span import insert_span, key_padding
from attnopt.patterns import same

aten = torch.ops.aten
Build = Callable[[Region], Node]
# A GPU's fused kernels take head sizes in steps of 8.
EXTRA_GPU = 8


def sdpa(
    builder: Builder,
    region: Region,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None,
    causal: bool,
    scale: float | None = None,
) -> Node:
    grouped = region.site.heads != region.site.kv_heads
    scale = region.site.scale if scale is None else scale
    return builder.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
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
    """As `codegen.span_cpu.causal_padded`, in the graph: one more feature, constant in q and very negative in the keys
    that are padded, keeps the causal kernel that takes no mask, and its gradient."""

    def build(region: Region) -> Node:
        call, site = (builder := Builder(program.gm, region.out)).call, region.site
        pad = key_padding(builder, region)
        q, k, v, scale = region.q, region.k, region.v, site.scale
        like = q.meta["val"]
        if scale < 1e-4:  # the penalty is multiplied by the scale: keep it negative and large
            q, scale = call(aten.mul.Tensor, q, scale), 1.0
        extra = tuning(like.dtype, site.head_dim).extra if program.device == "cpu" else EXTRA_GPU
        width = max(site.head_dim + extra, site.head_dim_v)
        batch, keys, rows = builder.size(k, 0), builder.size(k, 2), builder.size(q, 2)
        hidden = call(aten.where.Scalar, pad, 0.0, -PENALTY)
        hidden = call(aten._to_copy.default, call(aten.view.default, hidden, [batch, 1, keys, 1]), dtype=like.dtype)
        hidden = call(aten.expand.default, hidden, [batch, site.kv_heads, keys, 1])
        marker = call(aten.new_full.default, q, [batch, site.heads, rows, 1], PENALTY)
        q, k = call(aten.cat.default, [q, marker], 3), call(aten.cat.default, [k, hidden], 3)
        if rest := width - site.head_dim - 1:
            q, k = (call(aten.constant_pad_nd.default, x, [0, rest]) for x in (q, k))
        if site.head_dim_v < width:
            v = call(aten.constant_pad_nd.default, v, [0, width - site.head_dim_v])
        out = call(aten.transpose.int, sdpa(builder, region, q, k, v, None, True, scale), 1, 2)
        out = call(aten.slice.Tensor, out, 3, 0, site.head_dim_v)
        dead = call(aten.eq.Scalar, call(aten.cumsum.default, pad, 1), 0)
        dead = call(aten.unsqueeze.default, call(aten.unsqueeze.default, dead, 2), 3)
        return call(aten.transpose.int, call(aten.masked_fill.Scalar, out, dead, 0.0), 1, 2)

    return build


def lower_operand_mask(program: Program) -> Build:
    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        mask = operand_mask(builder, region.match, region.q.meta["val"].dtype)
        return sdpa(builder, region, region.q, region.k, region.v, mask, region.match.causal)

    return build


def already_exact(region: Region) -> bool:
    """An SDPA call that has neither a mask operand nor a physical repeat of K and V."""
    anchor = region.anchor
    return (
        region.site.pattern == "sdpa"
        and not region.match.terms
        and anchor.args[1] is region.k
        and anchor.args[2] is region.v
    )


def general(program: Program, region: Region) -> tuple[Build, str] | Refusal:
    """A written-out attention no closed form helps: fused with its mask as the graph had it."""
    site = region.site
    if site.softcap:
        return Refusal(f"no fused kernel here caps scores at {site.softcap:g}", code="softcap-no-kernel")
    if site.sink:
        return Refusal(f"no fused kernel here has a sink ({site.sink})", code="sink-no-kernel")
    if site.pattern == "sdpa":
        said = f"already a single attention call, and none is cheaper for keys {site.mask}"
        return Refusal(said, code="already-one-call")
    return lower_operand_mask(program), "SDPA with the mask as it was"


def choose(program: Program, region: Region) -> tuple[Build, str] | Refusal:
    """What to lower to and what to call it, or why the site stays as it is."""
    mask: Mask = region.site.mask
    q, k = region.q.meta["val"], region.k.meta["val"]
    square = same(q.shape[2], k.shape[2])
    if already_exact(region):
        return Refusal("already a single attention call without a mask", code="already-one-call")
    if region.match.read:
        said = ", ".join(n.name for n in region.match.read)
        reason = f"its weights ({said}) are read elsewhere too, so that nothing would be saved"
        return Refusal(reason, code="weights-read-elsewhere")
    if region.site.scale <= 0 and not (region.site.plain and mask.kind == "causal" and mask.padded):
        # SDPA's kernels hide scores before they scale them: minus infinity would become NaN or the largest score.
        return Refusal(f"the scale is {region.site.scale:g}, expected a positive one", code="scale-not-positive")
    if not region.site.plain:
        return general(program, region)
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
        if not square:
            return general(program, region)
        return lower_causal_padding(program), "SDPA is_causal, padding folded into a feature"
    if mask.kind == "sliding" and mask.offset == 0 and square:
        if program.needs_grad and region.site.pattern == "sdpa":
            return Refusal(
                "gradients are needed, and the sliding-window kernel has none yet", code="window-no-gradient"
            )
        if program.needs_grad:
            return general(program, region)
        return insert_span(program, None), f"span kernel, window {mask.window}"
    return general(program, region)


def run(program: Program) -> None:
    for region in program.pending:
        chosen = choose(program, region)
        if isinstance(chosen, Refusal):
            program.refuse(region, chosen)
            continue
        build, lowering = chosen
        repeated = region.site.heads != region.site.kv_heads and region.anchor.args[1:2] != (region.k,)
        program.replace(region, build, lowering, note="K and V are not repeated" if repeated else "")


__all__: list[Any] = ["choose", "run"]
