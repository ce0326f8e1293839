"""Hand a graph to inductor without letting it fuse what was left alone on purpose.

Inductor has attention patterns of its own, which compare the shape of the graph and leave axes and permutations
unproved; they have no switch. They match a soft-max whose quotient has a known number of users. Here that quotient
gets one more user while inductor's patterns run, which is taken away right after:

    joint_custom_pre_pass     p = exp / sum; ...   ->   p = exp / sum; _assert_tensor_metadata(p); ...
    joint_custom_post_pass    the reverse

Every other pattern of inductor stays on. Both are part of one compilation's configuration, so nothing is changed for
other compilations or threads, and part of the key of inductor's caches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
MARK = "attnopt_shielded"
# Asserts nothing without its other arguments, and counts as no dead code.
WITNESS = aten._assert_tensor_metadata.default
SHIELDED = "inductor's own attention patterns are kept from the soft-maxes that stay; its other patterns are on"


def softmax_left(gm: GraphModule) -> bool:
    """Whether a soft-max stays, in whatever spelling, here or in the body of a higher-order operator."""
    graphs = (m.graph for m in gm.modules() if isinstance(m, GraphModule))
    names = (getattr(n.target, "__name__", str(n.target)) for g in graphs for n in g.nodes if n.op.startswith("call"))
    return any(re.search(r"softmax|(^|[._])exp2?(_|\.|$)", name, re.I) for name in names)


def shield(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target is aten.div.Tensor and is_exponential(node.args[0]):
            with graph.inserting_after(node):
                graph.call_function(WITNESS, (node,)).meta[MARK] = True


def is_exponential(node: Any) -> bool:
    """Whether a node is an exponential, or a cast of one."""
    while isinstance(node, Node) and node.target is torch.ops.prims.convert_element_type.default:
        node = node.args[0]
    return isinstance(node, Node) and node.target is aten.exp.default


def unshield(graph: Graph) -> None:
    for node in [n for n in graph.nodes if n.meta.get(MARK)]:
        graph.erase_node(node)


@cache
def passes() -> tuple[type, ...]:
    """The two passes as inductor wants them; made at first use, since inductor is slow to import."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Together(CustomGraphPass):
        """One of the two above, beside a pass that the user has set."""

        step: Callable[[Graph], None]
        first: bool

        def __init__(self, theirs: Any) -> None:
            self.theirs = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs] * (theirs is not None)

        def __call__(self, graph: Graph) -> None:
            # The user's own pass sees the graph as it is.
            for step in [*self.theirs, self.step] if self.first else [self.step, *self.theirs]:
                step(graph)

        def uuid(self) -> Any:
            theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.theirs]
            return None if None in theirs else (type(self).__name__, get_hash_for_files((__file__,)), *theirs)

    class Shield(Together):
        step, first = staticmethod(shield), True

    class Unshield(Together):
        step, first = staticmethod(unshield), False

    return Shield, Unshield


def shielded(patches: dict[str, Any]) -> dict[str, Any]:
    """The settings that keep inductor's attention patterns away, added to `patches`."""
    from torch._inductor import config

    names = ("joint_custom_pre_pass", "joint_custom_post_pass")
    ours = {n: of(patches.get(n, getattr(config, n))) for n, of in zip(names, passes(), strict=True)}
    return {**patches, **ours}


def protected(graph: GraphModule, patches: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The settings to compile `graph` with, and whether they keep inductor's attention patterns away from it."""
    needed = softmax_left(graph) and patches.get("pattern_matcher", True)
    return (shielded(patches) if needed else patches), needed


def to_inductor(graph: GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=patches or None)


def later(graph: GraphModule, patches: dict[str, Any]) -> Callable[..., Any]:
    """The same long after Dynamo has finished with the graph: it is traced again, with the arguments of its calls."""
    return torch.compile(graph, backend=lambda gm, inputs: to_inductor(gm, inputs, protected(gm, patches)[0]))
