"""Text of expressions and predicates, through sympy's printers.

j <= i + offset        (i + offset) // 64 == j // 64        table[bucket(i - j), h]
((j <= i + offset) & (i - j < 4096))                      the same as a kernel writes it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from attnopt.masks.expressions import Affine, Call, Distance, Quotient, Read, Remainder
from attnopt.masks.predicates import AtLeastZero, BoolLoad, Clause, Literal
from attnopt.masks.values import Monomial, Sum

Quotients = sympy.Function("floordiv", integer=True)
Remainders = sympy.Function("floormod", integer=True)


class MaskPrinter(StrPrinter):
    """Python's own signs for quotients and remainders; a read without an index is a plain name."""

    def _print_Function(self, expr: Any) -> str:
        name = expr.func.__name__
        if name in ("floordiv", "floormod"):
            sign = "//" if name == "floordiv" else "%"
            return f" {sign} ".join(self.parenthesize(a, PRECEDENCE["Mul"], strict=True) for a in expr.args)
        return str(super()._print_Function(expr))

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        """Positive terms first and the number last: j - i + 8, not 8 - i + j."""
        terms = sorted(expr.as_ordered_terms(order), key=lambda t: (t.is_number, t.could_extract_minus_sign()))
        text = ""
        for term in terms:
            minus = term.could_extract_minus_sign()
            part = self.parenthesize(-term if minus else term, PRECEDENCE["Add"])
            text += (" - " if text else "-") * minus + " + " * (not minus and bool(text)) + part
        return text

    def _print_Abs(self, expr: Any) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _print_Indexed(self, expr: Any) -> str:
        return f"{expr.base.label}[{', '.join(self._print(i) for i in expr.indices)}]"

    def parenthesize(self, item: Any, level: int, strict: bool = False) -> str:
        # A quotient binds as tightly as a product, whatever sympy thinks of a function.
        if getattr(getattr(item, "func", None), "__name__", "") in ("floordiv", "floormod"):
            return f"({self._print(item)})" if level >= PRECEDENCE["Mul"] else self._print(item)
        return str(super().parenthesize(item, level, strict))


def sympy_atom(atom: Any) -> sympy.Expr:
    if isinstance(atom, str):
        return sympy.Symbol(atom, integer=True)
    if isinstance(atom, Read):
        if not visible(atom):
            return sympy.Symbol(str(atom.node), integer=True)
        return sympy.Indexed(sympy.IndexedBase(str(atom.node)), *map(sympy_expression, visible(atom)))
    if isinstance(atom, Call):
        return sympy.Function(str(atom.node), integer=True)(sympy_expression(atom.argument))
    if isinstance(atom, Quotient):
        return Quotients(sympy_expression(atom.argument), sympy.Integer(atom.divisor))
    if isinstance(atom, Remainder):
        return Remainders(sympy_expression(atom.argument), sympy.Integer(atom.divisor))
    if isinstance(atom, Distance):
        return sympy.Abs(sympy_expression(atom.argument))
    return atom


def visible(read: Read | BoolLoad) -> tuple[Affine, ...]:
    """The index without the dimensions of size one; a kernel's tensor has no sizes, and is read at 0 in those."""
    known = hasattr(read.node, "meta")
    sizes = read.node.meta["val"].shape if known else [None if e.terms or e.constant else 1 for e in read.index]
    return tuple(
        e
        for e, size in zip(read.index, sizes, strict=True)
        if not (isinstance(size, int) and size == 1 and not e.terms)
    )


def sympy_expression(value: Affine) -> sympy.Expr:
    return sympy.Add(*(c * sympy_atom(a) for a, c in value.terms), sympy.sympify(value.constant))


def expression_text(value: Affine, printer: StrPrinter | None = None) -> str:
    return str((printer or MaskPrinter()).doprint(sympy_expression(value)))


def sides(value: Affine) -> tuple[Affine, Affine]:
    """``value = right - left``, neither with a negative term, nor with a constant where it can be helped."""
    left = {a: -c for a, c in value.terms if c < 0}
    right = {a: c for a, c in value.terms if c > 0}
    if not right or (left and isinstance(value.constant, int) and value.constant < 0):
        # What remains on the left of a bound by 0 is moved to the other side all the same.
        return (
            (Affine.of(left), Affine((), value.constant))
            if not right
            else (Affine.of(left, -value.constant), Affine.of(right))
        )
    return (
        (Affine.of(left), Affine.of(right, value.constant)) if left else (Affine((), -value.constant), Affine.of(right))
    )


def literal_text(literal: Literal, printer: StrPrinter | None = None) -> str:
    """One comparison, written without negative terms: ``j <= i + 3``."""
    if isinstance(literal, BoolLoad):
        index = ", ".join(expression_text(e, printer) for e in visible(literal))
        return f"{'not ' if literal.negated else ''}{literal.node}[{index}]"
    left, right = sides(literal.expression)
    if isinstance(literal, AtLeastZero):
        # A lower bound reads better with the variable first: j >= 4, not 4 <= j.
        if left.is_constant and not right.is_constant:
            return f"{expression_text(right, printer)} >= {expression_text(left, printer)}"
        if left.constant == 1 and not left.is_constant:
            return f"{expression_text(left - 1, printer)} < {expression_text(right, printer)}"
        return f"{expression_text(left, printer)} <= {expression_text(right, printer)}"
    sign = "!=" if literal.negated else "=="
    if left.is_constant:
        left, right = right, left
    ordered = sorted((left, right), key=lambda e: (e.is_constant, expression_text(e)))
    return f" {sign} ".join(expression_text(e, printer) for e in ordered)


def clause_text(clause: Clause) -> str:
    parts = sorted(literal_text(x) for x in clause)
    return parts[0] if len(parts) == 1 else "(" + " or ".join(parts) + ")"


def sum_text(value: Sum, skip: Iterable[Any] = ()) -> str:
    return str(MaskPrinter().doprint(sympy_sum(value)))


def sympy_sum(value: Sum) -> sympy.Expr:
    return sympy.Add(*(sympy_number(c) * sympy_monomial(m) for m, c in value.terms))


def sympy_number(value: float) -> sympy.Expr:
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value, 6)


def sympy_monomial(monomial: Monomial) -> sympy.Expr:
    return sympy.Mul(*(sympy_atom(a) for a in monomial))
