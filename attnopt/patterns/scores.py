"""Backward from the soft-max to the product of q and k: one rule for each kind of operation a score may pass.

    softmax(cat([where(keep, softcap(s * scale) + bias, -inf), sink]))  ->  s, and what each step means

`Walk.RULES` maps targets to rules; a target without one ends the walk with a Miss that names it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.masks.interpret import MASKED
from attnopt.patterns import Factor, Operand, RawTerm, argument, inactive_dropout, scalar, shape_of, value
from attnopt.patterns.layout import BACK, CASTS, COPIES, MOVES, Dims, Space, is_one, same
from attnopt.patterns.product import Product, product_of
from attnopt.reasons import described, located

aten = torch.ops.aten
# Operations between a product and the soft-max it feeds; the longest chain in transformers is 11 long.
REACH = 16
HIDES = f"{MASKED:g} or less"


def scaled_by(item: Any) -> str:
    return f"the scores are scaled by {described(item)}; expected a constant, or zeros and ones beside an added mask"


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


def obstacle(node: Any) -> Node | None:
    """The first node on the way back that no rule follows, where views, moves and elementwise operations lead to a
    product of two activations; None where they do not, or where every one has its rule."""
    for _ in range(REACH):
        if not isinstance(node, Node) or node.op != "call_function" or activations(node):
            return None
        if node.target not in Walk.RULES and node.target not in BACK and node.target not in COPIES:
            return node if carries(node) and any(leads_back(a) for a in node.all_input_nodes) else None
        operands = node.args[0] if node.target == aten.cat.default else node.args[:3]
        node = next((a for a in operands if leads_back(a)), None)
    return None


def leads_back(node: Any, limit: int = REACH) -> bool:
    """Whether a product of two activations feeds `node` through views, moves and elementwise operations."""
    nodes, seen = [node], set[Node]()
    for _ in range(limit):
        nodes = [n for n in nodes if isinstance(n, Node) and n.op == "call_function" and n not in seen]
        if any(map(activations, nodes)):
            return True
        seen.update(nodes)
        known = (n for n in nodes if n.target in Walk.RULES or n.target in BACK or n.target in COPIES or carries(n))
        nodes = list(dict.fromkeys(a for n in known for a in n.all_input_nodes))
    return False


def activations(node: Node) -> bool:
    """Whether the node is a product of two tensors with a batch: a projection or a router has a matrix for one."""
    product = product_of(node)
    return product is not None and min(len(shape_of(product.lhs)), len(shape_of(product.rhs))) >= 3


def elementwise(node: Node) -> bool:
    """Whether the node computes each entry from the same entry of an operand of its own shape."""
    # Not every overload has the tag.
    known = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in Walk.RULES
    if not known or value(node) is None:
        return False
    shape = shape_of(node)
    held = [shape_of(a) for a in node.all_input_nodes if value(a) is not None]
    return any(len(s) == len(shape) and all(map(same, s, shape)) for s in held)


def carries(node: Node) -> bool:
    """Whether the entries of an operand, or what is computed from them one by one, are in the node's result."""
    return node.target in MOVES or elementwise(node)


