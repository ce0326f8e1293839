"""Rules for what makes tensors from nothing: aranges and constants."""

from __future__ import annotations

import torch
from torch.fx import Node

from attnopt.masks.expressions import Affine, as_constant
from attnopt.masks.interpret import Index, Interpreter, argument, rule
from attnopt.masks.predicates import FALSE, TRUE
from attnopt.masks.values import Value, constant

aten = torch.ops.aten


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(_: Interpreter, node: Node, index: Index) -> Value | None:
    numbers = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1)
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if not isinstance(step, int) or not isinstance(start, (int, torch.SymInt)):
        return None
    # Counting in half precision rounds from 2048 on.
    if node.meta["val"].dtype in (torch.float16, torch.bfloat16):
        return None
    return index[0] * step + Affine((), as_constant(start))


def filled(value: float, node: Node) -> Value:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return TRUE if value else FALSE
    return constant(value) if dtype.is_floating_point else Affine((), int(value))


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(_: Interpreter, node: Node, index: Index) -> Value:
    return filled(0.0, node)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(_: Interpreter, node: Node, index: Index) -> Value:
    return filled(1.0, node)


@rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)
def full(_: Interpreter, node: Node, index: Index) -> Value | None:
    position = {aten.new_full.default: 2, aten.scalar_tensor.default: 0}.get(node.target, 1)
    value = argument(node, position, "fill_value")
    if isinstance(value, torch.SymInt) and not node.meta["val"].dtype.is_floating_point:
        return Affine((), as_constant(value))
    return filled(float(value), node) if isinstance(value, (int, float)) else None
