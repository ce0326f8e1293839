"""Compare a rewritten site with its original by running both on random inputs.

    q, k, v, mask inputs  ->  original subgraph  ->  a
    q, k, v, mask inputs  ->  what replaces it   ->  b       a == b wherever a query keeps a key

Run by `Program.replace` with ``options={"verify": True}`` or ATTNOPT_VERIFY=1, and by the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.errors import VerificationError
from attnopt.ir import Region
from attnopt.masks.interpret import MASKED
from attnopt.passes.arrange import canonical, rearrange, term_dims
from attnopt.patterns import alike, checked

# Largest error of an output whose values are averages of standard normal ones.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def check_region(gm: GraphModule, region: Region, new: Node) -> None:
    """Raise VerificationError where `new` computes something else than ``region.out``.

    Both are cut off at the operands and the mask's loads and fed random values; a symbolic size is its hint.
    """
    match = region.match
    generator = torch.Generator().manual_seed(0)
    values: dict[Node, Any] = {o.node: sample(o.node, generator) for o in (match.q, match.k, match.v)}
    read = set().union(*(ancestors(t.node) for t in match.terms))
    for node in dict.fromkeys(original(node, read) for node in region.loads.values()):
        values.setdefault(node, sample(node, generator, bool(region.meaning.assumptions)))
    for term in (t for t in match.terms if checked(t)):
        # The same mask computed once more must not be sampled apart.
        twin = next((o.node for o in match.terms if o.node in values and alike(o.node, term.node)), None)
        if twin is not None:
            values[term.node] = values[twin]
    with torch.no_grad():
        expected = evaluate(gm, region.out, values, generator)
        found = evaluate(gm, new, values, generator)
        keep = kept(gm, region, values, generator)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        shapes = f"{found.dtype} {tuple(found.shape)}", f"{expected.dtype} {tuple(expected.shape)}"
        raise VerificationError(f"the rewrite yields {shapes[0]}, the original {shapes[1]}")
    difference = (found - expected).double().abs().masked_fill(~keep, 0.0)
    limit = TOLERANCE.get(expected.dtype, 1e-4)
    largest = float(difference.max()) if difference.numel() else 0.0
    if not largest <= limit:
        limits = f"{largest:.3g} on random inputs (limit {limit:g})"
        raise VerificationError(f"the rewrite differs from the original by {limits}")


def ancestors(node: Node) -> set[Node]:
    found, stack = {node}, [node]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack += new
    return found


def original(node: Node, read: set[Node]) -> Node:
    """The node itself, or what a comparison made for a load reads."""
    while node not in read:
        node = node.all_input_nodes[0]
    return node


def hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def sample(node: Node, generator: torch.Generator, zero_or_one: bool = False) -> Any:
    """A random value like the node's fake one; flags keep their first key, so that causal rows keep one."""
    like = node.meta["val"]
    if not isinstance(like, Tensor):
        return hint(like) if isinstance(like, (int, torch.SymInt)) else like
    shape = [hint(s) for s in like.shape]
    if like.dtype.is_floating_point and not zero_or_one:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)
    made = torch.rand(shape, generator=generator) < 0.7
    if made.ndim:
        made[..., 0] = True
    return made.to(like.device, like.dtype)


def evaluate(gm: GraphModule, target: Node, values: dict[Node, Any], generator: torch.Generator) -> Tensor:
    """The value of `target`, computed from `values`; whatever else the cut reads is sampled and added to them."""
    done = dict(values)
    stack = [target]
    while stack:
        node = stack[-1]
        if node in done:
            stack.pop()
            continue
        missing = [n for n in node.all_input_nodes if n not in done]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node.op == "placeholder":
            done[node] = values[node] = sample(node, generator)
        elif node.op == "get_attr":
            done[node] = attribute(gm, str(node.target))
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), done.__getitem__)
            done[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise VerificationError(f"{node.op} nodes cannot be run on their own")
    return done[target]


def attribute(gm: GraphModule, path: str) -> Any:
    held: Any = gm
    for name in path.split("."):
        held = getattr(held, name)
    return held


def kept(gm: GraphModule, region: Region, values: dict[Node, Any], generator: torch.Generator) -> Tensor:
    """Where the output is defined, in its own layout: the rows whose query keeps at least one key."""
    match = region.match
    q, k, v = (evaluate(gm, node, values, generator) for node in (region.q, region.k, region.v))
    keep = torch.ones(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if match.causal:
        keep = keep.tril()
    roles = zip((match.roles.batch, match.roles.heads, match.roles.queries, match.roles.keys), keep.shape, strict=True)
    sizes = {atom: hint(atom.size) for atoms, _ in roles for atom in atoms}
    sizes |= {atom: hint(atom.size) for atom in match.roles.values}
    for term in (t for t in match.terms if not checked(t)):
        tensor = evaluate(gm, term.node, values, generator)
        tensor = rearrange(lambda target, *args: target(*args), tensor, *term_dims(match, term), sizes)
        if term.kind == "add":
            keep = keep & (tensor > MASKED)
        else:
            keep = keep & (tensor.bool() if term.kind == "keep" else ~tensor.bool())
    rows = keep.any(-1, keepdim=True).expand(-1, -1, -1, v.shape[3])
    return rearrange(lambda target, *args: target(*args), rows, canonical(match)[3], match.out.dims, sizes)
