"""A mask and a bias as a kernel is specialised on them: no graph behind it, canonical, and read back from JSON.

    Form(keep: j <= i and t0[b, j], added: t1[h]*j, softcap 0, sink "h")
    ->  {"added": [[1.0, ["load", 1, "float32", [0, [1, "h"]]], "j"]], "keep": [[["ge", [0, [1, "i"], [-1, "j"]]]], ...

What a graph reads becomes a Slot, t0, t1 and so on: an argument of the kernel. Sizes known at run time only become
further integer arguments, s0, s1 and so on. A graph that comes from a cache of another process has the text alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch

from attnopt import strict_json
from attnopt.errors import AttnoptError
from attnopt.masks.expressions import Affine, Call, Distance, Quotient, Read, Remainder
from attnopt.masks.predicates import AtLeastZero, BoolLoad, Clause, Conjunction, EqualZero, Literal, literal_reads
from attnopt.masks.printing import clause_text, literal_text, sum_text
from attnopt.masks.values import Sum, monomial_reads

POSITIONS = ("b", "h", "i", "j")
SINKS = ("", "0", "h", "bhi")
PLACE = strict_json.Place("the form of a masked kernel", AttnoptError, "Clear the caches and compile anew.")


class NoForm(Exception):
    """The mask or bias depends on something that a kernel does not get."""


@dataclass(frozen=True)
class Slot:
    """A tensor argument of the kernel: its number and torch's name of its dtype."""

    number: int
    dtype: str

    def __str__(self) -> str:
        return f"t{self.number}"


