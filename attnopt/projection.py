"""The output projection of an observed attention: the weight that its heads' outputs are multiplied with next.

    observer (B, H, N, Dv) -> permute, reshape (B, N, H * Dv) -> linear with W_O

Found by following the result through the graph, not by a module's name. What moves the values otherwise on the way (a
gate, a norm, a quantised product) has no such weight, and None is the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
# What only arranges values, or rounds them.
ARRANGES = {
    aten.permute.default, aten.transpose.int, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.alias.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.t.default,
}  # fmt: skip
# Position of the rows and of the weight (in, out) in the arguments of a product; `linear` has it as (out, in).
PRODUCTS = {
    aten.linear.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
}


def projection_of(node: Node) -> Tensor | None:
    """The weight (out, H * Dv) that the result (B, H, N, Dv) of `node` goes into, its heads one after the other."""
    chain: list[Node] = []
    at = node
    while len(at.users) == 1:
        (at_next,) = at.users
        if at_next.target in PRODUCTS:
            rows, weight = PRODUCTS[at_next.target]
            held = value_of(at_next.args[weight]) if at_next.args[rows] is at else None
            if held is None or held.ndim != 2:
                return None
            held = held if at_next.target is aten.linear.default else held.T
            return held if _heads_in_order(node, chain, held.shape[1]) else None
        if at_next.target not in ARRANGES or at_next.args[0] is not at:
            return None
        chain.append(at_next)
        at = at_next
    return None


def _heads_in_order(node: Node, chain: list[Node], width: int) -> bool:
    """Whether the arrangement brings (b, h, n, d) to row (b, n) and column h * Dv + d: tried on numbered entries."""
    shape = node.meta["val"].shape
    if not all(isinstance(size, int) for size in shape) or shape[1] * shape[3] != width:
        return False
    # Of few rows, but of their own length: the sizes of views are in the graph.
    numbers = torch.arange(shape.numel()).reshape(shape)
    expected = numbers.transpose(1, 2).reshape(-1, width)
    for step in chain:
        if step.target in (aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default):
            continue
        numbers = applied(step, numbers)
    return numbers.shape[-1] == width and torch.equal(numbers.reshape(-1, width), expected)


def applied(step: Node, to: Tensor) -> Tensor:
    target: Any = aten.reshape.default if step.target in (aten.view.default, aten._unsafe_view.default) else step.target
    if any(isinstance(a, Node) for a in step.args[1:]):
        return to
    found: Tensor = target(to, *step.args[1:], **step.kwargs)
    return found


def value_of(node: Any) -> Tensor | None:
    """The tensor that a node holds in the call being compiled: an input, rearranged or cast, or None."""
    if not isinstance(node, Node):
        return None
    if node.op == "placeholder":
        try:
            held = node.meta["grapharg"].example
        except (KeyError, AttributeError, TypeError, AssertionError):
            return None
        return held.detach() if isinstance(held, Tensor) and not held.is_meta else None
    if node.target in ARRANGES:
        held = value_of(node.args[0])
        return None if held is None else applied(node, held)
    return None
