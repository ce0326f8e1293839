"""Axes as data: every dimension of a tensor is a row-major tuple of atoms, so that no dimension number is ever trusted.

    softmax(x)[b, h, i, j]  <-  view  <-  x.view(B*H, S, T)      dims ((b, h), (i), (j))

Views regroup atoms, splitting one where a dimension is cut in two; permutations reorder them; an expanded dimension has
none. Two tensors agree on an axis only if they hold the same atom.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Atom:
    """One independent axis; `size` is an int or a SymInt."""

    name: str
    size: Any = field(compare=False, repr=False)


Dims: TypeAlias = tuple[tuple[Atom, ...], ...]

Targets: TypeAlias = tuple[Any, ...]
VIEWS: Targets = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
COPIES: Targets = (
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default, aten.detach.default,
)  # fmt: skip
CASTS: Targets = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)
REORDERS: Targets = (
    aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.mT.default,
)  # fmt: skip
# Take, move, join or sum entries of scores and weights. No rule follows them; that one stands there is said.
MOVES: Targets = (
    operator.getitem, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.narrow.default, aten.gather.default, aten.index_select.default,
    aten.take_along_dim.default, aten.topk.default, aten.sort.default, aten.roll.default, aten.flip.default,
    aten.pad.default, aten.constant_pad_nd.default, aten.as_strided.default, aten.unfold.default, aten.cat.default,
    aten.index_fill.int_Scalar, aten.index_put.default, aten.scatter.src, aten.scatter.value, aten.cumsum.default,
    aten.slice_scatter.default, aten.sum.dim_IntList, aten.mean.dim,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Two sizes proved equal: never by a guard, so that asking does not cause a recompile."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def plain(size: Any) -> Any:
    """A size as an int where it is one: 12*s0 // s0 is the symbol's 12, and no int."""
    expr = getattr(getattr(size, "node", None), "expr", None)
    return int(expr) if expr is not None and expr.is_Integer else size


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def shape_of(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def order_of(node: Node) -> list[int] | None:
    """For a reordering node: output dimension d is input dimension order[d]."""
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target == aten.permute.default:
        return [d % rank for d in node.args[1]]
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        a, b = (d % rank for d in node.args[1:3])
    elif node.target in (aten.t.default, aten.mT.default) and rank >= 2:
        a, b = rank - 2, rank - 1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def first(argument: Any) -> Any:
    return argument[0] if isinstance(argument, (list, tuple)) and argument else argument


class Space:
    """The atoms of one proof, and how they were split on the way."""

    def __init__(self) -> None:
        self.parts: dict[Atom, tuple[Atom, Atom]] = {}
        # Where an axis whose size is known only at run time is a dimension of its own.
        self.places: dict[Atom, tuple[Node, int]] = {}
        # Sizes that an operation needs to be equal and that the shapes do not say are.
        self.equal: list[tuple[Any, Any]] = []
        self._made = 0

    def new(self, size: Any) -> tuple[Atom, ...]:
        """A fresh axis; a dimension of size one needs none."""
        size = plain(size)
        if is_one(size):
            return ()
        self._made += 1
        return (Atom(f"x{self._made}", size),)

    def dims_of(self, node: Node) -> Dims:
        return tuple(self.new(size) for size in shape_of(node))

    def split(self, atom: Atom, outer: Any, inner: Any) -> tuple[Atom, Atom]:
        """Cut an axis into `outer` times `inner`; every dims resolved later sees the two."""
        if atom not in self.parts:
            self.parts[atom] = (Atom(f"{atom.name}.0", plain(outer)), Atom(f"{atom.name}.1", plain(inner)))
        return self.parts[atom]

    def atoms(self, atoms: Iterable[Atom]) -> tuple[Atom, ...]:
        found: list[Atom] = []
        for atom in atoms:
            found += self.atoms(self.parts[atom]) if atom in self.parts else (atom,)
        return tuple(found)

    def resolve(self, dims: Dims) -> Dims:
        """`dims` in terms of the finest atoms known by now."""
        return tuple(self.atoms(d) for d in dims) if self.parts else dims

    def regroup(self, atoms: Sequence[Atom], sizes: Sequence[Any]) -> Dims | None:
        """The same axes, in the same order, as dimensions of `sizes`; None where that cannot be proved."""
        queue, grouped = list(self.atoms(atoms)), []
        for size in sizes:
            size = next((known for known, other in self.equal if same(size, other)), size)
            taken: list[Atom] = []
            held: Any = 1
            while not same(held, size):
                if not queue:
                    return None
                cut = self._take(queue.pop(0), held, size)
                if cut is None:
                    return None
                taken.append(cut[0])
                queue[:0] = cut[1:]
                held = held * cut[0].size
            grouped.append(tuple(taken))
        return None if queue else tuple(grouped)

    def _take(self, atom: Atom, held: Any, size: Any) -> tuple[Atom, ...] | None:
        """The atom whole, or split so that its outer part fills a dimension of `size` that has `held` already."""
        if same(held * atom.size, size):
            return (atom,)
        if isinstance(held, int) and isinstance(size, int) and isinstance(atom.size, int):
            if not held or size % held or not atom.size:
                return None
            need = size // held
            if need % atom.size == 0:
                return (atom,)
            return self.split(atom, need, atom.size // need) if atom.size % need == 0 else None
        rest = size // (held * atom.size)
        if same(rest * held * atom.size, size):
            return (atom,)
        need = size // held
        inner = atom.size // need
        return self.split(atom, need, inner) if same(need * inner, atom.size) and same(need * held, size) else None

    def back(self, node: Node, dims: Dims, casts: bool = False) -> tuple[Node, Dims] | None:
        """What a view-like `node` with `dims` reads, and that tensor's dims; None where it is no view."""
        if node.op != "call_function" or not node.args:
            return None
        source = first(node.args[0])
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return None
        rule = BACK.get(node.target)
        if rule is None and (node.target in COPIES or (casts and node.target in CASTS)):
            return source, dims
        found = rule(self, node, self.resolve(dims)) if rule is not None else None
        if found is None:
            return None
        for d, atoms in enumerate(found):
            if len(atoms) == 1 and not isinstance(atoms[0].size, int):
                self.places.setdefault(atoms[0], (source, d))
        return source, found

    def forward(self, user: Node, dims: Dims) -> Dims | None:
        """The dims of a view-like user's result, given its input's."""
        dims = self.resolve(dims)
        if user.target in COPIES or user.target in CASTS:
            return dims
        if user.target in REORDERS:
            order = order_of(user)
            return None if order is None else tuple(dims[d] for d in order)
        if user.target in VIEWS:
            return self.regroup([a for d in dims for a in d], shape_of(user))
        return None


def _reordered(space: Space, node: Node, dims: Dims) -> Dims | None:
    order = order_of(node)
    if order is None:
        return None
    source: list[tuple[Atom, ...]] = [()] * len(order)
    for position, dim in enumerate(order):
        source[dim] = dims[position]
    return tuple(source)


def _viewed(space: Space, node: Node, dims: Dims) -> Dims | None:
    return space.regroup([a for d in dims for a in d], shape_of(node.args[0]))


def _expanded(space: Space, node: Node, dims: Dims) -> Dims | None:
    """A dimension of size one that was stretched does not depend on its position."""
    sizes = shape_of(node.args[0])
    tail = dims[len(dims) - len(sizes) :]
    new = shape_of(node)[len(dims) - len(sizes) :]
    return tuple(() if is_one(s) else d for s, d, n in zip(sizes, tail, new, strict=True))


def _repeated(space: Space, node: Node, dims: Dims) -> Dims | None:
    """repeat_interleave(x, r, dim): r neighbours in the result share one entry."""
    times, dim = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    dim %= len(dims)
    cut = space.regroup(dims[dim], (shape_of(node.args[0])[dim], times))
    return None if cut is None else space.resolve((*dims[:dim], cut[0], *dims[dim + 1 :]))


def _tiled(space: Space, node: Node, dims: Dims) -> Dims | None:
    """repeat(x, times): whole copies one after another."""
    sizes = shape_of(node.args[0])
    times = [t.meta.get("val") if isinstance(t, Node) else t for t in node.args[1]]
    if len(times) != len(sizes):
        return None
    source: list[tuple[Atom, ...]] = []
    for d, size, n in zip(dims, sizes, times, strict=True):
        cut = space.regroup(d, (n, size))
        if cut is None:
            return None
        source.append(cut[1])
    return space.resolve(tuple(source))


def _stacked(space: Space, node: Node, dims: Dims) -> Dims | None:
    """stack([x, x, ...], dim): the new dimension does not matter."""
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(dims)
    return (*dims[:dim], *dims[dim + 1 :]) if len(set(node.args[0])) == 1 else None


def _indexed(space: Space, node: Node, dims: Dims) -> Dims | None:
    """x[:, index] for an index 0, 0, 1, 1, ... that the graph computes from nothing but constants."""
    from attnopt.patterns.constants import evaluated

    source, indices = node.args
    used = [d for d, t in enumerate(indices) if t is not None]
    if len(used) != 1 or len(shape_of(indices[used[0]])) != 1:
        return None
    (dim,) = used
    size, found = shape_of(source)[dim], evaluated(indices[dim])
    if found is None or not isinstance(size, int) or not size or len(found) % size:
        return None
    times = len(found) // size
    if found.tolist() != [n // times for n in range(len(found))]:
        return None
    cut = space.regroup(dims[dim], (size, times))
    return None if cut is None else space.resolve((*dims[:dim], cut[0], *dims[dim + 1 :]))


Rule: TypeAlias = Callable[[Space, Node, Dims], "Dims | None"]
BACK: dict[Any, Rule] = {
    **dict.fromkeys(REORDERS, _reordered),
    **dict.fromkeys(VIEWS, _viewed),
    aten.expand.default: _expanded,
    aten.repeat_interleave.self_int: _repeated,
    aten.repeat.default: _tiled,
    aten.stack.default: _stacked,
    aten.index.Tensor: _indexed,
}
