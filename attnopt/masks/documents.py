"""Packed documents: what a predicate says about two positions that hold the same data.

    doc[b, i] == doc[b, j]                                      an equality of one position's data each
    cumsum[b, i] == cumsum[b, j] and pos[b, j] <= pos[b, i]  -> cumsum[b, i] == cumsum[b, j] and j <= i

The second is how transformers writes a mask of packed sequences: documents begin where positions do not count on, and
bounds are put on the positions. Inside a document these differ as the indices do: bounds on them are bounds on i - j.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, Read
from attnopt.masks.interpret import Interpreter, argument, dimension
from attnopt.masks.predicates import (
    AtLeastZero,
    Clause,
    Conjunction,
    EqualZero,
    Literal,
    at_least_zero,
    conjunction_of,
    equal_zero,
)

aten = torch.ops.aten
Equality = tuple[Clause, Read, Read]


def equalities(keep: Conjunction) -> Iterator[Equality]:
    """(clause, the read at i, the same read at j) of every clause that is an equality of one integer at i and at j.

    The index may hold b and constants beside the one position, and nothing else: no head, no neighbour on one side.
    """
    for clause in sorted(keep.clauses, key=lambda c: sorted(map(str, c))):
        literal = next(iter(clause)) if len(clause) == 1 else None
        if not isinstance(literal, EqualZero) or literal.negated or literal.expression.constant != 0:
            continue
        terms = literal.expression.terms
        if len(terms) != 2 or terms[0][1] + terms[1][1] != 0 or abs(terms[0][1]) != 1:
            continue
        at_i, at_j = (next((a for a, _ in terms if position(a) == name), None) for name in "ij")
        if isinstance(at_i, Read) and isinstance(at_j, Read) and moved(at_i) == at_j:
            yield clause, at_i, at_j


def position(atom: object) -> str | None:
    """The one position that a read of integers depends on, beside the sample."""
    if not isinstance(atom, Read) or any(len(e.terms) > 1 or not plain(e) for e in atom.index):
        return None
    found = [v for e in atom.index for v in e.variables - {"b"}]
    return found[0] if len(found) == 1 and found[0] in "ij" else None


def plain(index: Affine) -> bool:
    """A constant, or a variable with a constant."""
    return all(isinstance(a, str) and c == 1 for a, c in index.terms)


def moved(read: Read) -> Read:
    """The read at j in the place of i."""
    index = (Affine.of({"j" if a == "i" else a: c for a, c in e.terms}, e.constant) for e in read.index)
    return Read(read.node, tuple(index))


def by_index(keep: Conjunction, interpreter: Interpreter) -> Conjunction:
    """An equal predicate in which positions that count on inside a document are the indices themselves."""
    for clause, at_i, at_j in equalities(keep):
        source = counted(at_i.node)
        if source is None:
            continue
        here, there = interpreter.at(source, at_i.index), interpreter.at(source, at_j.index)
        if isinstance(here, Affine) and isinstance(there, Affine) and len(here.terms) == len(there.terms) == 1:
            others = (rewritten(c, here, there) for c in keep.clauses if c != clause)
            keep = conjunction_of({clause}) & conjunction(others)
    return keep


def conjunction(parts: Iterator[Conjunction]) -> Conjunction:
    found = Conjunction()
    for part in parts:
        found = found & part
    return found


def rewritten(clause: Clause, here: Affine, there: Affine) -> Conjunction:
    """The clause where ``here - there == i - j``."""
    held = Conjunction(frozenset({frozenset()}))
    for literal in clause:
        held = held | indexed(literal, here, there)
    return held


def indexed(literal: Literal, here: Affine, there: Affine) -> Conjunction:
    unchanged = Conjunction(frozenset({frozenset((literal,))}))
    if not isinstance(literal, (AtLeastZero, EqualZero)):
        return unchanged
    (first, _), (second, _) = here.terms[0], there.terms[0]
    times = literal.expression.coefficient(first)
    if not times or literal.expression.coefficient(second) != -times:
        return unchanged
    expression = literal.expression - (here - there) * times + Affine.of({"i": times, "j": -times})
    if isinstance(literal, AtLeastZero):
        return at_least_zero(expression)
    equal = equal_zero(expression)
    return equal.inverted() if literal.negated else equal


def counted(node: Node) -> Node | None:
    """P where the node is the running number of places at which P does not count on by one, along its last dimension.

    ``cumsum(diff(P, prepend=any) != 1)``: where two of its values are equal no such place lies between them, so the
    values of P there are as far apart as their indices. What is before the first place does not matter.
    """
    if node.target != aten.cumsum.default or node.meta["val"].dtype not in (torch.int32, torch.int64):
        return None
    flags = node.args[0]
    last = node.meta["val"].ndim - 1
    if dimension(node, argument(node, 1, "dim", 0)) != last or not isinstance(flags, Node):
        return None
    if flags.target != aten.ne.Scalar or flags.args[1] != 1 or not isinstance(flags.args[0], Node):
        return None
    steps = flags.args[0]
    if steps.target != aten.diff.default or argument(steps, 1, "n", 1) != 1:
        return None
    if dimension(steps, argument(steps, 2, "dim", -1)) != last or argument(steps, 4, "append") is not None:
        return None
    source, before = steps.args[0], argument(steps, 3, "prepend")
    if not isinstance(source, Node) or not isinstance(before, Node) or before.meta["val"].shape[last] != 1:
        return None
    return source if source.meta["val"].dtype in (torch.int32, torch.int64) else None
