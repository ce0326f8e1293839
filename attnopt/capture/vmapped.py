"""Replace what Dynamo recorded of a `torch.vmap` by the batched operations it stands for.

_vmap_increment_nesting(N, ...)                      ->   i = unsqueeze(x, 1)
i = _add_batch_dim(x, 0, 1); le = i <= y                  le = aten.le.Tensor(i, y)
m = _remove_batch_dim(le, 1, N, 0)
_vmap_decrement_nesting()

The pre-dispatch export meets a batched tensor before its batching rule has run and fails. Traced by itself, below
functorch, such a region is plain ATen, differentiable as written, and the export takes that. It is the whole of an
outermost `vmap` with those inside it. A region is left as it is, for the export to be refused with a reason, where it
holds another transform or a switch of gradients, or cannot be traced; all are where autocast is on, whose casts it
would hide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.capture import autocast

log = logging.getLogger("attnopt")
functorch = torch._C._functorch
# What tells where a node comes from.
ORIGIN = ("nn_module_stack", "stack_trace")


def nesting(node: Node) -> int:
    """1 where a transform of torch.func is entered, -1 where it is left, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def regions(gm: GraphModule) -> list[list[Node]]:
    """The nodes from the entry to the exit of every outermost transform, in order."""
    found: list[list[Node]] = []
    depth = 0
    for node in gm.graph.nodes:
        step = nesting(node)
        if depth == 0 and step == 1:
            found.append([])
        if depth or step == 1:
            found[-1].append(node)
        depth += step
    return found


def open_vmaps(gm: GraphModule) -> None:
    """Put the batched operations of every region that can be traced in its place."""
    found = regions(gm)
    if not found or autocast.current() or any(n.target is autocast.ENTER for n in gm.graph.nodes):
        return
    for region in found:
        only_vmap = all("_vmap_" in n.target.__name__ for n in region if nesting(n))
        if only_vmap and all(n.target is not torch._C._set_grad_enabled for n in region):
            open_vmap(gm, region)


def open_vmap(gm: GraphModule, region: list[Node]) -> None:
    """Replace one region, if it can be traced."""
    # A constant is an input like any other.
    body, inside = gm.graph, {n for n in region if n.op != "get_attr"}
    taken = dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside)
    given = dict.fromkeys(n for n in region if n in inside and not inside.issuperset(n.users))
    values = [fresh(n.meta.get("example_value")) for n in taken]
    if any(v is None for v in values):
        return
    try:
        traced = batched(gm, region, inside, list(taken), list(given), values)
    except Exception:
        log.debug("a region of vmap was not opened", exc_info=True)
        return
    if any(n.op == "get_attr" for n in traced.graph.nodes):
        return
    inputs = (n for n in traced.graph.nodes if n.op == "placeholder")
    copies: dict[Node, Node] = dict(zip(inputs, taken, strict=True))
    origin = {k: v for k, v in region[0].meta.items() if k in ORIGIN}
    with body.inserting_before(next(n for n in reversed(region) if n in inside)):
        results: Any = body.graph_copy(traced.graph, copies)
    for new in copies.values():
        if new not in taken:
            new.meta = dict(origin)
    for old, new in zip(given, results, strict=True):
        new.meta.setdefault("example_value", old.meta.get("example_value"))
        old.replace_all_uses_with(new, lambda user: user not in inside)
    for node in reversed(region):
        if node in inside:
            body.erase_node(node)


def fresh(value: Any) -> Any:
    """A fake value like `value` in the fake mode of this compilation; None where there is none to stand for it."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, torch.SymInt)) else None
    if value.layout is not torch.strided or value.is_nested:
        return None
    # Dynamo traced in another mode than the one that the export will use; both have the same symbols.
    with torch._guards.detect_fake_mode([value]):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def batched(
    gm: GraphModule, region: list[Node], inside: set[Node], taken: list[Node], given: list[Node], values: list[Any]
) -> GraphModule:
    """The plain operations that a region runs, as a graph from its inputs to its outputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    alone = torch.fx.Graph()
    copies = {node: alone.placeholder(node.name) for node in taken}
    for node in region:
        if node in inside:
            copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(tuple(copies[n] for n in given))
    run = torch.fx.Interpreter(GraphModule(gm, alone)).run
    with torch._guards.detect_fake_mode(values), at_level(), torch.no_grad():
        return make_fx(run)(*values)


@contextmanager
def at_level() -> Iterator[None]:
    """Leave torch.func's stack as high as it was, also after a failure between an entry and its exit."""
    before = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(before)
