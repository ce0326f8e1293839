"""Name where each region's keys and values come from; nothing in the graph changes.

    linear(x) beside q's linear(x)           fresh     cat([past, new], keys)             cat
    index_copy(buffer, keys, position, new)  write     cat([buffer[1:], new]), roll       ring
    the tensors of an earlier site           shared    linear(another sequence), inputs   cross

"unknown" is what could not be told. The keys' axis decides (passes/lineage.py): joining features is no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from attnopt.ir import Region
from attnopt.passes.lineage import MADE, Walk, start
from attnopt.passes.program import Program
from attnopt.passes.writes import Place, Write
from attnopt.patterns import value
from attnopt.patterns.layout import Space

aten = torch.ops.aten
# Steps back from q and from k within which both mostly meet; all of the graph is the second try.
NEAR, FAR = 80, 4000
MODULAR = (aten.remainder.Scalar, aten.remainder.Tensor)


@dataclass(frozen=True)
class Source:
    """A kind, and the nodes behind it: "writer", "old" (what was there), "new" and "position", where they are known."""

    kind: str
    nodes: dict[str, Node] = field(default_factory=dict)


def run(program: Program) -> None:
    earlier: dict[tuple[Node, Node], Region] = {}
    for region in program.regions:
        tensors = base(region.k), base(region.v)
        first = earlier.setdefault(tensors, region)
        if first is not region:
            kind, nodes = "shared", {"k_writer": tensors[0], "v_writer": tensors[1], "site": first.anchor}
        else:
            kind, nodes = both(source_of(region, region.k), source_of(region, region.v))
        region.site = replace(region.site, kv=kind)
        region.kv_nodes = nodes


def both(k: Source, v: Source) -> tuple[str, dict[str, Node]]:
    """What K and V have in common."""
    if k.kind != v.kind:
        return "unknown", {}
    nodes = {f"{name}_{what}": node for name, side in (("k", k), ("v", v)) for what, node in side.nodes.items()}
    if "k_position" in nodes and nodes["k_position"] is nodes.get("v_position"):
        nodes["position"] = nodes["k_position"]
    return k.kind, nodes


def base(node: Node) -> Node:
    """The tensor behind views, casts and repeats."""
    space = Space()
    dims = space.dims_of(node)
    while (step := space.back(node, dims, casts=True)) is not None:
        node, dims = step
    return node


def source_of(region: Region, node: Node) -> Source:
    found = Source("unknown")
    for limit in (NEAR, FAR):
        space = Space()
        asked = Walk(space, limit)
        if follow(asked, start(space, region.q, 2)):
            return found
        walk = Walk(space, limit, stop=asked.seen)
        written = follow(walk, start(space, node, 2))
        found = judged(walk, asked, written)
        if found.kind != "unknown" or len(asked.seen) <= limit >= len(walk.seen):
            break
    return found


def follow(walk: Walk, *places: Place) -> list[Source]:
    """Walk back; a write into a buffer ends the way, any other joining of positions does not."""
    walk.run(*places)
    found: list[Source] = []
    while walk.writes:
        write = walk.writes.pop(0)
        source = cache_of(write)
        if source is None and write.kind == "write":
            walk.lost.append(write.parts[0])
        elif source is None:
            walk.run(*write.parts)
        else:
            found.append(source)
    return found


def cache_of(write: Write) -> Source | None:
    """The cache that a write goes into; None where it is none that is known."""
    space = Space()
    old = Walk(space, NEAR)
    inner = follow(old, begin(space, write.parts[0]))
    if old.met or old.lost or any(p.projected for p in old.ends):
        return None
    buffers = {p.node for p in old.ends}
    if inner and {s.kind for s in inner} <= {"write", "ring"} and buffers <= {s.nodes["old"] for s in inner}:
        # Written before already, or moved along.
        kind = "ring" if any(s.kind == "ring" for s in inner) else "write"
        buffers = {s.nodes["old"] for s in inner}
    else:
        kind = write.kind
    if len(buffers) != 1:
        return None
    (buffer,) = buffers
    made = buffer.target in MADE and buffer.op == "call_function"
    if not made and not floating_input(buffer):
        return None
    if write.kind == "cat" and (made or isinstance(value(buffer), torch.nn.Parameter)):
        return None
    if write.kind == "roll" or any(p.cut == "tail" for p in old.ends) or modular(write.position):
        kind = "ring"
    nodes = {"writer": write.node, "old": buffer}
    if len(write.parts) == 2:
        nodes["new"] = write.parts[1].node
    if write.position is not None:
        nodes["position"] = write.position
    return Source(kind, nodes)


def begin(space: Space, place: Place) -> Place:
    """The place in terms of a space of its own."""
    axis = place.dims.index(place.axis)
    return start(space, place.node, axis)


def floating_input(node: Node) -> bool:
    held = value(node)
    return node.op == "placeholder" and held is not None and held.dtype.is_floating_point


def modular(position: Node | None) -> bool:
    """Whether the position wraps around."""
    stack, seen = [position] if position is not None else [], set()
    while stack:
        node = stack.pop()
        if node.target in MODULAR:
            return True
        seen.add(node)
        stack += [n for n in node.all_input_nodes if n not in seen]
    return False


def judged(walk: Walk, asked: Walk, written: list[Source]) -> Source:
    data = [p for p in walk.ends if not position(p)]
    if walk.lost:
        return Source("unknown")
    if written:
        (first, *rest) = written
        same = all(s.kind == first.kind and s.nodes["old"] is first.nodes["old"] for s in rest)
        others = {p.node for p in data} - {first.nodes["old"]}
        return first if same and not others and not walk.met else Source("unknown")
    if walk.met:
        return Source("fresh") if not data else Source("unknown")
    if not data or asked.lost or any(p.node in asked.seen for p in data):
        return Source("unknown")
    whole = [p for p in data if not p.projected]
    if whole and (len({p.node for p in walk.ends}) > 1 or not floating_input(whole[0].node)):
        return Source("unknown")
    return Source("cross", {"old": data[0].node} if len({p.node for p in data}) == 1 else {})


def position(place: Place) -> bool:
    """Whether a way back ends in positions rather than data: an arange, or integers that nothing is looked up by."""
    held = value(place.node)
    if place.node.op == "call_function":
        return place.node.target in MADE
    return held is not None and not held.dtype.is_floating_point and not place.projected
