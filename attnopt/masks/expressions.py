"""Integer index expressions: affine in index variables, quotients, remainders and integers read from tensors.

    i + len - j      i // 64      index[i, j] + 3

Immutable and hashable, so interpretation can be memoised and equal expressions compare equal. No simplifier runs: an
expression is canonical as it is built, with the ranges ``0 <= v < size`` deciding quotients and remainders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import sympy


def as_constant(value: Any) -> int | sympy.Expr:
    """A Python int where it is one; a sympy expression for a symbolic size."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    expr = value.node.expr if hasattr(value, "node") else value
    return int(expr) if getattr(expr, "is_Integer", False) else expr


@lru_cache(maxsize=1024)
def printed(constant: int | sympy.Expr) -> str:
    """Sympy orders the terms anew each time it prints, and predicates are sorted by their text."""
    return str(constant)


@dataclass(frozen=True)
class Quotient:
    """``argument // divisor``, rounded down."""

    argument: Affine
    divisor: int

    def __str__(self) -> str:
        return f"({self.argument})//{self.divisor}"


@dataclass(frozen=True)
class Remainder:
    """``argument % divisor``, never negative."""

    argument: Affine
    divisor: int

    def __str__(self) -> str:
        return f"({self.argument})%{self.divisor}"


@dataclass(frozen=True)
class Distance:
    """``abs(argument)``."""

    argument: Affine

    def __str__(self) -> str:
        return f"abs({self.argument})"


@dataclass(frozen=True)
class Read:
    """Data: the value of an fx `node` at `index`, one expression per dimension."""

    node: Any
    index: tuple[Affine, ...]

    def __str__(self) -> str:
        return f"{self.node}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Call:
    """A function of one expression that the graph computes and nobody needs to know: ``bucket(i - j)``.

    It can be looked up as the value of `node` at `index`.
    """

    node: Any
    argument: Affine
    index: tuple[Affine, ...] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.node}({self.argument})"


# What an affine expression is a sum of. A plain string is an index variable; a sympy expression, a symbolic size.
Atom = str | Quotient | Remainder | Distance | Read | Call


