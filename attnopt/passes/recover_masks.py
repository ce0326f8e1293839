"""Interpret each match's mask and bias, and turn matches into regions; only views are inserted.

    expand(and(le(j, i), pad[:, None, None, :]))   ->   Mask(causal, loads=pad[b, j])

What cannot be proved about a mask stays in the record as data, so the site is known and exact, and nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from attnopt.ir import Miss, Region, Site
from attnopt.masks.expressions import Affine
from attnopt.masks.interpret import Interpreter
from attnopt.masks.predicates import TRUE, Conjunction, TooManyClauses, fold_ranges
from attnopt.masks.recover import recover
from attnopt.masks.terms import Meaning, Term
from attnopt.masks.values import Select, literal_value, monomial_variables
from attnopt.passes.arrange import operand_nodes
from attnopt.passes.program import Builder, Program
from attnopt.patterns import Match, RawTerm, alike, checked, value
from attnopt.patterns.layout import Atom
from attnopt.reasons import described, located, module_path, source_line


def variables(match: Match) -> tuple[dict[tuple[Atom, ...], str], dict[Atom, str], dict[str, Any]]:
    """Names of whole roles, names of single atoms, and the extent of every name."""
    roles = {"b": match.roles.batch, "h": match.roles.heads, "i": match.roles.queries, "j": match.roles.keys}
    whole = {atoms: name for name, atoms in roles.items() if atoms}
    single: dict[Atom, str] = {}
    extents: dict[str, Any] = {}
    for name, atoms in roles.items():
        extents[name] = 1
        for n, atom in enumerate(atoms):
            extents[name] = extents[name] * atom.size
            single[atom] = name if len(atoms) == 1 else f"{name}{n}"
            extents.setdefault(single[atom], atom.size)
    return whole, single, extents


def term_of(term: RawTerm, match: Match) -> Term:
    """The term, read at an index over b, h, i, j."""
    whole, single, _ = variables(match)

    def index(atoms: tuple[Atom, ...]) -> Affine:
        if atoms in whole:
            return Affine.var(whole[atoms])
        at = Affine()
        rest = list(atoms)
        while rest:
            # The longest run that is a role of its own, else one atom.
            run = next((r for r in whole if tuple(rest[: len(r)]) == r), (rest[0],))
            name = whole.get(run, single.get(rest[0], rest[0].name))
            size: Any = 1
            for atom in run:
                size = size * atom.size
            if not isinstance(size, int) and at != Affine():
                # No affine index says this: a position of its own, of which nothing is known.
                return Affine.var(".".join(atom.name for atom in atoms))
            at = (at * size if isinstance(size, int) else at) + Affine.var(name)
            rest = rest[len(run) :]
        return at

    assert term.kind != "times" and term.kind != "zeroes"
    return Term(term.kind, term.node, tuple(index(d) for d in term.scores), term.fill, term.factor)


def sink_of(match: Match) -> str:
    """What the column of the sink holds: "0", a logit for each head, or one for each row of the scores."""
    if match.sink is None:
        return ""
    node = match.sink.node
    while node.target in (torch.ops.aten.expand.default, torch.ops.aten.reshape.default, torch.ops.aten.view.default):
        node = node.args[0]
    if node.target in (
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.zeros.default,
        torch.ops.aten.new_zeros.default,
    ):
        return "0"
    held = value(node)
    heads = 1
    for atom in match.roles.heads:
        heads = heads * atom.size
    if held is not None and held.numel() == heads:
        return "logit[h]"
    return "logit[b, h, i]"


def site_of(match: Match, meaning: Meaning, ordinal: int, q: Node, k: Node, v: Node) -> Site | Miss:
    shapes = [value(t).shape for t in (q, k, v)]  # type: ignore[union-attr]
    heads, kv_heads, head_dim, head_dim_v = shapes[0][1], shapes[1][1], shapes[0][3], shapes[2][3]
    sizes = (heads, kv_heads, head_dim, head_dim_v)
    if not match.roles.group and not isinstance(heads, int):
        heads = kv_heads = 0
    if not all(isinstance(x, int) for x in (heads, kv_heads, head_dim, head_dim_v)):
        return Miss(f"head counts and dimensions are {sizes}, expected numbers", code="symbolic-heads")
    sink = sink_of(match)
    dtype = str(value(q).dtype).removeprefix("torch.")  # type: ignore[union-attr]
    return Site(
        module_path(match.anchor) or "attention", ordinal, match.pattern, heads, kv_heads, head_dim, head_dim_v,
        match.scale, dtype, meaning.mask, source_line(match.anchor), match.softcap, meaning.bias, sink,
    )  # fmt: skip


def switches_gradients(match: Match, order: dict[Node, int]) -> bool:
    """Whether gradients are switched on or off between the operands and the output: then the parts differ in it."""
    first, last = max(order[match.q.node], order[match.k.node]), order[match.out.node]
    return any(first < n < last and "_set_grad_enabled" in str(node.target) for node, n in order.items())


def where_one(interpreter: Interpreter, term: Term) -> Conjunction | None:
    """Where a mask of zeros and ones is one."""
    found = interpreter.operand(term.node, term.index)
    if isinstance(found, Select):
        match literal_value(found.on), literal_value(found.off):
            case (1.0, 1.0):
                return TRUE
            case (1.0, 0.0):
                return found.predicate
            case (0.0, 1.0):
                return found.predicate.inverted()
        return None
    return found if isinstance(found, Conjunction) else None


def moved_rows(meaning: Meaning) -> bool:
    """Whether something is added to all keys of a row alike: the record leaves that out, but a sink does not get it."""
    slopes = meaning.bias is not None and meaning.bias.kind == "alibi"
    return slopes or any("j" not in monomial_variables(m) for m, _ in meaning.added.terms)


def agrees(interpreter: Interpreter, term: RawTerm, match: Match, keep: Conjunction) -> bool:
    """Whether a term that is no mask leaves every key alone that the mask keeps."""
    masks = {"zeroes": "drop", "times": "keep"}
    for other in match.terms:
        if other.kind == masks[term.kind] and other.scores == term.scores and alike(other.node, term.node):
            return True
    try:
        one = where_one(interpreter, term_of(replace(term, kind="keep"), match))
        if one is None:
            return False
        both = keep & (one.inverted() if term.kind == "zeroes" else one)
    except TooManyClauses:
        return False
    return fold_ranges(both, interpreter.ranges) == fold_ranges(keep, interpreter.ranges)


def understand(program: Program, interpreter: Interpreter, match: Match, ordinal: int) -> Region | Miss:
    terms = [term_of(t, match) for t in match.terms if not checked(t)]
    extents = variables(match)[2]
    meaning = recover(terms, extents, causal=match.causal, interpreter=interpreter)
    if match.sink is not None and moved_rows(meaning):
        return Miss("what is added to the scores moves them against the sink", code="added-beside-sink")
    for term in match.terms:
        if checked(term) and not agrees(interpreter, term, match, meaning.keep):
            seen = f"multiplied by {described(term.node)}, which may be zero where a key is kept"
            if term.kind == "times":
                return located(Miss(f"the scores are {seen}", code="score-times-tensor"), term.node)
            return located(Miss(f"the weights are {seen}", code="weight-operation"), term.node)
    graph = program.gm.graph
    existing = set(graph.nodes)
    # After all three operands: views of an operand may read the size of another.
    q, k, v = operand_nodes(Builder(program.gm, match.out.node), match)
    site = site_of(match, meaning, ordinal, q, k, v)
    if isinstance(site, Miss):
        for node in reversed([n for n in graph.nodes if n not in existing]):
            graph.erase_node(node)
        return site
    return Region(site, q, k, v, match.out.node, match.anchor, dict(meaning.nodes), match, meaning)


def run(program: Program) -> None:
    held = program.gm.meta.get("attnopt_constants", {})
    constants = {n: held[n.name] for n in program.gm.graph.nodes if n.op == "placeholder" and n.name in held}
    interpreter = Interpreter(constants)
    seen: Counter[str] = Counter()
    order = {node: n for n, node in enumerate(program.gm.graph.nodes)}
    switching = any("_set_grad_enabled" in str(node.target) for node in order)
    for match in program.matches:
        path = module_path(match.anchor) or "attention"
        ordinal = seen[path]
        seen[path] += 1
        found: Region | Miss
        if switching and switches_gradients(match, order):
            found = Miss(
                "gradients are switched on or off inside the attention, expected outside", code="gradient-switch"
            )
        else:
            try:
                with program.gm.graph.inserting_before(match.out.node):
                    found = understand(program, interpreter, match, ordinal)
            except ValueError as error:
                found = Miss(f"its mask was not interpreted: {error}", code="mask-not-interpreted")
        if isinstance(found, Miss):
            program.misses.append(located(replace(found, path=path), match.anchor))
        else:
            program.regions.append(found)
    program.relied_on |= interpreter.relied_on
