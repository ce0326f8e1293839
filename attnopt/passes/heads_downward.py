"""From the output of an attention down to the products that read it: only the columns of the heads that stay.

    linear(view(out, [B, N, H * D]), W_O, b)   ->   linear(view(out', [B, N, h * D]), W_O[:, kept], b + W_O[:, gone] m)

m holds the mean outputs of the heads that are gone. Views, copies and casts may stand between, and several products may
read the output (the two of a low-rank adapter's pair and the weight that it adapts); anything else ends the walk with a
reason. Without a head that stays the product is its constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.ir import Refusal
from attnopt.passes.head_slices import Heads, Slices, Unpushed, at_compile_time, shapes_agree
from attnopt.passes.heads_upward import Upward, again
from attnopt.passes.program import Builder
from attnopt.patterns import value
from attnopt.patterns.layout import CASTS, COPIES, REORDERS, VIEWS, Atom, Dims, shape_of
from attnopt.projection import PRODUCTS
from attnopt.reasons import described

aten = torch.ops.aten


class Downward:
    """The output's walk. means: float64 (H, Dv), zero for heads that stay; of: the atoms of (heads, features) in their
    canonical order; heads is None where none stays."""

    def __init__(self, slices: Slices, heads: Heads, means: Tensor, of: tuple[Atom, ...]) -> None:
        self.slices, self.heads, self.means, self.of = slices, heads, means, of
        self.up = Upward(slices, heads, ())

    def follow(self, node: Node, dims: Dims, new: Node | None) -> None:
        """Push `new`, which stands for `node` with the heads that stay (None: no head stays), into all its users."""
        if not node.users:
            raise unread(node)
        if new is not None:
            self.slices.twins[node] = new
        for user in list(node.users):
            if user.target is aten.sym_size.int and new is not None:
                continue
            with self.slices.gm.graph.inserting_before(user.next):
                if user.target in PRODUCTS and user.args[PRODUCTS[user.target][0]] is node:
                    self.slices.replacements.append((user, self.product(user, dims, new)))
                    continue
                after = self.heads.space.forward(user, dims) if user.target in ARRANGES else None
                if after is None or user.args[0] is not node:
                    raise gated(user) if pointwise(user) else unread(user)
                made = None if new is None else again(self.slices, self.heads, user, self.heads.resolve(after), new)
            if made is not None and not shapes_agree(made, self.heads.kept(self.heads.resolve(after))):
                raise unread(user)
            self.follow(user, after, made)

    def product(self, node: Node, dims: Dims, new: Node | None) -> Node:
        dims = self.heads.resolve(dims)
        weight_node = node.args[PRODUCTS[node.target][1]]
        weight = self.slices.weight(weight_node)
        linear = node.target == aten.linear.default
        if weight is None:
            raise opaque(weight_node)
        if weight.ndim != 2 or self.heads.of(dims[:-1]) or node.kwargs:
            raise unread(node)
        entries = self.flat_means(dims[-1])
        if entries is None:
            raise unread(node)
        bias = self.bias_of(node)
        with at_compile_time():
            matrix = weight.double() if linear else weight.double().T
            constant = matrix @ entries.to(weight.device)
            held = self.slices.weight(bias)
            if held is not None and held.ndim == 1:
                constant = constant + held.double()
            constant = constant.to(node.meta["val"].dtype)
        folded = held is not None and held.ndim == 1
        self.slices.rely(weight_node)
        if folded:
            self.slices.rely(bias)
        builder, added = Builder(self.slices.gm, node), self.slices.constant(constant, node)
        if new is None:
            made = builder.call(aten.expand.default, added, self.sizes(node, builder))
        else:
            # Every axis of the rows but the features' is new to the weight.
            out = self.heads.space.new(weight.shape[0 if linear else 1])
            columns = self.up.narrowed(weight_node, (out, dims[-1]) if linear else (dims[-1], out))
            if linear:
                made = builder.call(aten.linear.default, new, columns, added)
            elif node.target == aten.addmm.default:
                made = builder.call(aten.addmm.default, added, new, columns)
            else:
                made = builder.call(aten.add.Tensor, builder.call(node.target, new, columns), added)
        if bias is not None and not folded:
            made = builder.call(aten.add.Tensor, made, bias)
        return made

    @staticmethod
    def bias_of(node: Node) -> Any:
        if node.target == aten.linear.default:
            return node.args[2] if len(node.args) > 2 else None
        return node.args[0] if node.target == aten.addmm.default else None

    def flat_means(self, features: tuple[Atom, ...]) -> Tensor | None:
        """The mean outputs in the order of a product's columns; None where those are not the heads' features alone."""
        own = [a for d in self.heads.resolve((self.of,)) for a in d]
        if sorted(a.name for a in own) != sorted(a.name for a in features):
            return None
        apart = self.means.reshape([a.size for a in own])
        return apart.permute([own.index(a) for a in features]).reshape(-1)

    def sizes(self, node: Node, builder: Builder) -> list[Any]:
        """The shape of a product as numbers and nodes that do not need its inputs."""
        return [s if isinstance(s, int) else self.size(s, node, builder) for s in shape_of(node)]

    def size(self, wanted: Any, node: Node, builder: Builder) -> Node:
        for source in self.slices.gm.graph.nodes:
            if source.op != "placeholder":
                break
            held = source.meta.get("val")
            if isinstance(held, torch.SymInt) and str(held) == str(wanted):
                return source
        for source in self.slices.gm.graph.nodes:
            held = value(source)
            if source.op != "placeholder" or held is None:
                continue
            for d, size in enumerate(held.shape):
                if not isinstance(size, int) and str(size) == str(wanted):
                    return builder.call(aten.sym_size.int, source, d)
        said = f"the size {wanted} of {described(node)} is known at run time only, from what is removed"
        raise Unpushed(Refusal(said, code="prune-no-output-projection"))


ARRANGES = (*VIEWS, *COPIES, *CASTS, *REORDERS)


def pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def gated(node: Node) -> Unpushed:
    said = f"{described(node)} stands between its output and the projection, so that a mean is no constant behind it"
    return Unpushed(Refusal(said, code="prune-gated-output"))


def unread(node: Node) -> Unpushed:
    said = f"its output goes into {described(node)}, expected a product with a parameter"
    return Unpushed(Refusal(said, code="prune-no-output-projection"))


def opaque(node: Any) -> Unpushed:
    said = f"the weight of its output projection is {described(node)}, expected one computed from parameters"
    return Unpushed(Refusal(said, code="prune-opaque-weight"))
