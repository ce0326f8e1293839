"""Shared by the lowerings: insert ``attnopt::span_attention`` for a region, its tables as tensor attributes.

Where gradients will be asked for it is ``attnopt::span_attention_lse``, which has one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from attnopt import ops  # noqa: F401  (registers the operator)
from attnopt.ir import Region
from attnopt.mixed import compose, tables
from attnopt.passes.program import Builder, Program

aten = torch.ops.aten


def key_padding(builder: Builder, region: Region) -> Node:
    """The conjunction of the mask's loads as bool (B, Sk)."""
    batch, keys = builder.size(region.q, 0), builder.size(region.k, 2)
    combined: Node | None = None
    for load in region.site.mask.loads:
        node = region.loads[load.name]
        rows = batch if "b" in load.dims else 1
        flat = builder.call(aten.reshape.default, node, [rows, keys])
        flat = flat if rows is batch else builder.call(aten.expand.default, flat, [batch, keys])
        combined = flat if combined is None else builder.call(aten.logical_and.default, combined, flat)
    assert combined is not None
    return combined


def held(program: Program, region: Region, name: str, tensor: torch.Tensor) -> Node:
    """A tensor as an attribute of the graph, of a name that begins like this; its node."""
    attribute = f"{name}_{len(list(program.gm.named_buffers()))}"
    program.gm.register_buffer(attribute, tensor)
    node = program.gm.graph.get_attr(attribute)
    node.meta["val"] = region.q.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def insert_span(program: Program) -> Callable[[Region], Node]:
    """A builder of the operator's call for one region, all of whose heads are dense."""

    def build(region: Region) -> Node:
        made = tables(None, region.site.heads)
        rules = [held(program, region, f"attnopt_{name}", tensor) for name, tensor in made.items()]
        builder = Builder(program.gm, region.out)
        pad = key_padding(builder, region) if region.loads else None
        numbers = region.site.scale, region.site.mask.window or 0, 0, program.needs_grad
        found: Node = compose(builder.call, region.q, region.k, region.v, rules, (), pad, *numbers)
        return found

    return build
