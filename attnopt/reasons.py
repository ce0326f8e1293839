"""Where a Miss or a Refusal stands: the node, its module, the model's source line, and the page that explains it.

    Miss("the soft-max is over dim 1 ...", code="softmax-axis")   ->   docs/reasons.md#softmax-axis

Every Miss and Refusal is made with a code, the heading of its section in docs/reasons.md; a test keeps the two alike.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from attnopt.ir import Miss, Refusal

if TYPE_CHECKING:
    from torch.fx import Node

Reason = TypeVar("Reason", Miss, Refusal)


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


def described(item: Any) -> str:
    """A value of the graph in words that are the same for equal layers: ``aten.mean.dim of [2, 4, 1]``."""
    held = getattr(item, "meta", {}).get("val")
    if held is None:
        return str(getattr(item, "target", item))
    made = str(item.target) if item.op == "call_function" else {"placeholder": "an input"}.get(item.op, "a constant")
    return f"{made} of {list(held.shape)}" if hasattr(held, "shape") else made


def located(reason: Reason, node: Node) -> Reason:
    """The same reason, at `node` where it names no place of its own."""
    if reason.node:
        return reason
    path, source = reason.path or module_path(node), reason.source or source_line(node)
    return replace(reason, path=path, source=source, node=f"{node.name} ({node.target})")
