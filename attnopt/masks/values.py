"""What a tensor of a mask's subgraph can be at a symbolic position: an integer, a predicate or a number.

Affine        integers: i - j + 3
Conjunction   booleans
Select        numbers: a sum of products, or one such where a predicate holds and another elsewhere
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnopt.masks.expressions import Affine, as_constant, atom_reads, atom_variables
from attnopt.masks.predicates import FALSE, TRUE, Conjunction

# Anything at or below this is "minus infinity" to a soft-max in any dtype: transformers uses the dtype's minimum,
# older models -1e4 and -1e9.
MASKED = -1e4

Monomial = tuple[Any, ...]


@dataclass(frozen=True)
class Sum:
    """Σ c · atom · atom …, over index variables, reads and symbolic sizes; the empty product carries the constant.

    Real-number meaning: how the graph rounds in between is not part of it.
    """

    terms: tuple[tuple[Monomial, float], ...] = ()

    @classmethod
    def of(cls, coefficients: Mapping[Monomial, float]) -> Sum:
        found = [(m, c) for m, c in coefficients.items() if c != 0]
        return cls(tuple(sorted(found, key=lambda t: str([str(a) for a in t[0]]))))

    @classmethod
    def number(cls, value: float) -> Sum:
        return cls((((), float(value)),)) if value != 0 else cls()

    @classmethod
    def atom(cls, atom: Any) -> Sum:
        return cls((((atom,), 1.0),))

    @classmethod
    def affine(cls, value: Affine) -> Sum:
        coefficients: dict[Monomial, float] = {(a,): float(c) for a, c in value.terms}
        if isinstance(value.constant, int):
            coefficients[()] = float(value.constant)
        else:
            coefficients[(value.constant,)] = 1.0
        return cls.of(coefficients)

    @property
    def constant(self) -> float | None:
        """The number it is, if it is one."""
        if not self.terms:
            return 0.0
        return self.terms[0][1] if self.terms[0][0] == () and len(self.terms) == 1 else None

    def __add__(self, other: Sum) -> Sum:
        sums = dict(self.terms)
        for m, c in other.terms:
            sums[m] = sums.get(m, 0.0) + c
        return Sum.of(sums)

    def __mul__(self, other: Sum) -> Sum:
        products: dict[Monomial, float] = {}
        for m, c in self.terms:
            for n, d in other.terms:
                joined = tuple(sorted((*m, *n), key=str))
                products[joined] = products.get(joined, 0.0) + c * d
        return Sum.of(products)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(c) for _, c in self.terms)

    def __str__(self) -> str:
        parts = ["*".join([*([f"{c:g}"] if c != 1 or not m else []), *map(str, m)]) for m, c in self.terms]
        return " + ".join(parts) or "0"


def monomial_variables(monomial: Monomial) -> frozenset[str]:
    return frozenset(v for atom in monomial for v in atom_variables(atom))


def monomial_reads(monomial: Monomial) -> list[Any]:
    return [read for atom in monomial for read in atom_reads(atom)]


Number = Affine | Sum


@dataclass(frozen=True)
class Select:
    """`on` where the predicate holds, `off` elsewhere; an unconditional value has the predicate true and both equal."""

    predicate: Conjunction
    on: Number
    off: Number

    @classmethod
    def uniform(cls, value: Number) -> Select:
        return cls(TRUE, value, value)

    @classmethod
    def of(cls, predicate: Conjunction, on: Number, off: Number) -> Select:
        if predicate == FALSE or on == off:
            return cls(TRUE, off, off)
        return cls(TRUE, on, on) if predicate == TRUE else cls(predicate, on, off)

    @property
    def plain(self) -> bool:
        return self.predicate == TRUE


Value = Affine | Conjunction | Select


def constant(value: float) -> Select:
    return Select.uniform(Sum.number(value))


def literal_value(number: Number) -> float | None:
    """The number that a branch of a Select always is, if it is one."""
    if isinstance(number, Sum):
        return number.constant
    return float(number.constant) if number.is_constant and isinstance(number.constant, int) else None


def as_sum(number: Number) -> Sum:
    return number if isinstance(number, Sum) else Sum.affine(number)


def numeric(value: Value | None) -> Select | None:
    """Any value as a number: a predicate is 1 where it holds."""
    if isinstance(value, Conjunction):
        return Select.of(value, Affine((), 1), Affine())
    return Select.uniform(value) if isinstance(value, Affine) else value


def narrowed(value: Select) -> Value:
    """An unconditional integer as the plain expression it is."""
    return value.on if value.plain and isinstance(value.on, Affine) else value


def masked(number: Number) -> bool:
    held = literal_value(number)
    return held is not None and held <= MASKED


@dataclass(frozen=True)
class Additive:
    """What is added to a score: `bias` where the predicate holds, and where it does not the masked value `off`."""

    predicate: Conjunction
    off: float
    bias: Sum


def additive(value: Select, needs_zero: bool = True) -> Additive | None:
    """An additive mask, whichever way round it was written; None for what masks nothing but is not zero."""
    branches = [(value.predicate, value.on, value.off)]
    if not value.plain:
        branches.append((value.predicate.inverted(), value.off, value.on))
    for predicate, on, off in branches:
        if predicate == TRUE or masked(off):
            bias, fill = as_sum(on), literal_value(off)
            if (bias == Sum() or not needs_zero) and bias.finite:
                return Additive(predicate, float("-inf") if fill is None else fill, bias)
    return None


def size(value: Any) -> Affine:
    return Affine((), as_constant(value))
