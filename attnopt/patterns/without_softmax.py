"""Attention without a soft-max: nothing for this project to replace, and said so instead of passed over in silence.

    f(q @ k.T * s) @ v                       sigmoid, relu, relu^2, a mask alone: weights of another kind
    phi(q) @ (phi(k).T @ v) [/ normaliser]   linear already: keys and values are summed before a query comes
    phi(q) * cumsum(phi(k) x v)              the same, causal

All are a product of three, (A B) C, with axes as attention has them. Two bare products are no attention, nor is one of
weights that the model has learned: a two-layer perceptron is f(x @ w1) @ w2. Never a Match, only a Miss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns import alike, argument, scalar, shape_of, value
from attnopt.patterns.layout import BACK, CASTS, COPIES, Atom, Dims, Space
from attnopt.patterns.product import Product, operands_of, product_of
from attnopt.patterns.scores import activations, elementwise
from attnopt.registry import PATTERNS

aten = torch.ops.aten
# What makes weights of scores, or features of a query or a key. Not exp, which is half a soft-max.
FUNCTIONS = {
    "sigmoid", "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh",
    "softplus", "hardsigmoid", "hardswish", "hardtanh", "square", "abs", "clamp", "clamp_min", "cos", "sin",
    "log_sigmoid",
}  # fmt: skip
OF_FEATURES = FUNCTIONS | {"exp", "softmax", "_softmax"}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg", "pow", "maximum", "minimum"}
HIDES = {"tril", "masked_fill", "where"}
PASSED = FUNCTIONS | ARITHMETIC | HIDES | {"cumsum", "dropout"}
# Operations between two of the products.
REACH = 16


@dataclass
class Way:
    """What stands between the last product and the one before: functions in order, whether a mask hides some entries,
    and the axis of a running sum."""

    functions: list[str] = field(default_factory=list)
    masked: bool = False
    running: tuple[Atom, ...] | None = None


def name_of(node: Node) -> str:
    return getattr(node.target, "_opname", "")


@PATTERNS.register("without-softmax", priority=-10)
class WithoutSoftmax:
    anchors = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.sum.dim_IntList)

    @staticmethod
    def match(node: Node) -> Miss | None:
        product = product_of(node) if activations(node) else None
        if product is None:
            return None
        for inner, other in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
            found = three(product, inner, other)
            if found is not None:
                return found
        return None


def three(last: Product, inner: Node, other: Node) -> Miss | None:
    """What (A B) C is an attention of, where `inner` leads back to A B and C is `other`."""
    space, way = Space(), Way()
    out_dims = space.dims_of(last.node)
    dims = operands_of(space, last, out_dims)
    inner_dims, other_dims = dims if inner is last.lhs else dims[::-1]
    reached = back(space, inner, inner_dims, way)
    if reached is None:
        return None
    first, first_dims = reached
    if isinstance(first, Product):
        left, right = first.lhs, first.rhs
        pair = operands_of(space, first, space.resolve(first_dims))
    else:
        left, right = first
        pair = outer_dims(first, space.resolve(first_dims))
    a, b, c, out, weights = (
        {x for d in space.resolve(held) for x in d} for held in (*pair, other_dims, out_dims, inner_dims)
    )
    summed = (weights & c) - out
    if bool(summed & a) == bool(summed & b):
        return None
    if summed & a:
        a, b, left, right = b, a, right, left
    # B, and C with it, have what the last product sums over; A has an axis that the others lack, and so has C, unless
    # it shares the positions of a running sum.
    apart = bool(a - b - c) and bool(way.running or ((c - a - b) and ((a & b) - out)))
    if not apart or not all(map(given, (left, right, other))):
        return None
    return linear(way, right, other) if not way.functions and not way.masked else quadratic(way)


def quadratic(way: Way) -> Miss | None:
    """Weights of every pair, made by something else than a soft-max."""
    if way.running is not None:
        return None
    functions = ", ".join(dict.fromkeys(way.functions))
    made = f"made by {functions}" if functions else "masked scores"
    return Miss(f"its weights are {made}, expected a soft-max over the keys", code="no-softmax")


def linear(way: Way, keys: Node, queries: Node) -> Miss | None:
    """Keys times values first. Without a feature map of both keys and queries it is any product of three matrices."""
    maps = feature_map(keys), feature_map(queries)
    if not all(maps):
        return None
    said = " and ".join(dict.fromkeys(maps))
    summed = "summed over the positions before it" if way.running is not None else "summed over all positions"
    seen = f"it is linear already: keys (through {said}) times values are {summed}, and a query reads the sum"
    return Miss(seen, code="already-linear")


def back(space: Space, node: Node, dims: Dims, way: Way) -> tuple[Product | tuple[Node, Node], Dims] | None:
    """The first product on the way back from `node`, or the two operands of an outer one below a running sum, and the
    dims of its result. None where the way is none that weights or a state take."""
    for _ in range(REACH):
        if node.op != "call_function":
            return None
        if activations(node):
            product = product_of(node)
            return None if product is None else (product, dims)
        if way.running is not None and (pair := outer(node)) is not None:
            return pair, dims
        behind = space.back(node, dims, casts=True)
        if behind is not None:
            node, dims = behind
            continue
        step = onward(node)
        if step is None:
            return None
        name = name_of(node)
        if name == "cumsum":
            dim = argument(node, 1, "dim")
            if way.running is not None or not isinstance(dim, int):
                return None
            way.running = space.resolve(dims)[dim]
        elif name in FUNCTIONS:
            way.functions.insert(0, name)
        elif name == "pow" or (name == "mul" and alike(*node.args[:2])):
            way.functions.insert(0, "square" if name == "mul" or scalar(node.args[1]) == 2 else "pow")
        elif name in HIDES or (name == "mul" and hides_pairs(node, step)):
            way.masked = True
        node = step
    return None


def onward(node: Node) -> Node | None:
    """The operand that the weights or the state came from: of the node's own shape, and computed from a product."""
    name = name_of(node)
    if name not in PASSED:
        return None
    sources = [a for a in dict.fromkeys(node.all_input_nodes) if value(a) is not None and leads_back(a)]
    if len(sources) != 1 or len(shape_of(sources[0])) != len(shape_of(node)):
        return None
    return sources[0] if elementwise(node) or name in ("tril", "cumsum", "dropout") else None


