"""Rewrite every spelling of the same into one, by named rules applied until none holds.

    exp(x - amax(x)) / sum(...)           ->  softmax(x)
    baddbmm(c, a, b, beta, alpha)         ->  c * beta + (a @ b) * alpha
    view(x, x.shape), dropout(x, eval)    ->  x

Each rule changes a result by rounding at most. `Program.hits` counts them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes import remove_dead_code
from attnopt.passes.program import Builder, Program
from attnopt.patterns import inactive_dropout, number, value
from attnopt.patterns.layout import VIEWS, order_of, same, shape_of

aten = torch.ops.aten
Rule = Callable[[Program, Node], "Node | None"]


def unchanged(node: Node, source: Any) -> Node | None:
    """`source` if it can stand in for `node`: a tensor of the same shape, dtype and device."""
    new, old = value(source), value(node)
    if new is None or old is None or new.dtype != old.dtype or new.device != old.device or new.ndim != old.ndim:
        return None
    return source if all(same(a, b) for a, b in zip(new.shape, old.shape, strict=True)) else None


def drop_identity_view(program: Program, node: Node) -> Node | None:
    """view(x, x.shape), expand to the same, a permutation that moves nothing, the whole as a slice"""
    if node.target in (*VIEWS, aten.expand.default, aten.alias.default):
        return unchanged(node, node.args[0])
    if node.target == aten.permute.default and order_of(node) == list(range(len(shape_of(node)))):
        return node.args[0]
    whole = node.target == aten.slice.Tensor and (len(node.args) < 5 or node.args[4] == 1)
    return unchanged(node, node.args[0]) if whole else None


def drop_identity_cast(program: Program, node: Node) -> Node | None:
    if node.target not in (aten.to.dtype, aten.type_as.default):
        return None
    return unchanged(node, node.args[0])


def drop_inactive_dropout(program: Program, node: Node) -> Node | None:
    return node.args[0] if inactive_dropout(node) else None


def drop_neutral_operand(program: Program, node: Node) -> Node | None:
    """x * 1, x / 1, x + 0"""
    neutral = {aten.mul.Tensor: 1.0, aten.mul.Scalar: 1.0, aten.div.Tensor: 1.0, aten.add.Tensor: 0.0}.get(node.target)
    if neutral is None or node.kwargs or number(node.args[1]) != neutral:
        return None
    return unchanged(node, node.args[0])


def drop_empty_part(program: Program, node: Node) -> Node | None:
    """cat([nothing, x]): what a cache writes on its first call"""
    if node.target != aten.cat.default:
        return None
    parts = [p for p in node.args[0] if not (value(p) is not None and 0 in map(static, shape_of(p)))]
    return unchanged(node, parts[0]) if len(parts) == 1 else None


def static(size: Any) -> int:
    return size if isinstance(size, int) else -1


def open_baddbmm(program: Program, node: Node) -> Node | None:
    if node.target != aten.baddbmm.default:
        return None
    call = Builder(program.gm, node).call
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = call(aten.bmm.default, *node.args[1:3])
    product = product if alpha == 1 else call(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    added = node.args[0] if beta == 1 else call(aten.mul.Tensor, node.args[0], beta)
    return call(aten.add.Tensor, product, added)


def softmax_from_quotient(program: Program, node: Node) -> Node | None:
    """exp(x) / sum(exp(x)), and with one more than the sum: a soft-max that may attend to nothing"""
    if node.target != aten.div.Tensor or not isinstance(node.args[1], Node):
        return None
    top, total = node.args
    more = None
    if total.target == aten.add.Tensor and number(total.args[1]) is not None and not total.kwargs:
        total, more = total.args
    if total.target != aten.sum.dim_IntList or not isinstance(top, Node) or top.target != aten.exp.default:
        return None
    keep = total.args[2] if len(total.args) > 2 else total.kwargs.get("keepdim", False)
    if total.args[0] is not top or not keep or len(total.args[1]) != 1 or not floating(node) or total.kwargs.get("dtype"):
        return None
    x, dim = top.args[0], total.args[1][0]
    call = Builder(program.gm, node).call
    if more is None:
        return call(aten.softmax.int, x, dim)
    if number(more) != 1 or dim % len(shape_of(x)) != len(shape_of(x)) - 1 or not isinstance(shape_of(x)[-1], int):
        return None
    column = call(aten.zeros_like.default, call(aten.slice.Tensor, x, -1, 0, 1))
    weights = call(aten.softmax.int, call(aten.cat.default, [x, column], -1), -1)
    return call(aten.slice.Tensor, weights, -1, 0, shape_of(x)[-1])


def softmax_from_logarithm(program: Program, node: Node) -> Node | None:
    """exp(x - logsumexp(x)), exp(log_softmax(x))"""
    if node.target != aten.exp.default or not floating(node):
        return None
    inner = node.args[0]
    call = Builder(program.gm, node).call
    if inner.target == aten.log_softmax.int and len(inner.args) == 2 and not inner.kwargs:
        return call(aten.softmax.int, *inner.args)
    if inner.target != aten.sub.Tensor or inner.kwargs or not isinstance(inner.args[1], Node):
        return None
    x, norm = inner.args
    if norm.target != aten.logsumexp.default or norm.args[0] is not x or len(norm.args) < 3 or not norm.args[2]:
        return None
    dims = norm.args[1]
    return call(aten.softmax.int, x, dims[0]) if len(dims) == 1 else None


def floating(node: Node) -> bool:
    held = value(node)
    return held is not None and held.dtype.is_floating_point


RULES: Sequence[Rule] = (
    drop_identity_view,
    drop_identity_cast,
    drop_inactive_dropout,
    drop_neutral_operand,
    drop_empty_part,
    open_baddbmm,
    softmax_from_quotient,
    softmax_from_logarithm,
)


def returned(node: Node) -> bool:
    """Whether the node leaves the graph: then it stays, so that no output becomes an alias of an input."""
    return any(u.op == "output" or u.target == aten.copy_.default for u in node.users)


def run(program: Program) -> None:
    remove_dead_code.run(program)
    graph = program.gm.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or returned(node) or "val" not in node.meta:
            continue
        for rule in RULES:
            with graph.inserting_before(node):
                new = rule(program, node)
            if new is not None:
                node.replace_all_uses_with(new)
                program.hits[rule.__name__] += 1
                break
    remove_dead_code.run(program)
