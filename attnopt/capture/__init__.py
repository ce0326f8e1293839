"""Take Dynamo's graph to the pre-dispatch functional ATen graph: one small dialect, nothing written in place.

``aot_export_module(..., pre_dispatch=True)`` keeps matmul, softmax and scaled_dot_product_attention whole and makes
every spelling of a view or cast the same operation. Mutated inputs come back as outputs; `copy_` writes them at the
end. What the export would lose or stumble over is dealt with before and after it:

    prepare      opaque fast paths are opened
    floats       Python floats that became inputs are numbers again, or tensors
    vmapped      what was recorded of torch.vmap becomes the batched operations
    autocast     every cast that autocast would make is an operation of the graph
    constants    values of small buffers, for passes that can prove more with them
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnopt import settings
from attnopt.capture import autocast
from attnopt.capture.constants import KEY, small_buffers
from attnopt.capture.prepare import prepared
from attnopt.errors import first_line
from attnopt.ir import Refusal

log = logging.getLogger("attnopt")

__all__ = ["KEY", "capture", "needs_grad"]


def needs_grad(inputs: Sequence[Any]) -> bool:
    """Whether gradients will be asked of a graph with these inputs in the current mode."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def obstacle(gm: GraphModule, inputs: Sequence[Any]) -> Refusal | None:
    """What makes a graph unfit for export although the export would succeed; None if nothing does."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return Refusal(f"it holds the higher-order operator {node.target}", code="higher-order-operator")
        # A failing export would leave the level on torch.func's stack.
        if node.op == "call_function" and getattr(node.target, "__name__", "").endswith("increment_nesting"):
            return Refusal(f"it enters a transform of torch.func by {node.target.__name__}", code="func-transform")
    if any(isinstance(x, torch.Tensor) and x.is_nested for x in inputs):
        return Refusal("it takes a nested tensor", code="nested-tensor")
    return None


def exported_graph(gm: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """The functional graph of `gm` and its signature. The autocast state in force is the same afterwards."""
    from torch._functorch.aot_autograd import aot_export_module

    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast paths of nn.MultiheadAttention are opaque calls; the slow path shows the attention.
        torch.backends.mha.set_fastpath_enabled(False)
        with autocast.restored():
            return aot_export_module(gm, inputs, trace_joint=False, pre_dispatch=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def unexported(reason: Refusal) -> Refusal:
    return replace(reason, reason=f"the graph was not exported: {reason.reason}")


def capture(gm: GraphModule) -> GraphModule | Refusal:
    """The functional ATen graph of a Dynamo graph, taking and returning the same flat values; or why there is none.

    `gm` itself is not changed. ``meta["attnopt_constants"]`` maps placeholders that are small buffers to their tensors.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [n.meta.get("example_value") for n in placeholders]
    try:
        ready = prepared(gm)
        reason = obstacle(ready, inputs)
        if reason is not None:
            return unexported(reason)
        exported, signature = exported_graph(ready, inputs)
        if signature.parameters or signature.buffers:
            owned = ", ".join([*signature.parameters, *signature.buffers][:3])
            return unexported(Refusal(f"it owns parameters of its own: {owned}", code="owns-parameters"))
        found = [n for n in exported.graph.nodes if n.op == "placeholder"]
        for old, new in zip(placeholders, found, strict=True):
            new.meta = {**old.meta, **new.meta}
            new.meta.setdefault("val", old.meta.get("example_value"))
        if needs_grad(inputs):
            open_copies(exported)
        reason = autocast.make_explicit(exported)
        if reason is None:
            mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
            reason = write_back(exported, mutated, needs_grad(inputs))
    except Exception as error:
        if settings.strict():
            raise
        log.debug("export failed", exc_info=True)
        return unexported(Refusal(f"{type(error).__name__}: {first_line(error)[:200]}", code="export-failed"))
    if reason is not None:
        return unexported(reason)
    exported.meta = {**gm.meta, **exported.meta, KEY: small_buffers(placeholders, found)}
    return exported


def open_copies(gm: GraphModule) -> None:
    """What a functional copy returns, in operations that have a derivative, which ``aten::copy`` has not."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        source, (target, held) = node.args[1], (n.meta["val"] for n in (node, node.args[1]))
        with gm.graph.inserting_before(node):
            if held.dtype != target.dtype or held.device != target.device:
                where = {"dtype": target.dtype, "device": target.device}
                source = gm.graph.call_function(torch.ops.aten._to_copy.default, (source,), where)
                source.meta = {"val": held.to(**where)}
            if held.shape != target.shape:
                source = gm.graph.call_function(torch.ops.aten.expand_as.default, (source, node.args[0]))
                source.meta = {"val": target}
            # Contiguous, so that any view of what was written is one of this as well.
            fresh = gm.graph.call_function(
                torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        gm.graph.erase_node(node)


def write_back(gm: GraphModule, mutated: dict[str, str], grad: bool) -> Refusal | None:
    """Copy the values of mutated inputs back and drop them from the outputs; or say why that would be wrong.

    Where gradients are needed everything reads a clone of such an input: the backward pass may have kept it, and the
    write would change what was kept.
    """
    if not mutated:
        return None
    graph = gm.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    by_name = {n.name: n for n in graph.nodes}
    if grad and any(differentiable(gm)[by_name[value]] for value in mutated):
        return Refusal("it writes a value that needs a gradient to an input", code="writes-gradient")
    results: Sequence[Node] = output.args[0]
    if grad:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        for target in map(by_name.__getitem__, mutated.values()):
            with graph.inserting_before(first):
                read = graph.call_function(torch.ops.aten.clone.default, (target,))
            read.meta = {"val": target.meta["val"]}
            target.replace_all_uses_with(read, lambda user, read=read: user is not read)
    with graph.inserting_before(output):
        for value, target in mutated.items():
            copied = graph.call_function(torch.ops.aten.copy_.default, (by_name[target], by_name[value]))
            copied.meta = dict(by_name[value].meta)
    output.args = (tuple(results[len(mutated) :]),)
    gm.recompile()
    return None


def differentiable(gm: GraphModule) -> dict[Node, bool]:
    """Whether each node's value would carry a gradient, found by running the functional graph on its fake inputs."""
    carries: dict[Node, bool] = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            out = super().run_node(n)
            carries[n] = isinstance(out, torch.Tensor) and out.requires_grad
            return out

    inputs = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    with tensors[0].fake_mode, torch.enable_grad():
        Watched(gm).run(
            *(x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs)
        )
    return carries
