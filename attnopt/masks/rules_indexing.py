"""Rules for views and look-ups: the same value, read at another index."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, as_constant, divide
from attnopt.masks.interpret import Index, Interpreter, argument, dimension, is_one, rule, same_size, shape_of
from attnopt.masks.predicates import TRUE, Conjunction, at_least_zero
from attnopt.masks.rules_predicates import choose
from attnopt.masks.values import Value

aten = torch.ops.aten


@rule(
    aten.alias.default, aten.clone.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default
)
def same(interpreter: Interpreter, node: Node, index: Index) -> Value:
    return interpreter.at(node.args[0], index)


@rule(aten.dropout.default)
def dropout(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    inactive = node.args[1] == 0 or node.args[2] is False
    return interpreter.at(node.args[0], index) if inactive else None


@rule(aten.unsqueeze.default)
def unsqueeze(interpreter: Interpreter, node: Node, index: Index) -> Value:
    dim = dimension(node, node.args[1])
    return interpreter.at(node.args[0], index[:dim] + index[dim + 1 :])


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def squeeze(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    sizes = shape_of(node.args[0])
    named = argument(node, 1, "dim", range(len(sizes)))
    dims = {d % len(sizes) for d in ([named] if isinstance(named, int) else named)}
    gone = {d for d in dims if is_one(sizes[d])}
    if len(sizes) - len(gone) != len(index):
        return None
    left = iter(index)
    return interpreter.at(node.args[0], tuple(Affine() if d in gone else next(left) for d in range(len(sizes))))


@rule(aten.expand.default, aten.expand_as.default)
def expand(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    return interpreter.operand(node.args[0], index)


@rule(aten.transpose.int, aten.t.default, aten.mT.default)
def transpose(interpreter: Interpreter, node: Node, index: Index) -> Value:
    first, second = node.args[1:] if node.target == aten.transpose.int else (-2, -1)
    a, b = dimension(node, first), dimension(node, second)
    swapped = list(index)
    if len(index) > 1:
        swapped[a], swapped[b] = swapped[b], swapped[a]
    return interpreter.at(node.args[0], tuple(swapped))


@rule(aten.permute.default)
def permute(interpreter: Interpreter, node: Node, index: Index) -> Value:
    source: list[Affine] = [Affine()] * len(index)
    for position, dim in enumerate(node.args[1]):
        source[dim % len(index)] = index[position]
    return interpreter.at(node.args[0], tuple(source))


def number(value: Any) -> Any:
    """A literal or symbolic integer as an int or sympy expression; None for anything else."""
    value = value.meta.get("val") if isinstance(value, Node) else value
    return as_constant(value) if isinstance(value, (int, torch.SymInt)) else None


@rule(aten.slice.Tensor)
def slice_(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    dim = dimension(node, argument(node, 1, "dim", 0))
    start, step = number(argument(node, 2, "start") or 0), argument(node, 4, "step", 1)
    if not isinstance(step, int) or start is None:
        return None
    size = as_constant(shape_of(node.args[0])[dim])
    nonnegative = interpreter.ranges.nonnegative
    if nonnegative(-start - 1):
        # Counted from the end, and cut off at the beginning.
        start = start + size
        if not nonnegative(start):
            return None
    elif not nonnegative(start):
        return None
    moved = (*index[:dim], index[dim] * step + Affine((), start), *index[dim + 1 :])
    return interpreter.at(node.args[0], moved)


@rule(aten.select.int)
def select(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    sizes = shape_of(node.args[0])
    dim, position = node.args[1] % len(sizes), number(node.args[2])
    if position is not None and interpreter.ranges.nonnegative(-position - 1):
        position = position + as_constant(sizes[dim])
    if position is None or not interpreter.ranges.nonnegative(position):
        return None
    return interpreter.at(node.args[0], (*index[:dim], Affine((), position), *index[dim:]))


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
def view(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    """Dimensions are split and merged in runs of equal size: a run's flat position, divided up again."""
    old, new = list(shape_of(node.args[0])), list(shape_of(node))
    source: list[Affine] = []
    o = n = 0
    while o < len(old):
        if is_one(old[o]):
            source.append(Affine())
            o += 1
            continue
        while n < len(new) and is_one(new[n]):
            n += 1
        if n < len(new) and same_size(old[o], new[n]):
            source.append(index[n])
            o, n = o + 1, n + 1
            continue
        run = equal_run(old, new, o, n)
        if run is None:
            return None
        flat = Affine()
        for position in range(n, run[1]):
            flat = flat * new[position] + index[position] if position > n else index[position]
        split: list[Affine] = []
        for dim in range(run[0] - 1, o, -1):
            flat, rest = divide(flat, old[dim], interpreter.ranges)
            split.append(rest)
        source += [flat, *reversed(split)]
        o, n = run
    return interpreter.at(node.args[0], tuple(source)) if all(is_one(s) for s in new[n:]) else None


def equal_run(old: list[Any], new: list[Any], o: int, n: int) -> tuple[int, int] | None:
    """Where the shortest runs of dimensions from o and n with equal products end; all but the first sizes are ints."""
    ends = itertools.product(range(o + 1, len(old) + 1), range(n + 1, len(new) + 1))
    # By length, not by size: which of two symbolic products is the smaller one is not known.
    for o_end, n_end in sorted(ends, key=sum):
        if same_size(product(old[o:o_end]), product(new[n:n_end])):
            known = all(isinstance(s, int) for s in (*old[o + 1 : o_end], *new[n + 1 : n_end]))
            return (o_end, n_end) if known else None
    return None


