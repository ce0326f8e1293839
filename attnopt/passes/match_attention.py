"""Ask every pattern about every anchor; nothing in the graph changes.

softmax(...) @ v   or   scaled_dot_product_attention(...)   ->   a Match, or a Miss that says why not
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch.fx import Node

from attnopt.ir import Miss
from attnopt.passes.program import Program
from attnopt.registry import PATTERNS


def module_path(node: Node) -> str:
    """Path of the innermost module that made the node, without the closure or wrapper it was reached through."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^[LG]\[[^\]]*\](\.|$)", "", path)
    path = re.sub(r"\._modules\[['\"]([^'\"]*)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path)
    return ".".join(part for part in path.split(".") if part and part != "_orig_mod")


def source_line(node: Node) -> str:
    """file:line of the innermost frame of the model's own code."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


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
            program.misses.append(Miss(found.reason, module_path(node), source_line(node)))
        elif found is not None:
            program.matches.append(found)
