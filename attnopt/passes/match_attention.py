"""Ask every pattern about every anchor; nothing in the graph changes.

softmax(...) @ v   or   scaled_dot_product_attention(...)   ->   a Match, or a Miss that says why not
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.fx import Node

from attnopt import settings
from attnopt.ir import Attempt, Miss
from attnopt.passes.program import Program
from attnopt.patterns import Match
from attnopt.reasons import located
from attnopt.registry import PATTERNS


def run(program: Program) -> None:
    by_target: dict[Any, list[Any]] = defaultdict(list)
    for name, pattern in PATTERNS:
        for target in pattern.anchors:
            by_target[target].append((name, pattern))
    for node in program.gm.graph.nodes:
        if node.target not in by_target:
            continue
        for one in asked(program, node, by_target[node.target]):
            if isinstance(one, Miss):
                program.misses.append(located(one, node))
            else:
                program.matches.append(one)
                program.hits.update(one.rules)


def asked(program: Program, node: Node, patterns: list[tuple[str, Any]]) -> tuple[Match | Miss, ...]:
    """What the first pattern that knows the node makes of it, or what the first of the others misses."""
    off = settings.disabled()
    found: tuple[Match | Miss, ...] = ()
    for name, pattern in patterns:
        answer = unasked(name) if name in off else pattern.match(node)
        answers = answer if isinstance(answer, tuple) else () if answer is None else (answer,)
        told = "; ".join(map(summary, answers)) or "no attention"
        program.attempts.append(Attempt(name, f"{node.name} ({node.target})", any(answers), told))
        if any(answers):
            return answers
        found = found or answers
    return found


def unasked(name: str) -> Miss:
    return Miss(f"ATTNOPT_DISABLE switches the pattern {name} off", code="switched-off")


def summary(answer: Match | Miss) -> str:
    if isinstance(answer, Miss):
        return f"not recognised, {answer.reason}"
    return f"matched, by {', '.join(answer.rules)}" if answer.rules else "matched"
