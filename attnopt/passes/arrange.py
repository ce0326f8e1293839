"""Bring operands to (B, heads, length, dim), and outputs back, by the fewest views their proved axes allow.

bmm(q.view(B*H, S, D), ...)  ->  region.q = q.view(B, H, S, D), and the output viewed back
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnopt.masks.interpret import MASKED
from attnopt.passes.program import Builder
from attnopt.patterns import Factor, Match, RawTerm, checked, shape_of
from attnopt.patterns.layout import Atom, Dims, is_one

aten = torch.ops.aten
Call = Callable[..., Any]


def rearrange(call: Call, tensor: Any, have: Dims, want: Dims, sizes: dict[Atom, Any]) -> Any:
    """`tensor` with dims `have` as dims `want` (the same atoms): reshape to atoms, permute, reshape to merged ones.

    call: ``call(target, *args)``, which inserts nodes or computes; sizes: an int, or what stands for one, by atom.
    """
    if have == want:
        return tensor
    atoms, wanted = [a for d in have for a in d], [a for d in want for a in d]
    if sorted(a.name for a in atoms) != sorted(a.name for a in wanted):
        raise ValueError(f"{have} and {want} do not hold the same axes")
    if any(len(d) != 1 for d in have):
        tensor = call(aten.reshape.default, tensor, shape([sizes[a] for a in atoms]))
    if atoms != wanted:
        tensor = call(aten.permute.default, tensor, [atoms.index(a) for a in wanted])
    if any(len(d) != 1 for d in want):
        tensor = call(aten.reshape.default, tensor, shape([product([sizes[a] for a in d]) for d in want]))
    return tensor


def product(sizes: list[Any]) -> Any:
    """The product of sizes; -1 stands for the one that is not known by itself."""
    number, rest = 1, [s for s in sizes if not isinstance(s, int) or s == -1]
    for size in sizes:
        number *= size if isinstance(size, int) else 1
    if not rest:
        return number
    return rest[0] if len(sizes) == 1 else -1


def shape(sizes: list[Any]) -> list[Any]:
    """`sizes` for a reshape, which can work out one of them."""
    if sum(isinstance(s, int) and s == -1 for s in sizes) > 1:
        raise ValueError("two sizes known only at run time are no dimensions of q, k or v")
    return sizes


def canonical(match: Match) -> tuple[Dims, Dims, Dims, Dims]:
    """The dims that a region's q, k, v and output have."""
    r = match.roles
    return (
        (r.batch, r.heads, r.queries, r.features),
        (r.batch, r.kv_heads, r.keys, r.features),
        (r.batch, r.kv_heads, r.keys, r.values),
        (r.batch, r.heads, r.queries, r.values),
    )


class Sizes(dict[Atom, Any]):
    """Sizes by atom; one known at run time only is read off a tensor that has it as a dimension, else it is -1."""

    def __init__(self, builder: Builder, match: Match) -> None:
        super().__init__()
        self.builder, self.match = builder, match

    def __missing__(self, atom: Atom) -> Any:
        if isinstance(atom.size, int):
            return atom.size
        for operand in (self.match.q, self.match.k, self.match.v):
            for d, atoms in enumerate(operand.dims):
                if atoms == (atom,) and not isinstance(atom.size, int):
                    self[atom] = self.builder.size(operand.node, d)
                    return self[atom]
        if atom in self.match.places:
            self[atom] = self.builder.size(*self.match.places[atom])
            return self[atom]
        return -1


def operand_nodes(builder: Builder, match: Match) -> tuple[Node, Node, Node]:
    """q, k and v in canonical layout; existing nodes where they have it already."""
    made = []
    for operand, want in zip((match.q, match.k, match.v), canonical(match), strict=False):
        like = Builder(builder.gm, operand.node)
        made.append(rearrange(like.call, operand.node, operand.dims, want, Sizes(like, match)))
    for factor in match.factors:
        made[0] = multiplied(builder, match, made[0], factor)
    return made[0], made[1], made[2]


