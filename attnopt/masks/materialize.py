"""Boolean nodes for what a mask reads at one index: true where the key is kept, in the mask's own coordinates.

A comparison such as ``m[b, 0, j + 2] != 0`` becomes ``ne(slice(select(m, 1, 0), 1, 2, 2 + Sk), 0)`` of shape (B, Sk).
New nodes stand right after what they read, so nothing that is there changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, Ranges, Read
from attnopt.masks.predicates import AtLeastZero, BoolLoad, EqualZero, Literal

aten = torch.ops.aten


def call(after: Node, target: Any, *args: Any) -> Node:
    """A call inserted behind `after`, with its fake value; the one that an earlier site had inserted, if it did."""
    for user in after.users:
        if user.meta.get("made_for_masks") and user.target == target and user.args == args:
            return user
    with after.graph.inserting_after(after):
        node = after.graph.call_function(target, args)
    node.meta = {k: v for k, v in after.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta["made_for_masks"] = True
    values = torch.fx.node.map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, Node) else a)
    mode = getattr(after.meta["val"], "fake_mode", None)
    if mode is None:
        node.meta["val"] = target(*values)
    else:
        with mode, torch.no_grad():
            node.meta["val"] = target(*values)
    return node


def steps(read: Read | BoolLoad, order: tuple[str, ...], ranges: Ranges) -> list[tuple[Any, ...]] | None:
    """Selects and slices that turn the node into a tensor over `order`, from the last dimension to the first."""
    sizes = read.node.meta["val"].shape
    found: list[tuple[Any, ...]] = []
    seen: list[Any] = []
    for dim in reversed(range(len(read.index))):
        position = read.index[dim]
        if position.is_constant:
            if not isinstance(position.constant, int):
                return None
            found.append((aten.select.int, dim, position.constant))
            continue
        if len(position.terms) != 1 or position.terms[0][1] != 1 or position.terms[0][0] not in order:
            return None
        variable, start = position.terms[0][0], position.constant
        extent = ranges.sizes[str(variable)]
        seen.append(variable)
        if start == 0 and same_extent(sizes[dim], extent):
            continue
        if not isinstance(start, int) or start < 0 or not isinstance(extent, int):
            return None
        found.append((aten.slice.Tensor, dim, start, start + extent))
    return found if tuple(reversed(seen)) == tuple(v for v in order if v in seen) else None


def same_extent(size: Any, extent: Any) -> bool:
    from attnopt.masks.expressions import as_constant

    return bool(as_constant(size) == extent)


def boolean_node(literal: Literal, ranges: Ranges, order: tuple[str, ...] = ("b", "j")) -> Node | None:
    """A node over the variables of `order` that is true where the literal holds; None where there is no simple one."""
    if isinstance(literal, BoolLoad):
        read: Read | BoolLoad = literal
        compare: list[tuple[Any, ...]] = [(aten.bitwise_not.default,)] if literal.negated else []
    else:
        ((atom, c),) = literal.expression.terms
        held = literal.expression.constant
        if not isinstance(atom, Read) or c not in (1, -1) or not isinstance(held, int):
            return None
        read = atom
        if isinstance(literal, EqualZero):
            compare = [(aten.ne.Scalar if literal.negated else aten.eq.Scalar, -held * c)]
        else:
            compare = [(aten.ge.Scalar, -held) if c > 0 else (aten.le.Scalar, held)]
    if isinstance(literal, BoolLoad) and not literal.negated and whole(literal, ranges, order):
        return literal.node
    views = steps(read, order, ranges)
    if views is None:
        return None
    node = read.node
    for target, *args in (*views, *compare):
        node = call(node, target, node, *args)
    return node


def whole(load: BoolLoad, ranges: Ranges, order: tuple[str, ...]) -> bool:
    """Whether the node is read at just its own dimensions, those of size one aside."""
    used = []
    for position, size in zip(load.index, load.node.meta["val"].shape, strict=True):
        if position == Affine() and isinstance(size, int) and size == 1:
            continue
        if position.constant != 0 or len(position.terms) != 1 or position.terms[0][1] != 1:
            return False
        variable = position.terms[0][0]
        if variable not in order or not same_extent(size, ranges.sizes[str(variable)]):
            return False
        used.append(variable)
    return tuple(used) == tuple(v for v in order if v in used)


def is_simple(literal: Literal) -> bool:
    """Whether the literal reads one tensor and compares it with a number."""
    if isinstance(literal, BoolLoad):
        return True
    terms = literal.expression.terms
    return len(terms) == 1 and isinstance(terms[0][0], Read) and isinstance(literal, (AtLeastZero, EqualZero))
