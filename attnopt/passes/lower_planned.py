"""Planned mode: replace each region the plan names by calls whose heads follow their own choices.

    sdpa(q, k, v, is_causal=True)  ->  attnopt::span_attention(q, k, v, sinks, alphas, betas, ...)
    some heads with a far part     ->  attnopt::span_attention_lse, attnopt::linear_far, ... (planned.py)

Regions whose heads are all dense, or that the plan's kernel cannot serve, are left to the exact lowering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnopt import settings
from attnopt.board import as_prompt
from attnopt.codegen.triton_linear_text import MAX_FEATURES
from attnopt.ir import DENSE, Choice, Refusal, Region
from attnopt.mixed import far_parts, hold
from attnopt.passes.planned import described, insert_planned
from attnopt.passes.program import Program
from attnopt.patterns import same
from attnopt.reasons import located
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.plan import Plan


def unlike_spans(region: Region) -> Refusal | None:
    """Why a span could not be taken from this region by any kernel; None if it could. What the profiler needs too."""
    mask, q, k = region.site.mask, region.q.meta["val"], region.k.meta["val"]
    if not region.site.heads:
        return Refusal("planned spans need a number of heads known when compiling", code="symbolic-heads")
    if not mask.causal or mask.offset != 0:
        return Refusal(f"planned spans need a causal mask, and this one keeps {mask}", code="span-needs-causal")
    if not region.site.simple:
        said = f"spans know a scale, a soft-cap and a simple mask only, and this is {region.site.canonical}"
        return Refusal(said, code="span-needs-plain")
    if not same(q.shape[2], k.shape[2]):
        said = "planned spans serve prefill only: the keys are not the queries' own"
        return Refusal(said, code="span-needs-prefill")
    if region.site.scale <= 0:
        said = f"planned spans need a positive scale, and this one is {region.site.scale:g}"
        return Refusal(said, code="scale-not-positive")
    return None


def refusal(region: Region) -> Refusal | None:
    """Why the span kernel cannot stand in for this region; None if it can."""
    no = unlike_spans(region)
    if no is not None:
        return no
    if not region.site.plain:
        said = f"planned spans know a scale and a simple mask only, and this is {region.site.canonical}"
        return Refusal(said, code="span-needs-plain")
    if region.site.head_dim != region.site.head_dim_v:
        said = f"{region.site.head_dim_v} and {region.site.head_dim}"
        return Refusal(f"planned spans need values as wide as keys, these are {said}", code="span-needs-equal-widths")
    return None


def switched_off(choices: Sequence[Choice]) -> Refusal | None:
    """Why candidates that `ATTNOPT_DISABLE` names are not used; None where it names none of these."""
    named = sorted({choice.candidate for choice in choices} & settings.disabled())
    said = f"ATTNOPT_DISABLE switches the candidate {' and '.join(named)} off"
    return Refusal(said, code="switched-off") if named else None


def unserved(program: Program, region: Region, choices: Sequence[Choice], heads: Sequence[int]) -> Refusal | None:
    """Why no kernel runs these choices at a region, whose heads are the query heads `heads` of the site; None if one
    does."""
    # A Refusal is falsy: it is asked for by identity.
    asked = [switched_off(choices), refusal(region), *(CANDIDATES[c.candidate].refuse(region.site) for c in choices)]
    asked += [without_gradient(program, choices)]
    return next((no for no in asked if no is not None), too_wide(program, region.site.name, choices, heads))


def without_gradient(program: Program, choices: Sequence[Choice]) -> Refusal | None:
    """Why heads whose keys are selected cannot stand in this graph; None where they can."""
    chosen = [part for part in far_parts(choices) if part.far == "selected"]
    if not program.needs_grad or not chosen:
        return None
    return Refusal(f"{chosen[0]} has no gradient, and one is asked for", code="selection-has-no-gradient")


def too_wide(program: Program, site: str, choices: Sequence[Choice], heads: Sequence[int]) -> Refusal | None:
    """Why the kernels of this device cannot run the feature maps of some heads of a site; None if they can."""
    fitted = program.plan.fitted if program.plan is not None else None
    if fitted is None or settings.target(program.device) != "triton":
        return None
    for part in far_parts(choices):
        mapped = part.map_name and part.far != "selected"
        width = fitted.map_of(site, part.map_name, [heads[h] for h in part.heads]).width if mapped else 0
        if width > MAX_FEATURES:
            said = f"{part.map_name} has {width} features, and Triton kernels hold {MAX_FEATURES} at most"
            return Refusal(said, code="far-too-wide")
    return None


def check_plan(program: Program, plan: Plan) -> None:
    """PlanError where the plan was made for another model: none of the graph's causal sites is in it, or heads differ;
    and where it wants feature maps that it does not bring along.

    A site that is missing beside others that are there is only noted: a model may have attentions no plan was made for.
    """
    sites = [r.site for r in program.regions if r.site.heads]
    causal = [s for s in sites if s.mask.causal and s.mask.offset == 0 and s.simple]
    named = [site for site in causal if site.name in plan.choices]
    plan.check(named or causal, complete=False)
    for site in named:
        choices = plan.choices[site.name]
        for part in far_parts(choices):
            hold(part, len(choices), plan.fitted, site.name, range(len(choices)), torch.device("cpu"))


def in_prompt(program: Program, region: Region, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The choices as they are in a prefill, with a note where some change nothing there."""
    dense = as_prompt(choices)
    heads = sum(a != b for a, b in zip(dense, choices, strict=True))
    if heads:
        said = f"{heads} of its {len(choices)} heads select tokens while decoding; this graph computes them dense"
        note = Refusal(said, region.site.name, region.site.source, code="selects-while-decoding")
        program.notes.append(located(note, region.anchor))
    return dense


def run(program: Program) -> None:
    plan = program.plan
    if plan is None:
        return
    check_plan(program, plan)
    for region in program.pending:
        if region.site.name in program.exact:
            continue
        choices = plan.choices.get(region.site.name)
        if choices is None:
            said = "the plan does not name this site; it stays exact"
            unplanned = Refusal(said, region.site.name, region.site.source, code="not-in-the-plan")
            program.notes.append(located(unplanned, region.anchor))
            continue
        choices = in_prompt(program, region, choices)
        if all(c == DENSE for c in choices):
            continue
        no = unserved(program, region, choices, range(len(choices)))
        if no is not None:
            exact = replace(no, reason=f"planned, but {no.reason}; it stays exact", path=region.site.name)
            program.notes.append(located(exact, region.anchor))
            continue
        build = insert_planned(program, choices, plan, region.site.name, range(len(choices)))
        program.replace(region, build, described(choices), tuple(choices), equal=False)
