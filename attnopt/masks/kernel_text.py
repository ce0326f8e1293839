"""Expressions, predicates and sums as the source of a kernel: Triton's, which is also that of numpy and of torch.

    j <= i and (j < 4 or i - j < 128)      ->      j <= i,  (j < 4) | (i - j < 128)
    (i + s0) // 48                         ->      (i + s0 - ((i + s0) % 48 + 48) % 48) // 48

Names: b, h, i, j, first, last and the sizes are variables of the kernel; what is read has been given a name before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnopt.masks.expressions import Affine, Distance, Quotient, Read, Remainder, atom_variables
from attnopt.masks.live_range import Bound, Extreme
from attnopt.masks.predicates import AtLeastZero, BoolLoad, Clause, Literal
from attnopt.masks.printing import sides
from attnopt.masks.values import Monomial, Sum


def nonnegative(value: Affine) -> bool:
    """Whether the value cannot be negative, whatever sizes and data are."""
    return value.constant >= 0 and all(c > 0 and nonnegative_atom(atom) for atom, c in value.terms)


def nonnegative_atom(atom: Any) -> bool:
    if isinstance(atom, str):
        # A size may be a difference of sizes.
        return atom[0] != "s"
    return isinstance(atom, (Remainder, Distance)) or (isinstance(atom, Quotient) and nonnegative(atom.argument))


class KernelText:
    """Prints with a name for every Read; a boolean read's name is true or false by itself."""

    def __init__(self, names: Mapping[Read, str]) -> None:
        self.names = names

    def expression(self, value: Affine) -> str:
        """Positive terms first: ``i - j + 3``."""
        text = ""
        for atom, c in sorted(value.terms, key=lambda t: t[1] < 0):
            sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
            text += sign + (f"{abs(c)} * " if abs(c) != 1 else "") + self.atom(atom)
        if value.constant or not text:
            sign = ("-" if value.constant < 0 else "") if not text else (" - " if value.constant < 0 else " + ")
            text += sign + str(abs(value.constant))
        return text

    def inner(self, value: Affine) -> str:
        """The expression where a sum needs brackets."""
        alone = len(value.terms) == 1 and value.terms[0][1] == 1 and not value.constant
        return (
            self.expression(value)
            if alone and not isinstance(value.terms[0][0], Quotient)
            else f"({self.expression(value)})"
        )

    def atom(self, atom: Any) -> str:
        """One that binds as tightly as a call."""
        if isinstance(atom, str):
            return atom
        if isinstance(atom, Read):
            return self.names[atom]
        if isinstance(atom, Distance):
            return f"tl.abs({self.expression(atom.argument)})"
        if isinstance(atom, Quotient):
            return f"({self.quotient(self.inner(atom.argument), atom.divisor, nonnegative(atom.argument))})"
        assert isinstance(atom, Remainder), atom
        return f"({self.remainder(self.inner(atom.argument), atom.divisor, nonnegative(atom.argument))})"

    def quotient(self, value: str, divisor: int, positive: bool) -> str:
        """Rounded down, as Python does it: Triton rounds towards zero."""
        if divisor & (divisor - 1) == 0:
            return f"{value} >> {divisor.bit_length() - 1}"
        if positive:
            return f"{value} // {divisor}"
        return f"({value} - {self.remainder(value, divisor, False)}) // {divisor}"

    def remainder(self, value: str, divisor: int, positive: bool) -> str:
        """Never negative: Triton's has the sign of the value."""
        if divisor & (divisor - 1) == 0:
            return f"{value} & {divisor - 1}"
        return f"{value} % {divisor}" if positive else f"({value} % {divisor} + {divisor}) % {divisor}"

    def literal(self, literal: Literal) -> str:
        if isinstance(literal, BoolLoad):
            return f"{'~' if literal.negated else ''}{self.names[Read(literal.node, literal.index)]}"
        left, right = sides(literal.expression)
        if not isinstance(literal, AtLeastZero):
            left, right = (right, left) if left.is_constant else (left, right)
            return f"{self.expression(left)} {'!=' if literal.negated else '=='} {self.expression(right)}"
        if left.is_constant and not right.is_constant:
            return f"{self.expression(right)} >= {self.expression(left)}"
        if left == Affine.var("i") and right.constant and right - right.constant == Affine.var("j"):
            # A window.
            return f"i - j < {right.constant + 1}"
        if left.constant == 1 and left.terms:
            return f"{self.expression(left - 1)} < {self.expression(right)}"
        return f"{self.expression(left)} <= {self.expression(right)}"

    def clause(self, clause: Clause) -> list[str]:
        """One text for each literal; more than one are to be joined by ``|``, in brackets."""
        return sorted(map(self.literal, clause))

    def monomial(self, monomial: Monomial, coefficient: float, unit: str) -> str:
        """``unit * 0.5 * t0_h * j``: what varies least comes first, so that products of scalars stay scalars."""
        size = abs(coefficient)
        factors = [unit, *([repr(size)] if size != 1 else []), *(self.atom(a) for a in varying(monomial))]
        return " * ".join(factors)

    def sum(self, value: Sum, unit: str) -> list[tuple[str, str]]:
        """(sign, text) of each product."""
        return [("-" if c < 0 else "+", self.monomial(m, c, unit)) for m, c in value.terms]

    def bound(self, bound: Bound) -> str:
        if isinstance(bound, Affine):
            return self.expression(bound)
        name = {"max": "tl.maximum", "min": "tl.minimum"}[bound.kind]
        text = self.bound(bound.of[0])
        for other in bound.of[1:]:
            text = f"{name}({text}, {self.bound(other)})"
        return text


def varying(monomial: Monomial) -> list[Any]:
    """The factors of a product, those that vary least first."""
    return sorted(monomial, key=lambda a: (len(atom_variables(a) & {"i", "j"}), "j" in atom_variables(a), str(a)))


__all__ = ["Extreme", "KernelText", "nonnegative", "varying"]
