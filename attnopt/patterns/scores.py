"""Backward from the soft-max to the product of q and k: one rule for each kind of operation a score may pass.

    softmax(cat([where(keep, softcap(s * scale) + bias, -inf), sink]))  ->  s, and what each step means

`Walk.RULES` maps targets to rules; a target without one ends the walk with a Miss that names it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.masks.interpret import MASKED
from attnopt.patterns import Operand, RawTerm, argument, inactive_dropout, scalar, shape_of, value
from attnopt.patterns.layout import BACK, CASTS, COPIES, Dims, Space
from attnopt.patterns.product import Product, product_of

aten = torch.ops.aten
# How often each rule applied in this process, for `ATTNOPT_DEBUG` and the tests.
HITS: Counter[str] = Counter()
# Operations between a product and the soft-max it feeds; the longest chain in transformers is 11 long.
REACH = 16


def product_behind(node: Any, limit: int = REACH, seen: set[Node] | None = None) -> bool:
    """Whether a product feeds `node` through operations a score may pass."""
    seen = set() if seen is None else seen
    if not isinstance(node, Node) or limit == 0 or node in seen or node.op != "call_function":
        return False
    seen.add(node)
    if product_of(node) is not None:
        return True
    if node.target not in Walk.RULES and node.target not in BACK and node.target not in COPIES:
        return False
    operands = node.args[0] if node.target == aten.cat.default else node.args[:3]
    return any(product_behind(a, limit - 1, seen) for a in operands)


def zero_or_one(node: Node) -> bool:
    """Whether every entry is proved to be 0 or 1: a boolean, one made a number, or a triangle of ones."""
    held = value(node)
    if held is None:
        return False
    if held.dtype == torch.bool or node.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return True
    triangle = node.target in (aten.tril.default, aten.triu.default)
    return (triangle or moves(node)) and isinstance(node.args[0], Node) and zero_or_one(node.args[0])


def moves(node: Node) -> bool:
    """A view, a part, a cast or a copy of its first operand."""
    return node.target in (*BACK, *CASTS, *COPIES, aten.slice.Tensor)


def handed_in(node: Node) -> bool:
    """A part of an input of the graph: if that is a constant buffer, its values decide when masks are recovered."""
    while moves(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder"


class Walk:
    """What stands between a product and a soft-max. `dims` are those of the node reached so far."""

    def __init__(self, space: Space, dims: Dims, axis: int) -> None:
        self.space, self.dims = space, dims
        self.axis = axis
        self.keys = dims[axis]
        self.scale = 1.0
        self.softcap = 0.0
        self.terms: list[RawTerm] = []
        self.sink: Operand | None = None
        self.sink_first = False
        self.inner: list[Node] = []

    def back(self, node: Node) -> Product | Miss:
        """The product, or why the walk stopped. The scale met so far applies to everything further back."""
        while True:
            if not isinstance(node, Node) or node.op != "call_function":
                return Miss("the scores come from outside this graph")
            found = product_of(node)
            if found is not None:
                return found
            self.inner.append(node)
            rule = self.RULES.get(node.target)
            step = rule(self, node) if rule is not None else self.view(node)
            if isinstance(step, Miss):
                return step
            HITS[rule.__name__ if rule is not None else "view"] += 1
            node = step

    def resolved_terms(self) -> tuple[RawTerm, ...]:
        return tuple(replace(t, scores=self.space.resolve(t.scores)) for t in self.terms)

    def add_term(self, kind: Any, node: Node, fill: float | None = None, factor: float = 1.0) -> None:
        self.terms.append(RawTerm(kind, node, self.dims, fill, factor))

    def view(self, node: Node) -> Node | Miss:
        if node.target not in BACK and node.target not in COPIES:
            return Miss(f"the scores pass {node.target}, which no rule follows")
        found = self.space.back(node, self.dims)
        if found is None:
            return Miss(f"the scores pass {node.target} in a way that was not proved")
        self.dims = found[1]
        return found[0]

    def cast(self, node: Node) -> Node | Miss:
        held, source = value(node), value(node.args[0])
        if held is None or source is None or not held.dtype.is_floating_point or not source.dtype.is_floating_point:
            return Miss("the scores are cast to integers")
        return node.args[0]

    def dropout(self, node: Node) -> Node | Miss:
        return node.args[0] if inactive_dropout(node) else Miss("the scores pass an active dropout")

    def scaled(self, node: Node) -> Node | Miss:
        """s * c, c * s, s / c for a constant c."""
        a, b = node.args[:2]
        multiplied = node.target in (aten.mul.Tensor, aten.mul.Scalar)
        if multiplied and isinstance(b, Node) and scalar(b) is None and scalar(a) is not None:
            a, b = b, a
        factor = scalar(b)
        if factor is None and multiplied and isinstance(a, Node) and isinstance(b, Node):
            return self.selected(a, b)
        if factor is None or not isinstance(a, Node):
            return Miss("the scores are scaled by a tensor")
        if factor == 0 or len(node.args) > 2:
            return Miss("the scores are scaled by zero")
        self.scale *= factor if multiplied else 1 / factor
        return a

    def selected(self, a: Node, b: Node) -> Node | Miss:
        """s * m for a mask of zeros and ones, beside an added one that hides what is zero."""
        scores, mask = (a, b) if product_behind(a) else (b, a)
        binary = zero_or_one(mask) or handed_in(mask)
        if not self.terms or not binary or not self.full(scores) or self.softcap:
            return Miss("the scores are scaled by a tensor")
        self.add_term("times", mask)
        return scores

    def negated(self, node: Node) -> Node | Miss:
        self.scale = -self.scale
        return node.args[0]

    def capped(self, node: Node) -> Node | Miss:
        """c * tanh(s): what was met so far is outside, what follows is inside."""
        if self.softcap or self.scale <= 0:
            return Miss("a tanh that is not a soft-cap")
        self.softcap, self.scale = self.scale, 1.0
        return node.args[0]

    def filled(self, node: Node) -> Node | Miss:
        """masked_fill(s, drop, -inf)"""
        fill = scalar(node.args[2])
        if not self.hides(fill):
            return Miss("masked scores are filled with a value that is not minus infinity")
        self.add_term("drop", node.args[1], fill)
        return node.args[0]

    def chosen(self, node: Node) -> Node | Miss:
        """where(keep, s, -inf), or where(drop, -inf, s)"""
        condition, on, off = node.args[:3]
        off_fill, on_fill = scalar(off), scalar(on)
        if off_fill is not None and isinstance(on, Node) and self.hides(off_fill):
            self.add_term("keep", condition, off_fill)
            return on
        if on_fill is not None and isinstance(off, Node) and self.hides(on_fill):
            self.add_term("drop", condition, on_fill)
            return off
        return Miss("scores are chosen between tensors")

    def hides(self, fill: float | None) -> bool:
        """Whether a score set to `fill` here is gone after the scales met so far, which apply to it as well."""
        return fill is not None and not self.softcap and fill * self.scale <= MASKED and fill <= MASKED

    def added(self, node: Node) -> Node | Miss:
        """s + mask, s - rowmax, s + bias"""
        a, b = node.args[:2]
        sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
        if node.kwargs.get("alpha", 1) != 1:
            return Miss("a multiple of something is added to the scores")
        if not isinstance(a, Node):
            return Miss("the scores are subtracted from a number")
        # The same for every score of a row: the soft-max cancels it.
        if not isinstance(b, Node) or (sign < 0 and self.row_maximum(b)):
            if self.softcap:
                return Miss("something is added inside the soft-cap")
            return a if self.sink is None else Miss("the sink does not get what is added to the scores")
        first, second = product_behind(a), product_behind(b)
        if first and second:
            first, second = self.larger(a, b)
        if not first and not second:
            return Miss("nothing that is added here comes from a product")
        scores, other = (a, b) if first else (b, a)
        if sign < 0 and not first:
            return Miss("the scores are subtracted from a tensor")
        if self.softcap:
            return Miss("something is added inside the soft-cap")
        if not self.full(scores):
            return Miss("the scores are broadcast against what is added")
        self.add_term("add", other, None, sign * self.scale)
        return scores

    def larger(self, a: Node, b: Node) -> tuple[bool, bool]:
        """Of two sums of products the one that is a plain product of two large tensors; the other is data."""
        plain = [self.plain(x) for x in (a, b)]
        return (plain[0], not plain[0])

    def plain(self, node: Node) -> bool:
        """Whether only views, casts and constant factors stand before the product."""
        for _ in range(REACH):
            if product_of(node) is not None:
                return True
            simple = node.target in COPIES or node.target in CASTS or node.target in BACK
            scaled = node.target in (aten.mul.Tensor, aten.div.Tensor) and scalar(node.args[1]) is not None
            if not (simple or scaled) or not isinstance(node.args[0], Node):
                return False
            node = node.args[0]
        return False

    def full(self, node: Node) -> bool:
        """Whether the node already has every dimension of the sum."""
        return len(shape_of(node)) == len(self.dims) and all(
            not d or not (isinstance(s, int) and s == 1) for s, d in zip(shape_of(node), self.dims, strict=True)
        )

    def row_maximum(self, node: Node) -> bool:
        """max(s) over the keys: one number for each row."""
        while node.target in (*COPIES, *CASTS):
            node = node.args[0]
        if node.target is operator.getitem and node.args[1] == 0:
            node = node.args[0]
        if node.target not in (aten.amax.default, aten.max.dim, aten.logsumexp.default):
            return False
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        rank = len(shape_of(node.args[0]))
        axis = next((n for n, d in enumerate(self.dims) if d == self.keys), None)
        if rank != len(self.dims) or axis is None or not argument(node, 2, "keepdim", False):
            return False
        return [d % rank for d in dims] == [axis]

    def floored(self, node: Node) -> Node | Miss:
        """max(s, smallest number): only what is masked is that small."""
        if len(node.args) > 2 or node.kwargs:
            return Miss("the scores are clamped from above")
        floor = scalar(node.args[1])
        return node.args[0] if self.hides(floor) else Miss("the scores are clamped")

    def outside(self) -> bool:
        """Whether anything but casts and the row's maximum was met so far."""
        return bool(self.terms) or self.scale != 1.0 or bool(self.softcap)

    def appended(self, node: Node) -> Node | Miss:
        """cat([s, sink], keys): one more column, which the weights drop again."""
        parts, rank = node.args[0], len(self.dims)
        dim = (node.args[1] if len(node.args) > 1 else 0) % rank
        if len(parts) != 2 or self.sink is not None or self.dims[dim] != self.keys or self.outside():
            return Miss("the scores are joined with something other than one sink")
        scores, sink = parts if product_behind(parts[0]) else parts[::-1]
        self.sink_first = scores is parts[1]
        if not (isinstance(shape_of(sink)[dim], int) and shape_of(sink)[dim] == 1) or not product_behind(scores):
            return Miss("the scores are joined with more than one column")
        self.keys = self.space.new(shape_of(scores)[dim])
        self.dims = (*self.dims[:dim], self.keys, *self.dims[dim + 1 :])
        self.sink = Operand(sink, (*self.dims[:dim], (), *self.dims[dim + 1 :]))
        return scores

    RULES: ClassVar[dict[Any, Callable[[Walk, Node], Node | Miss]]] = {
        **dict.fromkeys(CASTS, cast),
        **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), scaled),
        **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), added),
        **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), filled),
        **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), chosen),
        **dict.fromkeys((aten.maximum.default, aten.clamp_min.default, aten.max.other), floored),
        aten.clamp.default: floored,
        aten.neg.default: negated,
        aten.tanh.default: capped,
        aten.dropout.default: dropout,
        aten.cat.default: appended,
    }


__all__ = ["HITS", "Walk", "product_behind", "zero_or_one"]
