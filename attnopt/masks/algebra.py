"""The small algebra masks are computed in: affine index expressions, and conjunctions of bounds and opaque loads.

Everything is immutable and hashable, so interpretation can be memoised. No simplifier runs: conjunctions are sets of
atoms ``affine >= 0`` in canonical form (gcd 1), which is enough to compare two masks for equality by ``==``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Affine:
    """c0 + Σ c_v · v over index variables v; `constant` is an int or a sympy expression in symbolic sizes."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int | sympy.Expr = 0

    @classmethod
    def of(cls, coefficients: Mapping[str, int], constant: Any = 0) -> Affine:
        return cls(tuple(sorted((v, c) for v, c in coefficients.items() if c)), as_constant(constant))

    @classmethod
    def var(cls, name: str) -> Affine:
        return cls(((name, 1),))

    def coefficient(self, name: str) -> int:
        return dict(self.terms).get(name, 0)

    @property
    def variables(self) -> frozenset[str]:
        return frozenset(v for v, _ in self.terms)

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def __add__(self, other: Affine | int) -> Affine:
        if not isinstance(other, Affine):
            other = Affine((), as_constant(other))
        sums = dict(self.terms)
        for v, c in other.terms:
            sums[v] = sums.get(v, 0) + c
        return Affine.of(sums, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine.of({v: c * factor for v, c in self.terms}, self.constant * factor)

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (other * -1 if isinstance(other, Affine) else -other)

    def __str__(self) -> str:
        text = " + ".join([f"{c}*{v}" if c != 1 else v for v, c in self.terms])
        if self.constant != 0 or not text:
            text = f"{text} + {self.constant}" if text else f"{self.constant}"
        return text.replace("+ -", "- ").replace("-1*", "-")


@dataclass(frozen=True)
class AtLeastZero:
    """The atom ``expression >= 0``."""

    expression: Affine

    @classmethod
    def canonical(cls, expression: Affine) -> AtLeastZero:
        """Divide by the gcd of the coefficients, rounding the constant down: exact over the integers."""
        divisor = math.gcd(*(abs(c) for _, c in expression.terms))
        if divisor > 1 and isinstance(expression.constant, int):
            scaled = {v: c // divisor for v, c in expression.terms}
            return cls(Affine.of(scaled, expression.constant // divisor))
        return cls(expression)

    def __str__(self) -> str:
        return f"{self.expression} >= 0"


@dataclass(frozen=True)
class BoolLoad:
    """An opaque boolean: `node` (an fx node) read at `index`, inverted if `negated`."""

    node: Any
    index: tuple[Affine, ...]
    negated: bool = False

    @property
    def variables(self) -> frozenset[str]:
        return frozenset().union(*(a.variables for a in self.index)) if self.index else frozenset()

    def __str__(self) -> str:
        return f"{'not ' if self.negated else ''}{self.node}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Conjunction:
    """All of `atoms` hold; no atoms means true. `false` means no position is kept."""

    atoms: frozenset[AtLeastZero | BoolLoad] = frozenset()
    false: bool = False

    def __and__(self, other: Conjunction) -> Conjunction:
        return FALSE if self.false or other.false else Conjunction(self.atoms | other.atoms)

    @property
    def constant(self) -> bool | None:
        """True or False where the predicate is decided, else None."""
        return False if self.false else True if not self.atoms else None

    def inverted(self) -> Conjunction | None:
        """The negation, where it is a conjunction too."""
        if self.false:
            return TRUE
        if not self.atoms:
            return FALSE
        if len(self.atoms) > 1:
            return None
        (atom,) = self.atoms
        if isinstance(atom, BoolLoad):
            return Conjunction(frozenset({BoolLoad(atom.node, atom.index, not atom.negated)}))
        return at_least_zero(atom.expression * -1 - 1)

    def __str__(self) -> str:
        return "false" if self.false else " and ".join(sorted(map(str, self.atoms))) or "true"


TRUE = Conjunction()
FALSE = Conjunction(false=True)


def at_least_zero(expression: Affine) -> Conjunction:
    """``expression >= 0``, decided at once where the expression is a known constant."""
    if expression.is_constant:
        sign = expression.constant >= 0
        if isinstance(sign, bool) or sign in (sympy.true, sympy.false):
            return TRUE if bool(sign) else FALSE
    return Conjunction(frozenset({AtLeastZero.canonical(expression)}))


def fold_ranges(predicate: Conjunction, extents: Mapping[str, Any]) -> Conjunction:
    """Decide atoms that hold, or fail, for every position in ``0 <= v < extents[v]`` (static extents only)."""
    kept: set[AtLeastZero | BoolLoad] = set()
    for atom in predicate.atoms:
        if isinstance(atom, AtLeastZero):
            low = high = atom.expression.constant
            for v, c in atom.expression.terms:
                extent = as_constant(extents[v])
                if c > 0:
                    high = high + c * (extent - 1)
                else:
                    low = low + c * (extent - 1)
            if low == sympy.oo or (low >= 0) in (True, sympy.true):
                continue
            if (high < 0) in (True, sympy.true):
                return FALSE
        kept.add(atom)
    return FALSE if predicate.false else Conjunction(frozenset(kept))
