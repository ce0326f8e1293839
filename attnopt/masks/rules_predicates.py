"""Rules for comparisons, connectives, casts, triangles and choices."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, reads
from attnopt.masks.interpret import Handler, Index, Interpreter, argument, rule
from attnopt.masks.predicates import FALSE, TRUE, Conjunction, at_least_zero, equal_zero
from attnopt.masks.values import (
    Number,
    Select,
    Sum,
    Value,
    additive,
    as_sum,
    constant,
    literal_value,
    masked,
    narrowed,
    numeric,
)

aten = torch.ops.aten


def compare(a: Value | None, b: Value | None, op: str) -> Conjunction | None:
    """`a op b`, side by side of what either may be."""
    one, other = numeric(a), numeric(b)
    if one is None or other is None:
        return None
    if isinstance(a, Conjunction) and isinstance(b, Conjunction) and op in ("eq", "ne"):
        alike = (a & b) | (a.inverted() & b.inverted())
        return alike if op == "eq" else alike.inverted()
    result: Conjunction | None = FALSE
    sides = [(one.predicate, one.on), (one.predicate.inverted(), one.off)]
    others = [(other.predicate, other.on), (other.predicate.inverted(), other.off)]
    for condition, x in sides:
        for other_condition, y in others:
            joint = condition & other_condition
            if joint == FALSE:
                continue
            here = compare_numbers(x, y, op)
            if here is None or result is None:
                return None
            result = result | (joint & here)
    return result


def compare_numbers(a: Number, b: Number, op: str) -> Conjunction | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        difference = a - b
        if op in ("ge", "gt"):
            return at_least_zero(difference if op == "ge" else difference - 1)
        if op in ("le", "lt"):
            return at_least_zero(difference * -1 if op == "le" else difference * -1 - 1)
        equal = equal_zero(difference)
        return equal if op == "eq" else equal.inverted()
    x, y = literal_value(a), literal_value(b)
    if x is not None and y is not None:
        return TRUE if getattr(operator, op)(x, y) else FALSE
    # An integer expression against a float that is an integer, or lies between two.
    for expression, number, mirrored in ((a, y, op), (b, x, MIRRORED[op])):
        if isinstance(expression, Affine) and number is not None:
            return against_number(expression, number, mirrored)
    return None


MIRRORED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt", "eq": "eq", "ne": "ne"}


def against_number(expression: Affine, number: float, op: str) -> Conjunction | None:
    if number in (float("inf"), float("-inf")) or number != number:
        return None
    if number.is_integer():
        return compare_numbers(expression, Affine((), int(number)), op)
    if op in ("eq", "ne"):
        return FALSE if op == "eq" else TRUE
    below = Affine((), int(number // 1))
    return compare_numbers(expression, below, "gt" if op in ("ge", "gt") else "le")


def rounded(operand: object, value: Value | None) -> bool:
    """Whether integers that were read from data are held in float32."""
    single = isinstance(operand, Node) and operand.meta["val"].dtype == torch.float32
    return single and isinstance(value, Affine) and next(reads(value), None) is not None


def comparison(op: str) -> Handler:
    def handler(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
        a, b = (interpreter.operand(x, index) for x in node.args[:2])
        # Integers beyond 2^24 may be equal once they are rounded: data is not compared with data in float32.
        if all(map(rounded, node.args[:2], (a, b))):
            return None
        return compare(a, b, op)

    return handler


for _name in ("ge", "gt", "le", "lt", "eq", "ne"):
    rule(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(comparison(_name))


def truth(interpreter: Interpreter, value: object, index: Index) -> Conjunction | None:
    """An operand of a logical connective: anything but 0 is true."""
    held = interpreter.operand(value, index)
    return held if isinstance(held, Conjunction) else compare(held, constant(0.0), "ne")


def connective(join: Callable[[Conjunction, Conjunction], Conjunction]) -> Handler:
    def handler(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
        if "bitwise" in str(node.target) or "__" in str(node.target):
            a, b = (interpreter.operand(x, index) for x in node.args[:2])
        else:
            a, b = (truth(interpreter, x, index) for x in node.args[:2])
        return join(a, b) if isinstance(a, Conjunction) and isinstance(b, Conjunction) else None

    return handler


rule(
    aten.__and__.Tensor, aten.__and__.Scalar, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.logical_and.default
)(connective(operator.and_))
rule(aten.__or__.Tensor, aten.__or__.Scalar, aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.logical_or.default)(
    connective(operator.or_)
)
rule(aten.__xor__.Tensor, aten.bitwise_xor.Tensor, aten.logical_xor.default)(
    connective(lambda a, b: (a | b) & (a & b).inverted())
)


@rule(aten.bitwise_not.default, aten.logical_not.default)
def not_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if node.target == aten.logical_not.default:
        value: Value | None = truth(interpreter, node.args[0], index)
    else:
        value = interpreter.operand(node.args[0], index)
    if node.meta["val"].dtype != torch.bool or not isinstance(value, Conjunction):
        return None
    return value.inverted()


@rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)
def cast(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    dtype, source = node.meta["val"].dtype, node.args[0].meta["val"].dtype
    if dtype == source or value is None:
        return value
    if dtype == torch.bool:
        return compare(value, constant(0.0), "ne")
    held = numeric(value)
    assert held is not None
    if dtype.is_floating_point:
        sides = [as_float(interpreter, side, dtype) for side in (held.on, held.off)]
        return narrowed(Select.of(held.predicate, sides[0], sides[1]))
    if dtype not in (torch.int32, torch.int64) and not isinstance(value, Conjunction):
        return None
    whole = [as_integer(side) for side in (held.on, held.off)]
    return None if whole[0] is None or whole[1] is None else narrowed(Select.of(held.predicate, whole[0], whole[1]))


def as_float(interpreter: Interpreter, number: Number, dtype: torch.dtype) -> Number:
    """A number rounded to `dtype`: what overflows becomes infinite, an integer stays one where it is held exactly."""
    held = literal_value(number)
    if held is not None:
        limit = torch.finfo(dtype).max
        return number if abs(held) <= limit else Sum.number(float("inf") if held > 0 else float("-inf"))
    # Positions beyond 2^24 do not occur with a mask over pairs of them.
    exact = {torch.float16: 2**11, torch.bfloat16: 2**8}.get(dtype)
    if isinstance(number, Affine) and exact is not None and not interpreter.ranges.within(number, -exact, exact):
        return as_sum(number)
    return number


def as_integer(number: Number) -> Affine | None:
    held = literal_value(number)
    if held is not None:
        return Affine((), int(held)) if held.is_integer() else None
    return number if isinstance(number, Affine) else None


@rule(aten.tril.default, aten.triu.default)
def triangle(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    diagonal = argument(node, 1, "diagonal", 0)
    diagonal = diagonal.meta["val"] if isinstance(diagonal, Node) else diagonal
    bound = interpreter.operand(diagonal, ())
    if not isinstance(bound, Affine):
        return None
    row, column = index[-2], index[-1]
    inside = column - row - bound if node.target == aten.triu.default else row + bound - column
    value = interpreter.operand(node.args[0], index)
    nothing: Value = FALSE if node.meta["val"].dtype == torch.bool else constant(0.0)
    return None if value is None else choose(at_least_zero(inside), value, nothing)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    condition, on, off = (interpreter.operand(a, index) for a in node.args)
    return None if on is None or off is None else choose(condition, on, off)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    other, condition, value = (interpreter.operand(a, index) for a in node.args)
    if other is None or value is None:
        return None
    if node.meta["val"].dtype == torch.bool:
        value = value if isinstance(value, Conjunction) else compare(value, constant(0.0), "ne")
    return None if value is None else choose(condition, value, other)


def choose(condition: Value | None, on: Value, off: Value) -> Value | None:
    """``where(condition, on, off)``: predicates of any form, numbers of at most two different values."""
    if not isinstance(condition, Conjunction):
        return None
    if condition.constant is not None:
        return on if condition.constant else off
    if isinstance(on, Conjunction) and isinstance(off, Conjunction):
        return (condition & on) | (condition.inverted() & off)
    yes, no = numeric(on), numeric(off)
    if yes is None or no is None:
        return None
    if any(isinstance(x, Sum) for x in (yes.on, yes.off, no.on, no.off)):
        # So that 0 and 0.0 are the same number.
        yes, no = floating(yes), floating(no)
    if yes.plain and no.plain:
        return narrowed(Select.of(condition, yes.on, no.on))
    for inside, outside, keep in ((yes, no, condition), (no, yes, condition.inverted())):
        # One side is a fixed masked value and the other an additive mask: kept where both keep.
        held = additive(inside, needs_zero=False)
        fixed = literal_value(outside.on) if outside.plain else None
        if held is not None and fixed is not None and masked(outside.on):
            return Select.of(keep & held.predicate, held.bias, Sum.number(min(fixed, held.off)))
        # Both take one of the same two values.
        if outside.plain and outside.on in (inside.on, inside.off):
            first = inside.predicate if outside.on == inside.on else inside.predicate.inverted()
            last = inside.off if outside.on == inside.on else inside.on
            return narrowed(Select.of(first | keep.inverted(), outside.on, last))
    if (yes.on, yes.off) == (no.on, no.off):
        return Select.of((condition & yes.predicate) | (condition.inverted() & no.predicate), yes.on, yes.off)
    return None


def floating(value: Select) -> Select:
    """The same with its known numbers as floats."""
    on, off = (x if literal_value(x) is None else as_sum(x) for x in (value.on, value.off))
    return Select(value.predicate, on, off)
