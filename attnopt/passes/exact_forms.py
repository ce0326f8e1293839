"""What exact mode lowers an attention to: functions of a program that return the builder of one form.

plain                 sdpa(q, k, v), is_causal or not
key padding           sdpa(q, k, v, mask (B, 1, 1, Sk))
causal and padding    sdpa(q|marker, k|hidden, v, is_causal)
operand mask          sdpa(q, k, v, mask as it was, read once where it repeats itself)
packed                sdpa(q as (B, kv_heads, heads per KV head, D), k, v, mask (B, 1, 1, Sk)), for one query
chunked               sdpa of (B * chunks, heads, chunk, D), is_causal
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from attnopt.codegen.span_cpu import PENALTY, tuning
from attnopt.ir import Region
from attnopt.masks.predicates import literal_variables
from attnopt.masks.values import monomial_variables
from attnopt.passes.arrange import operand_mask
from attnopt.passes.program import Builder, Program
from attnopt.passes.span import key_padding

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
    grouped: bool | None = None,
) -> Node:
    grouped = region.site.heads != region.site.kv_heads if grouped is None else grouped
    scale = region.site.scale if scale is None else scale
    dims = [x.meta["val"].shape[3] for x in (q, k, v)]
    if q.meta["val"].device.type == "cpu" and dims[0] != dims[2]:
        # The fused CPU kernel asks for equal head sizes; features of zeros change no score.
        q, k, v = (widened(builder, x, max(dims)) for x in (q, k, v))
    out = builder.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )
    return out if v.meta["val"].shape[3] == dims[2] else builder.call(aten.slice.Tensor, out, 3, 0, dims[2])


def widened(builder: Builder, tensor: Node, width: int) -> Node:
    """`tensor` (B, heads, S, D) with features of zeros up to `width`."""
    shape = tensor.meta["val"].shape
    missing = width - shape[3]
    if not missing:
        return tensor
    if all(isinstance(size, int) for size in shape):
        return builder.call(aten.constant_pad_nd.default, tensor, [0, missing])
    # Traced, a pad asks for every size as a number: a batch or length known at run time only would be guarded on.
    zeros = builder.call(aten.new_zeros.default, tensor, [*(builder.size(tensor, d) for d in range(3)), missing])
    return builder.call(aten.cat.default, [tensor, zeros], 3)


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
        hidden = call(aten.expand.default, hidden, [batch, builder.size(k, 1), keys, 1])
        marker = call(aten.new_full.default, q, [batch, builder.size(q, 1), rows, 1], PENALTY)
        q, k = call(aten.cat.default, [q, marker], 3), call(aten.cat.default, [k, hidden], 3)
        q, k, v = (widened(builder, x, width) for x in (q, k, v))
        out = call(aten.transpose.int, sdpa(builder, region, q, k, v, None, True, scale), 1, 2)
        out = call(aten.slice.Tensor, out, 3, 0, site.head_dim_v)
        dead = call(aten.eq.Scalar, call(aten.cumsum.default, pad, 1), 0)
        dead = call(aten.unsqueeze.default, call(aten.unsqueeze.default, dead, 2), 3)
        return call(aten.transpose.int, call(aten.masked_fill.Scalar, out, dead, 0.0), 1, 2)

    return build


def varies_over(region: Region) -> set[str]:
    """Which of b, h, i and j the mask or the bias may vary over, proved from what they mean."""
    keep, added = region.meaning.keep, region.meaning.added
    names = {v for clause in keep.clauses for literal in clause for v in literal_variables(literal)}
    names |= {v for monomial, _ in added.terms for v in monomial_variables(monomial)}
    # An axis of several parts has a variable for each: h0, h1.
    return {name[:1] for name in names}


def mask_read_once(program: Program, builder: Builder, region: Region, hidden: bool = False) -> Node | None:
    """The mask as it was, at index 0 of every axis it repeats itself along: (B | 1, heads | 1, Sq | 1, Sk).

    hidden: what is masked is false or minus infinity, never a finite fill.
    """
    mask = operand_mask(builder, region.match, region.q.meta["val"].dtype, hidden or program.needs_grad)
    if mask is None:
        return None
    varies = varies_over(region)
    for dim, name in enumerate("bhi"):
        size = mask.meta["val"].shape[dim]
        if name not in varies and not (isinstance(size, int) and size == 1):
            mask = builder.call(aten.slice.Tensor, mask, dim, 0, 1)
    return mask


def lower_operand_mask(program: Program) -> Build:
    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        mask = mask_read_once(program, builder, region)
        return sdpa(builder, region, region.q, region.k, region.v, mask, region.match.causal)

    return build


def lower_packed(program: Program) -> Build:
    """One query a head: the heads of a KV head become rows of one head, so that K and V are read once."""

    def build(region: Region) -> Node:
        call, site = (builder := Builder(program.gm, region.out)).call, region.site
        batch, share = builder.size(region.q, 0), site.heads // site.kv_heads
        rows = call(aten.reshape.default, region.q, [batch, site.kv_heads, share, site.head_dim])
        mask = mask_read_once(program, builder, region)
        out = sdpa(builder, region, rows, region.k, region.v, mask, False, grouped=False)
        return call(aten.reshape.default, out, [batch, site.heads, 1, site.head_dim_v])

    return build


def lower_chunked(program: Program) -> Build:
    """Every chunk is a sample of its own: a view where q, k and v are laid out as (B, N, heads, D)."""

    def build(region: Region) -> Node:
        call, site = (builder := Builder(program.gm, region.out)).call, region.site
        batch, length, chunk = builder.size(region.q, 0), builder.size(region.q, 2), site.mask.chunk

        def split(x: Node) -> Node:
            sizes = [-1, chunk, builder.size(x, 1), builder.size(x, 3)]
            parts = call(aten.reshape.default, call(aten.transpose.int, x, 1, 2), sizes)
            return call(aten.transpose.int, parts, 1, 2)

        q, k, v = split(region.q), split(region.k), split(region.v)
        out = call(aten.transpose.int, sdpa(builder, region, q, k, v, None, site.mask.causal), 1, 2)
        out = call(aten.reshape.default, out, [batch, length, builder.size(region.q, 1), site.head_dim_v])
        return call(aten.transpose.int, out, 1, 2)

    return build
