"""Drop what no output needs any more: the masks that were materialised, the repeats of K and V.

mask = expand(and(...)); out = scaled_dot_product_attention(q, k, v, is_causal=True)   ->   out = ...
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnopt.passes.program import Program

KEEP = {torch.ops.aten.copy_.default, torch.ops.aten._assert_tensor_metadata.default}


def impure(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return node.op != "get_attr"
    schema = getattr(node.target, "_schema", None)
    return node.target in KEEP or (schema.is_mutable if schema is not None else node.is_impure())


def run(program: Program) -> None:
    program.gm.graph.eliminate_dead_code(is_impure_node=impure)
