"""From an operand of an attention up to its projections: every node on the way once more, for the chosen heads alone.

    rope(transpose(view(linear(x, W, b), [B, N, H, D])))   ->   rope(transpose(view(linear(x, W', b'), [B, N, h, D])))
    y = linear(x, W) + s * linear(linear(x, A), B)         ->   linear(x, W') + s * linear(linear(x, A), B')
    q, k, v = split(linear(x, W_qkv), ...)                 ->   linear(x, rows of q), linear(x, rows of k), ...

One rule for each kind of operation says what the axes of its inputs are, given its result's. An operation without a
rule ends the walk with a reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attnopt.ir import Refusal
from attnopt.passes.head_slices import Heads, Slices, Unpushed, shapes_agree, sizes
from attnopt.passes.lineage import PARTS, REDUCTIONS, unreduced
from attnopt.passes.program import Builder
from attnopt.patterns import argument, value
from attnopt.patterns.layout import CASTS, COPIES, REORDERS, VIEWS, Atom, Dims, is_one, shape_of
from attnopt.patterns.product import operands_of, product_of
from attnopt.reasons import described

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
COMPLEX = (aten.view_as_complex.default, aten.view_as_real.default)
POINTWISE = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
# Take a part of a dimension; those in DROPS take it away with that.
DROPS = (aten.select.int, aten.unbind.int)


def unfollowed(node: Node, why: str = "") -> Unpushed:
    seen = f"{described(node)}{', ' * bool(why)}{why}"
    return Unpushed(Refusal(f"its heads pass {seen}, which cannot be followed", code="prune-no-projection"))


def joint_norm(node: Node) -> Unpushed:
    said = f"{described(node)} reads all heads together, so that those that stay need the others"
    return Unpushed(Refusal(said, code="prune-joint-norm"))


class Upward:
    """One operand's walk. features: the operand's own feature axis; a part of a wider dimension that is all of it was
    cut out of a fused projection, any other part (a half, for RoPE) was not."""

    def __init__(self, slices: Slices, heads: Heads, features: tuple[Atom, ...]) -> None:
        self.slices, self.heads, self.space, self.features = slices, heads, heads.space, features

    def narrowed(self, node: Node, dims: Dims) -> Node:
        """`node` for the chosen heads; `node` itself where it does not vary over them."""
        dims = self.heads.resolve(dims)
        if not self.heads.of(dims):
            return node
        key = (node, self.heads.key(dims))
        if key not in self.slices.made:
            after = node.next
            # Inputs of the graph come first and stay together.
            while after.op == "placeholder":
                after = after.next
            with self.slices.gm.graph.inserting_before(after):
                new = self.followed(node, dims)
            dims = self.heads.resolve(dims)
            if not shapes_agree(new, self.heads.kept(dims)):
                raise unfollowed(node)
            self.slices.followed.add(node)
            if value(new) is not None:
                self.slices.twins[node] = new
            self.slices.made[key] = new
        return self.slices.made[key]

    def followed(self, node: Node, dims: Dims) -> Node:
        if node.op != "call_function":
            return self.slices.taken(node, self.heads, dims)
        target = node.target
        if target in (*VIEWS, *COPIES, *CASTS, *REORDERS) or target == aten.expand.default:
            step = self.space.back(node, dims, casts=True)
            if step is None:
                raise unfollowed(node)
            return again(self.slices, self.heads, node, self.heads.resolve(dims), self.narrowed(*step))
        for targets, rule in RULES:
            if target in targets:
                return rule(self, node, dims)
        if product_of(node) is not None:
            return self.product(node, dims)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return self.pointwise(node, dims)
        raise unfollowed(node)

    def with_inputs(self, node: Node, inputs: Sequence[tuple[Any, Dims | None]]) -> Node:
        """The same call on narrowed inputs; all that vary over the chosen axes must have the same ones."""
        new: dict[Node, Node] = {}
        for source, dims in inputs:
            if not isinstance(source, Node) or dims is None:
                continue
            made = self.narrowed(source, dims)
            if new.setdefault(source, made) is not made:
                raise unfollowed(node, "which reads one tensor in two ways")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: new.get(n, n))
        return Builder(self.slices.gm, node).call(node.target, *args, **kwargs)

    # --- rules --------------------------------------------------------------------------------------------------------

    def linear(self, node: Node, dims: Dims) -> Node:
        """linear(x, W, b) and addmm(b, x, W): rows, or columns, of W; per-head products of what is chosen already."""
        rowwise = node.target == aten.linear.default
        x, weight, bias = (*node.args, None)[:3] if rowwise else (*node.args[1:3], node.args[0])
        summed = self.space.new(shape_of(x)[-1])
        outer, out = dims[:-1], dims[-1]
        if node.kwargs or (bias is not None and len(shape_of(bias)) != 1):
            raise unfollowed(node)
        if self.heads.of(outer) and self.heads.of((out,)):
            raise unfollowed(node, "which makes heads of heads")
        into = (out, summed) if rowwise else (summed, out)
        new = self.with_inputs(node, [(x, (*outer, summed)), (weight, into), (bias, (out,))])
        if self.heads.of((out,)):
            self.slices.products.append((node, new))
        return new

    def product(self, node: Node, dims: Dims) -> Node:
        product = product_of(node)
        assert product is not None
        left, right = operands_of(self.space, product, dims)
        of = [set(self.heads.of(self.heads.resolve(d))) for d in (dims, left, right)]
        if (of[1] and of[1] != of[0]) or (of[2] and of[2] != of[0]):
            raise unfollowed(node)
        return self.with_inputs(node, [(product.lhs, left), (product.rhs, right)])

    def pointwise(self, node: Node, dims: Dims) -> Node:
        inputs = []
        first = self.heads.of(dims)[0]
        for source in (*node.args, *node.kwargs.values()):
            held = value(source)
            if held is None:
                continue
            tail = dims[len(dims) - held.ndim :]
            own = tuple(() if is_one(s) else d for s, d in zip(held.shape, tail, strict=True))
            chosen = self.heads.of(own)
            if chosen and chosen[0] is not first:
                raise unfollowed(node, "whose operands vary over other heads")
            inputs.append((source, own))
        return self.with_inputs(node, inputs)

    def norm(self, node: Node, dims: Dims) -> Node:
        if self.heads.of(dims[len(dims) - len(node.args[1]) :]):
            raise joint_norm(node)
        return self.with_inputs(node, [(node.args[0], dims)])

    def reduction(self, node: Node, dims: Dims) -> Node:
        source = unreduced(self.space, node, dims)
        if source is None:
            raise unfollowed(node)
        return self.with_inputs(node, [(node.args[0], source)])

    def complex(self, node: Node, dims: Dims) -> Node:
        inner = (*dims, self.space.new(2)) if node.target == aten.view_as_complex.default else dims[:-1]
        return self.with_inputs(node, [(node.args[0], inner)])

    def joined(self, node: Node, dims: Dims) -> Node:
        """cat along another dimension than the heads'."""
        dim = argument(node, 1, "dim", 0) % len(dims)
        if self.heads.of((dims[dim],)):
            raise unfollowed(node)
        # A part of no entries may have one dimension only.
        parts = [p for p in node.args[0] if len(shape_of(p)) == len(dims)]
        own = [(*dims[:dim], self.space.new(shape_of(p)[dim]), *dims[dim + 1 :]) for p in parts]
        return self.with_inputs(node, list(zip(parts, own, strict=True)))

    def flipped(self, node: Node, dims: Dims) -> Node:
        moved = node.args[2 if node.target == aten.roll.default else 1]
        if self.heads.of(tuple(dims[d % len(dims)] for d in moved)):
            raise unfollowed(node)
        return self.with_inputs(node, [(node.args[0], dims)])

    # --- parts of a dimension -----------------------------------------------------------------------------------------

    def item(self, node: Node, dims: Dims) -> Node:
        """One of the results of a split, a chunk or an unbind."""
        made, at = node.args
        if made.target in PARTS:
            dim = argument(made, 2, "dim", 0) % len(dims)
            start = sum(t.shape[dim] for t in made.meta["val"][:at])
            return self.part(node, made, dims, dim, start, 1)
        if made.target == aten.unbind.int:
            dim = argument(made, 1, "dim", 0) % len(shape_of(made.args[0]))
            return self.part(node, made, dims, dim, at, 1)
        raise unfollowed(made)

    def sliced(self, node: Node, dims: Dims) -> Node:
        dim = argument(node, 1, "dim", 0) % len(dims)
        start, step, size = argument(node, 2, "start") or 0, argument(node, 4, "step", 1), shape_of(node.args[0])[dim]
        start = start + size if isinstance(start, int) and isinstance(size, int) and start < 0 else start
        return self.part(node, node, dims, dim, start, step)

    def selected(self, node: Node, dims: Dims) -> Node:
        sizes_before = shape_of(node.args[0])
        dim, at = node.args[1] % len(sizes_before), node.args[2]
        at = at + sizes_before[dim] if isinstance(at, int) and at < 0 else at
        return self.part(node, node, dims, dim, at, 1)

    def indexed(self, node: Node, dims: Dims) -> Node:
        """x[:, [a, a + 1, ...]] of a list that the graph holds."""
        used = [d for d, t in enumerate(node.args[1]) if t is not None]
        found = self.slices.weight(node.args[1][used[0]]) if len(used) == 1 else None
        if found is None or found.ndim != 1 or not len(found) or found.dtype == torch.bool:
            raise unfollowed(node)
        self.slices.rely(node.args[1][used[0]])
        dim, size = used[0], shape_of(node.args[0])[used[0]]
        at = [n + size if n < 0 else n for n in found.tolist()]
        run = at == list(range(at[0], at[0] + len(at)))
        return self.part(node, node, dims, dim, at[0], 1 if run else 0)

    def part(self, node: Node, made: Node, dims: Dims, dim: int, start: Any, step: int) -> Node:
        """Entries start, start + step, ... of a dimension: of a fused projection, whose other rows are not needed, or
        of each head's features."""
        source, drops = made.args[0], made.target in DROPS
        size = shape_of(source)[dim]
        here: tuple[Atom, ...] = () if drops else dims[dim]
        rest = dims[dim:] if drops else dims[dim + 1 :]
        whole = (*dims[:dim], self.space.new(size), *rest)
        chosen = self.heads.of((here,))
        key = (source, self.heads.key(self.heads.resolve(whole)))
        fused = key not in self.slices.made and (drops or not here or here == self.space.atoms(self.features))
        if step == 1 and isinstance(size, int) and isinstance(start, int) and (chosen or fused):
            window = self.window(here, start, size)
            if window is not None:
                new = self.narrowed(source, (*dims[:dim], window, *rest))
                self.slices.followed.update((node, made))
                return Builder(self.slices.gm, node).call(aten.select.int, new, dim, 0) if drops else new
        if chosen:
            raise unfollowed(made)
        self.slices.followed.add(made)
        new = self.with_inputs(made, [(source, whole)])
        return new if made is node else Builder(self.slices.gm, node).call(operator.getitem, new, node.args[1])

    def window(self, here: tuple[Atom, ...], start: int, size: int) -> tuple[Atom, ...] | None:
        """The atoms of a dimension of `size` of which the entries from `start` on are those of `here`; None where its
        blocks do not begin at multiples of their size."""
        chosen = self.heads.of((here,))
        last = max((here.index(a) for a in chosen), default=-1)
        outer, inner = here[: last + 1], here[last + 1 :]
        block = math.prod((a.size for a in inner), start=1)
        if set(outer) != set(chosen) or not isinstance(block, int) or start % block or size % block:
            return None
        column = torch.full((self.heads.count,), start // block)
        times = 1
        for atom in reversed(outer):
            column = column + self.heads.columns[atom] * times
            times *= atom.size
        if size == block:
            return inner
        rank = min((self.heads.ranks[a] for a in chosen), default=None)
        return (self.heads.window(size // block, column, rank), *inner)


RULES: tuple[tuple[tuple[Any, ...], Any], ...] = (
    ((aten.linear.default, aten.addmm.default), Upward.linear),
    (NORMS, Upward.norm),
    (REDUCTIONS, Upward.reduction),
    (COMPLEX, Upward.complex),
    ((aten.cat.default,), Upward.joined),
    ((aten.flip.default, aten.roll.default), Upward.flipped),
    ((operator.getitem,), Upward.item),
    ((aten.slice.Tensor,), Upward.sliced),
    ((aten.select.int,), Upward.selected),
    ((aten.index.Tensor,), Upward.indexed),
    (POINTWISE, Upward.pointwise),
)


def again(slices: Slices, heads: Heads, node: Node, dims: Dims, source: Node) -> Node:
    """A view, copy, cast or reordering on `source` in place of its own; dims: those of `node`."""
    builder = Builder(slices.gm, node)
    if node.target in VIEWS:
        return builder.call(aten.reshape.default, source, new_sizes(heads, node, dims, stretched=False))
    if node.target == aten.expand.default:
        return builder.call(aten.expand.default, source, new_sizes(heads, node, dims, stretched=True))
    if node.target == aten.type_as.default:
        return builder.call(aten._to_copy.default, source, dtype=node.meta["val"].dtype)
    return builder.call(node.target, source, *node.args[1:], **node.kwargs)


def new_sizes(heads: Heads, node: Node, dims: Dims, stretched: bool) -> list[Any]:
    """What a view or an expansion is given: numbers, sizes of the graph, or -1 for one that follows from the others."""
    kept = heads.kept(dims)
    found: list[Any] = []
    given = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) else ()
    for d, size in enumerate(sizes(kept)):
        if isinstance(size, int):
            found.append(size)
        elif kept[d] == dims[d] and len(given) == len(dims):
            found.append(given[d])
        else:
            found.append(-1)
    if not stretched and sum(isinstance(s, int) and s == -1 for s in found) > 1:
        raise unfollowed(node, "of two sizes known at run time only")
    return found
