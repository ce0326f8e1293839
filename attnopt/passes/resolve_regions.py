"""Keep matches whose regions are convex and disjoint, so that each can be cut out on its own.

    two matches that share a product                ->  the larger one, and a Miss for the other
    a mask that is computed from the site's scores  ->  a Miss

Convex: no path leaves the region and comes back to it. A rewrite of such a region can never make a cycle.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import torch
from torch.fx import Graph, Node

from attnopt.ir import Miss
from attnopt.passes.program import Program
from attnopt.patterns import Match
from attnopt.reasons import described, located

aten = torch.ops.aten
# These read the sizes of their operand only.
SIZED = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.sym_size.int}
SIZED |= {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
SIZED |= {aten.empty_like.default}


def flow(graph: Graph) -> nx.DiGraph:
    """The graph's dataflow: an edge from every node to the users that read its values."""
    edges = nx.DiGraph()
    edges.add_nodes_from(graph.nodes)
    edges.add_edges_from((node, user) for node in graph.nodes for user in node.users if user.target not in SIZED)
    return edges


def inside(match: Match) -> set[Node]:
    return {*match.inner, match.anchor, match.out.node}


def hull(dataflow: nx.DiGraph, region: set[Node]) -> set[Node]:
    """The smallest convex region around one: with every node on a path that leaves it and comes back."""
    left = {u for n in region for u in dataflow.successors(n) if u not in region}
    below = left.union(*(nx.descendants(dataflow, n) for n in left)) if left else set()
    above = region.union(*(nx.ancestors(dataflow, n) for n in region))
    return region | (below & above)


def disjoint(matches: list[Match]) -> tuple[list[Match], list[Match]]:
    """(kept, dropped): of matches that share a node, the one with the larger region stays.

    Matches of one soft-max stay together: each ends in a product of its own.
    """
    conflicts = nx.Graph()
    conflicts.add_nodes_from(range(len(matches)))
    owners: dict[Node, list[int]] = {}
    for n, match in enumerate(matches):
        for node in inside(match):
            owners.setdefault(node, []).append(n)
    anchors = [match.anchor for match in matches]
    conflicts.add_edges_from(
        (a, b) for found in owners.values() for a in found for b in found if a < b and anchors[a] is not anchors[b]
    )
    dropped: set[int] = set()
    for group in nx.connected_components(conflicts):
        for n in sorted(group, key=lambda n: (-len(inside(matches[n])), n)):
            if n not in dropped:
                dropped.update(conflicts.neighbors(n))
    return [m for n, m in enumerate(matches) if n not in dropped], [matches[n] for n in sorted(dropped)]


def run(program: Program) -> None:
    kept, dropped = disjoint(program.matches)
    dataflow: nx.DiGraph | None = None
    program.matches = []
    for match in kept:
        region = inside(match)
        if any(u not in region for n in region - {match.out.node} for u in n.users):
            dataflow = flow(program.gm.graph) if dataflow is None else dataflow
            around = hull(dataflow, region)
            operands = {match.q.node, match.k.node, match.v.node}
            operands |= {t.node for t in match.terms} | {f.node for f in match.factors}
            if operands & around:
                seen = ", ".join(sorted({described(n) for n in operands & around}))
                program.misses.append(
                    located(
                        Miss(f"{seen} is computed from its own scores, expected from outside", code="not-convex"),
                        match.anchor,
                    )
                )
                continue
            match = replace(match, inner=tuple(around - {match.anchor, match.out.node}))
        program.matches.append(match)
    for match in dropped:
        seen = "it shares a product with a larger attention, expected products of its own"
        program.misses.append(located(Miss(seen, code="shared-product"), match.anchor))
