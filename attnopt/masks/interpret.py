"""Abstract interpretation of a mask's subgraph: each tensor becomes an expression in its own index variables.

    arange -> i      unsqueeze/expand/view/slice/index -> re-indexing      le/eq/and/where/tril/cumsum -> predicate

``Interpreter.at(node, index)`` is the value of an fx node at a symbolic position. What cannot be interpreted becomes an
opaque read at the indices it really depends on, so nothing is ever guessed: a mask is either proved or passed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from attnopt.masks.expressions import (
    Affine,
    Call,
    Distance,
    Quotient,
    Ranges,
    Read,
    Remainder,
    as_constant,
    leading_positive,
)
from attnopt.masks.predicates import FALSE, TRUE, BoolLoad, Conjunction, TooManyClauses, single
from attnopt.masks.values import MASKED, Select, Sum, Value, additive, constant

__all__ = ["MASKED", "Interpreter", "Select", "additive"]

Index = tuple[Affine, ...]


def shape_of(node: Node) -> Sequence[Any]:
    return node.meta["val"].shape


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def same_size(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


class Interpreter:
    """Interprets the nodes of one graph; memoised over (node, index).

    constants: graph inputs whose value may be relied on, because somebody else guards it.
    """

    def __init__(self, constants: Mapping[Node, torch.Tensor] | None = None) -> None:
        self.constants = dict(constants or {})
        self.ranges = Ranges()
        self._memo: dict[tuple[Node, Index], Value] = {}
        self._forms: dict[Node, Any] = {}
        self._fresh = 0

    @property
    def relied_on(self) -> set[str]:
        """Names of the constant inputs whose value was used."""
        return {node.name for node, form in self._forms.items() if form is not None}

    def within(self, extents: Mapping[str, Any]) -> None:
        """Interpret from now on for index variables of these extents."""
        ranges = Ranges(extents)
        if ranges != self.ranges:
            self.ranges, self._memo = ranges, {}

    def at(self, node: Node, index: Index) -> Value:
        """The value of `node` at `index` (one expression per dimension)."""
        key = (node, index)
        if key not in self._memo:
            value = self._known_constant(node, index)
            handler = RULES.get(node.target) if node.op == "call_function" and value is None else None
            try:
                value = handler(self, node, index) if handler is not None else value
            except TooManyClauses:
                value = None
            self._memo[key] = self.opaque(node, index) if value is None else value
        return self._memo[key]

    def _known_constant(self, node: Node, index: Index) -> Value | None:
        if node not in self.constants:
            return None
        from attnopt.masks.constants import closed_form

        if node not in self._forms:
            self._forms[node] = closed_form(self.constants[node])
        form = self._forms[node]
        return form(index) if form is not None else None

    def opaque(self, node: Node, index: Index) -> Value:
        """Data: a function of one distance where the operands show that it is one, else a read of the node."""
        # A dimension of size one is read at 0 whatever the position: that is what the load depends on.
        index = tuple(Affine() if is_one(size) else a for a, size in zip(index, shape_of(node), strict=True))
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return single(BoolLoad(node, index))
        argument = self._function_of(node, index)
        atom = Read(node, index) if argument is None else Call(node, argument, index)
        return Select.uniform(Sum.atom(atom)) if dtype.is_floating_point else Affine.var(atom)

    def _function_of(self, node: Node, index: Index) -> Affine | None:
        """The one expression in both i and j that an elementwise node depends on, if it is one: i - j for buckets."""
        tags = getattr(node.target, "tags", ())
        elementwise = torch.Tag.pointwise in tags or node.target in CASTS
        if node.op != "call_function" or not elementwise or torch.Tag.nondeterministic_seeded in tags:
            return None
        found: set[Affine] = set()
        for operand in (*node.args, *node.kwargs.values()):
            if isinstance(operand, Node):
                value = self.operand(operand, index)
                arguments = None if value is None else value_arguments(value)
                if arguments is None:
                    return None
                found |= arguments
        if len(found) != 1:
            return None
        (argument,) = found
        return argument if {"i", "j"} <= argument.variables else None

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

    def integer(self, node: Node, index: Index) -> Affine | None:
        """The value of a node of integers as one expression: what has several forms is looked up."""
        value = self.operand(node, index)
        if isinstance(value, Select):
            sizes = shape_of(node)
            value = self.opaque(node, index[len(index) - len(sizes) :])
        return value if isinstance(value, Affine) else None

    def fresh(self, size: Any) -> str:
        """A variable of its own, for a sum over a dimension of `size`."""
        self._fresh += 1
        name = f"t{self._fresh}"
        self.ranges.sizes[name] = as_constant(size)
        return name


def value_arguments(value: Value) -> set[Affine] | None:
    """The expressions that a value depends on, but for factors and constants; None where it reads data."""
    if isinstance(value, Affine):
        return expression_arguments(value)
    if isinstance(value, Conjunction):
        return united(None if isinstance(x, BoolLoad) else expression_arguments(x.expression) for x in value.atoms)
    branches = (expression_arguments(b) if isinstance(b, Affine) else sum_arguments(b) for b in (value.on, value.off))
    return united((value_arguments(value.predicate), *branches))


def united(parts: Iterable[set[Affine] | None]) -> set[Affine] | None:
    found: set[Affine] = set()
    for part in parts:
        if part is None:
            return None
        found |= part
    return found


def sum_arguments(value: Sum) -> set[Affine] | None:
    """As for an expression; a sum of plain variables counts as one where its factors have whole ratios."""
    plain = {m[0]: c for m, c in value.terms if len(m) == 1 and isinstance(m[0], str)}
    unit = min(map(abs, plain.values()), default=1.0)
    if any(not (c / unit).is_integer() for c in plain.values()):
        return None
    whole = Affine.of({a: round(c / unit) for a, c in plain.items()})
    others = (Affine.var(a) for m, _ in value.terms if m not in {(a,) for a in plain} for a in m)
    return united(expression_arguments(e) for e in (whole, *others))


def expression_arguments(value: Affine) -> set[Affine] | None:
    plain: dict[Any, int] = {}
    inner: list[set[Affine] | None] = []
    for atom, c in value.terms:
        if isinstance(atom, str):
            plain[atom] = c
        elif isinstance(atom, Call):
            inner.append({atom.argument})
        elif isinstance(atom, (Distance, Quotient, Remainder)):
            inner.append(expression_arguments(atom.argument))
        elif not isinstance(atom, sympy.Expr):
            return None
    if plain:
        unit = math.gcd(*plain.values())
        inner.append({leading_positive(Affine.of({a: c // unit for a, c in plain.items()}))})
    return united(inner)


CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
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


# The rules register themselves; they need the names above.
from attnopt.masks import rules_arithmetic, rules_indexing, rules_predicates, rules_sources  # noqa: E402, F401
