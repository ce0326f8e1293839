"""Exact mode: lower each remaining region to what computes the same, cheaper.

    sdpa(q, repeat(k), repeat(v), mask=bool N x N)  ->  sdpa(q, k, v, is_causal=True, enable_gqa=True)
    softmax(q @ k.T * s + mask) @ v                 ->  the same
    softmax(q @ k.T * s + any mask or bias) @ v     ->  sdpa(q, k, v, mask as it was), where no closed form helps
    causal and pad[b, j]                            ->  attnopt::span_attention, all heads dense: sdpa is_causal on each
                                                        sample's run of real tokens. Under gradients and on a GPU: sdpa
                                                        on q, k, v with one more feature that hides padded keys
    causal, i // c == j // c                        ->  sdpa is_causal with every chunk a sample of the batch
    sliding window                                  ->  attnopt::span_attention (reads only the window)
    causal, doc[b, i] == doc[b, j]                  ->  attnopt::document_attention (each document by itself)
    sdpa, values of another head size               ->  sdpa with zeros in the features that are missing
    one query, grouped heads                        ->  sdpa with the query heads of a KV head as rows
    keys written into a buffer, any mask            ->  attnopt::live_attention (reads what the mask shows of it)
    one query, keys concatenated                    ->  the same, all keys
    any mask, bias, soft-cap or sink, on a GPU      ->  attnopt::masked_attention, which has them printed into it

Nothing here changes a result beyond float tolerance, except in rows whose every key is masked: they become 0. Of what
is right for a site, the first form that pays on this device is taken (`pays` has the measurements); where none does,
the site stays, and the report says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from attnopt.ir import Refusal, Region
from attnopt.passes import documents, pays
from attnopt.passes.exact_forms import (
    Build,
    lower_causal_padding,
    lower_chunked,
    lower_key_padding,
    lower_operand_mask,
    lower_packed,
    lower_plain,
    varies_over,
)
from attnopt.passes.live import lower_live, on_grown, on_live_columns
from attnopt.passes.masked import insert_masked, unserved
from attnopt.passes.program import Program
from attnopt.passes.span import insert_span
from attnopt.patterns import same

Form = tuple[Build, str]


def repeats_keys(region: Region) -> bool:
    """Whether the graph copies K and V to every query head before the products."""
    return region.site.heads != region.site.kv_heads and region.anchor.args[1:2] != (region.k,)


def already_exact(region: Region) -> bool:
    """An SDPA call that has neither a mask operand nor a physical repeat of K and V."""
    anchor = region.anchor
    return (
        region.site.pattern == "sdpa"
        and not region.match.terms
        and anchor.args[1] is region.k
        and anchor.args[2] is region.v
    )


def unfused(program: Program, region: Region) -> bool:
    """Whether an SDPA call of the graph runs written out: the CPU's fused kernel asks for equal head sizes."""
    return program.device == "cpu" and region.site.head_dim != region.site.head_dim_v


def one_query(region: Region) -> bool:
    size = region.q.meta["val"].shape[2]
    return isinstance(size, int) and size == 1


def one_row(region: Region) -> bool:
    """Whether the mask operands are one row for all queries already."""
    shapes = [term.node.meta["val"].shape for term in region.match.terms]
    return all(len(s) < 2 or (isinstance(s[-2], int) and s[-2] == 1) for s in shapes)


def packable(program: Program, region: Region) -> bool:
    """One query a head, several heads a KV head, and a mask operand that all heads share, if any.

    A causal call without an operand keeps key 0 alone for its one query: its packed rows would keep more.
    """
    grouped = region.site.heads != region.site.kv_heads and not region.match.causal
    return program.device == "cpu" and grouped and one_query(region) and "h" not in varies_over(region)


def on_runs(program: Program, region: Region) -> bool:
    """Whether the span operator, which looks at the padding when it runs, may stand for causal attention."""
    return program.device == "cpu" and not program.needs_grad and region.site.heads > 0 and region.site.scale > 0


def in_chunks(region: Region) -> bool:
    """Nothing but chunks of equal size, whole ones, known while compiling."""
    site, mask = region.site, region.site.mask
    queries, keys = (x.meta["val"].shape[2] for x in (region.q, region.k))
    bare = not (mask.padded or mask.terms or mask.opaque or mask.offset or mask.window is not None)
    sized = isinstance(queries, int) and isinstance(keys, int) and queries == keys
    return mask.chunk > 0 and bare and site.bias is None and sized and queries % mask.chunk == 0


def general(program: Program, region: Region) -> Iterator[Form]:
    """No closed form helps: one call with the mask as the graph had it, unless that is what the graph has."""
    if region.site.pattern != "sdpa" or repeats_keys(region) or unfused(program, region):
        yield lower_operand_mask(program), pays.AS_IT_WAS
    elif region.match.terms and not one_row(region) and "i" not in varies_over(region):
        yield lower_operand_mask(program), "SDPA with a mask of one row"


def printed(program: Program, region: Region) -> Iterator[Form]:
    """A kernel of the site's own. It gives a tile of rows to one head, which a single query would not fill."""
    if not one_query(region) and not unserved(program, region):
        said = ", ".join([*region.site.extras, f"keep {region.site.mask}"])
        yield insert_masked(program), f"{pays.PRINTED}, {said}"


