"""Which keys a tile of query rows may keep, and which it keeps whole, in closed form.

    j <= i and i - j < 128, rows first..last   ->   live [first - 127, last + 1), whole [last - 127, first + 1)

A clause that bounds j by positions, sizes and data of the batch entry gives an interval; every other clause only masks,
and where there is one, no interval is proved to be kept whole. Everything here is sound and nothing need be tight.

Documents, ``t0[b, i] == t0[b, j]``, bound keys by what is known of their rows when the kernel runs: `t0_first` and
`t0_last` are the outermost keys of the documents of the tile's rows, and from `t0_whole` to its first row every key is
kept by every row. Padding, ``t0[b, j]``, does so likewise: `t0_first` and `t0_end` bound what it keeps, and it keeps
all of `t0_whole_first` to `t0_whole_end`. `attnopt/codegen/equal_runs.py` computes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.masks.expressions import Affine, Quotient, Read, Remainder, atom_variables
from attnopt.masks.kernel_form import Form
from attnopt.masks.predicates import AtLeastZero, BoolLoad, Clause, EqualZero, Literal, literal_variables

FIRST, LAST = Affine.var("first"), Affine.var("last")


@dataclass(frozen=True)
class Extreme:
    """The largest or smallest of several bounds."""

    kind: str  # "max" or "min"
    of: tuple[Affine | Extreme, ...]


Bound = Affine | Extreme


def extreme(kind: str, bounds: Sequence[Bound]) -> Bound:
    found = tuple(dict.fromkeys(bounds))
    return found[0] if len(found) == 1 else Extreme(kind, found)


@dataclass(frozen=True)
class Interval:
    """``low <= j < high``; None where it is not bounded."""

    low: Bound | None = None
    high: Bound | None = None


@dataclass(frozen=True)
class Live:
    """live: outside it no row of the tile keeps a key; gap: nor in ``gap.low <= j < gap.high``, if that holds any.

    whole: inside it every row keeps every key; None where that is not provable.
    """

    live: Interval
    gap: Interval | None
    whole: Interval | None

    @property
    def grows(self) -> bool:
        """Whether later tiles keep more keys, as causal ones do."""
        return "last" in names_of(self.live.high) and "first" not in names_of(self.live.low)


def documents(form: Form) -> tuple[Read, ...]:
    """The numbers of documents, read at the query, of the clauses that keep a query's own document alone."""
    found = (document(clause) for clause in form.clauses)
    return tuple(dict.fromkeys(read for read in found if read is not None))


def document(clause: Clause) -> Read | None:
    """``t[b, i]`` where the clause is ``t[b, i] == t[b, j]``, the position in the last dimension."""
    literal = next(iter(clause))
    if len(clause) > 1 or not isinstance(literal, EqualZero) or literal.negated or literal.expression.constant != 0:
        return None
    terms = literal.expression.terms
    reads = [atom for atom, _ in terms if isinstance(atom, Read) and atom.index]
    if len(reads) != 2 or len(terms) != 2 or sorted(c for _, c in terms) != [-1, 1]:
        return None
    one, other = reads
    if one.node != other.node or one.index[:-1] != other.index[:-1]:
        return None
    if any(e not in (Affine(), Affine.var("b")) for e in one.index[:-1]) or one.index.count(Affine.var("b")) > 1:
        return None
    at = {read.index[-1]: read for read in reads}
    return at[Affine.var("i")] if set(at) == {Affine.var("i"), Affine.var("j")} else None


def names_of(bound: Bound | None) -> set[str]:
    """The variables of a bound; data itself counts by the variables of its index."""
    if isinstance(bound, Affine):
        return {name for atom, _ in bound.terms for name in atom_variables(atom) or {str(atom)}}
    return {name for part in bound.of for name in names_of(part)} if bound is not None else set()


def flags(form: Form) -> tuple[BoolLoad, ...]:
    """The clauses that are padding of keys."""
    found = (padding(clause) for clause in form.clauses)
    return tuple(dict.fromkeys(load for load in found if load is not None))


def padding(clause: Clause) -> BoolLoad | None:
    """``t[b, j]``, the position in the last dimension, where that is the clause."""
    load = next(iter(clause))
    if len(clause) > 1 or not isinstance(load, BoolLoad) or load.negated or load.index[-1:] != (Affine.var("j"),):
        return None
    before = load.index[:-1]
    return load if all(e in (Affine(), Affine.var("b")) for e in before) and before.count(Affine.var("b")) < 2 else None


def bounded(value: Affine, up: bool) -> Affine | None:
    """A bound of the value over the rows of a tile, in `first` and `last`; None where none is known."""
    total = Affine((), value.constant)
    for atom, c in value.terms:
        bound = bounded_atom(atom, up == (c > 0))
        if bound is None:
            return None
        total = total + bound * c
    return total


def bounded_atom(atom: Any, up: bool) -> Affine | None:
    if "i" not in atom_variables(atom):
        return Affine.var(atom)
    if atom == "i":
        return LAST if up else FIRST
    if isinstance(atom, Quotient):
        inner = bounded(atom.argument, up)
        return None if inner is None else Affine.var(Quotient(inner, atom.divisor))
    if isinstance(atom, Remainder):
        return Affine((), atom.divisor - 1 if up else 0)
    return None


