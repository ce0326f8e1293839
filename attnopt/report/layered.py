"""Where the boxes of a small graph go: rows from the inputs down to the output, few crossings, none on another.

placed(graph, widths)   ->   node -> (x, row), rows counted from the top, and the way of each edge
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

GAP = 0.16  # between two boxes of a row, in the unit of widths
SWEEPS = 6


@dataclass(frozen=True)
class Bend:
    """Where an edge passes a row between those of its ends; it takes the place of a narrow box."""

    start: Hashable
    end: Hashable
    row: int


@dataclass(frozen=True)
class Layout:
    """place: (x, row) of the middle of each node; ways: the points of each edge, from its start to its end."""

    place: dict[Hashable, tuple[float, int]]
    ways: dict[tuple[Hashable, Hashable], list[tuple[float, int]]]
    width: float
    rows: list[list[Hashable]] = field(default_factory=list)


def placed(graph: nx.DiGraph, widths: Mapping[Hashable, float]) -> Layout:
    """A layout of an acyclic graph. Each node stands in the row right above the first that needs it."""
    generations = list(nx.topological_generations(graph.reverse(copy=False)))
    row = {node: len(generations) - 1 - n for n, nodes in enumerate(generations) for node in nodes}
    rows: list[list[Hashable]] = [[] for _ in generations]
    for node in graph:
        rows[row[node]].append(node)
    links: list[tuple[Hashable, Hashable]] = []
    bends: dict[tuple[Hashable, Hashable], list[Bend]] = {}
    for start, end in graph.edges:
        between = [Bend(start, end, n) for n in range(row[start] + 1, row[end])]
        for bend in between:
            rows[bend.row].append(bend)
        bends[start, end] = between
        chain: list[Hashable] = [start, *between, end]
        links += pairwise(chain)
    whole = nx.DiGraph(links)
    whole.add_nodes_from(graph)
    order(whole, rows)
    x = spread(whole, rows, widths)
    left = min((x[n] - half(n, widths) for n in x), default=0.0)
    right = max((x[n] + half(n, widths) for n in x), default=0.0)
    at = {node: (x[node] - left, n) for n, nodes in enumerate(rows) for node in nodes}
    ways = {edge: [at[p] for p in (edge[0], *between, edge[1])] for edge, between in bends.items()}
    return Layout({node: at[node] for node in graph}, ways, right - left, rows)


def order(graph: nx.DiGraph, rows: list[list[Hashable]]) -> None:
    """Sort each row by where the neighbours of its nodes stand, from the output up and down again."""
    for sweep in range(SWEEPS):
        place = {node: n / max(len(nodes), 1) for nodes in rows for n, node in enumerate(nodes)}
        upward = sweep % 2 == 0
        for nodes in reversed(rows) if upward else rows:
            near = graph.successors if upward else graph.predecessors
            middle = {n: sum(map(place.__getitem__, s)) / len(s) if (s := list(near(n))) else place[n] for n in nodes}
            nodes.sort(key=lambda node: (middle[node], place[node]))
            place.update({node: (n + 0.5) / len(nodes) for n, node in enumerate(nodes)})


def half(node: Hashable, widths: Mapping[Hashable, float]) -> float:
    return widths.get(node, GAP) / 2


def spread(graph: nx.DiGraph, rows: list[list[Hashable]], widths: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """x of every node: as near to the middle of its neighbours as its row lets it."""
    x = {node: 0.0 for nodes in rows for node in nodes}
    for nodes in rows:
        apart(nodes, {node: 0.0 for node in nodes}, x, widths)
    for sweep in range(2 * SWEEPS):
        for nodes in reversed(rows) if sweep % 2 == 0 else rows:
            near = {n: [*graph.successors(n), *graph.predecessors(n)] for n in nodes}
            wanted = {n: sum(x[m] for m in near[n]) / len(near[n]) if near[n] else x[n] for n in nodes}
            apart(nodes, wanted, x, widths)
    return x


def apart(
    nodes: list[Hashable], wanted: Mapping[Hashable, float], x: dict[Hashable, float], widths: Mapping[Hashable, float]
) -> None:
    """Put the nodes of a row near where they are wanted, in their order, a gap between them.

    Neighbours that would overlap become one block, which stands at the mean of what its nodes want.
    """
    blocks: list[tuple[list[Hashable], list[float], float]] = []  # nodes, their offsets in the block, its start
    for node in nodes:
        members, offsets, start = [node], [0.0], wanted[node]
        while blocks and start < blocks[-1][2] + blocks[-1][1][-1] + distance(blocks[-1][0][-1], members[0], widths):
            before, their, _ = blocks.pop()
            shift = their[-1] + distance(before[-1], members[0], widths)
            members, offsets = before + members, their + [shift + o for o in offsets]
            start = sum(wanted[m] - o for m, o in zip(members, offsets, strict=True)) / len(members)
        blocks.append((members, offsets, start))
    for members, offsets, start in blocks:
        x.update({member: start + offset for member, offset in zip(members, offsets, strict=True)})


def distance(a: Hashable, b: Hashable, widths: Mapping[Hashable, float]) -> float:
    return half(a, widths) + half(b, widths) + GAP
