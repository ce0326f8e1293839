"""Interpret each match's mask and turn matches into regions; nothing in the graph changes.

    expand(and(le(j, i), pad[:, None, None, :]))   ->   Mask(causal, loads=pad[b, j])

A mask that cannot be proved makes a Miss: the site is then left as it was.
"""

from __future__ import annotations

from collections import Counter

import torch

from attnopt.ir import Mask, Miss, Region, Site
from attnopt.masks.algebra import TRUE, Affine, Conjunction, at_least_zero
from attnopt.masks.classify import classify
from attnopt.masks.interpret import Interpreter, Select, additive
from attnopt.passes.match_attention import module_path, source_line
from attnopt.passes.program import Program
from attnopt.patterns import MaskTerm, Match, same, value

INDEX = tuple(Affine.var(v) for v in ("b", "h", "i", "j"))


def predicate_of(interpreter: Interpreter, term: MaskTerm) -> tuple[Conjunction, float] | Miss:
    """The keep-predicate of one mask operand, and what a masked score becomes."""
    found = interpreter.operand(term.node, INDEX)
    if term.kind == "add":
        mask = additive(found) if isinstance(found, Select) else None
        if mask is not None:
            return mask.predicate, float("-inf") if mask.predicate == TRUE else mask.off
        return Miss("what is added to the scores is not a mask that can be proved")
    if not isinstance(found, Conjunction):
        return Miss("the mask cannot be proved from the graph")
    keep = found if term.kind == "keep" else found.inverted()
    if keep is None:
        return Miss("the mask drops a combination of conditions, which has no closed form yet")
    return keep, float("-inf") if term.fill is None else term.fill


def recover(interpreter: Interpreter, match: Match) -> tuple[Mask, dict[str, torch.fx.Node]] | Miss:
    q, k = value(match.q), value(match.k)
    assert q is not None and k is not None
    keep, fill = TRUE, float("-inf")
    if match.causal:
        keep = at_least_zero(Affine.var("i") - Affine.var("j"))
    for term in match.terms:
        found = predicate_of(interpreter, term)
        if isinstance(found, Miss):
            return found
        keep, fill = keep & found[0], max(fill, found[1])
    key_length = k.shape[-1] if match.k_transposed else k.shape[-2]
    extents = {"b": q.shape[0], "h": q.shape[1], "i": q.shape[2], "j": key_length}
    return classify(keep, extents, "-inf" if fill == float("-inf") else "finite")


def site_of(match: Match, mask: Mask, ordinal: int) -> Site | Miss:
    q, k, v = (value(t) for t in (match.q, match.k, match.v))
    assert q is not None and k is not None and v is not None
    heads, kv_heads, head_dim, head_dim_v = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    if not all(isinstance(x, int) for x in (heads, kv_heads, head_dim, head_dim_v)):
        return Miss("head counts or dimensions are symbolic")
    if v.shape[1] != kv_heads or heads % kv_heads:
        return Miss(f"{heads} query heads over {kv_heads} key heads and {v.shape[1]} value heads")
    if not same(q.shape[0], k.shape[0]) or not same(q.shape[0], v.shape[0]):
        return Miss("q, k and v have different batch sizes")
    path, dtype = module_path(match.anchor), str(q.dtype).removeprefix("torch.")
    return Site(
        path or "attention", ordinal, match.pattern, heads, kv_heads, head_dim, head_dim_v,
        match.scale, dtype, mask, source_line(match.anchor),
    )  # fmt: skip


def switches_gradients(match: Match, order: dict[torch.fx.Node, int]) -> bool:
    """Whether gradients are switched on or off between the operands and the output: then the parts differ in it."""
    first, last = max(order[match.q], order[match.k]), order[match.out]
    return any(first < n < last and "_set_grad_enabled" in str(node.target) for node, n in order.items())


def run(program: Program) -> None:
    interpreter = Interpreter()
    seen: Counter[str] = Counter()
    order = {node: n for n, node in enumerate(program.gm.graph.nodes)}
    switching = any("_set_grad_enabled" in str(node.target) for node in order)
    for match in program.matches:
        path = module_path(match.anchor) or "attention"
        ordinal = seen[path]
        seen[path] += 1
        recovered = recover(interpreter, match)
        if switching and switches_gradients(match, order):
            recovered = Miss("gradients are switched on or off inside the attention")
        site = recovered if isinstance(recovered, Miss) else site_of(match, recovered[0], ordinal)
        if isinstance(recovered, Miss) or isinstance(site, Miss):
            no = recovered if isinstance(recovered, Miss) else site
            program.misses.append(Miss(no.reason, path, source_line(match.anchor)))  # type: ignore[union-attr]
            continue
        k = match.k
        if match.k_transposed:
            # Defined, not guessed: k is the transpose of what q was multiplied with.
            from attnopt.passes.program import Builder

            with program.gm.graph.inserting_after(k):
                k = Builder(program.gm, k).call(torch.ops.aten.transpose.int, k, 2, 3)
        mask_node = match.terms[0].node if match.terms else None
        program.regions.append(Region(site, match.q, k, match.v, match.out, match.anchor, mask_node, recovered[1]))