def quotient(value: Affine, divisor: int) -> Affine:
    if divisor == 1:
        return value
    if not value.terms:
        return Affine((), value.constant // divisor)
    return Affine.var(Quotient(value, divisor))


def interval(literal: Literal, whole: bool) -> Interval | None:
    """Keys that some row of the tile, or with `whole` every row, keeps by this literal.

    None where nothing is known: then every key may be kept, or none is proved to be.
    """
    if isinstance(literal, BoolLoad):
        return None
    if isinstance(literal, AtLeastZero):
        return half_line(literal.expression, whole)
    if literal.negated:
        return None
    above, below = half_line(literal.expression, whole), half_line(literal.expression * -1, whole)
    if above is None or below is None:
        return None
    return Interval(above.low or below.low, above.high or below.high)


def half_line(value: Affine, whole: bool) -> Interval | None:
    """``value >= 0`` as a bound of j."""
    keyed = [(atom, c) for atom, c in value.terms if "j" in atom_variables(atom)]
    if len(keyed) != 1:
        return None
    ((atom, c),) = keyed
    rest = bounded(value - Affine.of({atom: c}), not whole)
    if rest is None:
        return None
    # c * atom >= -rest
    edge = quotient(rest, abs(c)) * (1 if c < 0 else -1)
    if atom == "j":
        return Interval(None, edge + 1) if c < 0 else Interval(edge, None)
    if not isinstance(atom, Quotient) or atom.argument.coefficient("j") != 1:
        return None
    shift = atom.argument - Affine.var("j")
    if shift.variables & {"i", "j"}:
        return None
    # (j + shift) // d <= edge is j + shift < d * (edge + 1); >= edge is j + shift >= d * edge.
    if c < 0:
        return Interval(None, (edge + 1) * atom.divisor - shift)
    return Interval(edge * atom.divisor - shift, None)


def hull(clause: Clause) -> Interval:
    """Around the keys that any literal of the clause may keep."""
    if (read := document(clause)) is not None:
        return Interval(Affine.var(f"{read.node}_first"), Affine.var(f"{read.node}_last") + 1)
    if (load := padding(clause)) is not None:
        return Interval(Affine.var(f"{load.node}_first"), Affine.var(f"{load.node}_end"))
    parts = [interval(x, False) for x in ordered(clause)]
    if any(p is None for p in parts):
        return Interval()
    lows, highs = [p.low for p in parts if p], [p.high for p in parts if p]
    low = None if None in lows else extreme("min", lows)  # type: ignore[arg-type]
    return Interval(low, None if None in highs else extreme("max", highs))  # type: ignore[arg-type]


def gap_in(clause: Clause) -> Interval | None:
    """What lies between the first keys that one literal keeps and the last keys that another does."""
    parts = [interval(x, False) for x in ordered(clause)]
    if any(p is None or (p.low is None) == (p.high is None) for p in parts):
        return None
    heads = [p.high for p in parts if p is not None and p.high is not None]
    tails = [p.low for p in parts if p is not None and p.low is not None]
    return Interval(extreme("max", heads), extreme("min", tails)) if heads and tails else None


def kept_whole(clause: Clause) -> Interval | None:
    """Keys that every row of the tile keeps by the clause, as one interval."""
    if (read := document(clause)) is not None:
        return Interval(Affine.var(f"{read.node}_whole"), FIRST + 1)
    if (load := padding(clause)) is not None:
        return Interval(Affine.var(f"{load.node}_whole_first"), Affine.var(f"{load.node}_whole_end"))
    parts = [(x, interval(x, True)) for x in ordered(clause)]
    known = [(x, p) for x, p in parts if p is not None]
    if not known:
        return None
    lows, highs = [p.low for _, p in known], [p.high for _, p in known]
    if not any(lows):
        return Interval(None, None if None in highs else extreme("max", highs))  # type: ignore[arg-type]
    if not any(highs):
        return Interval(None if None in lows else extreme("min", lows), None)  # type: ignore[arg-type]
    # Several intervals are not one: that of the literal which follows the query is the long one.
    return next((p for x, p in known if "i" in literal_variables(x)), known[0][1])


def ordered(clause: Clause) -> list[Literal]:
    return sorted(clause, key=str)


def live_range(form: Form) -> Live:
    """What is known of the keys of a tile with the query rows first to last (included)."""
    hulls = [hull(c) for c in form.clauses]
    if any(x.high is not None for c, x in zip(form.clauses, hulls, strict=True) if document(c) is None):
        # The last key of a document is of no use where positions end the range.
        hulls = [Interval(x.low) if document(c) else x for c, x in zip(form.clauses, hulls, strict=True)]
    lows = [x.low for x in hulls if x.low is not None]
    highs = [x.high for x in hulls if x.high is not None]
    live = Interval(extreme("max", lows) if lows else None, extreme("min", highs) if highs else None)
    gap = next((g for c in form.clauses if (g := gap_in(c)) is not None), None)
    wholes = [kept_whole(c) for c in form.clauses]
    if any(w is None for w in wholes):
        return Live(live, gap, None)
    starts = [w.low for w in wholes if w is not None and w.low is not None]
    ends = [w.high for w in wholes if w is not None and w.high is not None]
    whole = Interval(extreme("max", starts) if starts else None, extreme("min", ends) if ends else None)
    return Live(live, gap, whole)


__all__ = [
    "Bound",
    "Extreme",
    "Interval",
    "Live",
    "document",
    "documents",
    "flags",
    "live_range",
    "names_of",
    "padding",
]
