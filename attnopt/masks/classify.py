"""From a proved predicate to a Mask record: bounds on i - j, chunks, padding, further terms, and what stays data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch.fx import Node

from attnopt.ir import Load, Mask
from attnopt.masks.expressions import Affine, Call, Quotient, Ranges, Read
from attnopt.masks.materialize import boolean_node, is_simple
from attnopt.masks.predicates import (
    AtLeastZero,
    BoolLoad,
    Clause,
    Conjunction,
    EqualZero,
    Literal,
    as_int,
    at_least_zero,
    literal_reads,
    literal_variables,
)
from attnopt.masks.printing import clause_text, expression_text, visible


@dataclass
class Parts:
    """A predicate's clauses, sorted by what they say."""

    offsets: list[Affine] = field(default_factory=list)
    reaches: list[Affine] = field(default_factory=list)
    chunks: list[tuple[Affine, int, Clause]] = field(default_factory=list)
    padding: list[tuple[Load, Node]] = field(default_factory=list)
    terms: list[Clause] = field(default_factory=list)
    data: list[Clause] = field(default_factory=list)


def distance(value: Affine) -> tuple[int, Affine] | None:
    """(sign, rest) where the value is sign · (i - j) + rest and the rest does not vary with a position."""
    sign = value.coefficient("i")
    rest = value - Affine.of({"i": sign, "j": -sign})
    if abs(sign) != 1 or value.coefficient("j") != -sign or rest.variables:
        return None
    return (sign, rest) if all(isinstance(a, Read) for a, _ in rest.terms) else None


def chunk(literal: Literal) -> tuple[Affine, int] | None:
    """(offset, c) of ``(i + offset) // c == j // c``."""
    if not isinstance(literal, EqualZero) or literal.negated or len(literal.expression.terms) != 2:
        return None
    if literal.expression.constant != 0:
        return None
    (a, c), (b, d) = literal.expression.terms
    if not isinstance(a, Quotient) or not isinstance(b, Quotient) or a.divisor != b.divisor or c != -d or abs(c) != 1:
        return None
    for query, key in ((a.argument, b.argument), (b.argument, a.argument)):
        if key == Affine.var("j") and query.coefficient("i") == 1 and not (query - Affine.var("i")).variables:
            return query - Affine.var("i"), a.divisor
    return None


def reads_pairs(clause: Clause) -> bool:
    """Whether the clause reads data at a position that varies with both i and j."""
    found = [read for literal in clause for read in literal_reads(literal)]
    return any(
        isinstance(read, Call) or {"i", "j"} <= frozenset().union(*(e.variables for e in read.index), frozenset())
        for read in found
    )


def sort_clauses(predicate: Conjunction, ranges: Ranges) -> Parts:
    parts = Parts()
    for clause in sorted(predicate.clauses, key=lambda c: sorted(map(str, c))):
        literal = next(iter(clause)) if len(clause) == 1 else None
        if reads_pairs(clause):
            parts.data.append(clause)
        elif literal is None:
            parts.terms.append(clause)
        elif isinstance(literal, AtLeastZero) and (found := distance(literal.expression)) is not None:
            (parts.offsets if found[0] > 0 else parts.reaches).append(found[1])
        elif isinstance(literal, EqualZero) and not literal.negated and (found := distance(literal.expression)):
            parts.offsets.append(found[1] * found[0])
            parts.reaches.append(found[1] * -found[0])
        elif (grouped := chunk(literal)) is not None:
            parts.chunks.append((*grouped, clause))
        elif (padding := key_padding(literal, ranges)) is not None:
            parts.padding.append(padding)
        else:
            parts.terms.append(clause)
    return parts


def key_padding(literal: Literal, ranges: Ranges) -> tuple[Load, Node] | None:
    """The load behind a condition on the key alone, and a boolean node that holds it, of shape (B, Sk) or (Sk)."""
    if not is_simple(literal) or literal_variables(literal) not in ({"b", "j"}, {"j"}):
        return None
    reads = list(literal_reads(literal))
    if len(reads) != 1 or not isinstance(reads[0], Read):
        return None
    node = boolean_node(literal, ranges)
    if node is None:
        return None
    return Load(reads[0].node.name, ("b", "j") if "b" in literal_variables(literal) else ("j",)), node


def tightest(bounds: list[Affine]) -> tuple[Affine | None, list[Affine]]:
    """The smallest of bounds that differ by known numbers, and the bounds that cannot be compared with it."""
    if not bounds:
        return None, []
    best, others = bounds[0], []
    for bound in bounds[1:]:
        apart = bound - best
        known = as_int(apart.constant) if apart.is_constant else None
        if known is None:
            others.append(bound)
        elif known < 0:
            best = bound
    return best, others


def text_or_int(value: Affine) -> int | str:
    number = as_int(value.constant) if value.is_constant else None
    return expression_text(value) if number is None else number


def record(parts: Parts, fill: str, ranges: Ranges) -> tuple[Mask, dict[str, Node]]:
    """The Mask of everything but `parts.data`, and the nodes behind its loads."""
    distance_of_pair = Affine.of({"i": 1, "j": -1})
    offset, loose = tightest(parts.offsets)
    reach, far = tightest(parts.reaches)
    extra = [at_least_zero(distance_of_pair + o) for o in loose] + [at_least_zero(r - distance_of_pair) for r in far]
    shift: Affine = offset if offset is not None else Affine()
    window, symmetric = None, False
    if reach is not None:
        width = reach + shift + 1
        number = as_int(width.constant) if width.is_constant else None
        if number is None or number < 1:
            extra.append(at_least_zero(reach - distance_of_pair))
        else:
            window = number
    lengths = Affine((), ranges.sizes["j"]) - Affine((), ranges.sizes["i"])
    if window is not None and offset is not None and offset == reach and offset not in (Affine(), lengths):
        # As far ahead as behind.
        window, symmetric, shift, offset = window - as_int(shift.constant), True, Affine(), None  # type: ignore[operator]
    size = 0
    for moved, divisor, clause in parts.chunks:
        if size == 0 and (moved == shift or (offset is None and window is None)):
            size, shift = divisor, moved
        else:
            parts.terms.append(clause)
    terms = [*parts.terms, *(clause for predicate in extra for clause in predicate.clauses)]
    read = [r for clause in terms for x in clause for r in literal_reads(x)]
    read += [a for a, _ in shift.terms if isinstance(a, Read)]
    reads = {load_of(r): r.node for r in read}
    nodes = {load.name: node for load, node in reads.items()}
    loads = []
    for load, node in sorted(parts.padding, key=lambda pair: str(pair[0])):
        load = Load(name_for(load.name, node, nodes), load.dims)
        nodes[load.name] = node
        loads.append(load)
    mask = Mask(
        offset is not None, window, symmetric, text_or_int(shift), tuple(loads), fill, size,
        tuple(sorted(map(clause_text, terms))), tuple(sorted(reads, key=str)),
    )  # fmt: skip
    return mask, nodes


def name_for(name: str, node: Node, taken: dict[str, Node]) -> str:
    """The name of the data, numbered where that name already stands for another node."""
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    return next(x for x in names if taken.get(x, node) is node)


def load_of(read: Read | BoolLoad | Call) -> Load:
    if isinstance(read, Call):
        return Load(read.node.name, tuple(expression_text(e) for e in visible(Read(read.node, read.index))))
    return Load(read.node.name, tuple(expression_text(e) for e in visible(read)))
