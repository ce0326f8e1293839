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
from attnopt.patterns.constants import zero_or_one
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
    """exp(x) / sum(exp(x)); with more than the sum below, a soft-max with one more column that is dropped again"""
    if node.target != aten.div.Tensor or not isinstance(node.args[1], Node) or not floating(node):
        return None
    top, total = node.args
    more: Any = None
    if total.target == aten.add.Tensor and not total.kwargs:
        sums = [a for a in total.args if isinstance(a, Node) and a.target == aten.sum.dim_IntList]
        if len(sums) != 1:
            return None
        more = total.args[1] if sums[0] is total.args[0] else total.args[0]
        total = sums[0]
    if total.target != aten.sum.dim_IntList or total.args[0] is not top or total.kwargs.get("dtype"):
        return None
    keep = total.args[2] if len(total.args) > 2 else total.kwargs.get("keepdim", False)
    if not keep or len(total.args[1]) != 1:
        return None
    builder, dim = Builder(program.gm, node), total.args[1][0]
    x = exponent(builder, top)
    if x is None:
        return None
    if more is None:
        return builder.call(aten.softmax.int, x, dim)
    rank, keys = len(shape_of(x)), shape_of(x)[-1]
    column = sink_column(builder, x, more)
    if column is None or dim % rank != rank - 1:
        return None
    weights = builder.call(aten.softmax.int, builder.call(aten.cat.default, [x, column], -1), -1)
    return builder.call(aten.slice.Tensor, weights, -1, 0, keys if isinstance(keys, int) else builder.size(x, -1))


def exponent(builder: Builder, top: Node) -> Node | None:
    """x of exp(x), and of exp(x) * m for a mask m: x where kept, minus infinity elsewhere"""
    if top.target == aten.exp.default:
        return top.args[0]
    if top.target != aten.mul.Tensor or not all(isinstance(a, Node) for a in top.args):
        return None
    power, mask = top.args if top.args[0].target == aten.exp.default else top.args[::-1]
    if power.target != aten.exp.default or not zero_or_one(mask):
        return None
    keep = mask if mask.meta["val"].dtype == torch.bool else builder.call(aten.ne.Scalar, mask, 0)
    return builder.call(aten.where.ScalarOther, keep, power.args[0], float("-inf"))


def sink_column(builder: Builder, x: Node, more: Any) -> Node | None:
    """The score whose exponential is `more`, as a last column of x: 0 for one."""
    sizes = [builder.size(x, d) for d in range(len(shape_of(x)) - 1)]
    if number(more) == 1:
        return builder.call(aten.new_zeros.default, x, [*sizes, 1])
    if not isinstance(more, Node) or shape_of(more)[-1:] != (1,):
        return None
    chain = []
    while more.target in (*VIEWS, aten.expand.default):
        chain.append(more)
        more = more.args[0]
    if more.target != aten.exp.default:
        return None
    score = more.args[0]
    for view in reversed(chain):
        score = builder.call(view.target, score, *view.args[1:])
    return builder.call(aten.expand.default, score, [*sizes, 1])


def column_from_padding(program: Program, node: Node) -> Node | None:
    """softmax(pad(x, (0, 1))): a column of zeros"""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default) or list(node.args[1]) != [0, 1]:
        return None
    plain = node.target == aten.constant_pad_nd.default or node.args[2:3] in ((), ("constant",))
    fill = (
        (node.args[2] if node.target == aten.constant_pad_nd.default else node.args[3])
        if len(node.args) > (2 if node.target == aten.constant_pad_nd.default else 3)
        else 0
    )
    if not plain or fill not in (0, None) or not any("softmax" in str(u.target) for u in node.users):
        return None
    builder, x = Builder(program.gm, node), node.args[0]
    sizes = [builder.size(x, d) for d in range(len(shape_of(x)) - 1)]
    return builder.call(aten.cat.default, [x, builder.call(aten.new_zeros.default, x, [*sizes, 1])], -1)


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
    column_from_padding,
)


def returned(node: Node) -> bool:
    """Whether the node leaves the graph: then it stays, so that no output becomes an alias of an input."""
    return any(u.op == "output" or u.target == aten.copy_.default for u in node.users)


def pure(node: Node) -> bool:
    """Whether two nodes with the same operands compute the same."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or "val" not in node.meta:
        return False
    tags, name = node.target.tags, node.target._schema.name
    random = torch.Tag.nondeterministic_seeded in tags or "empty" in name or "dropout" in name
    return not (random or node.target._schema.is_mutable or returned(node))


def merge_equal(program: Program) -> None:
    """x + y and x + y: computed once"""
    known: dict[Any, Node] = {}
    scope = 0
    for node in list(program.gm.graph.nodes):
        # Nothing moves across a switch of the gradient or autocast mode.
        scope += "_set_grad_enabled" in str(node.target) or "autocast" in str(node.target)
        if not pure(node):
            continue
        key = (scope, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in known:
            node.replace_all_uses_with(known[key])
            program.hits["merge_equal"] += 1
        else:
            known[key] = node


def run(program: Program) -> None:
    remove_dead_code.run(program)
    merge_equal(program)
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
