"""Recognisers: each looks at one anchor node and says what attention it computes, or why it cannot tell.

A pattern registers an object with `anchors` (the fx targets it looks at) and ``match(node) -> Match | Miss | None``;
None means "not attention at all" and is not reported. Facts only: a pattern never changes the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.fx import Node

from attnopt.ir import Miss

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskTerm:
    """One operand of the mask: "keep" (bool, true keeps), "drop" (bool, true drops) or "add" (added to the score).

    `fill` is what a dropped score becomes (a keep or drop term of a written-out attention); None for an SDPA mask.
    """

    kind: Literal["keep", "drop", "add"]
    node: Node
    fill: float | None = None


@dataclass(frozen=True)
class Match:
    """What an anchor computes: softmax(scale · q kᵀ + terms) v, with k and v of shape (B, KV heads, Sk, ·).

    `k_transposed` says that `k` is the (B, KV heads, D, Sk) operand of the first product instead.
    """

    pattern: str
    anchor: Node
    out: Node
    q: Node
    k: Node
    v: Node
    scale: float
    causal: bool = False
    terms: tuple[MaskTerm, ...] = ()
    k_transposed: bool = False


class Pattern(Protocol):
    anchors: Sequence[Any]
    match: Callable[[Node], Match | Miss | None]


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, if it has one."""
    held = node.meta.get("val") if isinstance(node, Node) else None
    return held if isinstance(held, torch.Tensor) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(item: Any) -> float | None:
    """A Python float for a literal number; None for anything decided at run time."""
    return float(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else None


def inactive_dropout(node: Node) -> bool:
    """A dropout that changes nothing: probability 0, or not training."""
    return node.target == aten.dropout.default and (node.args[1] == 0 or node.args[2] is False)


def same(a: Any, b: Any) -> bool:
    """Two sizes proved equal: never by a guard, so that asking does not cause a recompile."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a == b if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def unrepeat(node: Node) -> Node:
    """The KV tensor (B, KV heads, S, D) behind a repeat to (B, heads, S, D); `node` itself where there is none.

    expand(unsqueeze(x, 2)) reshaped, or repeat_interleave(x, r, 1): consecutive query heads share a KV head.
    """
    held = value(node)
    if node.target == aten.repeat_interleave.self_int and argument(node, 2, "dim") in (1, -3) and held is not None:
        return node.args[0]
    if node.target not in (aten._unsafe_view.default, aten.view.default, aten.reshape.default) or held is None:
        return node
    inner = node.args[0]
    while inner.target in (aten.clone.default, aten.contiguous.default):
        inner = inner.args[0]
    if inner.target != aten.expand.default or inner.args[0].target != aten.unsqueeze.default:
        return node
    source = inner.args[0].args[0]
    base, wide = value(source), value(inner)
    if base is None or wide is None or base.ndim != 4 or held.ndim != 4 or wide.ndim != 5:
        return node
    repeat = wide.shape[2]
    kept = all(same(wide.shape[d], s) for d, s in zip((0, 1, 3, 4), base.shape, strict=True))
    merged = isinstance(repeat, int) and same(held.shape[1], base.shape[1] * repeat)
    others = all(same(held.shape[d], base.shape[d]) for d in (0, 2, 3))
    return source if inner.args[0].args[1] in (2, -3) and kept and merged and others else node


def unrepeated_pair(k: Node, v: Node) -> tuple[Node, Node]:
    """K and V without their repeats, if both had the same one; else both as they are."""
    k_base, v_base = unrepeat(k), unrepeat(v)
    a, b = value(k_base), value(v_base)
    if k_base is k or v_base is v or a is None or b is None or not same(a.shape[1], b.shape[1]):
        return k, v
    return k_base, v_base
