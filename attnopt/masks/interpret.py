"""Abstract interpretation of a mask's subgraph: each tensor becomes an expression in its own index variables.

    arange -> i      unsqueeze/expand/view/slice/index -> re-indexing      le/eq/and/where/tril/cumsum -> predicate

``Interpreter.at(node, index)`` is the value of an fx node at a symbolic position. What cannot be interpreted becomes an
opaque load at the indices it really depends on, so nothing is ever guessed: a mask is either proved or passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnopt.masks.algebra import FALSE, TRUE, Affine, BoolLoad, Conjunction, as_constant, at_least_zero

aten = torch.ops.aten
Index = tuple[Affine, ...]
# Anything at or below this is "minus infinity" to a soft-max in any dtype: transformers uses the dtype's minimum,
# older models -1e4 and -1e9.
MASKED = -1e4


@dataclass(frozen=True)
class Select:
    """`on` where the predicate holds, `off` elsewhere: a constant has the predicate true."""

    predicate: Conjunction
    on: float
    off: float


@dataclass(frozen=True)
class Opaque:
    """Data: the value of `node` at `index`; `bool` nodes become predicates instead."""

    node: Node
    index: Index


Value = Affine | Conjunction | Select | Opaque


def constant(value: float) -> Select:
    return Select(TRUE, float(value), float(value))


def shape_of(node: Node) -> Sequence[Any]:
    return node.meta["val"].shape


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


class Interpreter:
    """Interprets the nodes of one graph; memoised over (node, index)."""

    def __init__(self) -> None:
        self._memo: dict[tuple[Node, Index], Value] = {}
        self._fresh = 0

    def at(self, node: Node, index: Index) -> Value:
        """The value of `node` at `index` (one affine expression per dimension)."""
        key = (node, index)
        if key not in self._memo:
            handler = RULES.get(node.target) if node.op == "call_function" else None
            value = handler(self, node, index) if handler is not None else None
            self._memo[key] = self.opaque(node, index) if value is None else value
        return self._memo[key]

    def opaque(self, node: Node, index: Index) -> Value:
        # A dimension of size one is read at 0 whatever the position: that is what the load depends on.
        index = tuple(Affine() if is_one(size) else a for a, size in zip(index, shape_of(node), strict=True))
        if node.meta["val"].dtype == torch.bool:
            return Conjunction(frozenset({BoolLoad(node, index)}))
        return Opaque(node, index)

    def operand(self, value: Any, index: Index) -> Value | None:
        """A node broadcast to `index`'s rank, or a Python number."""
        if isinstance(value, bool):
            return TRUE if value else FALSE
        if isinstance(value, (int, torch.SymInt)):
            return Affine((), as_constant(value))
        if isinstance(value, float):
            return constant(value)
        if not isinstance(value, Node) or "val" not in value.meta:
            return None
        if isinstance(value.meta["val"], (int, torch.SymInt)):
            return Affine((), as_constant(value.meta["val"]))
        if not isinstance(value.meta["val"], torch.Tensor):
            return None
        sizes = shape_of(value)
        tail = index[len(index) - len(sizes) :] if sizes else ()
        return self.at(value, tuple(Affine() if is_one(s) else a for a, s in zip(tail, sizes, strict=True)))

    def fresh(self) -> str:
        self._fresh += 1
        return f"t{self._fresh}"


Handler = Callable[[Interpreter, Node, Index], "Value | None"]
RULES: dict[Any, Handler] = {}


def rule(*targets: Any) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        RULES.update(dict.fromkeys(targets, handler))
        return handler

    return add


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dimension(node: Node, dim: int) -> int:
    return dim % max(1, len(shape_of(node)))


# --- sources --------------------------------------------------------------------------------------------------------


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(_: Interpreter, node: Node, index: Index) -> Value | None:
    numbers = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1)
    if not isinstance(step, int) or isinstance(start, float) or node.meta["val"].is_floating_point():
        return None
    return index[0] * step + Affine((), as_constant(start))


def filled(value: float, node: Node) -> Value:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return TRUE if value else FALSE
    return constant(value) if dtype.is_floating_point else Affine((), int(value))


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(_: Interpreter, node: Node, index: Index) -> Value:
    return filled(0.0, node)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(_: Interpreter, node: Node, index: Index) -> Value:
    return filled(1.0, node)


@rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)
def full(_: Interpreter, node: Node, index: Index) -> Value | None:
    position = {aten.new_full.default: 2, aten.scalar_tensor.default: 0}.get(node.target, 1)
    value = argument(node, position, "fill_value")
    return filled(float(value), node) if isinstance(value, (int, float)) else None


# --- re-indexing ----------------------------------------------------------------------------------------------------


@rule(
    aten.alias.default, aten.clone.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default
)
def same(interpreter: Interpreter, node: Node, index: Index) -> Value:
    return interpreter.at(node.args[0], index)


@rule(aten.unsqueeze.default)
def unsqueeze(interpreter: Interpreter, node: Node, index: Index) -> Value:
    dim = dimension(node, node.args[1])
    return interpreter.at(node.args[0], index[:dim] + index[dim + 1 :])


@rule(aten.squeeze.dim)
def squeeze(interpreter: Interpreter, node: Node, index: Index) -> Value:
    dim = node.args[1] % len(shape_of(node.args[0]))
    if len(shape_of(node.args[0])) == len(index):
        return interpreter.at(node.args[0], index)
    return interpreter.at(node.args[0], (*index[:dim], Affine(), *index[dim:]))


@rule(aten.expand.default)
def expand(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    return interpreter.operand(node.args[0], index)


@rule(aten.transpose.int)
def transpose(interpreter: Interpreter, node: Node, index: Index) -> Value:
    a, b = dimension(node, node.args[1]), dimension(node, node.args[2])
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return interpreter.at(node.args[0], tuple(swapped))


@rule(aten.permute.default)
def permute(interpreter: Interpreter, node: Node, index: Index) -> Value:
    source: list[Affine] = [Affine()] * len(index)
    for position, dim in enumerate(node.args[1]):
        source[dim % len(index)] = index[position]
    return interpreter.at(node.args[0], tuple(source))


@rule(aten.slice.Tensor)
def slice_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    dim = dimension(node, argument(node, 1, "dim", 0))
    start, step = argument(node, 2, "start", 0) or 0, argument(node, 4, "step", 1)
    start = start.meta["val"] if isinstance(start, Node) else start
    # A negative start counts from an end that may be symbolic: leave it as data.
    if not isinstance(step, int) or not (start >= 0 if isinstance(start, int) else False):
        return None
    moved = (*index[:dim], index[dim] * step + start, *index[dim + 1 :])
    return interpreter.at(node.args[0], moved)


@rule(aten.select.int)
def select(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    dim, position = node.args[1] % len(shape_of(node.args[0])), node.args[2]
    if not isinstance(position, int) or position < 0:
        return None
    return interpreter.at(node.args[0], (*index[:dim], Affine((), position), *index[dim:]))


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    """Adding and removing dimensions of size one; splitting a dimension is affine too. Merging needs div and mod."""
    old, new = list(shape_of(node.args[0])), list(shape_of(node))
    source: list[Affine] = []
    at = 0
    for size in old:
        if is_one(size):
            source.append(Affine())
            continue
        while at < len(new) and is_one(new[at]):
            at += 1
        if at < len(new) and same_size(new[at], size):
            source.append(index[at])
            at += 1
            continue
        linear, covered = Affine(), 1
        while at < len(new) and isinstance(new[at], int) and isinstance(size, int) and covered < size:
            linear, covered = linear * new[at] + index[at], covered * new[at]
            at += 1
        if covered != size:
            return None
        source.append(linear)
    return interpreter.at(node.args[0], tuple(source)) if all(is_one(s) for s in new[at:]) else None


def same_size(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


@rule(aten.index.Tensor)
def index_tensor(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    table, indices = node.args
    used = [d for d, t in enumerate(indices) if t is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    rank = max(len(shape_of(indices[d])) for d in used)
    first = used[0]
    position, rest = index[first : first + rank], index[first + rank :]
    source = list(index[:first])
    for d in used:
        value = interpreter.operand(indices[d], position)
        # A negative entry would wrap round; only what cannot be negative is followed.
        if not isinstance(value, Affine) or any(c < 0 for _, c in value.terms) or not known_nonnegative(value.constant):
            return None
        source.append(value)
    return interpreter.at(table, tuple(source) + tuple(rest))


def known_nonnegative(value: Any) -> bool:
    return value >= 0 if isinstance(value, int) else bool(value.is_nonnegative)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def binary(interpreter: Interpreter, node: Node, index: Index) -> tuple[Value | None, Value | None]:
    return interpreter.operand(node.args[0], index), interpreter.operand(node.args[1], index)


def both_masked(a: Select, b: Select) -> Select | None:
    """Two additive masks summed: kept where both keep."""
    one, other = additive(a), additive(b)
    if one is None or other is None:
        return None
    return Select(one.predicate & other.predicate, 0.0, min(one.off, other.off))


def additive(mask: Select) -> Select | None:
    """An additive mask as 0 where kept and `off` elsewhere, whichever way round it was written; None for a bias."""
    if mask.on == 0.0 and (mask.off <= MASKED or mask.predicate == TRUE):
        return mask
    inverted = mask.predicate.inverted()
    if mask.off == 0.0 and mask.on <= MASKED and inverted is not None:
        return Select(inverted, 0.0, mask.on)
    return None


@rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)
def add(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    a, b = binary(interpreter, node, index)
    if node.target == aten.rsub.Scalar:
        a, b = b, a
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    if isinstance(a, Affine) and isinstance(b, Affine):
        return a + b * sign
    a, b = numeric(a), numeric(b)
    if isinstance(a, Select) and isinstance(b, Select):
        if b.predicate == TRUE:
            return Select(a.predicate, a.on + sign * b.on, a.off + sign * b.on)
        if a.predicate == TRUE:
            return Select(b.predicate, a.on + sign * b.on, a.on + sign * b.off)
        return both_masked(a, b) if sign == 1 else None
    return None


def numeric(value: Value | None) -> Value | None:
    """A constant integer or a predicate as a Select; everything else unchanged."""
    if isinstance(value, Affine) and value.is_constant and isinstance(value.constant, int):
        return constant(value.constant)
    return Select(value, 1.0, 0.0) if isinstance(value, Conjunction) else value


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    a, b = binary(interpreter, node, index)
    if isinstance(a, Conjunction) and isinstance(b, Conjunction):
        return a & b
    if isinstance(a, Affine) and isinstance(b, Affine):
        for x, y in ((a, b), (b, a)):
            if y.is_constant and isinstance(y.constant, int):
                return x * y.constant
        return None
    a, b = numeric(a), numeric(b)
    if isinstance(a, Select) and isinstance(b, Select):
        for one, other in ((a, b), (b, a)):
            if other.predicate == TRUE:
                return Select(one.predicate, one.on * other.on, one.off * other.on)
    return None


@rule(aten.neg.default)
def neg(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    return value * -1 if isinstance(value, Affine) else None


@rule(aten.cumsum.default)
def cumsum(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    """A sum of zeros is 0: folds the packed-sequence test of transformers away when positions are an arange."""
    dim = dimension(node, node.args[1])
    variable = interpreter.fresh()
    inner = interpreter.operand(node.args[0], (*index[:dim], Affine.var(variable), *index[dim + 1 :]))
    zero = inner == FALSE or (isinstance(inner, Affine) and inner == Affine())
    return Affine() if zero else None


@rule(aten.diff.default)
def diff(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    order, dim = argument(node, 1, "n", 1), dimension(node, argument(node, 2, "dim", -1))
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if order != 1 or append is not None:
        return None
    source, at = node.args[0], index[dim]

    def read(tensor: Node, position: Affine) -> Value | None:
        return interpreter.operand(tensor, (*index[:dim], position, *index[dim + 1 :]))

    if prepend is None:
        high, low = read(source, at + 1), read(source, at)
        return high - low if isinstance(high, Affine) and isinstance(low, Affine) else None
    if not is_one(shape_of(prepend)[dim]):
        return None
    first, before = read(source, Affine()), read(prepend, Affine())
    high, low = read(source, at), read(source, at - 1)
    if not (isinstance(first, Affine) and isinstance(before, Affine)):
        return None
    if not (isinstance(high, Affine) and isinstance(low, Affine)):
        return None
    head, step = first - before, high - low
    # Position 0 and the rest have different formulas: followed only where they agree.
    return step if head == step else None


# --- predicates -----------------------------------------------------------------------------------------------------


def compare(a: Value | None, b: Value | None, op: str) -> Conjunction | None:
    """`a op b` for affine integers, or for a Select against a number."""
    if isinstance(a, Affine) and isinstance(b, Affine):
        difference = a - b
        if op in ("ge", "gt"):
            return at_least_zero(difference if op == "ge" else difference - 1)
        if op in ("le", "lt"):
            return at_least_zero(difference * -1 if op == "le" else difference * -1 - 1)
        equal = at_least_zero(difference) & at_least_zero(difference * -1)
        return equal if op == "eq" else equal.inverted() if equal.constant is not None else None
    a, b = numeric(a), numeric(b)
    if isinstance(a, Select) and isinstance(b, Select) and b.predicate == TRUE:
        on, off = (getattr(x, f"__{op}__")(b.on) for x in (a.on, a.off))
        if on == off:
            return TRUE if on else FALSE
        return a.predicate if on else a.predicate.inverted()
    return None


def comparison(op: str) -> Handler:
    def handler(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
        a, b = binary(interpreter, node, index)
        return compare(a, b, op)

    return handler


for _name in ("ge", "gt", "le", "lt", "eq", "ne"):
    rule(getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)(comparison(_name))


@rule(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
def and_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    a, b = binary(interpreter, node, index)
    return a & b if isinstance(a, Conjunction) and isinstance(b, Conjunction) else None


@rule(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
def or_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    a, b = binary(interpreter, node, index)
    for x, y in ((a, b), (b, a)):
        if x in (TRUE, y):
            return x
        if x == FALSE and isinstance(y, Conjunction):
            return y
    return None


@rule(aten.bitwise_not.default, aten.logical_not.default)
def not_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    if node.meta["val"].dtype != torch.bool or not isinstance(value, Conjunction):
        return None
    return value.inverted()


@rule(aten._to_copy.default, aten.to.dtype, aten.type_as.default)
def cast(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node.args[0], index)
    dtype, source = node.meta["val"].dtype, node.args[0].meta["val"].dtype
    if dtype == source:
        return value
    if dtype == torch.bool:
        return compare(value, constant(0.0), "ne")
    if dtype.is_floating_point:
        # The smallest float32 becomes -inf in a narrower type: still masked.
        return numeric(value) if isinstance(numeric(value), Select) else None
    return value if isinstance(value, Affine) and not source.is_floating_point else None


@rule(aten.tril.default, aten.triu.default)
def triangle(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    diagonal = argument(node, 1, "diagonal", 0)
    row, column = index[-2], index[-1]
    inside = column - row - diagonal if node.target == aten.triu.default else row + diagonal - column
    value = numeric(interpreter.operand(node.args[0], index))
    if not isinstance(value, Select):
        return None
    predicate = at_least_zero(inside)
    if node.meta["val"].dtype == torch.bool:
        proper = value.on and (not value.off or value.predicate == TRUE)
        return predicate & value.predicate if proper else None
    if value.predicate == TRUE:
        # -inf above the diagonal, or ones below it; 0 elsewhere.
        return Select(predicate, value.on, 0.0)
    return None


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    condition, on, off = (interpreter.operand(a, index) for a in node.args)
    return choose(condition, numeric(on), numeric(off))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    other, condition, value = (interpreter.operand(a, index) for a in node.args)
    if node.meta["val"].dtype == torch.bool:
        dropped = condition.inverted() if isinstance(condition, Conjunction) else None
        blank = (isinstance(value, Conjunction) and value == FALSE) or numeric(value) == constant(0.0)
        return other & dropped if blank and dropped is not None and isinstance(other, Conjunction) else None
    return choose(condition, numeric(value), numeric(other))


def choose(condition: Value | None, on: Value | None, off: Value | None) -> Select | None:
    """``where(condition, on, off)`` over selects: one side constant, and nested additive masks joined."""
    if not (isinstance(condition, Conjunction) and isinstance(on, Select) and isinstance(off, Select)):
        return None
    if on.predicate == TRUE and off.predicate == TRUE:
        return Select(condition, on.on, off.on)
    if off.predicate == TRUE and off.on <= MASKED and on.off <= MASKED:
        return Select(condition & on.predicate, on.on, min(off.on, on.off))
    inverted = condition.inverted()
    if on.predicate == TRUE and on.on <= MASKED and off.off <= MASKED and inverted is not None:
        return Select(inverted & off.predicate, off.on, min(on.on, off.off))
    return None
