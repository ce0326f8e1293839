"""Attention written out: matmul -> scale, mask, bias in any order that means the same -> softmax -> matmul.

Anchored at the soft-max. Forward through casts and inactive dropout to the product with V, backward through casts,
constant factors and mask operands to the product of Q and K. K is *defined* as the transpose of the second operand, so
no permutation has to be guessed, and the soft-max must run over the last axis.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.masks.interpret import MASKED
from attnopt.patterns import MaskTerm, Match, inactive_dropout, number, unrepeated_pair, value
from attnopt.registry import PATTERNS

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default,)
CASTS = (aten._to_copy.default, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.to.dtype)
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


def scores_behind(node: Node, limit: int = 8) -> bool:
    """Whether a matrix product feeds `node` through operations a score may pass."""
    if not isinstance(node, Node) or limit == 0:
        return False
    if node.target in PRODUCTS:
        return True
    if node.op != "call_function" or not node.args:
        return False
    return any(scores_behind(a, limit - 1) for a in node.args[:2] if isinstance(a, Node))


def product_after(node: Node) -> Node | Miss | None:
    """The product with V that consumes the weights, and nothing else but it."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return Miss(f"the weights have {len(users)} users") if any(u.target in PRODUCTS for u in users) else None
        user = users[0]
        if user.target in PRODUCTS:
            return user if user.args[0] is node and user.args[1] is not node else None
        if user.target in CASTS or inactive_dropout(user):
            node = user
            continue
        if user.target == aten.dropout.default:
            return Miss("dropout is active")
        return None


class Walk:
    """Backward from the soft-max to the product of Q and K, collecting what is met on the way."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.terms: list[MaskTerm] = []

    def back(self, node: Node) -> Node | Miss:
        """The product, or why the walk stopped. The scale met so far applies to everything further back."""
        while node.target not in PRODUCTS:
            if node.op != "call_function":
                return Miss("the scores come from outside this graph")
            step = self.step(node)
            if isinstance(step, Miss):
                return step
            node = step
        return node

    def step(self, node: Node) -> Node | Miss:
        target, args = node.target, node.args
        if target in CASTS:
            held, source = value(node), value(args[0])
            if held is None or source is None or not held.dtype.is_floating_point or not source.dtype.is_floating_point:
                return Miss("the scores are cast to integers")
            return args[0]
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            factor = number(args[1])
            if factor is None or factor == 0:
                return Miss("the scores are scaled by a tensor")
            self.scale *= factor if "mul" in str(target) else 1 / factor
            return args[0]
        if target == aten.add.Tensor:
            return self.added(node)
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            fill = number(args[2])
            if not self.hides(fill):
                return Miss("masked scores are filled with a value that is not minus infinity")
            self.terms.append(MaskTerm("drop", args[1], fill))
            return args[0]
        if target in (aten.where.ScalarOther, aten.where.self):
            fill = number(args[2]) if target == aten.where.ScalarOther else scalar(args[2])
            if not self.hides(fill):
                return Miss("scores are chosen between tensors")
            self.terms.append(MaskTerm("keep", args[0], fill))
            return args[1]
        return Miss(f"the scores pass {target}, which no pattern follows")

    def hides(self, fill: float | None) -> bool:
        """Whether a score set to `fill` here is gone after the scales met so far, which apply to it as well."""
        return fill is not None and fill * self.scale <= MASKED and fill <= MASKED

    def added(self, node: Node) -> Node | Miss:
        a, b = node.args[:2]
        if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, Node) or not isinstance(b, Node):
            return Miss("something other than a mask is added to the scores")
        if scores_behind(a) == scores_behind(b):
            return Miss("the scores are a sum of two products")
        scores, other = (a, b) if scores_behind(a) else (b, a)
        # A mask added before a scale still met is scaled too: only minus infinity survives that unchanged.
        if self.scale != 1.0:
            return Miss("a mask is added before the scale")
        self.terms.append(MaskTerm("add", other))
        return scores


def scalar(node: Node) -> float | None:
    """The value of a 0-d constant made in the graph."""
    position = (
        {aten.scalar_tensor.default: 0, aten.full.default: 1}.get(node.target) if isinstance(node, Node) else None
    )
    held = value(node)
    return number(node.args[position]) if position is not None and held is not None and held.ndim == 0 else None


@PATTERNS.register("written-out")
class WrittenOut:
    anchors = SOFTMAX

    @staticmethod
    def match(node: Node) -> Match | Miss | None:
        weights = value(node)
        if weights is None or not scores_behind(node.args[0]):
            return None
        out = product_after(node)
        if out is None or isinstance(out, Miss):
            return out
        if node.args[1] % max(1, weights.ndim) != weights.ndim - 1:
            return Miss("the soft-max does not run over the keys")
        walk = Walk()
        product = walk.back(node.args[0])
        if isinstance(product, Miss):
            return product
        q, k_transposed = product.args
        v = out.args[1]
        held = [t for t in map(value, (q, k_transposed, v, out)) if t is not None]
        if len(held) != 4 or any(t.ndim != 4 for t in held):
            return Miss("written-out attention whose operands do not have 4 dimensions")
        if len({t.dtype for t in held}) != 1:
            return Miss("q, k, v and the output have different dtypes")
        k, transposed = k_transposed, True
        if k.target == aten.transpose.int and {d % 4 for d in k.args[1:]} == {2, 3}:
            k, transposed = k.args[0], False
        if not transposed:
            k, v = unrepeated_pair(k, v)
        terms = tuple(walk.terms)
        return Match("written-out", node, out, q, k, v, walk.scale, False, terms, transposed)
