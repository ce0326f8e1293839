"""Python floats that Dynamo made inputs of its graph, which it does under ``dynamic=True``.

module.scaling    l_self_scaling.item() * x    ->   0.125 * x, under a guard: attributes rarely change
fn(..., scale)    l_scale_.item() * x          ->   l_scale_ * x, where the tensor is the float, in float64

A guard on a float that does change would recompile at every change, where inductor would not. An argument of which
anything else is asked than arithmetic is made a number as well: inductor's own compilation needs its value then.
Half precisions meet the float in float32 and are rounded once, as inductor computes with floats.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

ARITHMETIC = {
    **{getattr(operator, name): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")},
    **{getattr(torch, name): getattr(operator, name) for name in ("add", "sub", "mul")},
    **{torch.div: operator.truediv, torch.multiply: operator.mul, operator.neg: operator.neg},
    **{"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv},
}
HALF = (torch.float16, torch.bfloat16)


def settle_float(item: Node) -> None:
    """Make a float that is an input a number or a tensor of the graph. Items of tensors that hold data are left, and
    the export will say so."""
    held = item.meta.get("example_value")
    if not isinstance(held, torch.SymFloat) or held.node.hint is None:
        return
    found = None if is_attribute(item.args[0]) else arithmetic(item)
    if found is None:
        replace_by_number(item, float(held))
    else:
        make_tensor(item, found)


def is_attribute(placeholder: Any) -> bool:
    """Whether Dynamo found the float in an object rather than among the arguments."""
    source = getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)
    while source is not None:
        if not hasattr(source, "base"):
            return not getattr(source, "is_input", False)
        if hasattr(source, "member"):
            return True
        source = source.base
    return True


def arithmetic(item: Node) -> list[Node] | None:
    """The nodes that compute with a float, in order: Python's arithmetic on it, and that with tensors, where the
    tensors decide the result's dtype. None if there is any other use of it."""
    numbers, found = {item}, []
    for node in list(item.graph.nodes):
        if numbers.isdisjoint(node.all_input_nodes):
            continue
        if node.op not in ("call_function", "call_method") or node.target not in ARITHMETIC or node.kwargs:
            return None
        values = [a.meta.get("example_value") if isinstance(a, Node) else a for a in node.args]
        tensors = [v for v in values if isinstance(v, Tensor)]
        if any(not t.dtype.is_floating_point or t.ndim == 0 for t in tensors):
            return None
        if not tensors:
            if not all(isinstance(v, (int, float, torch.SymFloat)) for v in values):
                return None
            numbers.add(node)
        found.append(node)
    return found


def replace_by_number(item: Node, value: float) -> None:
    """Asking for the value has made the guard that recompiles when the float changes."""
    for user in list(item.users):
        user.args, user.kwargs = torch.fx.node.map_aggregate(
            (user.args, user.kwargs), lambda found: value if found is item else found
        )
    item.graph.erase_node(item)


def make_tensor(item: Node, users: list[Node]) -> None:
    """Let `users` compute with the tensor of which the float was taken, in the dtype that inductor computes in."""
    graph, number = item.graph, item.args[0]
    item.replace_all_uses_with(number)
    graph.erase_node(item)
    for node in users:
        node.op, node.target = "call_function", ARITHMETIC[node.target]
        tensor = next((a for a in node.args if isinstance(held(a), Tensor) and held(a).ndim), None)
        if tensor is None:
            continue
        dtype = held(tensor).dtype
        wide = torch.float32 if dtype in HALF else dtype
        with graph.inserting_before(node):
            node.args = tuple(
                a if a is tensor and wide == dtype else graph.call_function(torch.Tensor.to, (a, wide))
                for a in node.args
            )
        if wide != dtype:
            with graph.inserting_after(node):
                rounded = graph.call_function(torch.Tensor.to, (node, dtype))
            rounded.meta = dict(node.meta)
            node.replace_all_uses_with(rounded, lambda user, rounded=rounded: user is not rounded)


def give_floats_back(gm: GraphModule) -> None:
    """Take the floats of a rewritten graph from their tensors again, l_scale_  ->  1.0 * l_scale_.item(), in float64.

    Inductor makes numbers, and so guards, of the floats that it does not itself see in arithmetic with tensors.
    """
    aten = torch.ops.aten
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for node in placeholders:
        number = getattr(node.meta.get("example_value"), "item_memo", None)
        if not node.users or not isinstance(number, torch.SymFloat):
            continue
        with gm.graph.inserting_before(first):
            item = gm.graph.call_function(aten.item.default, (node,))
            one = gm.graph.call_function(aten.full.default, ([], 1.0), {"dtype": torch.float64})
            again = gm.graph.call_function(aten.mul.Tensor, (one, item))
        node.replace_all_uses_with(again, lambda user, item=item: user is not item)
    gm.recompile()


def held(item: Any) -> Any:
    return item.meta.get("example_value") if isinstance(item, Node) else item
