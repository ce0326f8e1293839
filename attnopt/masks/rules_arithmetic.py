"""Rules for sums, products, quotients and running sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, absolute, divide
from attnopt.masks.interpret import Index, Interpreter, argument, dimension, is_one, rule, shape_of
from attnopt.masks.predicates import FALSE, Conjunction, at_least_zero, fold_ranges
from attnopt.masks.values import (
    MASKED,
    Number,
    Select,
    Sum,
    Value,
    as_sum,
    literal_value,
    masked,
    narrowed,
    numeric,
)

aten = torch.ops.aten


def binary(interpreter: Interpreter, node: Node, index: Index) -> tuple[Value | None, Value | None]:
    return interpreter.operand(node.args[0], index), interpreter.operand(node.args[1], index)


def plus(a: Number, b: Number) -> Number:
    return a + b if isinstance(a, Affine) and isinstance(b, Affine) else as_sum(a) + as_sum(b)


def times(a: Number, b: Number) -> Number | None:
    """The product; None for 0 * inf, which is no number."""
    if isinstance(a, Affine) and isinstance(b, Affine):
        for one, other in ((a, b), (b, a)):
            if other.is_constant and isinstance(other.constant, int):
                return one * other.constant
    x, y = as_sum(a), as_sum(b)
    if not x.finite or not y.finite:
        if x.constant is None or y.constant is None or math.isnan(product := x.constant * y.constant):
            return None
        return Sum.number(product)
    return x * y


def added(a: Select, b: Select) -> Select | None:
    if a.plain or b.plain or a.predicate == b.predicate:
        condition = b.predicate if a.plain else a.predicate
        return Select.of(condition, plus(a.on, b.on), plus(a.off, b.off))
    one, other = kept_side(a), kept_side(b)
    if one is None or other is None:
        return None
    # Two additive masks, perhaps with a bias in them: kept where both keep.
    off = min(literal_value(one.off) or MASKED, literal_value(other.off) or MASKED)
    return Select.of(one.predicate & other.predicate, plus(one.on, other.on), Sum.number(off))


def kept_side(value: Select) -> Select | None:
    """A value that is masked on one side, with that side as `off`."""
    if masked(value.off):
        return value
    return Select(value.predicate.inverted(), value.off, value.on) if masked(value.on) else None


@rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)
def add(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    first, second = binary(interpreter, node, index)
    if node.meta["val"].dtype == torch.bool:
        # The sum of two booleans is one: either holds.
        both = isinstance(first, Conjunction) and isinstance(second, Conjunction)
        return first | second if both else None  # type: ignore[operator]
    a, b = numeric(first), numeric(second)
    if a is None or b is None:
        return None
    if node.target == aten.rsub.Scalar:
        a, b = b, a
    if node.target not in (aten.add.Tensor, aten.add.Scalar):
        b = multiplied(b, Select.uniform(Affine((), -1)))
    return finished(None if b is None else added(a, b))


def finished(value: Select | None) -> Value | None:
    """The value, unless it holds something that is no number, or infinite beside data."""
    if value is None:
        return None
    for branch in (value.on, value.off):
        if isinstance(branch, Sum) and any(math.isnan(c) for _, c in branch.terms):
            return None
    # Data added to what is masked anyway does not unmask it.
    sides = [swallow(branch) for branch in (value.on, value.off)]
    return narrowed(value if value.plain else Select.of(value.predicate, sides[0], sides[1]))


def swallow(branch: Number) -> Number:
    if isinstance(branch, Sum):
        held = dict(branch.terms).get((), 0.0)
        if held == float("-inf"):
            return Sum.number(held)
    return branch


def multiplied(a: Select, b: Select) -> Select | None:
    if not (a.plain or b.plain or a.predicate == b.predicate):
        if literal_value(a.off) != 0.0 or literal_value(b.off) != 0.0:
            return None
        on = times(a.on, b.on)
        return None if on is None else Select.of(a.predicate & b.predicate, on, Sum())
    condition = b.predicate if a.plain else a.predicate
    on, off = times(a.on, b.on), times(a.off, b.off)
    return None if on is None or off is None else Select.of(condition, on, off)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    a, b = binary(interpreter, node, index)
    if isinstance(a, Conjunction) and isinstance(b, Conjunction):
        return a & b
    a, b = numeric(a), numeric(b)
    return finished(multiplied(a, b)) if a is not None and b is not None else None


@rule(aten.neg.default)
def neg(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = numeric(interpreter.operand(node.args[0], index))
    return None if value is None else finished(multiplied(value, Select.uniform(Affine((), -1))))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    a, b = (numeric(value) for value in binary(interpreter, node, index))
    divisor = literal_value(b.on) if b is not None and b.plain else None
    if a is None or not divisor:
        return None
    scaled = multiplied(Select(a.predicate, as_sum(a.on), as_sum(a.off)), Select.uniform(Sum.number(1 / divisor)))
    return finished(scaled)


def divided(interpreter: Interpreter, node: Node, index: Index) -> tuple[Affine, Affine] | None:
    """Quotient and remainder by a positive constant."""
    a, b = binary(interpreter, node, index)
    if not isinstance(a, Affine) or not isinstance(b, Affine) or not b.is_constant:
        return None
    if not isinstance(b.constant, int) or b.constant <= 0:
        return None
    return divide(a, b.constant, interpreter.ranges)


@rule(
    aten.floor_divide.default, aten.floor_divide.Scalar, aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar
)
def floor_divide(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if "shift" in str(node.target):
        a, places = interpreter.operand(node.args[0], index), node.args[1]
        known = isinstance(a, Affine) and isinstance(places, int) and places >= 0
        return divide(a, 2**places, interpreter.ranges)[0] if known and isinstance(a, Affine) else None
    found = divided(interpreter, node, index)
    return None if found is None else found[0]


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    found = divided(interpreter, node, index)
    if found is None or node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return div(interpreter, node, index) if node.kwargs.get("rounding_mode") is None else None
    if node.kwargs["rounding_mode"] == "trunc":
        # Towards zero is downwards only where nothing is negative.
        dividend = interpreter.operand(node.args[0], index)
        assert isinstance(dividend, Affine)
        low, _ = interpreter.ranges.bounds(dividend)
        return found[0] if interpreter.ranges.nonnegative(low) else None
    return found[0]


@rule(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    found = divided(interpreter, node, index)
    return None if found is None else found[1]


@rule(aten.abs.default)
def abs_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    return absolute(value, interpreter.ranges) if isinstance(value, Affine) else None


@rule(aten.clamp.default, aten.clamp.Tensor)
def clamp(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    for limit, sign in ((argument(node, 1, "min"), 1), (argument(node, 2, "max"), -1)):
        if limit is not None:
            value = limited(interpreter, value, interpreter.operand(limit, index), sign)
    return value


@rule(aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default, aten.max.other)
def at_least(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    return limited(interpreter, *binary(interpreter, node, index), 1)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default, aten.min.other)
def at_most(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    return limited(interpreter, *binary(interpreter, node, index), -1)


def limited(interpreter: Interpreter, value: Value | None, bound: Value | None, sign: int) -> Value | None:
    """The larger of two integers (sign 1), or the smaller (-1)."""
    if not isinstance(value, Affine) or not isinstance(bound, Affine):
        return None
    above = fold_ranges(at_least_zero((value - bound) * sign), interpreter.ranges)
    return narrowed(Select.of(above, value, bound))


@rule(aten.cumsum.default)
def cumsum(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    """A sum of zeros is 0: folds the packed-sequence test of transformers away when positions are an arange.

    A sum of ones counts: positions made of a mask of ones.
    """
    dim = dimension(node, argument(node, 1, "dim", 0))
    variable = interpreter.fresh(shape_of(node)[dim])
    inner = interpreter.operand(node.args[0], (*index[:dim], Affine.var(variable), *index[dim + 1 :]))
    if inner == FALSE:
        return Affine()
    held = numeric(inner)
    each = literal_value(held.on) if held is not None and held.plain else None
    return (index[dim] + 1) * int(each) if each is not None and each.is_integer() else None


@rule(aten.diff.default)
def diff(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    order, dim = argument(node, 1, "n", 1), dimension(node, argument(node, 2, "dim", -1))
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if order != 1 or append is not None:
        return None
    source, at = node.args[0], index[dim]

    def read(tensor: Any, position: Affine) -> Value | None:
        return interpreter.operand(tensor, (*index[:dim], position, *index[dim + 1 :]))

    if prepend is None:
        return step(read(source, at + 1), read(source, at))
    if not is_one(shape_of(prepend)[dim]):
        return None
    head, inner = step(read(source, Affine()), read(prepend, Affine())), step(read(source, at), read(source, at - 1))
    # Position 0 and the rest have different formulas: followed only where they agree.
    return inner if head == inner else None


def step(high: Value | None, low: Value | None) -> Affine | None:
    return high - low if isinstance(high, Affine) and isinstance(low, Affine) else None
