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
        found: tuple[Any, ...] = ()
        for pattern in by_target.get(node.target, ()):
            answer = pattern.match(node)
            answers = answer if isinstance(answer, tuple) else () if answer is None else (answer,)
            found = answers if any(answers) or not found else found
            if any(answers):
                break
        for one in found:
            if isinstance(one, Miss):
                program.misses.append(located(one, node))
            else:
                program.matches.append(one)
                program.hits.update(one.rules)