def product(sizes: list[Any]) -> Any:
    result = 1
    for size in sizes:
        result = result * size
    return result


@rule(aten.index.Tensor)
def index_tensor(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    table, indices = node.args
    sizes = shape_of(table)
    used = [d for d, t in enumerate(indices) if t is not None]
    if any(indices[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in used):
        return None
    rank = max(len(shape_of(indices[d])) for d in used)
    # Indices that are not neighbours put their common dimensions first.
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    position, rest = index[first : first + rank], iter((*index[:first], *index[first + rank :]))
    source: list[Affine] = []
    exact = True
    for d in range(len(sizes)):
        if d not in used:
            source.append(next(rest))
            continue
        value = interpreter.integer(indices[d], position)
        if value is None:
            return None
        low, high = interpreter.ranges.bounds(value)
        if high is not None and interpreter.ranges.nonnegative(-high - 1):
            value, low = value + as_constant(sizes[d]), None if low is None else low + as_constant(sizes[d])
        exact = exact and interpreter.ranges.nonnegative(low)
        source.append(value)
    # An entry that may be negative wraps round, which only a look-up in the table itself does as well.
    return interpreter.at(table, tuple(source)) if exact else interpreter.opaque(table, tuple(source))


@rule(aten.embedding.default, aten.index_select.default)
def embedding(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if node.target == aten.embedding.default:
        table, indices, dim = node.args[0], node.args[1], 0
    else:
        table, dim, indices = node.args[0], dimension(node.args[0], node.args[1]), node.args[2]
    rank = len(shape_of(indices))
    value = interpreter.integer(indices, index[dim : dim + rank])
    if value is None:
        return None
    source = (*index[:dim], value, *index[dim + rank :])
    # Neither wraps round: an entry is never negative.
    return interpreter.at(table, source)


@rule(aten.repeat.default)
def repeat(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    sizes = shape_of(node.args[0])
    source: list[Affine] = []
    tail = index[len(index) - len(sizes) :]
    for size, whole, position in zip(sizes, shape_of(node)[len(index) - len(sizes) :], tail, strict=True):
        if is_one(size) or same_size(size, whole):
            source.append(Affine() if is_one(size) else position)
        elif isinstance(size, int):
            source.append(divide(position, size, interpreter.ranges)[1])
        else:
            return None
    return interpreter.at(node.args[0], tuple(source))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    dim, repeats = argument(node, 2, "dim"), node.args[1]
    if dim is None or not isinstance(repeats, int):
        return None
    dim = dimension(node, dim)
    source = divide(index[dim], repeats, interpreter.ranges)[0]
    return interpreter.at(node.args[0], (*index[:dim], source, *index[dim + 1 :]))


@rule(aten.cat.default, aten.concat.default)
def cat(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    """Which part a position falls into is a predicate over it; empty parts do not count."""
    parts = [p for p in node.args[0] if not (isinstance(s := p.meta["val"].numel(), int) and s == 0)]
    dim = dimension(node, argument(node, 1, "dim", 0))
    start: Any = 0
    value: Value | None = None
    for part in parts:
        position = index[dim] - Affine((), start)
        here = interpreter.at(part, (*index[:dim], position, *index[dim + 1 :]))
        value = here if value is None else either_side(at_least_zero(position), here, value)
        if value is None:
            return None
        start = start + as_constant(shape_of(part)[dim])
    return value


def either_side(condition: Conjunction, on: Value, off: Value) -> Value | None:
    return on if condition == TRUE else choose(condition, on, off)


@rule(aten.stack.default)
def stack(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    dim = dimension(node, argument(node, 1, "dim", 0))
    rest = (*index[:dim], *index[dim + 1 :])
    value: Value | None = None
    for n, part in enumerate(node.args[0]):
        here = interpreter.at(part, rest)
        value = here if value is None else either_side(at_least_zero(index[dim] - n), here, value)
        if value is None:
            return None
    return value


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(interpreter: Interpreter, node: Node, index: Index) -> Value | None:
    if node.target == aten.pad.default and argument(node, 2, "mode", "constant") != "constant":
        return None
    widths = node.args[1]
    fill = argument(node, 3 if node.target == aten.pad.default else 2, "value", 0)
    sizes = shape_of(node.args[0])
    inside, source = TRUE, list(index)
    for n in range(len(widths) // 2):
        dim, before, after = len(index) - 1 - n, number(widths[2 * n]), number(widths[2 * n + 1])
        if before is None or after is None:
            return None
        source[dim] = index[dim] - Affine((), before)
        if before != 0:
            inside = inside & at_least_zero(source[dim])
        if after != 0:
            inside = inside & at_least_zero(source[dim] * -1 + Affine((), as_constant(sizes[dim])) - 1)
    within = interpreter.operand(node.args[0], tuple(source))
    outside = bool(fill) if node.meta["val"].dtype == torch.bool else fill if fill is not None else 0
    around = interpreter.operand(outside, ())
    return None if within is None or around is None else choose(inside, within, around)
