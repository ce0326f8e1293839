"""Recognisers: each looks at one anchor node and says what attention it computes, or why it cannot tell.

A pattern registers an object with `anchors` (the fx targets it looks at) and ``match(node) -> Match | Miss | None``;
None means "not attention at all" and is not reported; a tuple is several attentions with one anchor. Facts only: a
pattern never changes the graph. Axes are atoms (patterns/layout.py), so a match is a proof: nothing in it rests on a
dimension's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns.layout import Atom, Dims, Space, same, shape_of

aten = torch.ops.aten
COPIED = (aten.clone.default, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class Operand:
    """A node and what each of its dimensions is."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class RawTerm:
    """One operand of the mask or bias, and the dims of the scores where it meets them.

    kind, fill, factor: as in `masks.terms.Term`; "times" is a factor that must be one wherever a key is kept, and
    "zeroes" is true where a weight is set to zero, which must be nowhere where a key is kept.
    """

    kind: Literal["keep", "drop", "add", "times", "zeroes"]
    node: Node
    scores: Dims
    fill: float | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Factor:
    """A tensor that the scores are multiplied with, or divided by: the same for every key, of any sign.

    scores: the dims of the scores where it meets them; dtype: what the model multiplied in.
    """

    node: Node
    scores: Dims
    divides: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Roles:
    """Which atoms are batch, query head, query position, key position, feature and value feature.

    The heads are (KV heads, queries of one KV head), so that consecutive query heads share keys; `group` counts the
    atoms of the second part.
    """

    batch: tuple[Atom, ...]
    heads: tuple[Atom, ...]
    group: int
    queries: tuple[Atom, ...]
    keys: tuple[Atom, ...]
    features: tuple[Atom, ...]
    values: tuple[Atom, ...]

    @property
    def kv_heads(self) -> tuple[Atom, ...]:
        return self.heads[: len(self.heads) - self.group]


@dataclass(frozen=True)
class Match:
    """What an anchor computes: softmax(softcap · tanh(scale · (factors · q) kᵀ / softcap) + terms) v.

    sink: the node that holds one more score per row, with the dims of the scores without it.
    inner: the nodes between the operands and the output, which a rewrite makes useless.
    read: results of the path that something else reads as well, such as returned weights.
    places: (node, dimension) where an axis of a size known only at run time stands alone.
    rules: names of the rules that led from the soft-max to the product, in order.
    shared: how many products the weights go into; each is an attention of its own, with these scores.
    factors: what the scores are multiplied with before anything is added to them or masked; it is put into q.
    """

    pattern: str
    anchor: Node
    out: Operand
    q: Operand
    k: Operand
    v: Operand
    roles: Roles
    scale: float
    softcap: float = 0.0
    causal: bool = False
    terms: tuple[RawTerm, ...] = ()
    sink: Operand | None = None
    inner: tuple[Node, ...] = ()
    read: tuple[Node, ...] = ()
    places: dict[Atom, tuple[Node, int]] = field(default_factory=dict, compare=False, repr=False)
    rules: tuple[str, ...] = ()
    factors: tuple[Factor, ...] = ()
    shared: int = 1

    def reading(self, old: Node, new: Node) -> Match:
        """The same, of operands that are `new` where they were `old`."""

        def renewed(operand: Operand) -> Operand:
            return replace(operand, node=new) if operand.node is old else operand

        places = {atom: (new if node is old else node, d) for atom, (node, d) in self.places.items()}
        return replace(self, q=renewed(self.q), k=renewed(self.k), v=renewed(self.v), places=places)


class Pattern(Protocol):
    anchors: Sequence[Any]
    match: Callable[[Node], Match | Miss | tuple[Match | Miss, ...] | None]


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, if it has one."""
    held = node.meta.get("val") if isinstance(node, Node) else None
    return held if isinstance(held, torch.Tensor) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def checked(term: RawTerm) -> bool:
    """Whether a term masks nothing itself, but must agree with the mask."""
    return term.kind in ("times", "zeroes")


def number(item: Any) -> float | None:
    """A Python float for a literal number; None for anything decided at run time."""
    return float(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else None


def scalar(item: Any) -> float | None:
    """A literal number, or the value of a 0-d constant made in the graph, rounded to its dtype."""
    if not isinstance(item, Node):
        return number(item)
    if item.op == "get_attr":
        return constant(item)
    held = value(item)
    if held is None or held.numel() != 1:
        return None
    found: float | None = None
    if item.target in (aten.scalar_tensor.default, aten.full.default):
        found = number(item.args[item.target == aten.full.default])
    elif item.target in (aten.sqrt.default, aten.rsqrt.default) and (inner := scalar(item.args[0])) is not None:
        found = inner ** (0.5 if item.target == aten.sqrt.default else -0.5) if inner > 0 else None
    elif item.target in (aten._to_copy.default, aten.to.dtype, aten.lift_fresh_copy.default, *COPIED):
        found = scalar(item.args[0])
    if found is None or (not held.dtype.is_floating_point and not math.isfinite(found)):
        return None
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return float(torch.tensor(found, dtype=torch.float64).to(held.dtype))


def constant(node: Node) -> float | None:
    """The number in a constant tensor that the graph itself holds."""
    held = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(held, torch.Tensor) or isinstance(held, torch.nn.Parameter) or held.numel() != 1:
        return None
    return float(held.item()) if type(held) is torch.Tensor else None


def alike(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two nodes are the same expression over the same inputs."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    if depth == 0 or a.op != b.op or torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    if a.op == "get_attr":
        return scalar(a) is not None and scalar(a) == scalar(b)
    if a.op != "call_function" or a.target != b.target or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    return all(alike(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def inactive_dropout(node: Node) -> bool:
    """A dropout that changes nothing: probability 0, or not training."""
    return node.target == aten.dropout.default and (node.args[1] == 0 or node.args[2] is False)


__all__ = [
    "Atom", "Dims", "Factor", "Match", "Operand", "Pattern", "RawTerm", "Roles", "Space", "alike", "argument", "aten",
    "checked", "inactive_dropout", "number", "same", "scalar", "shape_of", "value",
]  # fmt: skip
