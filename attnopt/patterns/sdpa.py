"""``scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale, enable_gqa)``, called whole, of any rank."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns import Match, Operand, RawTerm, argument, number, value
from attnopt.patterns.layout import Dims, Space, is_one, same
from attnopt.patterns.roles import assign, tidy, unscaled
from attnopt.registry import PATTERNS

aten = torch.ops.aten


def batch_dims(space: Space, sizes: list[tuple], grouped: bool) -> list[Dims] | Miss:
    """Dims of the leading dimensions of q, k and v, broadcast from the right; `grouped` repeats the last of k and v."""
    rank = max(map(len, sizes))
    found: list[list] = [[], [], []]
    for d in range(rank):
        here = [s[d - rank + len(s)] if d >= rank - len(s) else None for s in sizes]
        full = next((n for n in here if n is not None and not is_one(n)), 1)
        atoms = space.new(full)
        for n, (size, into) in enumerate(zip(here, found, strict=True)):
            if size is None:
                continue
            if is_one(size) or same(size, full):
                into.append(() if is_one(size) else atoms)
                continue
            cut = None
            if grouped and d == rank - 1 and n and isinstance(size, int) and isinstance(full, int) and full % size == 0:
                cut = space.regroup(atoms, (size, full // size))
            if cut is None:
                seen = f"q, k and v have {here} in leading dimension {d - rank}"
                return Miss(f"{seen}, expected equal sizes, or one", code="leading-dimensions")
            into.append(cut[0])
    return [tuple(f) for f in found]


@PATTERNS.register("sdpa", priority=10)
class Sdpa:
    anchors = (aten.scaled_dot_product_attention.default,)

    @staticmethod
    def match(node: Node) -> Match | Miss | None:
        held = [t for t in map(value, node.args[:3]) if t is not None]
        if len(held) != 3 or any(t.ndim < 2 for t in held):
            seen = [t.ndim for t in held]
            return Miss(f"q, k and v have {seen} dimensions, expected 2 or more each", code="operand-rank")
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            p = argument(node, 4, "dropout_p", 0.0)
            return Miss(f"dropout of the weights is active, p = {p}; expected none", code="dropout-active")
        scale, head_dim = argument(node, 6, "scale"), held[0].shape[-1]
        if scale is None and not isinstance(head_dim, int):
            return Miss(f"the head dimension is the symbol {head_dim}, expected a number", code="symbolic-heads")
        if head_dim == 0:
            return Miss("q, k or v has a dimension of size 0, expected elements", code="empty-operand")
        factor = 1 / math.sqrt(head_dim) if scale is None else number(scale)
        if factor is None:
            return Miss(f"the scale is {scale}, expected a constant", code="scale-not-constant")
        mask = argument(node, 3, "attn_mask")
        held_mask = value(mask) if mask is not None else None
        if mask is not None and held_mask is None:
            return Miss(f"the mask is {mask}, expected a tensor", code="mask-not-a-tensor")
        return prove(node, held, factor, mask)


def prove(node: Node, held: list[torch.Tensor], scale: float, mask: Node | None) -> Match | Miss:
    space = Space()
    grouped = bool(argument(node, 7, "enable_gqa", False))
    leading = batch_dims(space, [tuple(t.shape[:-2]) for t in held], grouped)
    if isinstance(leading, Miss):
        return leading
    queries, features = (space.new(s) for s in held[0].shape[-2:])
    keys, values = space.new(held[1].shape[-2]), space.new(held[2].shape[-1])
    if not keys:
        return Miss("K has one position, expected two keys or more", code="one-key")
    # Of two symbols where nothing before the call needs K and V to be equally long.
    space.equal.append((held[1].shape[-2], held[2].shape[-2]))
    q, k, v = (
        Operand(n, space.resolve((*dims, *own)))
        for n, dims, own in zip(
            node.args[:3], leading, ((queries, features), (keys, features), (keys, values)), strict=True
        )
    )
    # Broadcast: a dimension's axes are those of the first operand that has more than one entry there.
    rank = max(map(len, leading))
    aligned = [((),) * (rank - len(dims)) + dims for dims in leading]
    batch = tuple(next(filter(None, dims), ()) for dims in zip(*aligned, strict=True))
    out = Operand(node, space.resolve((*batch, queries, values)))
    causal = bool(argument(node, 5, "is_causal", False))
    (q, q_factor), (k, k_factor) = unscaled(space, q), unscaled(space, k)
    found = assign(space, (*out.dims[:-1], keys), q, k, v, out, keys)
    if isinstance(found, Miss):
        return found
    roles, q, k, v, out = found
    q = tidy(space, q, (roles.batch, roles.heads, roles.queries, roles.features))
    k = tidy(space, k, (roles.batch, roles.kv_heads, roles.keys, roles.features))
    v = tidy(space, v, (roles.batch, roles.kv_heads, roles.keys, roles.values))
    terms: tuple[RawTerm, ...] = ()
    if mask is not None:
        kind = "keep" if value(mask).dtype == torch.bool else "add"  # type: ignore[union-attr]
        terms = (RawTerm(kind, mask, space.resolve((*out.dims[:-1], keys))),)  # type: ignore[arg-type]
    return Match(
        "sdpa", node, out, q, k, v, roles, scale * q_factor * k_factor, 0.0, causal, terms, places=space.places
    )
