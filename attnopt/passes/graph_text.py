"""A graph as text for people, one line a node, and what differs between two such texts.

    softmax = aten.softmax.int(mul, -1)  [2, 4, 64, 64] float32

A node keeps its name and so its line from pass to pass: two texts differ only where a pass changed something.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node


def graph_text(graph: Graph) -> str:
    """The nodes in order: name = operation(arguments), and the shape and dtype of a tensor."""
    return "".join(line(node) + "\n" for node in graph.nodes)


def line(node: Node) -> str:
    if node.op == "output":
        return f"return {written(node.args[0])}"
    return f"{node.name} = {operation(node)}{kind(node.meta.get('val'))}"


def operation(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "input" if node.op == "placeholder" else f"constant {node.target}"
    given = [*map(written, node.args), *(f"{name}={written(value)}" for name, value in node.kwargs.items())]
    return f"{called(node.target)}({', '.join(given)})"


def called(target: Any) -> str:
    """``aten.mul.Tensor``, ``attnopt.span_attention.default``; a function by its name, an object by its class."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return str(getattr(target, "__name__", target if isinstance(target, str) else type(target).__name__))


def written(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {written(v)}' for k, v in value.items())}}}"
    plain = isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.device))
    return str(value).removeprefix("torch.") if plain else repr(value)


def kind(held: Any) -> str:
    """The shape and dtype of a tensor, of several in order, or the symbol of a size."""
    if isinstance(held, torch.Tensor):
        return f"  [{', '.join(map(str, held.shape))}] {str(held.dtype).removeprefix('torch.')}"
    if isinstance(held, (list, tuple)):
        return ",".join(map(kind, held))
    return f"  {held}" if isinstance(held, (torch.SymInt, torch.SymFloat, torch.SymBool)) else ""


def changes(before: str, after: str, name: str = "") -> str:
    """The hunks in which two texts differ, as a unified diff; "" where they are equal."""
    sides = (f"before {name}".strip(), f"after {name}".strip())
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), *sides, n=1, lineterm=""))


def diffs(source: str, steps: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(pass, what it changed) of each (pass, text after it) that has a text, from the graph as captured."""
    for name, text in steps:
        if text:
            yield name, changes(source, text, name)
            source = text
