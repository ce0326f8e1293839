"""Follow one axis of a tensor back through the graph: which tensor's axis is it, and who wrote along it?

    k[b, h, j, d]  <-  rope  <-  view  <-  linear(x)          the axis j of k is the axis s of x[b, s, c]

An axis is a tuple of atoms (patterns/layout.py), so a concatenation of features is never taken for one of positions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.writes import WRITERS, Axis, Place, Write, written
from attnopt.patterns import argument, value
from attnopt.patterns.layout import CASTS, Atom, Dims, Space, is_one, shape_of
from attnopt.patterns.product import operands_of, product_of

aten = torch.ops.aten

# Each position keeps its place, whatever is normalised or summed over the other dimensions.
ROWWISE = (
    aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default,
    aten.dropout.default, aten.cumsum.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
)  # fmt: skip
REDUCTIONS = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip
PARTS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections,
    aten.split.sizes,
)  # fmt: skip
MADE = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default,
    aten.full.default, aten.empty.memory_format, aten.new_zeros.default, aten.new_full.default, aten.new_ones.default,
    aten.new_empty.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.scalar_tensor.default,
)  # fmt: skip


@dataclass
class Walk:
    """One way back from `start` along its axis. What it passes is in `seen`; where it ends, in `ends` and `writes`.

    stop: nodes at which somebody else's walk goes on, by the pattern of the axis there.
    """

    space: Space
    limit: int = 400
    stop: dict[Node, Any] = field(default_factory=dict)
    seen: dict[Node, Any] = field(default_factory=dict)
    met: list[Place] = field(default_factory=list)
    ends: list[Place] = field(default_factory=list)
    lost: list[Place] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)

    def run(self, *starts: Place) -> Walk:
        stack = list(starts)
        while stack:
            place = stack.pop(0)
            place = self.settled(place)
            if place.node in self.seen:
                continue
            self.seen[place.node] = place.pattern
            if place.node in self.stop and self.stop[place.node] == place.pattern and place.axis:
                self.met.append(place)
                continue
            if len(self.seen) > self.limit:
                self.lost.append(place)
                continue
            if place.node.op != "call_function" or place.node.target in MADE:
                self.ends.append(place)
                continue
            write = written(self.space, place)
            if write is not None:
                self.writes.append(write)
                continue
            found = behind(self.space, place)
            if found is None:
                self.lost.append(place)
            else:
                stack += found
        return self

    def settled(self, place: Place) -> Place:
        return Place(
            place.node, self.space.resolve(place.dims), self.space.atoms(place.axis), place.projected, place.cut
        )


def start(space: Space, node: Node, dim: int) -> Place:
    dims = space.dims_of(node)
    return Place(node, dims, dims[dim])


def behind(space: Space, place: Place) -> list[Place] | None:
    """The places that hold the same axis one operation earlier; None where that cannot be told."""
    node, dims = place.node, place.dims

    def at(source: Any, source_dims: Dims | None, projected: bool = False, cut: str = "") -> list[Place] | None:
        if source_dims is None or not isinstance(source, Node) or value(source) is None:
            return None
        return [Place(source, source_dims, place.axis, place.projected or projected, place.cut or cut)]

    def replaced(dim: int, size: Any) -> Dims:
        return (*dims[:dim], space.new(size), *dims[dim + 1 :])

    step = space.back(node, dims, casts=True)
    if step is not None:
        return at(*step)
    if node.target == aten.copy.default:
        # All of the first operand is overwritten by the second.
        return pointwise(place, node.args[1:2])
    if node.target in ROWWISE:
        return at(node.args[0], dims)
    if node.target == aten.scaled_dot_product_attention.default:
        return at(node.args[0], (*dims[:-1], space.new(shape_of(node.args[0])[-1])))
    if node.target in (aten.linear.default, aten.addmm.default) and len(node.args) >= 3:
        x = node.args[0 if node.target == aten.linear.default else 1]
        return at(x, (*dims[:-1], space.new(shape_of(x)[-1])), True) if apart(dims, -1, place.axis) else None
    product = product_of(node)
    if product is not None:
        left, right = operands_of(space, product, dims)
        held = [p for p in ((product.lhs, left), (product.rhs, right)) if holds(p[1], place.axis)]
        return at(*held[0], True) if len(held) == 1 or (held and not place.axis) else None
    if node.target in REDUCTIONS:
        return at(node.args[0], unreduced(space, node, dims))
    if node.target in (aten.view_as_complex.default, aten.view_as_real.default):
        inner = (*dims, space.new(2)) if node.target == aten.view_as_complex.default else dims[:-1]
        return at(node.args[0], inner)
    if node.target in SELECTING:
        return SELECTING[node.target](space, place, at, replaced)
    if node.target is operator.getitem:
        return item_of(space, place, at)
    if node.target == aten.cat.default:
        return parts_of(space, place)
    if node.target in (aten.slice_scatter.default, aten.index_copy.default):
        return elsewhere(space, place)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in CASTS:
        return pointwise(place)
    return None


def holds(dims: Dims, axis: Axis) -> bool:
    return any(a in axis for d in dims for a in d) if axis else True


def apart(dims: Dims, dim: int, axis: Axis) -> bool:
    """Whether the dimension is another than the axis."""
    return not set(dims[dim]) & set(axis)


def unreduced(space: Space, node: Node, dims: Dims) -> Dims | None:
    """The dims before a sum over some dimensions; without an axis, only the features may be summed over."""
    sizes = shape_of(node.args[0])
    where = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    over = argument(node, where, "dim")
    over = {d % len(sizes) for d in ([over] if isinstance(over, int) else over or range(len(sizes)))}
    kept = len(dims) == len(sizes)
    if over != {len(sizes) - 1} and any(not is_one(sizes[d]) for d in over - {len(sizes) - 1}):
        return None
    rest = iter(dims if not kept else [d for n, d in enumerate(dims) if n not in over])
    return tuple(space.new(size) if d in over else next(rest) for d, size in enumerate(sizes))


def sliced(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    """x[:, a:b]: of another dimension, or of the axis itself."""
    node = place.node
    dim = argument(node, 1, "dim", 0) % len(place.dims)
    size = shape_of(node.args[0])[dim]
    source = replaced(dim, size)
    if place.axis and apart(place.dims, dim, place.axis):
        return at(node.args[0], source)
    if place.axis and place.dims[dim] != place.axis:
        return None
    begins = argument(node, 2, "start") in (None, 0)
    if not place.axis and (dim == len(place.dims) - 1 or is_one(size)):
        return at(node.args[0], source)
    return [Place(node.args[0], source, source[dim], place.projected, place.cut or ("head" if begins else "tail"))]


def selected(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    """x[:, n]: the dimension that is gone is not the axis, unless the axis has one position only."""
    node = place.node
    sizes = shape_of(node.args[0])
    dim = node.args[1] % len(sizes)
    atoms = space.new(sizes[dim])
    source = (*place.dims[:dim], atoms, *place.dims[dim:])
    if place.axis or is_one(sizes[dim]):
        return at(node.args[0], source)
    return None


def indexed(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    """x[index] in one dimension: the axis goes on in the index where that dimension is it, else in x."""
    node = place.node
    used = [d for d, t in enumerate(node.args[1]) if t is not None]
    if len(used) != 1 or not place.axis:
        return None
    (dim,), index = used, node.args[1][used[0]]
    rank = len(shape_of(index))
    here = place.dims[dim : dim + rank]
    if holds(here, place.axis):
        return at(index, here)
    return at(node.args[0], (*place.dims[:dim], space.new(shape_of(node.args[0])[dim]), *place.dims[dim + rank :]))


def index_selected(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    source, dim, index = place.node.args
    dim %= len(place.dims)
    if not apart(place.dims, dim, place.axis):
        return at(index, (place.dims[dim],))
    return at(source, replaced(dim, shape_of(source)[dim]))


def looked_up(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    """embedding(table, ids)"""
    return at(place.node.args[1], place.dims[:-1], True) if apart(place.dims, -1, place.axis) else None


def padded(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    node, rank = place.node, len(place.dims)
    source = place.dims
    for n in range(len(node.args[1]) // 2):
        dim = rank - 1 - n
        if any(p != 0 for p in node.args[1][2 * n : 2 * n + 2]):
            if not apart(source, dim, place.axis):
                return None
            source = (*source[:dim], space.new(shape_of(node.args[0])[dim]), *source[dim + 1 :])
    return at(node.args[0], source)


def rolled(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    return at(place.node.args[0], place.dims)


def convolved(space: Space, place: Place, at: Any, replaced: Any) -> list[Place] | None:
    """A convolution along the axis: its positions come from those of the input, other ones."""
    if len(place.dims) != 3 or place.dims[2] != place.axis:
        return None
    x = place.node.args[0]
    found = (place.dims[0], *(space.new(s) for s in shape_of(x)[1:]))
    return [Place(x, found, found[2], True, place.cut)]


SELECTING: dict[Any, Any] = {
    aten.slice.Tensor: sliced,
    aten.select.int: selected,
    aten.index.Tensor: indexed,
    aten.index_select.default: index_selected,
    aten.embedding.default: looked_up,
    aten.pad.default: padded,
    aten.constant_pad_nd.default: padded,
    aten.roll.default: rolled,
    aten.flip.default: rolled,
    aten.conv1d.default: convolved,
}


def item_of(space: Space, place: Place, at: Any) -> list[Place] | None:
    """One of several results: a part of a split, of an unbind, or what a normalisation returns."""
    made = place.node.args[0]
    if made.target in PARTS:
        dim = argument(made, 2, "dim", 0)
        source = made.args[0]
        dim %= len(place.dims)
        if not apart(place.dims, dim, place.axis):
            return None
        return at(source, (*place.dims[:dim], space.new(shape_of(source)[dim]), *place.dims[dim + 1 :]))
    if made.target == aten.unbind.int:
        source = made.args[0]
        dim = argument(made, 1, "dim", 0) % len(shape_of(source))
        return at(source, (*place.dims[:dim], space.new(shape_of(source)[dim]), *place.dims[dim:]))
    return None


def parts_of(space: Space, place: Place) -> list[Place] | None:
    """A concatenation along another dimension than the axis: all parts have it."""
    dim = argument(place.node, 1, "dim", 0) % len(place.dims)
    if not apart(place.dims, dim, place.axis):
        return None
    return [
        Place(p, (*place.dims[:dim], space.new(shape_of(p)[dim]), *place.dims[dim + 1 :]), place.axis, place.projected)
        for p in place.node.args[0]
    ]


def elsewhere(space: Space, place: Place) -> list[Place] | None:
    """A write along another dimension than the axis: what is written has the axis as well."""
    dim, new, _ = WRITERS[place.node.target](place.node)
    dim %= len(place.dims)
    if not apart(place.dims, dim, place.axis):
        return None
    inner = (*place.dims[:dim], space.new(shape_of(new)[dim]), *place.dims[dim + 1 :])
    return [
        Place(place.node.args[0], place.dims, place.axis, place.projected, place.cut),
        Place(new, inner, place.axis, place.projected, place.cut),
    ]


def pointwise(place: Place, operands: Sequence[Any] = ()) -> list[Place] | None:
    """The operands with the axis; one that lacks other axes which another has is a table of positions or a mask."""
    found: list[tuple[frozenset[Atom], Place]] = []
    others: set[Atom] = set()
    for operand in operands or (*place.node.args, *place.node.kwargs.values()):
        held = value(operand)
        if held is None:
            continue
        tail = place.dims[len(place.dims) - held.ndim :]
        dims = tuple(() if is_one(s) else d for s, d in zip(held.shape, tail, strict=True))
        if holds(dims, place.axis) and (held.ndim or not place.axis):
            atoms = frozenset(a for d in dims for a in d)
            found.append((atoms, Place(operand, dims, place.axis, place.projected, place.cut)))
        elif len({a for d in dims for a in d}) > 1:
            others |= {a for d in dims for a in d}
    # Data without the axis, spread along it by a mask: buffer * (1 - m) + new * m.
    if others - {a for atoms, _ in found for a in atoms}:
        return None
    return [p for atoms, p in found if not any(atoms < other for other, _ in found)] or None
