"""Shared by the lowerings of planned heads: insert the calls of attnopt/mixed.py for a region, whose spans, heads and
feature maps are tensors of the graph.

    sdpa(q, k, v, is_causal=True)  ->  attnopt::span_attention(q, k, v, sinks, alphas, betas, ...)

and where some heads have a far part, one operator for those whose maps are alike:

    near, lse = attnopt::span_attention_lse(q, k, v, sinks, alphas, betas, ...)
    far, far_lse = attnopt::linear_far(q, k, v, heads, sinks, alphas, betas, ..., maps)
    index_put(near, [None, heads], merge(near[:, heads], lse[:, heads], far, far_lse))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from attnopt.ir import Region
from attnopt.mixed import FarPart, HeldPart, compose, far_of, far_parts, gone, hold, tables
from attnopt.passes.program import Builder, Program
from attnopt.passes.span import held, key_padding
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.ir import Choice
    from attnopt.plan import Plan


def insert_planned(
    program: Program, choices: Sequence[Choice], plan: Plan, name: str, heads: Sequence[int]
) -> Callable[[Region], Node]:
    """A builder of the calls for one region, whose heads have these choices and are the query heads `heads` of the
    site that the plan calls `name`: all of them, or those that a pass has left. None may be gone."""
    if gone(choices):
        raise ValueError(f"{len(gone(choices))} heads of {name} have no attention, and cannot be put into one call")

    def build(region: Region) -> Node:
        builder = Builder(program.gm, region.out)
        made = tables(choices, len(choices))
        if program.watch is not None:
            program.watch(name, made, heads)
        rules = [held(program, region, f"attnopt_{table}", tensor) for table, tensor in made.items()]
        device = region.q.meta["val"].device
        parts = [
            nodes_of(program, region, hold(part, len(choices), plan.fitted, name, heads, device))
            for part in far_parts(choices)
        ]
        pad = key_padding(builder, region) if region.loads else None
        site = region.site
        numbers = site.scale, site.mask.window or 0, plan.min_length, program.needs_grad, name
        made_of: Node = compose(builder.call, region.q, region.k, region.v, rules, parts, pad, *numbers)
        return made_of

    return build


def nodes_of(program: Program, region: Region, part: HeldPart) -> HeldPart:
    """A far part whose tensors are attributes of the graph."""

    def node(name: str, tensor: Any) -> Any:
        return held(program, region, f"attnopt_{part.far}_{name}", tensor) if isinstance(tensor, Tensor) else tensor

    maps = tuple(node("map", tensor) for tensor in part.maps)
    made = {name: node(name, getattr(part, name)) for name in ("heads", "index", "settings")}
    return replace(part, maps=maps, **made)


def described(choices: Sequence[Choice]) -> str:
    """What reports call it: ``span kernel, 3 spans; linear tail on 2 heads``."""
    near = [c for c in choices if far_of(c)[0] != "selected"]
    spans = len({CANDIDATES[c.candidate].rule(dict(c.params)) for c in near})
    tails: dict[tuple[str, str], int] = {}
    for part in far_parts(choices):
        kind = part.far, part.map_name if part.far == "selected" else ""
        tails[kind] = tails.get(kind, 0) + len(part.heads)
    said = [f"span kernel, {spans} span{'s' * (spans > 1)}"] if near else []
    said += [str(FarPart(*kind, tuple(range(count)))) for kind, count in tails.items()]
    return "; ".join(said)
