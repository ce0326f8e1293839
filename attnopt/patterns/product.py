"""Every spelling of a product that sums over one axis, as labels on the dimensions of its operands and its result.

matmul, bmm, mm, linear without bias, einsum of two operands, sum(a * b, d)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from attnopt.patterns.layout import Atom, Dims, Space, is_one, shape_of

aten = torch.ops.aten
Labels = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """result[out] = Σ over the labels that are not in `out` of lhs[left] · rhs[right]."""

    node: Node
    lhs: Node
    rhs: Node
    left: Labels
    right: Labels
    out: Labels

    def other(self, operand: Node) -> Node:
        return self.rhs if operand is self.lhs else self.lhs


def product_of(node: Node) -> Product | None:
    """The product that `node` computes, or None."""
    if node.op != "call_function" or "val" not in node.meta:
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(node, node.args[0], node.args[1])
    if node.target == aten.linear.default and len(node.args) == 2:
        return _linear(node)
    if node.target == aten.einsum.default:
        return _einsum(node)
    if node.target == aten.sum.dim_IntList:
        return _summed(node)
    return None


def _matmul(node: Node, lhs: Node, rhs: Node) -> Product | None:
    a, b = len(shape_of(lhs)), len(shape_of(rhs))
    if a < 2 or b < 2:
        return None
    rank = max(a, b)
    batch = tuple(range(rank - 2))
    i, d, j = rank, rank + 1, rank + 2
    left, right = (*batch[rank - a :], i, d), (*batch[rank - b :], d, j)
    return Product(node, lhs, rhs, left, right, (*batch, i, j))


def _linear(node: Node) -> Product | None:
    x, w = node.args[:2]
    rank = len(shape_of(x))
    if rank < 2 or len(shape_of(w)) != 2:
        return None
    outer = tuple(range(rank - 1))
    return Product(node, x, w, (*outer, rank), (rank + 1, rank), (*outer, rank + 1))


def _einsum(node: Node) -> Product | None:
    """Two operands and no diagonal; an ellipsis stands for leading dimensions."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2:
        return None
    inputs, arrow, output = equation.partition("->")
    names = inputs.split(",")
    if len(names) != 2:
        return None
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        output = ("..." if "..." in inputs else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    labels: dict[str, int] = {}
    extra = [len(shape_of(x)) - len(n.replace("...", "")) for x, n in zip(operands, names, strict=True)]
    wide = max([e for e, n in zip(extra, names, strict=True) if "..." in n], default=0)

    def number(name: str, dots: int) -> Labels:
        head, _, tail = name.partition("...") if "..." in name else (name, "", "")
        letters = [*head, *(f"...{d}" for d in range(wide - dots, wide)), *tail] if "..." in name else list(name)
        return tuple(labels.setdefault(c, len(labels)) for c in letters)

    left, right = (number(n, e) for n, e in zip(names, extra, strict=True))
    out = number(output, wide)
    if any(len(set(side)) != len(side) for side in (left, right, out)):
        return None
    if (len(left), len(right)) != tuple(len(shape_of(x)) for x in operands):
        return None
    return Product(node, operands[0], operands[1], left, right, out)


def _summed(node: Node) -> Product | None:
    """sum(a * b, d) over one dimension that both operands have."""
    inner, dims = node.args[:2]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if keep or len(dims) != 1 or inner.target != aten.mul.Tensor or len(inner.users) != 1:
        return None
    a, b = inner.args[:2]
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return None
    rank = len(shape_of(inner))
    gone = dims[0] % rank
    labels = tuple(range(rank))
    sizes = shape_of(a), shape_of(b)
    left, right = (labels[rank - len(s) :] for s in sizes)
    if gone not in left or gone not in right or any(is_one(s[gone - rank]) for s in sizes):
        return None
    return Product(node, a, b, left, right, tuple(d for d in labels if d != gone))


def operands_of(space: Space, product: Product, out: Dims) -> tuple[Dims, Dims]:
    """Dims of both operands, given the result's: broadcast dimensions have no atoms, summed axes get fresh ones."""
    known = dict(zip(product.out, out, strict=True))
    found: list[Dims] = []
    for node, labels in ((product.lhs, product.left), (product.rhs, product.right)):
        dims = []
        for label, size in zip(labels, shape_of(node), strict=True):
            if label not in known:
                known[label] = space.new(size)
            dims.append(() if is_one(size) else known[label])
        found.append(tuple(dims))
    return found[0], found[1]


def result_of(space: Space, product: Product, operand: Node, dims: Dims) -> tuple[Dims, Dims, tuple[Atom, ...]]:
    """(dims of the other operand, dims of the result, axes summed over), given one operand's dims."""
    mine, theirs = (product.left, product.right) if operand is product.lhs else (product.right, product.left)
    known = dict(zip(mine, dims, strict=True))
    other = []
    for label, size in zip(theirs, shape_of(product.other(operand)), strict=True):
        if not known.get(label):
            known[label] = space.new(size)
        other.append(() if is_one(size) else known[label])
    gone = tuple(a for label in {*mine, *theirs} - {*product.out} for a in known.get(label, ()))
    return tuple(other), tuple(known[label] for label in product.out), gone