def multiplied(builder: Builder, match: Match, q: Node, factor: Factor) -> Node:
    """(B, heads, Sq, D) times or over a factor of the scores, in the type that those had, rounded once to q's."""
    like, dtype = Builder(builder.gm, factor.node), q.meta["val"].dtype
    have, want = term_dims(match, factor)
    by = rearrange(like.call, factor.node, have, want, Sizes(like, match))
    if by.meta["val"].dtype != factor.dtype:
        # A tensor without dimensions did not decide the type of its product; one with four would.
        by = like.call(aten._to_copy.default, by, dtype=factor.dtype)
    wide = q if dtype == factor.dtype else builder.call(aten._to_copy.default, q, dtype=factor.dtype)
    made = builder.call(aten.div.Tensor if factor.divides else aten.mul.Tensor, wide, by)
    return made if dtype == factor.dtype else builder.call(aten._to_copy.default, made, dtype=dtype)


def restored(builder: Builder, match: Match, new: Node) -> Node:
    """A canonical output in the layout that the graph had."""
    sizes = Sizes(builder, match)
    return rearrange(builder.call, new, canonical(match)[3], match.out.dims, sizes)


def term_dims(match: Match, term: RawTerm | Factor) -> tuple[Dims, Dims]:
    """(dims of a mask operand or factor, dims (B, heads, Sq, Sk) it is viewed to); size one where it is constant."""
    sizes = shape_of(term.node)
    tail = term.scores[len(term.scores) - len(sizes) :]
    have = tuple(() if is_one(s) else d for s, d in zip(sizes, tail, strict=True))
    present = {a for d in have for a in d}
    r = match.roles
    want = []
    for role in (r.batch, r.heads, r.queries, r.keys):
        if not set(role) <= present and set(role) & present:
            raise ValueError("a mask varies over a part of an axis only")
        want.append(role if set(role) <= present else ())
    return have, tuple(want)


def operand_mask(builder: Builder, match: Match, dtype: torch.dtype, grad: bool = False) -> Node | None:
    """All terms as one mask (B | 1, heads | 1, Sq | 1, Sk): bool, true where kept, or to be added to the scores.

    A row whose every score has a finite fill averages all keys, and does so here. With `grad` it is 0 instead, and so
    is its gradient: the fused backward takes each of its n weights for 1, not 1 / n.
    """
    call = builder.call
    keep: Node | None = None
    bias: Node | None = None
    for term in match.terms:
        if checked(term):
            continue
        have, want = term_dims(match, term)
        sizes = Sizes(builder, match)
        node = rearrange(call, term.node, have, want, sizes)
        if term.kind == "add":
            node = node if term.factor == 1.0 else call(aten.mul.Tensor, node, term.factor)
            bias = node if bias is None else call(aten.add.Tensor, bias, node)
            continue
        if term.node.meta["val"].dtype != torch.bool:
            node = call(aten.ne.Scalar, node, 0)
        node = call(aten.logical_not.default, node) if term.kind == "drop" else node
        keep = node if keep is None else call(aten.logical_and.default, keep, node)
    finite = [t.fill for t in match.terms if t.kind != "add" and t.fill is not None and math.isfinite(t.fill)]
    if bias is None and keep is not None and finite and not grad:
        zero = call(aten.new_zeros.default, match.q.node, [], dtype=dtype)
        return call(aten.where.ScalarOther, keep, zero, torch.finfo(dtype).min)
    if bias is None:
        return keep
    if bias.meta["val"].dtype != dtype:
        bias = call(aten._to_copy.default, bias, dtype=dtype)
    if grad:
        shown = call(aten.gt.Scalar, bias, MASKED)
        keep = shown if keep is None else call(aten.logical_and.default, keep, shown)
    if keep is None:
        return bias
    return call(aten.where.ScalarOther, keep, bias, -math.inf if grad else torch.finfo(dtype).min)