def forms(program: Program, region: Region) -> Iterator[Form]:
    """What is right for the site and may be cheaper, the best first."""
    site, mask = region.site, region.site.mask
    square = same(region.q.meta["val"].shape[2], region.k.meta["val"].shape[2])
    if on_live_columns(program, region):
        yield lower_live(program), pays.LIVE
    if on_grown(program, region):
        yield lower_live(program), pays.GROWN
    if packable(program, region):
        yield lower_packed(program), pays.PACKED
    if already_exact(region) and not unfused(program, region):
        return
    if in_chunks(region):
        yield lower_chunked(program), f"SDPA, chunks of {mask.chunk} as a batch"
    if site.plain and mask.kind == "none":
        if not mask.padded:
            yield lower_plain(program, False), "SDPA without a mask"
        elif site.pattern != "sdpa" or repeats_keys(region) or unfused(program, region) or not one_row(region):
            yield lower_key_padding(program), pays.PADDING
        return
    if site.plain and mask.kind == "causal" and mask.offset == 0:
        if not mask.padded:
            yield lower_plain(program, True), "SDPA is_causal"
            return
        if square and on_runs(program, region):
            yield insert_span(program), pays.RUNS
        if square:
            yield lower_causal_padding(program), pays.FEATURE
    if site.plain and mask.kind == "sliding" and mask.offset == 0 and square and site.heads > 0:
        yield insert_span(program), f"{pays.SPAN}, window {mask.window}"
    yield from printed(program, region)
    if documents.numbers_of(region) and documents.unlike_documents(program, region) is None:
        yield documents.lower_documents(program), documents.lowering(region)
    yield from general(program, region)


def wider_bias(region: Region) -> torch.dtype | None:
    """The dtype of a bias that q's dtype does not hold: a distance of 2000 keys, times a slope, is off by whole units
    in bfloat16, and in the model its sum with a score is not. What only hides keys is the same in every dtype."""
    if region.site.bias is None:
        return None
    held, own = {t.node.meta["val"].dtype for t in region.match.terms if t.kind == "add"}, region.q.meta["val"].dtype
    return next((d for d in held if d.is_floating_point and torch.promote_types(d, own) != own), None)


def impossible(program: Program, region: Region) -> Refusal | None:
    """Why no form here is right for the site; None where one may be."""
    better = packable(program, region) or on_grown(program, region) or unfused(program, region)
    if already_exact(region) and not better:
        return Refusal("already a single attention call without a mask", code="already-one-call")
    if region.match.read:
        reason = "its weights are read elsewhere too, so that nothing would be saved"
        return Refusal(reason, code="weights-read-elsewhere")
    return None


def beyond_sdpa(region: Region) -> Refusal | None:
    """Why no call of SDPA is right for the site; None where one may be."""
    site, mask = region.site, region.site.mask
    if site.scale <= 0 and not (site.plain and mask.kind == "causal" and mask.padded):
        # SDPA's kernels hide scores before they scale them: minus infinity would become NaN or the largest score.
        return Refusal(f"the scale is {site.scale:g}, expected a positive one", code="scale-not-positive")
    if (wide := wider_bias(region)) is not None:
        seen = f"its bias is in {str(wide).removeprefix('torch.')}, which SDPA would round to {site.dtype}"
        return Refusal(seen, code="bias-rounded")
    if site.softcap:
        return Refusal(f"no fused kernel here caps scores at {site.softcap:g}", code="softcap-no-kernel")
    if site.sink:
        return Refusal(f"no fused kernel here has a sink ({site.sink})", code="sink-no-kernel")
    return None


def choose(program: Program, region: Region, sizes: tuple[int, int] | None = None) -> Form | Refusal:
    """What to lower to and what to call it, or why the site stays as it is; `sizes`: at so many queries and keys."""
    if (no := impossible(program, region)) is not None:
        return no
    against = []
    no_sdpa = beyond_sdpa(region)
    for build, lowering in forms(program, region) if no_sdpa is None else printed(program, region):
        reason = pays.against(lowering, program.device, region, program.needs_grad, sizes)
        if not reason:
            return build, lowering
        against.append(f"{lowering} does not pay here, {reason}")
    if no_sdpa is not None:
        why = unserved(program, region) if program.device != "cpu" else ""
        return replace(no_sdpa, reason=f"{no_sdpa.reason}; {why}") if why else no_sdpa
    if against:
        return Refusal("; ".join(against), code="does-not-pay")
    if documents.numbers_of(region) and (no := documents.unlike_documents(program, region)) is not None:
        return no
    if opaque := ", ".join(map(str, region.site.mask.opaque)):
        seen = f"already a single attention call; its mask is data over pairs of positions, unproved: {opaque}"
        return Refusal(seen, code="mask-is-data")
    reason = f"already a single attention call, and none is cheaper for keys {region.site.mask}"
    return Refusal(reason, code="already-one-call")


def scores_stay(program: Program, region: Region) -> Refusal | None:
    """Of attentions that share their scores, one alone saves nothing: they are computed for the others."""
    if region.match.shared == 1:
        return None
    rewritten = {rewrite.site.name for rewrite in program.rewrites}
    others = [r for r in program.regions if r.anchor is region.anchor and r is not region]
    pending = {r.site.name for r in program.pending}
    lowered = [
        r for r in others
        if r.site.name in rewritten or (r.site.name in pending and not isinstance(choose(program, r), Refusal))
    ]  # fmt: skip
    if len(lowered) == region.match.shared - 1:
        return None
    seen = f"its weights go into {region.match.shared} products, {region.match.shared - 1 - len(lowered)} of which stay"
    return Refusal(f"{seen}, so that nothing would be saved", code="weights-read-elsewhere")


def run(program: Program) -> None:
    for region in program.pending:
        chosen = choose(program, region)
        if not isinstance(chosen, Refusal) and (no := scores_stay(program, region)) is not None:
            chosen = no
        if isinstance(chosen, Refusal):
            program.refuse(region, chosen)
            continue
        build, lowering = chosen
        program.replace(region, build, lowering, note="K and V are not repeated" if repeats_keys(region) else "")


__all__: list[Any] = ["choose", "lower_plain", "run"]