class Walk:
    """What stands between a product and a soft-max. `dims` are those of the node reached so far."""

    def __init__(self, space: Space, dims: Dims, axis: int) -> None:
        self.space, self.dims = space, dims
        # The dims of the soft-max, without a sink's column.
        self.rows = dims
        self.axis = axis
        self.keys = dims[axis]
        self.scale = 1.0
        self.softcap = 0.0
        self.terms: list[RawTerm] = []
        self.factors: list[Factor] = []
        self.sink: Operand | None = None
        self.sink_first = False
        self.inner: list[Node] = []
        self.rules: list[str] = []

    def back(self, node: Node) -> Product | Miss:
        """The product, or why the walk stopped. The scale met so far applies to everything further back."""
        while True:
            if not isinstance(node, Node) or node.op != "call_function":
                seen = node.op if isinstance(node, Node) else repr(node)
                return Miss(
                    f"the scores come from {seen}, expected a product in this graph", code="scores-from-outside"
                )
            found = product_of(node)
            if found is not None:
                return found
            self.inner.append(node)
            rule, held = self.RULES.get(node.target), len(self.terms)
            step = rule(self, node) if rule is not None else self.view(node)
            if isinstance(step, Miss):
                return located(step, node)
            if self.factors and any(t.kind != "times" for t in self.terms[held:]):
                return located(self.beneath(f"{described(self.terms[-1].node)}, a mask or a bias,"), node)
            self.rules.append(rule.__name__ if rule is not None else "view")
            node = step

    def resolved_terms(self) -> tuple[RawTerm, ...]:
        return tuple(replace(t, scores=self.space.resolve(t.scores)) for t in self.terms)

    def add_term(self, kind: Any, node: Node, fill: float | None = None, factor: float = 1.0) -> None:
        self.terms.append(RawTerm(kind, node, self.dims, fill, factor))

    def view(self, node: Node) -> Node | Miss:
        if node.target not in BACK and node.target not in COPIES:
            return Miss(f"the scores pass {node.target}, which no rule follows", code="score-operation")
        found = self.space.back(node, self.dims)
        if found is None:
            seen = f"the scores pass {node.target} to {list(shape_of(node))}"
            return Miss(f"{seen}, whose axes were not proved", code="score-view")
        self.dims = found[1]
        return found[0]

    def cast(self, node: Node) -> Node | Miss:
        held, source = value(node), value(node.args[0])
        if held is None or source is None or not held.dtype.is_floating_point or not source.dtype.is_floating_point:
            seen = " to ".join("nothing" if t is None else str(t.dtype) for t in (source, held))
            return Miss(f"the scores are cast from {seen}, expected float types, no integers", code="score-cast")
        return node.args[0]

    def dropout(self, node: Node) -> Node | Miss:
        if inactive_dropout(node):
            return node.args[0]
        return Miss(f"dropout of the scores is active, p = {node.args[1]}; expected none", code="dropout-active")

    def scaled(self, node: Node) -> Node | Miss:
        """s * c, c * s, s / c for a constant c; s * t, s / t for a tensor t that is one number for all keys."""
        a, b = node.args[:2]
        multiplied = node.target in (aten.mul.Tensor, aten.mul.Scalar)
        if multiplied and isinstance(b, Node) and scalar(b) is None and scalar(a) is not None:
            a, b = b, a
        factor = scalar(b)
        symbol = next((x for x in (a, b) if factor is None and isinstance(x, Node) and value(x) is None), None)
        if symbol is not None:
            return Miss(f"the scale is {symbol.meta.get('val')}, expected a constant", code="scale-not-constant")
        if factor is None and isinstance(a, Node) and isinstance(b, Node) and len(node.args) == 2:
            for scores, other in ((a, b), (b, a)) if multiplied else ((a, b),):
                if self.keyless(other) and product_behind(scores) and self.full(scores):
                    return self.folded(node, scores, other)
            if multiplied:
                return self.selected(a, b)
        if factor is None or not isinstance(a, Node):
            return Miss(scaled_by(b), code="score-times-tensor")
        if factor == 0 or len(node.args) > 2:
            seen = "zero" if factor == 0 else "a quotient that is rounded"
            return Miss(f"the scores are scaled by {seen}, expected a factor other than zero", code="scale-zero")
        self.scale *= factor if multiplied else 1 / factor
        return a

    def keyless(self, node: Node) -> bool:
        """Whether a tensor that meets the scores holds one number for all keys of a row."""
        if value(node) is None or len(shape_of(node)) > len(self.dims):
            return False
        keys, sizes = set(self.space.atoms(self.keys)), shape_of(node)
        tail = self.space.resolve(self.dims)[len(self.dims) - len(sizes) :]
        return not any(keys & set(d) for s, d in zip(sizes, tail, strict=True) if not is_one(s))

    def folded(self, node: Node, scores: Node, other: Node) -> Node:
        """s * t = (q * t) k, whatever the sign of t, as long as nothing further back is added or masked."""
        self.factors.append(Factor(other, self.dims, node.target == aten.div.Tensor, value(node).dtype))  # type: ignore[union-attr]
        self.rules.append("folded")
        return scores

    def beneath(self, seen: str) -> Miss:
        by = described(self.factors[-1].node)
        return Miss(f"{seen} is multiplied by {by} afterwards, expected the product alone", code="score-times-tensor")

    def selected(self, a: Node, b: Node) -> Node | Miss:
        """s * m beside an added mask that hides what is zero; that m is one elsewhere is proved with the mask."""
        scores, mask = (a, b) if product_behind(a) else (b, a)
        if not self.terms or product_behind(mask) or not self.full(scores) or self.softcap:
            return Miss(scaled_by(mask), code="score-times-tensor")
        self.add_term("times", mask)
        return scores

    def negated(self, node: Node) -> Node | Miss:
        self.scale = -self.scale
        return node.args[0]

    def capped(self, node: Node) -> Node | Miss:
        """c * tanh(s): what was met so far is outside, what follows is inside."""
        if self.factors:
            return self.beneath("a tanh of the scores")
        if self.softcap or self.scale <= 0:
            seen = "a second tanh" if self.softcap else f"a tanh times {self.scale:g}"
            return Miss(f"the scores pass {seen}, expected c * tanh(s / c) once with c > 0", code="tanh-no-softcap")
        self.softcap, self.scale = self.scale, 1.0
        return node.args[0]

    def filled(self, node: Node) -> Node | Miss:
        """masked_fill(s, drop, -inf)"""
        fill = scalar(node.args[2])
        if not self.hides(fill):
            seen = "a tensor" if fill is None else f"{fill:g}"
            return Miss(f"masked scores are filled with {seen}, expected {HIDES}", code="fill-too-large")
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
        fills = [f"{f:g}" if f is not None else "a tensor" for f in (on_fill, off_fill)]
        return Miss(f"where() has {' and '.join(fills)}, expected scores and a fill of {HIDES}", code="fill-too-large")

    def hides(self, fill: float | None) -> bool:
        """Whether a score set to `fill` here is gone after the scales met so far, which apply to it as well."""
        return fill is not None and not self.softcap and fill * self.scale <= MASKED and fill <= MASKED

    def added(self, node: Node) -> Node | Miss:
        """s + mask, s - rowmax, s + bias"""
        a, b = node.args[:2]
        sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
        if node.kwargs.get("alpha", 1) != 1:
            alpha = node.kwargs["alpha"]
            return Miss(f"what is added to the scores has alpha = {alpha}, expected 1", code="added-multiple")
        if not isinstance(a, Node):
            return Miss(
                f"the scores are subtracted from {described(a)}, expected to be added to", code="scores-subtracted"
            )
        # The same for every score of a row: the soft-max cancels it.
        if not isinstance(b, Node) or (sign < 0 and self.row_maximum(b)):
            if self.softcap:
                return Miss(
                    f"{described(b)} is added inside the soft-cap, expected outside", code="added-inside-softcap"
                )
            if self.sink is None:
                return a
            return Miss(
                f"{described(b)} is added to the scores and not to the sink, expected to both", code="added-beside-sink"
            )
        first, second = product_behind(a), product_behind(b)
        if first and second:
            first, second = self.larger(a, b)
        if not first and not second:
            return Miss(
                f"{described(a)} and {described(b)} are added, expected one of them to be a product",
                code="scores-from-outside",
            )
        scores, other = (a, b) if first else (b, a)
        if sign < 0 and not first:
            return Miss(
                f"the scores are subtracted from {described(a)}, expected to be added to", code="scores-subtracted"
            )
        if self.softcap:
            return Miss(
                f"{described(other)} is added inside the soft-cap, expected outside", code="added-inside-softcap"
            )
        if not self.full(scores):
            seen = f"scores of {list(shape_of(scores))} are broadcast against {list(shape_of(other))}"
            return Miss(f"{seen}, expected scores of full size", code="scores-broadcast")
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
            return Miss("the scores are clamped from above, expected from below only", code="scores-clamped")
        floor = scalar(node.args[1])
        if self.hides(floor):
            return node.args[0]
        seen = "a tensor" if floor is None else f"{floor:g}"
        return Miss(f"the scores are clamped from below at {seen}, expected {HIDES}", code="scores-clamped")

    def outside(self) -> bool:
        """Whether anything but casts and the row's maximum was met so far."""
        return bool(self.terms) or bool(self.factors) or self.scale != 1.0 or bool(self.softcap)

    def appended(self, node: Node) -> Node | Miss:
        """cat([s, sink], keys): one more column, which the weights drop again."""
        parts, rank = node.args[0], len(self.dims)
        dim = (node.args[1] if len(node.args) > 1 else 0) % rank
        if len(parts) != 2 or self.sink is not None or self.dims[dim] != self.keys or self.outside():
            seen = f"{len(parts)} tensors are joined on dim {dim}"
            return Miss(
                f"{seen} around the scores, expected one sink's column next to the soft-max", code="scores-joined"
            )
        scores, sink = parts if product_behind(parts[0]) else parts[::-1]
        self.sink_first = scores is parts[1]
        if not (isinstance(shape_of(sink)[dim], int) and shape_of(sink)[dim] == 1) or not product_behind(scores):
            columns = shape_of(sink)[dim]
            return Miss(
                f"the scores are joined with {columns} columns, expected the one of a sink", code="scores-joined"
            )
        self.keys = self.space.new(shape_of(scores)[dim])
        self.dims = (*self.dims[:dim], self.keys, *self.dims[dim + 1 :])
        self.rows = (*self.rows[: self.axis], self.keys, *self.rows[self.axis + 1 :])
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


__all__ = ["Walk", "activations", "carries", "leads_back", "obstacle", "product_behind"]
