"""From a sum added to the scores to a Bias record: slopes times distances, looked-up tables, other data.

What does not vary with the key moves every score of a row alike and leaves the soft-max as it was: it is dropped, and
so two spellings of the same bias are one record.
"""

from __future__ import annotations

import sympy
from torch.fx import Node

from attnopt.ir import Bias, Load
from attnopt.masks.classify import load_of
from attnopt.masks.expressions import Affine, Call, Read, atom_variables
from attnopt.masks.printing import MaskPrinter, sum_text, sympy_sum
from attnopt.masks.values import Sum, monomial_reads, monomial_variables


def bias_of(total: Sum) -> tuple[Bias | None, dict[str, Node]]:
    """The bias and the nodes behind its loads; None where nothing is left."""
    varying = Sum.of({m: c for m, c in total.terms if "j" in monomial_variables(m)})
    if not varying.terms:
        return None, {}
    reads = [r for m, _ in varying.terms for r in monomial_reads(m)]
    loads: dict[Load, Node] = {load_of(r): r.node for r in reads}
    kinds = {kind_of(m) for m, _ in varying.terms}
    kind = kinds.pop() if len(kinds) == 1 else "data"
    text = alibi_text(varying) if kind == "alibi" else sum_text(varying)
    return Bias(kind, text, tuple(sorted(loads, key=str))), {load.name: node for load, node in loads.items()}


def kind_of(monomial: tuple) -> str:
    """ "alibi": at most one read, of the head alone, times a distance; "table": one read at a computed index."""
    reads = [a for a in monomial if isinstance(a, Read)]
    distances = [a for a in monomial if not isinstance(a, Read)]
    if len(distances) == 1 and "j" in atom_variables(distances[0]) and not isinstance(distances[0], Call):
        return "alibi" if all(atom_variables(r) <= {"h"} for r in reads) else "data"
    if len(reads) == 1 and not distances and any(computed(e) for e in reads[0].index):
        return "table"
    return "data"


def computed(position: Affine) -> bool:
    """Whether an index is more than a variable: a function, a look-up or a difference."""
    return bool(position.terms) and not (len(position.terms) == 1 and isinstance(position.terms[0][0], str))


def alibi_text(value: Sum) -> str:
    """Slopes times ``j - i``: the part with i is the same for a whole row, so it may be written or left out."""
    whole = dict(value.terms)
    for monomial, c in value.terms:
        if "j" in monomial:
            row = tuple(sorted(("i" if a == "j" else a for a in monomial), key=str))
            whole[row] = whole.get(row, 0.0) - c
    return str(MaskPrinter().doprint(sympy.factor_terms(sympy_sum(Sum.of(whole)))))
