"""Shared by the lowerings: insert ``attnopt::span_attention`` for a region, its tables as tensor attributes.

Where gradients will be asked for it is ``attnopt::span_attention_lse``, which has one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from attnopt import ops  # noqa: F401  (registers the operator)
from attnopt.ir import Region
from attnopt.mixed import tables
from attnopt.passes.program import Builder, Program

if TYPE_CHECKING:
    from attnopt.ir import Choice

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


def insert_span(program: Program, choices: Sequence[Choice] | None, min_length: int = 0) -> Callable[[Region], Node]:
    """A builder of the operator's call for one region."""

    def build(region: Region) -> Node:
        gm, builder = program.gm, Builder(program.gm, region.out)
        held: list[Node] = []
        made = tables(choices, region.site.heads)
        if program.watch is not None:
            program.watch(region.site.name, made)
        for name, tensor in made.items():
            attribute = f"attnopt_{name}_{len(list(gm.named_buffers()))}"
            gm.register_buffer(attribute, tensor)
            node = gm.graph.get_attr(attribute)
            mode = region.q.meta["val"].fake_mode
            node.meta["val"] = mode.from_tensor(tensor)
            held.append(node)
        pad = key_padding(builder, region) if region.loads else None
        window = region.site.mask.window or 0
        arguments = (region.q, region.k, region.v, *held, pad, region.site.scale, window, min_length)
        if not program.needs_grad:
            return builder.call(torch.ops.attnopt.span_attention.default, *arguments)
        both = builder.call(torch.ops.attnopt.span_attention_lse.default, *arguments)
        return builder.call(operator.getitem, both, 0)

    return build