@dataclass(frozen=True)
class Form:
    """out = softmax(softcap * tanh(scale * q k^T / softcap) + added, masked where not keep, and the sink's column) v.

    keep, added: over b, h, i, j, sizes s0, s1, ... and Slots; softcap: 0 for none; sink: "" for no further column of
    the soft-max, "0" for a score of 0, "h" for a logit of each head, "bhi" for one of each row.
    """

    keep: Conjunction = field(default_factory=Conjunction)
    added: Sum = field(default_factory=Sum)
    softcap: float = 0.0
    sink: str = ""

    @cached_property
    def clauses(self) -> tuple[Clause, ...]:
        """In a fixed order: what bounds keys by positions first, data last, by text otherwise."""
        return tuple(sorted(self.keep.clauses, key=lambda c: (any_reads(c), len(c), clause_text(c))))

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Everything that is read, the index of a read before itself, each once."""
        found = [r for c in self.clauses for x in sorted(c, key=str) for r in literal_reads(x)]
        found += [r for m, _ in self.added.terms for r in monomial_reads(m)]
        return tuple(dict.fromkeys(reversed(found)))  # type: ignore[arg-type]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(sorted({r.node for r in self.reads}, key=lambda s: s.number))

    @cached_property
    def sizes(self) -> int:
        """How many sizes there are: s0 up to the highest that is named."""
        named = [int(name[1:]) for name in names_in(self) if name[0] == "s"]
        return max(named, default=-1) + 1

    @property
    def text(self) -> str:
        """JSON; equal forms give equal text."""
        return dumped(self)

    @property
    def kept(self) -> str:
        """The predicate; nothing where every key is kept."""
        return " and ".join(map(spoken, self.clauses))

    def __str__(self) -> str:
        """As a person reads it: ``j <= i and t0[b, j], scores + t1[h]*j, soft-cap 30, a sink of each head``."""
        parts = [self.kept or "all"]
        parts += [f"scores + {sum_text(self.added)}"] * bool(self.added.terms)
        parts += [f"soft-cap {self.softcap:g}"] * bool(self.softcap)
        named = {"0": "0", "h": "of each head", "bhi": "of each row"}
        return ", ".join([*parts, *([f"a sink {named[self.sink]}"] if self.sink else [])])


def spoken(clause: Clause) -> str:
    """A clause as a person reads it; a window as ``i - j < 128``."""
    parts = []
    for literal in clause:
        held = literal.expression if isinstance(literal, AtLeastZero) else Affine()
        wide = isinstance(held.constant, int) and held.constant > 0
        if wide and held - held.constant == Affine.of({"i": -1, "j": 1}):
            parts.append(f"i - j < {held.constant + 1}")
        else:
            parts.append(literal_text(literal))
    return parts[0] if len(parts) == 1 else "(" + " or ".join(sorted(parts)) + ")"


def any_reads(clause: Clause) -> bool:
    return any(True for literal in clause for _ in literal_reads(literal))


def names_in(form: Form) -> set[str]:
    """The names of positions and sizes that a form holds."""
    named: set[str] = set()

    def note(name: str) -> Affine:
        named.add(name)
        return Affine.var(name)

    rewritten(form, note, lambda read: read.node)
    return named


# Rewriting: one walk over the algebra, in which every name, every tensor and every size is replaced.


@dataclass
class Rewriting:
    """name: what stands for an index variable; node: for what a read reads; size: for a size known at run time."""

    name: Callable[[str], Affine]
    node: Callable[[Read | Call | BoolLoad], Any]
    size: Callable[[sympy.Expr], Affine]

    def expression(self, value: Affine) -> Affine:
        total = self.constant(value.constant)
        for atom, c in value.terms:
            total = total + self.atom(atom) * c
        return total

    def constant(self, value: Any) -> Affine:
        return Affine((), value) if isinstance(value, int) else self.size(value)

    def atom(self, atom: Any) -> Affine:
        if isinstance(atom, str):
            return self.name(atom)
        if isinstance(atom, (Read, Call)):
            return Affine.var(Read(self.node(atom), tuple(map(self.expression, atom.index))))
        if isinstance(atom, (Quotient, Remainder)):
            return Affine.var(type(atom)(self.expression(atom.argument), atom.divisor))
        if isinstance(atom, Distance):
            return Affine.var(Distance(self.expression(atom.argument)))
        return self.constant(int(atom) if getattr(atom, "is_Integer", False) else atom)

    def literal(self, literal: Literal) -> Literal:
        if isinstance(literal, BoolLoad):
            return BoolLoad(self.node(literal), tuple(map(self.expression, literal.index)), literal.negated)
        return replace(literal, expression=self.expression(literal.expression))

    def sum(self, value: Sum) -> Sum:
        total = Sum()
        for monomial, c in value.terms:
            product = Sum.number(c)
            for atom in monomial:
                product = product * Sum.affine(self.atom(atom))
            total = total + product
        return total


def rewritten(form: Form, name: Callable[[str], Affine], node: Callable[[Any], Any]) -> Form:
    by = Rewriting(name, node, lambda size: Affine((), size))
    keep = Conjunction(frozenset(frozenset(map(by.literal, c)) for c in form.keep.clauses))
    return replace(form, keep=keep, added=by.sum(form.added))


# From a graph: numbers for its nodes and its symbolic sizes.


@dataclass(frozen=True)
class Bound:
    """A form, and what its slots and sizes stand for: fx nodes, and sympy expressions in symbolic sizes."""

    form: Form
    nodes: tuple[Any, ...]
    sizes: tuple[sympy.Expr, ...]


def form_of(keep: Conjunction, added: Sum, names: Mapping[str, Affine], softcap: float = 0.0, sink: str = "") -> Bound:
    """The form of a recovered meaning. names: every index variable over b, h, i and j (h1 is ``h % 4``).

    NoForm where a variable is not among the names, or where nothing is kept at all.
    """
    if keep.false:
        raise NoForm("no key is ever kept")
    nodes: dict[Any, Slot] = {}
    sizes: dict[sympy.Expr, str] = {}

    def name(variable: str) -> Affine:
        if variable not in names:
            raise NoForm(f"it varies over {variable}, which is no position")
        return names[variable]

    if any(r.node.meta["val"].dtype == torch.bool for m, _ in added.terms for r in monomial_reads(m)):
        raise NoForm("a boolean is added to the scores")

    def slot(read: Read | Call | BoolLoad) -> Slot:
        if any(not e.terms and isinstance(e.constant, int) and e.constant < 0 for e in read.index):
            raise NoForm(f"{read.node} is read from its end")
        dtype = str(read.node.meta["val"].dtype).removeprefix("torch.")
        return nodes.setdefault(read.node, Slot(len(nodes), dtype))

    def size(value: sympy.Expr) -> Affine:
        return Affine.var(sizes.setdefault(value, f"s{len(sizes)}"))

    # Numbers must not depend on what nodes and symbols are called, so the order is that of the text without them.
    anonymous = Rewriting(name, lambda read: Slot(0, str(read.node.meta["val"].dtype)), lambda _: Affine.var("s0"))
    numbered = Rewriting(name, slot, size)
    clauses = []
    for clause in ordered(keep.clauses, lambda c: sorted(str(anonymous.literal(x)) for x in c)):
        clauses.append(frozenset(map(numbered.literal, ordered(clause, lambda x: str(anonymous.literal(x))))))
    total = Sum()
    for term in ordered(added.terms, lambda t: str(anonymous.sum(Sum((t,))))):
        total = total + numbered.sum(Sum((term,)))
    form = Form(Conjunction(frozenset(clauses)), total, softcap, sink)
    return Bound(form, tuple(nodes), tuple(sizes))


def ordered(items: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
    return sorted(items, key=lambda x: (key(x), str(x)))


def size_terms(value: sympy.Expr) -> Iterator[tuple[int, list[sympy.Symbol]]]:
    """A size as a sum of integers times products of symbols; NoForm where it is none."""
    for product, c in sympy.expand(value).as_coefficients_dict().items():
        factors: list[sympy.Symbol] = []
        for base, power in product.as_powers_dict().items():
            if base == 1:
                continue
            if not isinstance(base, sympy.Symbol) or not power.is_Integer or power < 1:
                raise NoForm(f"the size {value} is no sum of products of sizes")
            factors += [base] * int(power)
        if not c.is_Integer:
            raise NoForm(f"the size {value} has a fraction in it")
        yield int(c), factors


# To text and back.


@lru_cache(maxsize=4096)
def dumped(form: Form) -> str:
    data = {
        "keep": [sorted((literal_data(x) for x in c), key=json.dumps) for c in form.clauses],
        "added": [[c, *map(atom_data, m)] for m, c in form.added.terms],
        "softcap": form.softcap,
        "sink": form.sink,
    }
    return json.dumps(data, sort_keys=True, allow_nan=False)


def expression_data(value: Affine) -> list[Any]:
    return [value.constant, *([c, atom_data(atom)] for atom, c in value.terms)]


def atom_data(atom: Any) -> Any:
    if isinstance(atom, str):
        return atom
    if isinstance(atom, Read):
        return ["load", atom.node.number, atom.node.dtype, *map(expression_data, atom.index)]
    if isinstance(atom, Distance):
        return ["abs", expression_data(atom.argument)]
    return ["div" if isinstance(atom, Quotient) else "mod", atom.divisor, expression_data(atom.argument)]


def literal_data(literal: Literal) -> list[Any]:
    if isinstance(literal, BoolLoad):
        sign = "not" if literal.negated else "is"
        return [sign, literal.node.number, literal.node.dtype, *map(expression_data, literal.index)]
    sign = "ge" if isinstance(literal, AtLeastZero) else "ne" if literal.negated else "eq"
    return [sign, expression_data(literal.expression)]


@lru_cache(maxsize=4096)
def form_from(text: str) -> Form:
    """The form that a text stands for. AttnoptError where it stands for none."""
    data = PLACE.record(strict_json.parsed(text, PLACE), ("keep", "added", "softcap", "sink"))
    keep = frozenset(
        frozenset(read_literal(at, x) for at, x in place.items(clause))
        for place, clause in PLACE.at("keep").items(data["keep"])
    )
    terms = tuple(
        (tuple(read_atom(place, a) for a in value[1:]), place.number(value[0], float))
        for place, value in filled(PLACE.at("added"), data["added"], 1)
    )
    softcap = PLACE.at("softcap").number(data["softcap"], float, 0)
    if data["sink"] not in SINKS:
        PLACE.at("sink").fail(f"{data['sink']!r} is no sink")
    return Form(Conjunction(keep), Sum(terms), softcap, data["sink"])


def filled(place: strict_json.Place, value: Any, least: int) -> Iterator[tuple[strict_json.Place, list[Any]]]:
    """The items of a list of lists, each of at least so many entries."""
    for at, item in place.items(value):
        if not isinstance(item, list) or len(item) < least:
            at.fail(f"a list of {least} or more is needed here")
        yield at, item


def read_expression(place: strict_json.Place, value: Any) -> Affine:
    if not isinstance(value, list) or not value:
        place.fail("a constant and its terms are needed here")
    total = Affine((), place.number(value[0], int))
    for at, (c, atom) in ((at, pair) for at, pair in filled(place, value[1:], 2)):
        total = total + Affine.var(read_atom(at, atom)) * at.number(c, int)
    return total


def read_atom(place: strict_json.Place, value: Any) -> Any:
    if isinstance(value, str):
        if value not in POSITIONS and not (value[:1] == "s" and value[1:].isdecimal()):
            place.fail(f"{value!r} is no position and no size")
        return value
    match value:
        case ["load", number, dtype, *index]:
            return Read(read_slot(place, number, dtype), tuple(read_expression(place, e) for e in index))
        case ["abs", argument]:
            return Distance(read_expression(place, argument))
        case ["div" | "mod" as sign, divisor, argument]:
            kind = Quotient if sign == "div" else Remainder
            return kind(read_expression(place, argument), place.number(divisor, int, 1))
    place.fail("an atom is needed here")


def read_slot(place: strict_json.Place, number: Any, dtype: Any) -> Slot:
    return Slot(place.number(number, int, 0), place.string(dtype))


def read_literal(place: strict_json.Place, value: Any) -> Literal:
    match value:
        case ["is" | "not" as sign, number, dtype, *index]:
            found = tuple(read_expression(place, e) for e in index)
            return BoolLoad(read_slot(place, number, dtype), found, sign == "not")
        case ["ge", expression]:
            return AtLeastZero(read_expression(place, expression))
        case ["eq" | "ne" as sign, expression]:
            return EqualZero(read_expression(place, expression), sign == "ne")
    place.fail("a literal is needed here")


def positions_of(atoms: Mapping[str, list[tuple[str, Any]]]) -> dict[str, Affine]:
    """Names of the parts of merged axes over b, h, i, j.

    atoms: per position the (name, size) of its parts, the outer first. NoForm where an inner size is known at run time
    only.
    """
    found = {position: Affine.var(position) for position in POSITIONS}
    for position, parts in atoms.items():
        if len(parts) < 2:
            continue
        below = 1
        for n, (name, size) in reversed(list(enumerate(parts))):
            value = Affine.var(position)
            if below > 1:
                value = Affine.var(Quotient(value, below))
            if n:
                if not isinstance(size, int):
                    raise NoForm(f"an axis is made of parts, and the size of {name} is known at run time only")
                value = Affine.var(Remainder(value, size))
                below *= size
            found[name] = value
    return found
