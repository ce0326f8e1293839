"""The matcher at work on one model: its graphs run eagerly, every execution of a site is seen with its mask's data."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from attnopt.capture import capture, needs_grad
from attnopt.ir import Miss, Refusal, Region, Site
from attnopt.passes import PIPELINE, RECOGNISE, Program


@dataclass
class Seen:
    """One execution of a site: the values behind its mask's loads and symbols, and (B, H, Sq, Sk) of its scores."""

    site: Site
    values: dict[str, Any]
    sizes: tuple[int, int, int, int]


@dataclass
class Observed:
    """What the backend below met: every graph it was given, and every execution of what it recognised."""

    graphs: int = 0
    # Soft-maxes and attention calls in Dynamo's graphs, once per run, and those whose result nothing reads: no compiler
    # computes them.
    reached: int = 0
    unread: int = 0
    seen: list[Seen] = field(default_factory=list)
    # (execution) misses: as `seen`, once per run of the graph they are in.
    missed: list[Miss] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    rewrites: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)


ATTENTION = {"softmax", "_softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}


def attention_calls(gm: GraphModule) -> tuple[int, int]:
    """How many soft-maxes and attention calls a Dynamo graph has; and how many reach neither its output nor a write."""
    names = {n: n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "") for n in gm.graph.nodes}
    waiting = [n for n in gm.graph.nodes if n.op == "output" or names[n] == "setitem" or names[n].endswith("_")]
    live: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    found = [n for n in gm.graph.nodes if names[n] in ATTENTION]
    return len(found), sum(n not in live for n in found)


def backend_of(observed: Observed) -> Callable[..., Any]:
    """A torch.compile backend: capture, the pipeline, and the rewritten graph run as it is."""

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        observed.graphs += 1
        try:
            captured = capture(gm)
            if isinstance(captured, Refusal):
                observed.fallbacks.append(captured.reason)
                return gm.forward
            program = Program(captured, needs_grad=needs_grad(inputs)).run(RECOGNISE)
            tap = Tap(program)
            program.run(PIPELINE[len(RECOGNISE) :])
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            observed.exceptions.append(
                f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
            )
            return gm.forward
        reached, unread = attention_calls(gm)
        observed.refusals += [*program.refusals, *program.notes]
        observed.rewrites += [rewrite.lowering for rewrite in program.rewrites]

        def run(*args: Any) -> Any:
            observed.seen += tap(*args)
            observed.missed += program.misses
            observed.reached += reached
            observed.unread += unread
            return program.gm.forward(*args)

        return run

    return backend


class Tap:
    """Reads the loads of every region of a program from a copy of its graph made before anything is rewritten."""

    def __init__(self, program: Program) -> None:
        graph = Graph()
        copies: dict[Node, Node] = {}
        graph.graph_copy(program.gm.graph, copies)
        self.regions = [(r.site, dict(r.loads), score_shape(r)) for r in program.regions]
        wanted = dict.fromkeys(node for _, loads, _ in self.regions for node in loads.values())
        self.nodes = list(wanted)
        graph.output(tuple(copies[node] for node in self.nodes))
        for node in reversed(list(graph.nodes)):
            # A write to an input has no users; it is for the rewritten graph to make.
            if node.op not in ("output", "placeholder") and not node.users:
                graph.erase_node(node)
        self.module = GraphModule(program.gm, graph)
        self.placeholders = [n for n in program.gm.graph.nodes if n.op == "placeholder"]

    def __call__(self, *args: Any) -> list[Seen]:
        with torch.no_grad():
            read = dict(zip(self.nodes, self.module(*args), strict=True))
        symbols = symbols_of(self.placeholders, args)
        return [
            Seen(
                site,
                {**symbols, **{name: frozen(read[node]) for name, node in loads.items()}},
                sizes_of(shape, symbols),
            )
            for site, loads, shape in self.regions
        ]


def frozen(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def symbols_of(placeholders: list[Node], args: tuple[Any, ...]) -> dict[str, int]:
    """What every symbolic size of the graph is in this call, by its name."""
    found: dict[str, int] = {}
    for node, given in zip(placeholders, args, strict=True):
        like = node.meta.get("val")
        pairs = zip(like.shape, given.shape, strict=True) if isinstance(like, Tensor) else [(like, given)]
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[str(size.node.expr)] = int(number)
    return found


def score_shape(region: Region) -> tuple[Any, ...]:
    q, k = region.q.meta["val"].shape, region.k.meta["val"].shape
    return (*q[:3], k[2])


def sizes_of(shape: tuple[Any, ...], symbols: dict[str, int]) -> tuple[int, int, int, int]:
    def known(size: Any) -> int:
        if isinstance(size, int):
            return size
        # By the symbols themselves: a name alone makes another symbol, without their assumptions.
        return int(size.node.expr.subs({symbol: symbols[str(symbol)] for symbol in size.node.expr.free_symbols}))

    b, h, i, j = map(known, shape)
    return b, h, i, j
