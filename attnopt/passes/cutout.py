"""One site's nodes as plain records, cut out of the graph: what reports draw of it before and after a rewrite.

(x, ..., q, k, v, arange, le, where, matmul, softmax, matmul)   ->   (Op("q", "input"), ..., Op("matmul_1", ...))
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

import torch
from torch.fx import Node

from attnopt.ir import REST, Op, Region
from attnopt.passes.graph_text import called

MOST = 80  # Ops of a record; a picture of more cannot be read


def operands(region: Region) -> dict[Node, str]:
    """The nodes that a site starts from, by what they are called: q, k, v, and what its mask reads by its own name."""
    found = {node: name_of(node) for node in region.loads.values() if isinstance(node, Node)}
    found |= dict(zip((region.q, region.k, region.v), "qkv", strict=True))
    match = region.match
    return found if match is None else found | {match.q.node: "q", match.k.node: "k", match.v.node: "v"}


def reached(out: Node, inputs: Collection[Node], outside: Collection[Node] = ()) -> dict[Node, bool]:
    """The nodes that lead to `out`, the nearest first, each with whether it is where the site starts: at `inputs`, at
    the graph's own inputs and at what lies `outside`."""
    found = {out: False}
    queue = [out]
    for node in queue:
        if not found[node]:
            new = [n for n in node.all_input_nodes if n not in found]
            found |= {n: n in inputs or n in outside or n.op in ("placeholder", "get_attr") for n in new}
            queue += new
    return found


def cutout(found: Mapping[Node, bool], inputs: Mapping[Node, str]) -> tuple[Op, ...]:
    """What was `reached`, in the graph's order: at most MOST, the nearest to the output; the last counts the rest."""
    near = set(list(found)[:MOST])
    names = {node: inputs.get(node) or name_of(node) for node in near}
    ops = []
    for node in sorted(near):
        read = () if found[node] else tuple(names[n] for n in node.all_input_nodes if n in near)
        kind = "input" if found[node] else called(node.target)
        # Interned, as reports are kept and layers are alike.
        ops.append(Op(names[node], sys.intern(kind), read, sys.intern(shape_text(node))))
    more = len(found) - len(near)
    return tuple(ops) + ((Op(REST, f"and {more} more"),) if more else ())


def name_of(node: Node) -> str:
    """The node's own name, which is no operand's."""
    return f"{node.name}_" if node.name in ("q", "k", "v") else str(node.name)


def shape_text(node: Node) -> str:
    held = node.meta.get("val")
    if not isinstance(held, torch.Tensor):
        return ""
    sizes = ", ".join(map(str, held.shape)) or "scalar"
    return sizes if held.dtype.is_floating_point else f"{sizes} {str(held.dtype).removeprefix('torch.')}"
