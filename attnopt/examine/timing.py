"""An attention as it was and as it would be, timed in turn on random inputs, once both were seen to agree.

A pass in the pipeline: `Timings.run` stands before dead code is removed, when a graph holds both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from attnopt.cost import interleaved
from attnopt.errors import VerificationError, first_line
from attnopt.examine.records import Timing
from attnopt.ir import Region
from attnopt.passes.program import Program
from attnopt.passes.verify import compare, evaluate, hint, kept, operands_and_loads

ROUNDS = 15


class Timings:
    """The timings of a graph's rewritten sites, one for those that are alike."""

    def __init__(self) -> None:
        self.found: tuple[Timing, ...] = ()

    def run(self, program: Program) -> None:
        times: dict[Any, Timing] = {}
        done = {rewrite.site.name: rewrite.lowering for rewrite in program.rewrites}
        for region in program.regions:
            lowering = done.get(region.site.name)
            if lowering is None:
                continue
            shapes = tuple(tuple(map(hint, n.meta["val"].shape)) for n in (region.q, region.k, region.v))
            same = (replace(region.site, path="", ordinal=0, source=""), lowering, shapes)
            held = times.get(same)
            times[same] = replace(held, like=held.like + 1) if held else timed(program, region, lowering)
        self.found = tuple(times.values())


@torch.no_grad()
def timed(program: Program, region: Region, lowering: str) -> Timing:
    """The median of ROUNDS runs each. What differs is not timed: `wrong` then says by how much."""
    new = program.replaced[region.site.name]
    generator = torch.Generator().manual_seed(0)
    values = operands_and_loads(region, generator)
    queries, keys = (hint(n.meta["val"].shape[2]) for n in (region.q, region.k))
    found = Timing(region.site.name, lowering, queries, keys, 0.0, 0.0)
    try:
        # Once through, to sample whatever else the two read.
        for target in (region.out, new):
            evaluate(program.gm, target, values, generator)
        keep = kept(program.gm, region, values, generator)
        before, after = (cut(program.gm, target, values) for target in (region.out, new))
        compare("the rewrite", after(), before(), keep)
    except VerificationError as error:
        return replace(found, wrong=error.problem)
    except RuntimeError as error:
        return replace(found, wrong=first_line(error))
    times = interleaved([before, after], ROUNDS, program.device)
    return replace(found, before_ms=times[0], after_ms=times[1])


def cut(gm: GraphModule, target: Node, values: dict[Node, Any]) -> Any:
    """A call that computes `target` from `values`, with nothing else of the graph."""
    graph, made = Graph(), {}
    inputs: list[Tensor] = []
    needed, stack = set(), [target]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in values:
            stack += node.all_input_nodes
    for node in (n for n in gm.graph.nodes if n in needed):
        if node in values:
            made[node] = graph.placeholder(f"x{len(inputs)}")
            inputs.append(values[node])
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[target])
    run = GraphModule(gm, graph)
    return lambda: run(*inputs)
