"""What the terms of one attention mean together: a Mask, a Bias, and the nodes behind the data they read.

    [keep: j <= i, keep: pad[:, None, None, :], add: slopes[h] * j]   ->   causal, pad[b, j], bias slopes[h]*(j - i)

Never a refusal: what cannot be proved is carried as data, exact for whoever keeps the operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from attnopt.ir import Load, Mask
from attnopt.masks.bias import bias_of
from attnopt.masks.classify import load_of, name_for, reads_pairs, record, sort_clauses
from attnopt.masks.documents import by_index
from attnopt.masks.expressions import Affine, Read
from attnopt.masks.interpret import Interpreter, shape_of
from attnopt.masks.materialize import call
from attnopt.masks.predicates import (
    FALSE,
    TRUE,
    BoolLoad,
    Clause,
    Conjunction,
    TooManyClauses,
    at_least_zero,
    equal_zero,
    fold_ranges,
    single,
)
from attnopt.masks.terms import Meaning, Term
from attnopt.masks.values import MASKED, Select, Sum, additive, numeric

__all__ = ["recover"]


class Gathered:
    """The terms as they are interpreted: one predicate, the lowest fill, a sum of biases."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.keep: Conjunction = TRUE
        self.fill = -math.inf
        self.bias = Sum()
        self.assumed: set[str] = set()

    def add(self, term: Term) -> None:
        value = self.interpreter.operand(term.node, term.index)
        if term.kind == "add":
            self._add_number(term, numeric(value))
            return
        assert isinstance(value, Conjunction)
        keep = value if term.kind == "keep" else self._negated(term, value)
        rest, data = self._settled(keep)
        if data:
            # Data joined with anything else over both positions: the operand itself stands for it.
            load = BoolLoad(term.node, broadcast(term.node, term.index), term.kind == "drop")
            rest = Conjunction(rest.clauses | single(load).clauses)
        self._join(rest)
        self.fill = max(self.fill, -math.inf if term.fill is None else term.fill)

    def _negated(self, term: Term, value: Conjunction) -> Conjunction:
        try:
            return value.inverted()
        except TooManyClauses:
            return single(BoolLoad(term.node, broadcast(term.node, term.index), True))

    def _settled(self, keep: Conjunction) -> tuple[Conjunction, bool]:
        """The clauses that a record can hold, and whether there are others."""
        keep = fold_ranges(keep, self.interpreter.ranges)
        held = {c for c in keep.clauses if not reads_pairs(c) or (len(c) == 1 and isinstance(next(iter(c)), BoolLoad))}
        return Conjunction(frozenset(held)), len(held) < len(keep.clauses)

    def _join(self, keep: Conjunction) -> None:
        try:
            self.keep = self.keep & keep
        except TooManyClauses:
            # Not reduced any further, and right all the same.
            self.keep = Conjunction(self.keep.clauses | keep.clauses)

    def _add_number(self, term: Term, value: Select | None) -> None:
        """A mask, a bias, or both in one operand; else the operand as data."""
        held = padding_product(value, term.factor, self.assumed) if value is not None else None
        if held is None and value is not None:
            held = scaled_additive(value, term.factor)
        whole = Sum.atom(Read(term.node, broadcast(term.node, term.index))) * Sum.number(term.factor)
        if held is None:
            # At the operand's own index: a number of any kind, added as it stands.
            self.bias = self.bias + whole
            return
        keep, off, bias = held
        rest, data = self._settled(keep)
        self._join(rest)
        if keep != TRUE:
            self.fill = max(self.fill, off)
        # Where a part of the mask is data that has no record, the operand is added whole: it masks by itself.
        self.bias = self.bias + (whole if data else bias)


def scaled_additive(value: Select, factor: float) -> tuple[Conjunction, float, Sum] | None:
    mask = additive(value, needs_zero=False)
    if mask is None or (mask.predicate != TRUE and mask.off * factor > MASKED):
        return None
    bias = mask.bias * Sum.number(factor)
    return mask.predicate, mask.off * factor, bias


def padding_product(value: Select, factor: float, assumed: set[str]) -> tuple[Conjunction, float, Sum] | None:
    """``(1 - m) * fill`` for data m: kept where m is 1.

    Exact for integers up to 1, so for a mask of zeros and ones; that is recorded as an assumption.
    """
    if not value.plain or not isinstance(value.on, Sum):
        return None
    terms = dict(value.on.terms)
    fill = terms.pop((), 0.0)
    if not math.isfinite(fill) or fill * factor > MASKED:
        return None
    for monomial, c in terms.items():
        whole = len(monomial) == 1 and isinstance(monomial[0], Read) and not is_floating(monomial[0])
        if whole and c == -fill:
            read = monomial[0]
            assumed.add(f"{read} is 0 or 1")
            others = Sum.of({m: d for m, d in terms.items() if m != monomial}) * Sum.number(factor)
            return equal_zero(Affine.var(read) - 1), fill * factor, others
    return None


def is_floating(read: Read) -> bool:
    return bool(read.node.meta["val"].dtype.is_floating_point)


def broadcast(node: Node, index: tuple[Affine, ...]) -> tuple[Affine, ...]:
    sizes = shape_of(node)
    tail = index[len(index) - len(sizes) :] if sizes else ()
    return tuple(Affine() if isinstance(s, int) and s == 1 else e for e, s in zip(tail, sizes, strict=True))


def recover(
    terms: Sequence[Term], extents: dict[str, Any], *, causal: bool = False, interpreter: Interpreter
) -> Meaning:
    """The meaning of `terms` over positions 0 <= b < B, 0 <= h < H, 0 <= i < Sq, 0 <= j < Sk.

    extents: {"b": B, "h": H, "i": Sq, "j": Sk}, ints or SymInts. causal: SDPA's own, ``j <= i``.
    """
    interpreter.within(extents)
    gathered = Gathered(interpreter)
    if causal:
        gathered.keep = at_least_zero(Affine.of({"i": 1, "j": -1}))
    for term in terms:
        gathered.add(term)
    keep = fold_ranges(by_index(fold_ranges(gathered.keep, interpreter.ranges), interpreter), interpreter.ranges)
    fill = "-inf" if gathered.fill == -math.inf else "finite"
    nodes: dict[str, Node] = {}
    if keep == FALSE:
        mask = Mask(terms=("none",), fill=fill)
    else:
        parts = sort_clauses(keep, interpreter.ranges)
        mask, nodes = record(parts, fill, interpreter.ranges)
        mask, nodes = with_data(mask, nodes, parts.data)
    bias, bias_nodes = bias_of(gathered.bias)
    return Meaning(mask, bias, {**nodes, **bias_nodes}, keep, gathered.bias, tuple(sorted(gathered.assumed)))


def with_data(mask: Mask, nodes: dict[str, Node], data: Sequence[Clause]) -> tuple[Mask, dict[str, Node]]:
    """The mask with its data over (i, j): boolean reads, true where the key is kept."""
    opaque: dict[Load, Node] = {}
    for literal in (x for clause in data for x in clause):
        assert isinstance(literal, BoolLoad)
        node = literal.node
        if literal.negated:
            node = call(node, torch.ops.aten.bitwise_not.default, node)
        opaque[Load(name_for(literal.node.name, node, nodes), load_of(literal).dims)] = node
    found = replace(mask, opaque=tuple(sorted(opaque, key=str)))
    return found, {**nodes, **{load.name: node for load, node in opaque.items()}}
