"""From a proved predicate to a Mask record: bounds on i - j, opaque loads, or a reason why not."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from attnopt.ir import Load, Mask, Miss
from attnopt.masks.algebra import BoolLoad, Conjunction, as_constant, fold_ranges


def classify(predicate: Conjunction, extents: dict[str, Any], fill: str) -> tuple[Mask, dict[str, Node]] | Miss:
    """The Mask of a keep-predicate over b, h, i, j with extents {b: B, h: H, i: Sq, j: Sk}, and the nodes it loads.

    Anything that is not a causal bound, a window bound or a key padding load is a Miss with the term named.
    """
    predicate = fold_ranges(predicate, extents)
    if predicate.false:
        return Miss("the mask keeps no key at all")
    offsets: list[Any] = []
    reaches: list[Any] = []
    loads: dict[str, Node] = {}
    records: list[Load] = []
    for atom in sorted(predicate.atoms, key=str):
        if isinstance(atom, BoolLoad):
            if atom.negated or not is_key_padding(atom, extents):
                return Miss(f"the mask reads data that is not key padding: {atom}")
            loads[atom.node.name] = atom.node
            records.append(Load(atom.node.name, ("b", "j") if "b" in atom.variables else ("j",)))
            continue
        expression = atom.expression
        shape = (expression.coefficient("i"), expression.coefficient("j"))
        if expression.variables != {"i", "j"} or shape not in ((1, -1), (-1, 1)):
            return Miss(f"a mask term is not yet understood: {atom}")
        (offsets if shape == (1, -1) else reaches).append(expression.constant)
    return bounds(offsets, reaches, tuple(records), loads, fill)


def is_key_padding(atom: BoolLoad, extents: dict[str, Any]) -> bool:
    """True for a load at [b, j] or [j], with or without dimensions of size one between."""
    used = [a for a in atom.index if a.terms]
    if any(as_constant(a.constant) != 0 for a in atom.index):
        return False
    return [a.terms for a in used] in ([(("b", 1),), (("j", 1),)], [(("j", 1),)])


def bounds(
    offsets: list[Any], reaches: list[Any], records: tuple[Load, ...], loads: dict[str, Node], fill: str
) -> tuple[Mask, dict[str, Node]] | Miss:
    """i - j >= -offset (causal) and i - j <= reach (window); the tightest of each."""
    if not all(isinstance(x, int) for x in offsets + reaches):
        return Miss("a mask bound depends on a symbolic length")
    offset = min(offsets) if offsets else None
    reach = min(reaches) if reaches else None
    if offset is None and reach is None:
        return Mask(loads=records, fill=fill), loads
    if reach is None:
        assert offset is not None
        return Mask(causal=True, offset=offset, loads=records, fill=fill), loads
    if offset is not None and offset == 0 and reach >= 0:
        return Mask(causal=True, window=reach + 1, loads=records, fill=fill), loads
    if offset is not None and offset == reach:
        return Mask(window=reach + 1, symmetric=True, loads=records, fill=fill), loads
    return Miss(f"a band of keys from i - {reach} to i + {offset} has no lowering yet")
