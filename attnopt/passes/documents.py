"""Packed documents: where a site's mask is proved to keep them apart, one call that never looks across.

sdpa(q, k, v, mask=(j <= i) & (doc[b, i] == doc[b, j]))  ->  attnopt::document_attention(q, k, v, stack([doc]), ...)
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from attnopt.ir import Refusal, Region
from attnopt.masks.documents import equalities
from attnopt.masks.expressions import Ranges, Read
from attnopt.masks.materialize import steps
from attnopt.passes.exact_forms import Build
from attnopt.passes.program import Builder, Program
from attnopt.passes.recover_masks import variables
from attnopt.passes.span import key_padding
from attnopt.patterns import same

aten = torch.ops.aten


def numbers_of(region: Region) -> list[Read]:
    """What must be equal at i and at j, one read at i for each equality of the mask."""
    return [at_i for _, at_i, _ in equalities(region.meaning.keep)]


def unlike_documents(program: Program, region: Region) -> Refusal | None:
    """Why documents are not kept apart here though the mask compares two positions' data; None where they can be."""
    site, mask, numbers = region.site, region.site.mask, numbers_of(region)
    said = ""
    if program.device != "cpu":
        said = f"its kernel runs on the CPU, and this is {program.device}"
    elif mask.opaque or mask.chunk or len(numbers) != len(mask.terms):
        said = "something beside causality, a window and padding is in its mask"
    elif mask.offset != 0 or not same(region.q.meta["val"].shape[2], region.k.meta["val"].shape[2]):
        said = "its queries and keys are not the same tokens"
    elif mask.window is not None and not mask.causal:
        said = "its window is not causal"
    elif site.bias is not None:
        said = "a bias is added to its scores"
    elif not site.heads:
        said = "its number of heads is not known when compiling"
    elif any(steps(read, ("b", "i"), Ranges(variables(region.match)[2])) is None for read in numbers):
        said = "its documents' numbers are no tensor over samples and positions"
    return Refusal(f"its documents are not kept apart: {said}", code="documents-together") if said else None


def lowering(region: Region) -> str:
    """What reports call it."""
    mask = region.site.mask
    if mask.window is not None:
        return f"documents apart, each a window of {mask.window}"
    return "documents apart, each SDPA is_causal" if mask.causal else "documents apart, each SDPA without a mask"


def lower_documents(program: Program) -> Build:
    def build(region: Region) -> Node:
        call, site = (builder := Builder(program.gm, region.out)).call, region.site
        batch, length = builder.size(region.q, 0), builder.size(region.q, 2)
        ranges = Ranges(variables(region.match)[2])
        rows = []
        for read in numbers_of(region):
            node = read.node
            for target, *args in steps(read, ("b", "i"), ranges) or ():
                node = call(target, node, *args)
            rows.append(
                call(aten._to_copy.default, call(aten.expand.default, node, [batch, length]), dtype=torch.int64)
            )
        ids = call(aten.stack.default, rows)
        pad = key_padding(builder, region) if site.mask.loads else None
        both = call(
            torch.ops.attnopt.document_attention.default,
            region.q, region.k, region.v, ids, pad, site.scale, site.mask.causal, site.mask.window or 0,
        )  # fmt: skip
        return call(operator.getitem, both, 0)

    return build
