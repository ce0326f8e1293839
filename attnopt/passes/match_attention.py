"""Ask every pattern about every anchor; nothing in the graph changes.

softmax(...) @ v   or   scaled_dot_product_attention(...)   ->   a Match, or a Miss that says why not
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from attnopt.ir import Miss
from attnopt.passes.program import Program
from attnopt.reasons import located
from attnopt.registry import PATTERNS


def run(program: Program) -> None:
    by_target: dict[Any, list[Any]] = defaultdict(list)
    for _, pattern in PATTERNS:
        for target in pattern.anchors:
            by_target[target].append(pattern)
    for node in program.gm.graph.nodes:
        found: Any = None
        for pattern in by_target.get(node.target, ()):
            answer = pattern.match(node)
            found = answer if answer or found is None else found
            if answer:
                break
        if isinstance(found, Miss):
            program.misses.append(located(found, node))
        elif found is not None:
            program.matches.append(found)
            program.hits.update(found.rules)
