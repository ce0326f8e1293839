"""Run a captured graph piece by piece and keep only what passes between them: activation checkpointing, for any model.

    n_1 ... n_k | n_k+1 ... | ... n_m     cut between observed attentions, where the fewest bytes are alive

The backward pass then runs each piece again before going back through it, so the memory of one piece is needed at a
time, and a tensor the size of the residual stream for each of the others. Observed attentions count in their backward
pass only, hence once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Piece:
    """A run of a graph's nodes as a module: values of the nodes `takes` in, those of `gives` out, in order."""

    run: GraphModule
    takes: tuple[Node, ...]
    gives: tuple[Node, ...]


def in_pieces(gm: GraphModule, sites: Sequence[Node]) -> Callable[..., Any]:
    """What `gm` computes, a piece at a time where gradients are asked for; `sites`: the observed attentions, in order.

    A graph that writes to its inputs is left whole, or it would write twice.
    """
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    writes = any(n.op == "call_function" and str(n.target).split(".")[-2:-1] == ["copy_"] for n in nodes)
    if writes or len(sites) < 2:
        return gm.forward
    order = {node: at for at, node in enumerate(nodes)}
    cuts = cheapest_cuts(nodes, [order[site] for site in sites])
    bounds = [0, *cuts, len(nodes)]
    pieces = [piece(gm, nodes[a:b]) for a, b in itertools.pairwise(bounds)]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    last_use = {n: k for k, p in enumerate(pieces) for n in p.takes}
    results = {n for n in output.all_input_nodes}

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return gm.forward(*inputs)
        held = dict(zip(placeholders, inputs, strict=True))
        for k, p in enumerate(pieces):
            values = [held[n] for n in p.takes]
            # The backward pass goes through the last piece at once, and its logits are the largest tensor.
            if k == len(pieces) - 1:
                found = p.run(*values)
            else:
                found = checkpoint(p.run, *values, use_reentrant=False, preserve_rng_state=False)
            del values
            held.update(zip(p.gives, found, strict=True))
            for node in [n for n in held if last_use.get(n, -1) <= k and n not in results]:
                del held[node]
        return torch.fx.node.map_arg(output.args[0], lambda n: held[n])

    return run


def cheapest_cuts(nodes: Sequence[Node], sites: Sequence[int]) -> list[int]:
    """For each two attentions in turn the place between them across which the fewest bytes go, the last of several."""
    order = {node: at for at, node in enumerate(nodes)}
    alive = [0] * (len(nodes) + 1)
    for at, node in enumerate(nodes):
        until = max((order.get(user, len(nodes)) for user in node.users), default=at)
        size = size_of(node)
        # A value is carried over every cut after its node up to its last use.
        for place in range(at + 1, until + 1):
            alive[place] += size
    return [min(range(a + 1, b + 1), key=lambda place: (alive[place], -place)) for a, b in itertools.pairwise(sites)]


def size_of(node: Node) -> int:
    """Bytes of a node's value; of a view as well, which keeps its base alive."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        return 0
    return value.numel() * value.element_size()


def piece(gm: GraphModule, nodes: Sequence[Node]) -> Piece:
    inside = set(nodes)
    takes = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    gives = tuple(node for node in nodes if any(user not in inside for user in node.users))
    graph = Graph()
    copies = {n: graph.placeholder(n.name) for n in takes}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in gives))
    return Piece(GraphModule(gm, graph), takes, gives)
