"""Predicates over index expressions, in conjunctive normal form.

    (j <= i) and (pad[b, j] or block[b, i] == block[b, j])

A predicate is a set of clauses that all hold, a clause a set of literals of which one holds. Negation is pushed into
the literals. Clauses are reduced as they are joined (implied, contradicted and overlapping literals go), so that masks
written differently end as the same set; two predicates are compared by ``==``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from attnopt.masks.expressions import Affine, Call, Distance, Ranges, Read, leading_positive, reads

# More clauses than this and a predicate is carried as data: no mask in use comes near.
LIMIT = 48


class TooManyClauses(Exception):
    """A predicate has grown beyond LIMIT; the interpreter then carries it as data."""


@dataclass(frozen=True)
class AtLeastZero:
    """``expression >= 0``."""

    expression: Affine

    def __str__(self) -> str:
        return f"{self.expression} >= 0"


@dataclass(frozen=True)
class EqualZero:
    """``expression == 0``, or ``!= 0`` if `negated`; the first coefficient is positive."""

    expression: Affine
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.expression} {'!=' if self.negated else '=='} 0"


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


Literal = AtLeastZero | EqualZero | BoolLoad
Clause = frozenset[Literal]


def literal_variables(literal: Literal) -> frozenset[str]:
    return literal.variables if isinstance(literal, BoolLoad) else literal.expression.variables


def literal_reads(literal: Literal) -> Iterator[Read | Call]:
    """The data a literal reads, a boolean load itself included."""
    if isinstance(literal, BoolLoad):
        yield Read(literal.node, literal.index)
        for position in literal.index:
            yield from reads(position)
    else:
        yield from reads(literal.expression)


def opposite(literal: Literal) -> Literal:
    if isinstance(literal, AtLeastZero):
        return AtLeastZero(literal.expression * -1 - 1)
    if isinstance(literal, EqualZero):
        return EqualZero(literal.expression, not literal.negated)
    return BoolLoad(literal.node, literal.index, not literal.negated)


def gap(a: Affine, b: Affine, sign: int) -> int | None:
    """``b - sign * a`` where that is a known integer."""
    if len(a.terms) != len(b.terms):
        return None
    if sign > 0:
        if a.terms != b.terms:
            return None
    elif any(x != y or c != -d for (x, c), (y, d) in zip(a.terms, b.terms, strict=True)):
        return None
    difference = as_int(b.constant - sign * a.constant)
    return difference


def as_int(value: Any) -> int | None:
    return value if isinstance(value, int) else int(value) if getattr(value, "is_Integer", False) else None


def implies(a: Literal, b: Literal) -> bool:
    """Whether b holds wherever a does, by comparing constants alone."""
    if a == b:
        return True
    if isinstance(a, BoolLoad) or isinstance(b, BoolLoad) or (isinstance(a, EqualZero) and a.negated):
        return False
    for sign in (1, -1):
        # a: e >= 0 or e == 0; b: sign·e + slack (>=, != or ==) 0
        slack = gap(a.expression, b.expression, sign)
        if slack is None:
            continue
        if isinstance(b, AtLeastZero) and slack >= 0 and (sign > 0 or isinstance(a, EqualZero)):
            return True
        if isinstance(b, EqualZero) and b.negated and (sign * slack > 0 if isinstance(a, AtLeastZero) else slack != 0):
            return True
    return False


def either(a: Literal, b: Literal) -> Literal | None:
    """A literal equal to ``a or b``, if there is one that is not a or b."""
    if isinstance(a, AtLeastZero) and isinstance(b, AtLeastZero) and gap(a.expression, b.expression, -1) == -2:
        return EqualZero(leading_positive(a.expression + 1), True)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, EqualZero) and not x.negated and isinstance(y, AtLeastZero):
            for sign in (1, -1):
                if gap(x.expression, y.expression, sign) == -1:
                    return AtLeastZero(y.expression + 1)
    return None


def both(a: Literal, b: Literal) -> Literal | None:
    """A literal equal to ``a and b``, if there is one that is not a or b."""
    joined = either(opposite(a), opposite(b))
    return opposite(joined) if joined is not None else None


def reduce_pairs(found: set[Any], merged: Callable[[Any, Any], set[Any] | None]) -> None:
    """Replace pairs by what `merged` makes of them, until it makes nothing of any."""
    again = len(found) > 1
    while again:
        again = False
        for a in list(found):
            for b in list(found):
                if a is b or a not in found or b not in found:
                    continue
                rest = merged(a, b)
                if rest is not None:
                    found -= {a, b}
                    found |= rest
                    again = True


def merged_literals(a: Literal, b: Literal) -> set[Literal] | None:
    """What remains of ``a or b``."""
    if implies(a, b):
        return {b}
    joined = either(a, b)
    return None if joined is None else {joined}


def clause_of(literals: Iterable[Literal]) -> Clause | None:
    """The disjunction of literals, reduced; None where it always holds."""
    found = set(literals)
    if len(found) > 1:
        reduce_pairs(found, merged_literals)
        if any(implies(opposite(a), b) for a in found for b in found if a != b):
            return None
    return frozenset(found)


def subsumes(a: Iterable[Literal], b: Iterable[Literal]) -> bool:
    """Whether clause a implies clause b."""
    return all(any(implies(x, y) for y in b) for x in a)


def resolve(a: Clause, b: Clause) -> Clause | None:
    """b without a literal that a rules out: ``(x or R) and (y or R or S)`` with x, y exclusive leaves ``R or S``."""
    for y in b:
        for x in a:
            if implies(x, opposite(y)) and subsumes(a - {x}, b - {y}):
                return b - {y}
    return None


def merged_clauses(a: Clause, b: Clause) -> set[Clause] | None:
    """What remains of ``a and b``."""
    if subsumes(a, b):
        return {a}
    shorter = resolve(a, b)
    if shorter is not None:
        return {a, shorter}
    joined = both(next(iter(a)), next(iter(b))) if len(a) == len(b) == 1 else None
    return None if joined is None else {frozenset((joined,))}


def conjunction_of(clauses: Iterable[Clause]) -> Conjunction:
    """The clauses, reduced against each other to a fixed point."""
    found = set(clauses)
    if len(found) > LIMIT:
        raise TooManyClauses
    reduce_pairs(found, merged_clauses)
    return FALSE if frozenset() in found else Conjunction(frozenset(found))


@dataclass(frozen=True)
class Conjunction:
    """All of `clauses` hold; none means true, an empty one false."""

    clauses: frozenset[Clause] = frozenset()

    @property
    def false(self) -> bool:
        return frozenset() in self.clauses

    @property
    def constant(self) -> bool | None:
        """True or False where the predicate is decided, else None."""
        return False if self.false else True if not self.clauses else None

    @cached_property
    def atoms(self) -> frozenset[Literal]:
        return frozenset(literal for clause in self.clauses for literal in clause)

    def __and__(self, other: Conjunction) -> Conjunction:
        if not other.clauses or self == other:
            return self
        return conjunction_of(self.clauses | other.clauses) if self.clauses else other

    def __or__(self, other: Conjunction) -> Conjunction:
        if not self.clauses or not other.clauses:
            return TRUE
        if self == other or other.false:
            return self
        if self.false:
            return other
        if len(self.clauses) * len(other.clauses) > LIMIT * LIMIT:
            raise TooManyClauses
        joined = {clause_of(a | b) for a in self.clauses for b in other.clauses}
        return conjunction_of(c for c in joined if c is not None)

    def inverted(self) -> Conjunction:
        negated = FALSE
        for clause in sorted(self.clauses, key=len):
            negated = negated | conjunction_of(frozenset((opposite(x),)) for x in clause)
        return negated

    def __str__(self) -> str:
        if self.false:
            return "false"
        parts = sorted(" or ".join(sorted(map(str, clause))) for clause in self.clauses)
        return " and ".join(f"({p})" if " or " in p else p for p in parts) or "true"


TRUE = Conjunction()
FALSE = Conjunction(frozenset({frozenset()}))


def single(literal: Literal) -> Conjunction:
    return Conjunction(frozenset({frozenset((literal,))}))


def at_least_zero(expression: Affine) -> Conjunction:
    """``expression >= 0``, divided by the gcd of its coefficients: exact over the integers."""
    if expression.is_constant:
        sign = expression.constant >= 0
        if isinstance(sign, bool) or sign in (sympy.true, sympy.false):
            return TRUE if bool(sign) else FALSE
        return single(AtLeastZero(expression))
    for atom, c in expression.terms:
        if isinstance(atom, Distance) and abs(c) == 1:
            # |a| <= r is two bounds; |a| >= r, either of two.
            rest = expression - Affine.of({atom: c})
            above, below = (at_least_zero(rest + atom.argument * (c * sign)) for sign in (1, -1))
            return above & below if c < 0 else above | below
    divisor = math.gcd(*(abs(c) for _, c in expression.terms))
    if divisor > 1 and isinstance(expression.constant, int):
        scaled = {a: c // divisor for a, c in expression.terms}
        expression = Affine.of(scaled, expression.constant // divisor)
    return single(AtLeastZero(expression))


def equal_zero(expression: Affine) -> Conjunction:
    """``expression == 0``."""
    if expression.is_constant and as_int(expression.constant) is not None:
        return TRUE if expression.constant == 0 else FALSE
    divisor = math.gcd(*(abs(c) for _, c in expression.terms)) if expression.terms else 1
    if divisor > 1 and isinstance(expression.constant, int):
        if expression.constant % divisor:
            return FALSE
        expression = Affine.of({a: c // divisor for a, c in expression.terms}, expression.constant // divisor)
    return single(EqualZero(leading_positive(expression)))


def decide(literal: Literal, ranges: Ranges) -> bool | None:
    """Whether a literal holds, or fails, at every position within the ranges."""
    if isinstance(literal, BoolLoad):
        return None
    low, high = ranges.bounds(literal.expression)
    if isinstance(literal, AtLeastZero):
        if ranges.nonnegative(low):
            return True
        return False if high is not None and ranges.nonnegative(-high - 1) else None
    apart = (low is not None and ranges.nonnegative(low - 1)) or (high is not None and ranges.nonnegative(-high - 1))
    if apart:
        return literal.negated
    return not literal.negated if low == 0 and high == 0 else None


def implies_within(a: Literal, b: Literal, ranges: Ranges) -> bool:
    """Whether b holds wherever a does, given the ranges: j <= 1 implies j <= i + 2 as i is at least 0."""
    if not isinstance(a, AtLeastZero) or not isinstance(b, AtLeastZero):
        return a == b
    return a == b or ranges.nonnegative(ranges.bounds(b.expression - a.expression)[0])


def fold_ranges(predicate: Conjunction, ranges: Ranges) -> Conjunction:
    """The predicate without the literals and clauses that the ranges of its variables decide."""
    kept: list[Clause] = []
    for clause in sorted(predicate.clauses, key=lambda c: sorted(map(str, c))):
        decided = {literal: decide(literal, ranges) for literal in sorted(clause, key=str)}
        if True in decided.values():
            continue
        left = [literal for literal, holds in decided.items() if holds is None]
        for literal in tuple(left):
            if any(other is not literal and implies_within(literal, other, ranges) for other in left):
                left.remove(literal)
        kept.append(frozenset(left))
    for clause in tuple(kept):
        if any(o is not clause and all(any(implies_within(x, y, ranges) for y in clause) for x in o) for o in kept):
            kept.remove(clause)
    return conjunction_of(kept)
