"""Where the axis of a tensor lies at a node, and the operations that write new positions along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnopt.patterns import argument
from attnopt.patterns.layout import CASTS, Atom, Dims, Space, is_one, shape_of

aten = torch.ops.aten
Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Place:
    """A node on the way back, what each of its dimensions is, and the axis that is followed.

    projected: a product with something that lacks the axis was passed; cut: so was a slice of the axis, which starts
    at the beginning or not.
    """

    node: Node
    dims: Dims
    axis: Axis
    projected: bool = False
    cut: str = ""

    @property
    def pattern(self) -> tuple[tuple[int, ...], ...]:
        """Where in the node's dimensions the axis lies."""
        return tuple(tuple(self.axis.index(a) if a in self.axis else -1 for a in d) for d in self.dims)


@dataclass(frozen=True)
class Write:
    """New positions joined with or written into old ones along the axis.

    kind: "cat", "write" or "roll"; old: the part that was there (None where there is none), new: the part that is
    added; position: the index written at, if it is a node.
    """

    kind: str
    node: Node
    parts: tuple[Place, ...]
    position: Node | None = None


def written(space: Space, place: Place) -> Write | None:
    """The write along the axis that `place` is, if it is one."""
    node, dims = place.node, place.dims
    if place.axis and node.target == aten.where.self:
        return where_written(space, place)
    if not place.axis or node.target not in WRITERS:
        return None
    dim, new, position = WRITERS[node.target](node)
    if dim is None:
        return None
    dim %= len(dims)
    if dims[dim] != place.axis:
        return None
    given = node.args[0] if node.target == aten.cat.default else (node.args[0], new)
    parts = tuple(part_at(space, part, dim, len(dims)) for part in given if part is not None and not empty(part))
    kind = {aten.cat.default: "cat", aten.roll.default: "roll"}.get(node.target, "write")
    return Write(kind, node, parts, position if isinstance(position, Node) else None)


def empty(part: Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape_of(part))


def part_at(space: Space, part: Node, dim: int, rank: int) -> Place:
    """A part of a write at its own axis; one that lacks dimensions is spread over the axis and has none."""
    own = space.dims_of(part)
    return Place(part, own, own[dim] if len(own) == rank else ())


def where_written(space: Space, place: Place) -> Write | None:
    """where(positions == n, new, buffer), or with the last two exchanged, for a new part of one position."""
    dim = next((d for d, atoms in enumerate(place.dims) if atoms == place.axis), None)
    if dim is None:
        return None
    held = [dim - len(place.dims) + len(shape_of(x)) for x in place.node.args]
    along = [d >= 0 and not is_one(shape_of(x)[d]) for d, x in zip(held, place.node.args, strict=True)]
    if not along[0] or along[1] == along[2]:
        return None
    n = 1 if along[1] else 2
    buffer = place.node.args[n]
    own = space.dims_of(buffer)
    new = place.node.args[3 - n]
    parts = (Place(buffer, own, own[held[n]]), Place(new, space.dims_of(new), ()))
    return Write("write", place.node, parts, place.node.args[0])


def _index_put(node: Node) -> tuple[int | None, Any, Any]:
    used = [d for d, t in enumerate(node.args[1]) if t is not None]
    adds = argument(node, 3, "accumulate", False)
    return (used[0], None, node.args[1][used[0]]) if len(used) == 1 and not adds else (None, None, None)


def _roll(node: Node) -> tuple[int | None, Any, Any]:
    dims = argument(node, 2, "dims", ())
    inner = node.args[0]
    while inner.target in CASTS:
        inner = inner.args[0]
    # Only a buffer is rolled in order to be written; windows of pixels are rolled as well.
    return (dims[0] if len(dims) == 1 and inner.op == "placeholder" else None), None, None


# For each operation that writes along a dimension: the dimension, the new part, and the position.
WRITERS: dict[Any, Any] = {
    aten.cat.default: lambda n: (argument(n, 1, "dim", 0), None, None),
    aten.index_copy.default: lambda n: (n.args[1], n.args[3], n.args[2]),
    aten.slice_scatter.default: lambda n: (argument(n, 2, "dim", 0), n.args[1], argument(n, 3, "start")),
    aten.select_scatter.default: lambda n: (n.args[2], None, n.args[3]),
    aten.scatter.src: lambda n: (n.args[1], n.args[3], n.args[2]),
    aten.index_put.default: _index_put,
    aten.roll.default: _roll,
}
