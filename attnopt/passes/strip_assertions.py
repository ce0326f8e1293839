"""Drop metadata assertions whose dtype the graph already proves.

    _assert_tensor_metadata(x, None, None, float32)  ->  (nothing)      where x is float32

The export writes one after every cast; they hide nothing else, and none is dropped that could still fail.
"""

from __future__ import annotations

import torch

from attnopt.passes.program import Program

ASSERTION = torch.ops.aten._assert_tensor_metadata.default


def run(program: Program) -> None:
    graph = program.gm.graph
    for node in list(graph.nodes):
        if node.target != ASSERTION:
            continue
        held = node.args[0].meta.get("val")
        dtype = node.args[3] if len(node.args) > 3 else node.kwargs.get("dtype")
        sized = any(a is not None for a in node.args[1:3])
        if isinstance(held, torch.Tensor) and not sized and (dtype is None or held.dtype == dtype):
            graph.erase_node(node)
