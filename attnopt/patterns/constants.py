"""What a graph alone tells of a tensor's values: of a small one made of constants, of a mask of zeros and ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.patterns import value
from attnopt.patterns.layout import BACK, CASTS, COPIES

aten = torch.ops.aten
# An index over heads takes a handful of operations; anything longer is data.
MAX_NODES = 16
MAX_ELEMENTS = 4096


def evaluated(node: Node) -> Tensor | None:
    """`node` computed now, if nothing it reads depends on the graph's inputs; None otherwise."""
    order: list[Node] = []
    stack = [node]
    while stack:
        at = stack.pop()
        held = at.meta.get("val")
        if at.op != "call_function" or not isinstance(held, Tensor) or held.dtype.is_floating_point:
            return None
        sizes = [*held.shape]
        if not all(isinstance(s, int) for s in sizes) or held.numel() > MAX_ELEMENTS or len(order) > MAX_NODES:
            return None
        if torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
            return None
        order.append(at)
        stack += at.all_input_nodes
    values: dict[Node, Tensor] = {}
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():
        for at in reversed(order):
            if at not in values:
                args, kwargs = torch.fx.node.map_arg((at.args, at.kwargs), values.__getitem__)
                values[at] = at.target(*args, **kwargs)  # type: ignore[operator]
    return values[node].cpu()


def zero_or_one(node: Node) -> bool:
    """Whether every entry is proved to be 0 or 1: a boolean, one made a number, or a triangle of ones."""
    held = value(node)
    if held is None:
        return False
    if held.dtype == torch.bool or node.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return True
    views = node.target in BACK or node.target in CASTS or node.target in COPIES
    simple = views or node.target in (aten.tril.default, aten.triu.default, aten.slice.Tensor)
    return simple and isinstance(node.args[0], Node) and zero_or_one(node.args[0])