def leads_back(node: Node) -> bool:
    """Whether `back` may come from here to a product of activations or to an outer one."""
    nodes, seen = [node], set[Node]()
    for _ in range(REACH):
        nodes = [n for n in nodes if n.op == "call_function" and n not in seen]
        if any(activations(n) or outer(n) is not None for n in nodes):
            return True
        seen.update(nodes)
        nodes = list(dict.fromkeys(a for n in nodes if viewlike(n) or name_of(n) in PASSED for a in n.all_input_nodes))
    return False


def viewlike(node: Node) -> bool:
    return node.target in BACK or node.target in COPIES or node.target in CASTS


def hides_pairs(node: Node, scores: Node) -> bool:
    """Whether scores are multiplied with what varies over rows and columns and not with data: a mask or a decay."""
    other = next((a for a in node.args[:2] if a is not scores and isinstance(a, Node)), None)
    if other is None or value(other) is None or len(shape_of(other)) < 2:
        return False
    rows, columns = shape_of(other)[-2:]
    lone = [isinstance(s, int) and s == 1 for s in (rows, columns)]
    return not any(lone) and not given(other)


def outer(node: Node) -> tuple[Node, Node] | None:
    """The operands of x[..., :, None] * y[..., None, :], one of which each dimension of the result varies with."""
    if name_of(node) != "mul" or not all(isinstance(a, Node) and value(a) is not None for a in node.args[:2]):
        return None
    shapes = [shape_of(a) for a in node.args[:2]]  # type: ignore[arg-type]
    if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 4:
        return None
    ones = [[isinstance(s, int) and s == 1 for s in shape] for shape in shapes]
    wide = len(shapes[0])
    apart = [d for d in range(wide) if ones[0][d] != ones[1][d]]
    if len(apart) != 2 or ones[0][apart[0]] == ones[0][apart[1]]:
        return None
    return node.args[0], node.args[1]  # type: ignore[return-value]


def outer_dims(pair: tuple[Node, Node], dims: Dims) -> tuple[Dims, Dims]:
    """The dims of the operands of an outer product, given its result's."""
    found = []
    for node in pair:
        lone = [isinstance(s, int) and s == 1 for s in shape_of(node)]
        found.append(tuple(() if one else d for one, d in zip(lone, dims, strict=True)))
    return found[0], found[1]


def feature_map(node: Node) -> str:
    """The function by which features are made of a projection, or an empty string: the first on any way back from here
    over views, sums and joins."""
    nodes, seen = [node], set[Node]()
    for _ in range(REACH):
        nodes = [n for n in nodes if n.op == "call_function" and n not in seen]
        for n in nodes:
            if "softmax" in name_of(n) and leads_back(n.all_input_nodes[0]):
                # Weights of pairs: attention, and nobody's features.
                return ""
            if name_of(n) in OF_FEATURES:
                return "elu + 1" if name_of(n) == "elu" else name_of(n).removeprefix("_")
            if name_of(n) == "mul" and alike(*n.args[:2]):
                return "square"
        seen.update(nodes)
        known = (n for n in nodes if viewlike(n) or name_of(n) in ARITHMETIC | {"cat", "where"})
        nodes = list(dict.fromkeys(a for n in known for a in n.all_input_nodes))
    return ""


def given(node: Node) -> bool:
    """Whether a tensor depends on what the model is called with, and not on parameters and buffers alone."""
    seen, stack = {node}, [node]
    while stack:
        found = stack.pop()
        if found.op == "placeholder" and value(found) is not None and not learned(found):
            return True
        new = [n for n in found.all_input_nodes if n not in seen]
        seen.update(new)
        stack += new
    return False


def learned(node: Node) -> bool:
    """Whether an input of the graph is a parameter or a buffer of the model."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    return getattr(getattr(source, "base", None), "member", None) in ("_buffers", "_parameters")
