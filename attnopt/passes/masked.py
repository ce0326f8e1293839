"""Insert ``attnopt::masked_attention`` for a region: mask, bias, soft-cap and sink as a form, its data as arguments.

causal, doc[b, i] == doc[b, j]  ->  masked_attention(q, k, v, [doc], [], None, "{... t0[b, i] == t0[b, j] ...}", scale)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnopt import ops, settings  # noqa: F401  (registers the operator)
from attnopt.codegen.spec import MaskedPrefill
from attnopt.errors import AttnoptError, first_line
from attnopt.ir import Region
from attnopt.masks.kernel_form import Bound, NoForm, form_of, positions_of, size_terms
from attnopt.masks.live_range import documents, flags
from attnopt.passes.arrange import Sizes, rearrange
from attnopt.passes.program import Builder, Program
from attnopt.registry import TARGETS

aten = torch.ops.aten
VIEWS = (aten.expand.default, aten.reshape.default, aten.view.default)
SINKS = {"": "", "0": "0", "logit[h]": "h", "logit[b, h, i]": "bhi"}


def sink_kind(region: Region) -> str:
    """How the form holds the sink: by head where the heads of its column stand in the order of q's."""
    kind = SINKS[region.site.sink]
    if kind != "h":
        return kind
    heads = region.match.roles.heads
    seen = [a for dim in region.match.sink.dims for a in dim if a in heads]
    return "h" if tuple(seen) == heads else "bhi"


def bound_form(region: Region) -> Bound:
    """The region's form, and the nodes and sizes that it reads. NoForm where a kernel cannot have them."""
    roles = region.match.roles
    parts = {}
    for name, atoms in zip("bhij", (roles.batch, roles.heads, roles.queries, roles.keys), strict=True):
        parts[name] = [(name if len(atoms) == 1 else f"{name}{n}", atom.size) for n, atom in enumerate(atoms)]
    meaning = region.meaning
    return form_of(meaning.keep, meaning.added, positions_of(parts), region.site.softcap, sink_kind(region))


def unserved(program: Program, region: Region) -> str:
    """Why no kernel can be printed for the region here; empty where one can.

    On a CPU one can only where ATTNOPT_TARGET names a target that has the family: its own target has not.
    """
    site, target = region.site, settings.target(program.device)
    if program.device not in ("cpu", "cuda") or f"{target} {MaskedPrefill.kernel}" not in TARGETS:
        return f"the {target} target prints no masks into kernels"
    if program.needs_grad:
        return "gradients are needed, and a kernel with a printed mask has none"
    if not site.heads:
        return "the number of heads is known at run time only"
    try:
        form = bound_form(region).form
        sizes = (site.heads, site.kv_heads, site.head_dim, site.head_dim_v)
        TARGETS[f"{target} {MaskedPrefill.kernel}"].emit(MaskedPrefill(target, site.dtype, *sizes, form.text))
    except (NoForm, ValueError, AttnoptError) as error:
        return f"no kernel is printed, {first_line(error)}"
    return ""


def insert_masked(program: Program) -> Callable[[Region], Node]:
    """A builder of the operator's call for one region that is not `unserved`."""

    def build(region: Region) -> Node:
        builder, found = Builder(program.gm, region.out), bound_form(region)
        device = region.q.meta["val"].device
        tensors = [n if n.meta["val"].device == device else moved(builder, n, device) for n in found.nodes]
        calls = [(torch.ops.attnopt.equal_runs.default, read.node) for read in documents(found.form)]
        calls += [(torch.ops.attnopt.kept_runs.default, load.node) for load in flags(found.form)]
        tensors += [runs_node(builder, target, tensors[slot.number]) for target, slot in calls]
        sizes = [size_node(builder, region, size) for size in found.sizes]
        return builder.call(
            torch.ops.attnopt.masked_attention.default,
            region.q, region.k, region.v, tensors, sizes, sink_node(builder, region, found.form.sink),
            found.form.text, region.site.scale,
        )  # fmt: skip

    return build


def moved(builder: Builder, node: Node, device: torch.device) -> Node:
    return builder.call(aten._to_copy.default, node, device=device)


def runs_node(builder: Builder, target: Any, read: Node) -> Node:
    """Where documents or kept keys lie, computed once for all sites that read the same tensor."""
    for node in builder.gm.graph.nodes:
        if node is builder.like:
            break
        if node.target is target and node.args == (read,):
            return node
    return builder.call(target, read)


def sink_node(builder: Builder, region: Region, kind: str) -> Node | None:
    """The sink's logits, (H,) or (B, H, Sq)."""
    if kind in ("", "0"):
        return None
    match = region.match
    if kind == "bhi":
        r = match.roles
        dims = (r.batch, r.heads, r.queries, ())
        column = rearrange(builder.call, match.sink.node, match.sink.dims, dims, Sizes(builder, match))
        return builder.call(aten.squeeze.dim, column, 3)
    node = match.sink.node
    while node.target in VIEWS:
        node = node.args[0]
    return builder.call(aten.reshape.default, node, [region.site.heads])


def size_node(builder: Builder, region: Region, size: Any) -> Node:
    """A node that computes an expression in symbolic sizes."""
    total: Any = None
    for c, factors in size_terms(size):
        product: Any = c
        for factor in factors:
            node = symbol_node(builder, region, factor)
            product = node if product == 1 else builder.call(operator.mul, node, product)
        total = product if total is None else builder.call(operator.add, product, total)
    return total


def symbol_node(builder: Builder, region: Region, symbol: Any) -> Node:
    """A node in front of the region's output whose value, or one of whose sizes, is the symbol."""
    for node in builder.gm.graph.nodes:
        if node is region.out:
            break
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and held.node.expr == symbol:
            return node
        for d, size in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return builder.size(node, d)
    raise NoForm(f"nothing in the graph has the size {symbol}")
