"""Take Dynamo's graph to the pre-dispatch functional ATen graph: one small dialect, nothing written in place.

``aot_export_module(..., pre_dispatch=True)`` keeps matmul, softmax and scaled_dot_product_attention whole and makes
every spelling of a view or cast the same operation. Mutated inputs come back as outputs; `copy_` writes them at the
end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnopt import settings
from attnopt.ir import Refusal

log = logging.getLogger("attnopt")


def needs_grad(inputs: Sequence[Any]) -> bool:
    """Whether gradients will be asked of a graph with these inputs in the current mode."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def obstacle(gm: GraphModule, inputs: Sequence[Any]) -> str:
    """What makes a graph unfit for export although the export would succeed; empty if nothing does."""
    for node in gm.graph.nodes:
        if "autocast" in str(node.target):
            return "it switches autocast inside, and the export would lose the casts"
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"it holds the higher-order operator {node.target}"
    for device in {x.device.type for x in inputs if isinstance(x, torch.Tensor)}:
        if torch.is_autocast_enabled(device):
            return "it runs under autocast, whose casts an exported graph does not show"
    return ""


def capture(gm: GraphModule) -> GraphModule | Refusal:
    """The functional ATen graph of a Dynamo graph, taking and returning the same flat values; or why there is none."""
    from torch._functorch.aot_autograd import aot_export_module

    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [n.meta.get("example_value") for n in placeholders]
    reason = obstacle(gm, inputs)
    if reason:
        return Refusal(f"the graph was not exported: {reason}")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast paths of nn.MultiheadAttention are opaque calls; the slow path shows the attention.
        torch.backends.mha.set_fastpath_enabled(False)
        exported, signature = aot_export_module(gm, inputs, trace_joint=False, pre_dispatch=True)
    except Exception as error:
        if settings.strict():
            raise
        log.debug("export failed", exc_info=True)
        text = str(error).strip().splitlines()
        return Refusal(f"the graph was not exported: {type(error).__name__}: {text[0][:200] if text else ''}")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    if signature.parameters or signature.buffers:
        return Refusal("the graph was not exported: it owns parameters of its own")
    mutated = [*signature.buffers_to_mutate.items(), *signature.user_inputs_to_mutate.items()]
    if mutated and needs_grad(inputs):
        return Refusal("the graph was not exported: it needs gradients and writes to an input")
    write_back(exported, dict(mutated))
    for old, new in zip(placeholders, (n for n in exported.graph.nodes if n.op == "placeholder"), strict=True):
        new.meta = {**old.meta, **new.meta}
        new.meta.setdefault("val", old.meta.get("example_value"))
    exported.meta = {**gm.meta, **exported.meta}
    return exported


def write_back(gm: GraphModule, mutated: dict[str, str]) -> None:
    """Copy the values of mutated inputs back and drop them from the outputs."""
    if not mutated:
        return
    graph = gm.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    by_name = {n.name: n for n in graph.nodes}
    results: Sequence[Node] = output.args[0]
    with graph.inserting_before(output):
        for value, target in mutated.items():
            copied = graph.call_function(torch.ops.aten.copy_.default, (by_name[target], by_name[value]))
            copied.meta = dict(by_name[value].meta)
    output.args = (tuple(results[len(mutated) :]),)
    gm.recompile()