@dataclass(frozen=True)
class Affine:
    """c0 + Σ c · atom, the atoms sorted; `constant` is an int or a sympy expression in symbolic sizes."""

    terms: tuple[tuple[Atom, int], ...] = ()
    constant: int | sympy.Expr = 0

    @classmethod
    def of(cls, coefficients: Mapping[Any, int], constant: Any = 0) -> Affine:
        found = [(a, c) for a, c in coefficients.items() if c]
        return cls(tuple(sorted(found, key=lambda t: str(t[0])) if len(found) > 1 else found), as_constant(constant))

    @classmethod
    def var(cls, name: Atom) -> Affine:
        return cls(((name, 1),))

    def coefficient(self, name: Atom) -> int:
        return dict(self.terms).get(name, 0)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The index variables that the value depends on, through whatever it reads."""
        return frozenset(a for atom, _ in self.terms for a in atom_variables(atom))

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def __add__(self, other: Affine | int) -> Affine:
        if not isinstance(other, Affine):
            return Affine(self.terms, as_constant(self.constant + as_constant(other)))
        sums = dict(self.terms)
        for atom, c in other.terms:
            sums[atom] = sums.get(atom, 0) + c
        return Affine.of(sums, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine.of({a: c * factor for a, c in self.terms}, self.constant * factor)

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (other * -1 if isinstance(other, Affine) else -other)

    def __str__(self) -> str:
        text = " + ".join([f"{c}*{v}" if c != 1 else f"{v}" for v, c in self.terms])
        if self.constant != 0 or not text:
            constant = printed(self.constant)
            text = f"{text} + {constant}" if text else constant
        return text.replace("+ -", "- ").replace("-1*", "-")


def atom_variables(atom: Any) -> frozenset[str]:
    if isinstance(atom, str):
        return frozenset((atom,))
    if isinstance(atom, Read):
        return frozenset().union(*(e.variables for e in atom.index)) if atom.index else frozenset()
    return atom.argument.variables if hasattr(atom, "argument") else frozenset()


def reads(value: Affine) -> Iterator[Read | Call]:
    """The data an expression reads, what stands in an index included."""
    for atom, _ in value.terms:
        yield from atom_reads(atom)


def atom_reads(atom: Any) -> Iterator[Read | Call]:
    if isinstance(atom, Read):
        yield atom
        for position in atom.index:
            yield from reads(position)
    elif isinstance(atom, Call):
        yield atom
    elif hasattr(atom, "argument"):
        yield from reads(atom.argument)


class Ranges:
    """What is known of the variables' ranges, ``0 <= v < sizes[v]``, and of symbolic sizes. Never adds a guard."""

    def __init__(self, sizes: Mapping[str, Any] | None = None) -> None:
        self.sizes = {v: as_constant(s) for v, s in (sizes or {}).items()}
        self._shape_env = next((s.node.shape_env for s in (sizes or {}).values() if hasattr(s, "node")), None)
        self._decided: dict[Any, bool] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.sizes == other.sizes

    __hash__ = None  # type: ignore[assignment]

    def nonnegative(self, value: Any) -> bool:
        """Whether a constant is proved to be at least 0; None, an unknown bound, is not."""
        if value is None or isinstance(value, int):
            return value is not None and value >= 0
        if value not in self._decided:
            self._decided[value] = value.is_nonnegative is True or self._by_shapes(value)
        return self._decided[value]

    def _by_shapes(self, value: sympy.Expr) -> bool:
        if self._shape_env is None or not value.free_symbols:
            return False
        return self._shape_env._maybe_evaluate_static(sympy.Ge(value, 0)) in (True, sympy.true)

    def bounds(self, value: Affine) -> tuple[Any, Any]:
        """(lowest, highest), None where unknown; exact for independent variables, a bound otherwise."""
        low: Any = value.constant
        high: Any = value.constant
        for atom, c in value.terms:
            least, most = self._atom_bounds(atom)
            if c < 0:
                least, most = most, least
            low = None if low is None or least is None else low + c * least
            high = None if high is None or most is None else high + c * most
        return low, high

    def _atom_bounds(self, atom: Atom) -> tuple[Any, Any]:
        if isinstance(atom, str):
            return 0, self.sizes[atom] - 1 if atom in self.sizes else None
        if isinstance(atom, Remainder):
            return 0, atom.divisor - 1
        if isinstance(atom, Quotient):
            low, high = self.bounds(atom.argument)
            least = low // atom.divisor if isinstance(low, int) else 0 if self.nonnegative(low) else None
            return least, high // atom.divisor if isinstance(high, int) else None
        if isinstance(atom, Distance):
            low, high = self.bounds(atom.argument)
            return 0, max(-low, high) if isinstance(low, int) and isinstance(high, int) else None
        return None, None

    def within(self, value: Affine, low: int, high: int) -> bool:
        """Whether ``low <= value <= high`` is proved."""
        least, most = self.bounds(value)
        return (
            least is not None and most is not None and self.nonnegative(least - low) and self.nonnegative(high - most)
        )


def divide(value: Affine, divisor: int, ranges: Ranges) -> tuple[Affine, Affine]:
    """(value // divisor, value % divisor) for a positive divisor: what is a multiple of it leaves the quotient."""
    whole = {a: c // divisor for a, c in value.terms if c % divisor == 0}
    rest = {a: c % divisor if c > 0 else c for a, c in value.terms if c % divisor}
    carried = {a: (value.coefficient(a) - c) // divisor for a, c in rest.items()}
    constant = value.constant
    if isinstance(constant, int):
        base, left = divmod(constant, divisor)
    else:
        base, left = 0, constant
    quotient = Affine.of({**whole, **carried}, base)
    remainder = Affine.of(rest, left)
    if ranges.within(remainder, 0, divisor - 1):
        return quotient, remainder
    if len(rest) == 1 and left == 0:
        ((atom, c),) = rest.items()
        if isinstance(atom, Quotient) and c == 1:
            nested, _ = divide(atom.argument, atom.divisor * divisor, ranges)
            return quotient + nested, Affine.var(Remainder(remainder, divisor))
    return quotient + Affine.var(Quotient(remainder, divisor)), Affine.var(Remainder(remainder, divisor))


def absolute(value: Affine, ranges: Ranges) -> Affine:
    low, high = ranges.bounds(value)
    if ranges.nonnegative(low):
        return value
    if high is not None and ranges.nonnegative(-high):
        return value * -1
    return Affine.var(Distance(leading_positive(value)))


def leading_positive(value: Affine) -> Affine:
    """The expression or its negation, whichever has a positive first coefficient."""
    return value * -1 if value.terms and value.terms[0][1] < 0 else value
