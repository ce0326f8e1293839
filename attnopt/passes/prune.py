"""Remove the heads that the plan replaces by constants: their slices of the projections, and their attention.

    q, k, v = heads of linear(x, W_q), linear(x, W_k), linear(x, W_v)        W_q (H * D, C), W_k, W_v (G * D, C)
    linear(sdpa(q, k, v), W_O, b)                                            W_O (C, H * D)

    ->  q', k', v' = heads of linear(x, W_q'), linear(x, W_k'), linear(x, W_v')     the rows of the heads that stay
        linear(sdpa(q', k', v'), W_O', b + W_O[:, gone] m)                          their columns; m: mean outputs

Mean ablation folded into the output's bias (An et al., arXiv:2312.11983, equation 5). Keys and values go where no query
head of their group stays. Where groups keep unequal numbers of heads, those of equal numbers lie side by side, which is
an order of rows, and have one attention each. Without a head that stays the attention is gone altogether.

The new weights are constants, computed from the parameters' values at compile time; the model's own parameters are
neither changed nor replaced, and a check at every call runs the untouched graph once they have been. What stays is
lowered as ever, by the plan's choices for these heads or exactly. A site that cannot be cut stays exact, whole, with
the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt import settings
from attnopt.errors import first_line
from attnopt.ir import DENSE, Choice, Refusal, Region, Rewrite
from attnopt.mixed import gone
from attnopt.passes import lower_exact, lower_planned
from attnopt.passes.arrange import canonical, operand_mask, rearrange
from attnopt.passes.head_slices import Heads, Slices, Unpushed, unheld
from attnopt.passes.heads_downward import Downward
from attnopt.passes.heads_upward import Upward
from attnopt.passes.lineage import REDUCTIONS
from attnopt.passes.planned import described as described_choices
from attnopt.passes.planned import insert_planned
from attnopt.passes.program import Builder, Program
from attnopt.patterns import Match
from attnopt.patterns.layout import Atom, Space, is_one, same, shape_of
from attnopt.patterns.sdpa import Sdpa
from attnopt.reasons import described, located

aten = torch.ops.aten


@dataclass(frozen=True)
class Class:
    """KV groups that keep equally many query heads: positions among the heads and groups that stay, in their order."""

    first_head: int
    heads: int
    first_group: int
    groups: int


@dataclass(frozen=True)
class Kept:
    """heads: the site's query heads that stay, groups: its KV heads, each in the order of the new weights."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    classes: tuple[Class, ...]


def kept_of(heads: int, kv_heads: int, removed: Sequence[int]) -> Kept:
    """What stays of `heads` query heads over `kv_heads`: groups of equal numbers side by side, else in their order."""
    size = heads // kv_heads
    stay = {g: [h for h in range(g * size, (g + 1) * size) if h not in removed] for g in range(kv_heads)}
    by_number: dict[int, list[int]] = defaultdict(list)
    for group, left in stay.items():
        if left:
            by_number[len(left)].append(group)
    groups = [g for number in by_number for g in by_number[number]]
    classes, head, group = [], 0, 0
    for number, equal in by_number.items():
        count = len(equal)
        classes.append(Class(head, count * number, group, count))
        head, group = head + count * number, group + count
    return Kept(tuple(h for g in groups for h in stay[g]), tuple(groups), tuple(classes))


def run(program: Program) -> None:
    plan = program.plan
    if plan is None or not any(gone(choices) for choices in plan.choices.values()):
        return
    lower_planned.check_plan(program, plan)
    for region in program.pending:
        choices = plan.choices.get(region.site.name, ())
        if not gone(choices) or not program.affords(region):
            continue
        no = remove_heads(program, region, choices)
        if no is not None:
            said = f"{len(gone(choices))} of its heads are to go, but {no.reason}; it stays exact"
            program.notes.append(located(replace(no, reason=said, path=region.site.name), region.anchor))
            program.exact.add(region.site.name)


def remove_heads(program: Program, region: Region, choices: Sequence[Choice]) -> Refusal | None:
    """Remove the heads of a site that are to go; or why it stays, with nothing changed."""
    asked = (lower_planned.switched_off(choices), unfit(program, region))
    no = next((no for no in asked if no is not None), None)
    return cut(program, region, choices, gone(choices)) if no is None else no


def unfit(program: Program, region: Region) -> Refusal | None:
    """Why heads of this region cannot go, whatever its projections are; None if they may."""
    site, match = region.site, region.match
    if program.needs_grad:
        said = "gradients are asked for, and the new weights are constants"
        return Refusal(said, code="prune-needs-grad")
    if means_of(program, region) is None:
        return Refusal("the plan holds no mean outputs of this site", code="prune-no-means")
    if site.softcap or site.sink or not site.heads or site.scale <= 0:
        said = f"what stays would be a call of SDPA, which cannot compute {site.canonical}"
        return Refusal(said, code="prune-needs-plain")
    if match.read or match.shared > 1:
        return Refusal("its weights are read elsewhere too", code="weights-read-elsewhere")
    return None


def means_of(program: Program, region: Region) -> Tensor | None:
    """The mean outputs (H, Dv) of a site's heads, float64; None where there are none of this shape."""
    fitted = program.plan.fitted if program.plan is not None else None
    found = fitted.means.get(region.site.name) if fitted is not None else None
    if found is None or tuple(found.shape) != (region.site.heads, region.site.head_dim_v):
        return None
    return found.detach().to("cpu", torch.float64)


# What happens to keys and values, in the order of trials: nothing at all; rows of heads that are gone go; they stay
# whole, and the attention reads the groups it wants; the same, made by products apart from that of the queries.
UNTOUCHED, CUT, WHOLE, APART = "untouched", "cut", "whole", "apart"


def cut(program: Program, region: Region, choices: Sequence[Choice], removed: Sequence[int]) -> Refusal | None:
    """Rewrite one site; or why it stays, with nothing changed."""
    site = region.site
    kept = kept_of(site.heads, site.kv_heads, removed)
    natural = kept.groups == tuple(range(site.kv_heads)) or not kept.heads
    against: list[Refusal] = []
    for way in (UNTOUCHED, APART) if natural else (CUT, WHOLE, APART):
        slices = Slices(program)
        no: Refusal | None = None
        try:
            regions = cut_apart(program, region, kept, way, slices)
            no = still_needed(slices) if kept.heads else None
            if no is None:
                slices.commit()
        except Unpushed as error:
            no = error.refusal
        except Exception as error:
            if settings.strict():
                slices.undo()
                raise
            no = Refusal(f"{type(error).__name__} while cutting it: {first_line(error)}", code="rewrite-failed")
        if no is None:
            lower(program, region, regions, kept, choices, against[0].reason if against and not natural else "")
            return None
        slices.undo()
        against.append(no)
        if not kept.heads:
            break
    return against[0]


def cut_apart(program: Program, region: Region, kept: Kept, way: str, slices: Slices) -> list[Region]:
    """Insert the attention of the heads that stay and its projections, unused yet; one Region for each class."""
    means = means_of(program, region)
    assert means is not None
    means[list(kept.heads)] = 0.0
    regions: list[Region] = []
    out: Node | None = None
    if kept.heads:
        q, k, v = narrowed(slices, region.q, kept.heads), region.k, region.v
        if way == CUT:
            k, v = (narrowed(slices, x, kept.groups) for x in (k, v))
        if way == APART:
            every = range(region.site.kv_heads)
            k, v = (slices.instead(partial(narrowed, slices, x, every)) for x in (k, v))
        with program.gm.graph.inserting_before(region.out):
            regions = attentions(program, region, kept, (q, k, v), way == CUT, slices)
            out = joined(Builder(program.gm, region.out), [r.out for r in regions])
    push_down(program, region, kept, means, out, slices)
    return regions


def narrowed(slices: Slices, operand: Node, chosen: Sequence[int]) -> Node:
    """q, k or v (B, heads, N, D) of the chosen heads alone, its projection cut."""
    space = Space()
    batch, heads, length, features = space.dims_of(operand)
    if not heads:
        # One KV head: nothing to choose, but something to make apart from what was made together with it.
        heads = (Atom("one", 1),)
    walk = Upward(slices, Heads(space, heads, torch.tensor(chosen)), features)
    if operand.op == "placeholder":
        raise Unpushed(unheld(operand))
    return walk.narrowed(operand, (batch, heads, length, features))


def runs(kept: Kept) -> tuple[Class, ...]:
    """The classes, cut where their KV heads are no neighbours in the model."""
    found: list[Class] = []
    for part in kept.classes:
        each = part.heads // part.groups
        for n in range(part.groups):
            at = part.first_group + n
            if n and kept.groups[at] == kept.groups[at - 1] + 1:
                last = found.pop()
                found.append(replace(last, heads=last.heads + each, groups=last.groups + 1))
            else:
                found.append(Class(part.first_head + n * each, each, at, 1))
    return tuple(found)


def attentions(
    program: Program, region: Region, kept: Kept, operands: tuple[Node, Node, Node], cut: bool, slices: Slices
) -> list[Region]:
    """One SDPA call for each class on its part of q, k and v, the mask as the graph has it. cut: whether k and v have
    the KV heads that stay alone."""
    builder, site = Builder(program.gm, region.out), region.site
    mask = operand_mask(builder, region.match, operands[0].meta["val"].dtype)
    if mask is not None and not same_for_all(mask):
        mask = picked(builder, mask, kept.heads, slices)
    # A single query costs what its keys cost to read: they are not copied for it.
    single = not cut and is_one(shape_of(operands[0])[2])
    found = []
    for part in runs(kept) if single else kept.classes:
        q = sliced(builder, operands[0], part.first_head, part.heads)
        groups = kept.groups[part.first_group : part.first_group + part.groups]
        if cut:
            k, v = (sliced(builder, x, part.first_group, part.groups) for x in operands[1:])
        else:
            k, v = (picked(builder, x, groups, slices) for x in operands[1:])
        own = mask if mask is None or same_for_all(mask) else sliced(builder, mask, part.first_head, part.heads)
        out = builder.call(
            aten.scaled_dot_product_attention.default, q, k, v, own, 0.0, region.match.causal, scale=site.scale,
            enable_gqa=part.heads != part.groups,
        )  # fmt: skip
        match = Sdpa.match(out)
        if not isinstance(match, Match):
            raise Unpushed(Refusal(f"what stays of it is no plain attention: {match}", code="prune-needs-plain"))
        rest = replace(site, heads=part.heads, kv_heads=part.groups, pattern="sdpa")
        found.append(Region(rest, q, k, v, out, out, dict(region.loads), match, region.meaning))
    return found


def picked(builder: Builder, tensor: Node, heads: Sequence[int], slices: Slices) -> Node:
    """Some entries of dimension 1: a view where they are neighbours, else a copy."""
    first = heads[0]
    if tuple(heads) == tuple(range(first, first + len(heads))):
        return sliced(builder, tensor, first, len(heads))
    index = torch.tensor(heads, device=tensor.meta["val"].device)
    return builder.call(aten.index_select.default, tensor, 1, slices.constant(index, tensor))


def same_for_all(mask: Node) -> bool:
    """Whether a mask (B | 1, H | 1, Sq | 1, Sk) does not vary over the heads."""
    return len(shape_of(mask)) < 4 or shape_of(mask)[1] == 1


def sliced(builder: Builder, tensor: Node, first: int, count: int) -> Node:
    """The heads from `first` on; the tensor itself where that is all of them."""
    if first == 0 and shape_of(tensor)[1] == count:
        return tensor
    return builder.call(aten.slice.Tensor, tensor, 1, first, first + count)


def joined(builder: Builder, outs: Sequence[Node]) -> Node:
    """(B, h, N, Dv) of all classes, laid out (B, N, h, Dv) as the product with W_O reads it."""
    if len(outs) == 1:
        return outs[0]
    rows = [builder.call(aten.transpose.int, out, 1, 2) for out in outs]
    return builder.call(aten.transpose.int, builder.call(aten.cat.default, rows, 2), 1, 2)


def push_down(program: Program, region: Region, kept: Kept, means: Tensor, out: Node | None, slices: Slices) -> None:
    """From the output, in the layout that the graph had it in, to the products that read it."""
    space = Space()
    renamed: dict[Atom, Atom] = {}
    dims = [[renamed.setdefault(a, Atom(f"o.{a.name}", number(a.size))) for a in d] for d in region.match.out.dims]
    _, heads, _, values = (tuple(renamed[a] for a in d) for d in canonical(region.match)[3])
    chosen = Heads(space, heads, torch.tensor(kept.heads, dtype=torch.int64))
    layout = tuple(map(tuple, dims))
    if out is not None:
        with program.gm.graph.inserting_before(region.out):
            builder = Builder(program.gm, region.out)
            batch, queries = (tuple(renamed[a] for a in canonical(region.match)[3][d]) for d in (0, 2))
            have = (batch, (chosen.entries,), queries, values)
            lengths = {a: a.size for d in have for a in d if isinstance(a.size, int)}
            for d, atoms in enumerate(have):
                if len(atoms) == 1 and atoms[0] not in lengths:
                    lengths[atoms[0]] = builder.size(out, d)
            lengths |= {a: -1 for d in have for a in d if a not in lengths}
            out = rearrange(builder.call, out, have, chosen.kept(layout), lengths)
    Downward(slices, chosen, means, (*heads, *values)).follow(region.out, layout, out)


def number(size: Any) -> Any:
    """A size as an int where it is proved to be one: (6 * s) // s."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None and same(size, int(hint)) else size


def still_needed(slices: Slices) -> Refusal | None:
    """Why what was cut is needed whole all the same; None if nothing of it is."""
    left = slices.survivors()
    if not left:
        return None
    dead = slices.dead()
    readers = [u for n in left for u in n.users if u not in dead and u not in left]
    if any(reduces(u) for u in readers):
        said = f"{described(left[-1])} is normalised over all heads together, so that those that stay need the others"
        return Refusal(said, code="prune-joint-norm")
    reader = readers[-1] if readers else left[-1]
    by = "returned" if reader.op == "output" else f"read by {described(reader)}"
    said = f"{described(left[-1])}, which holds all heads, is {by} too"
    return Refusal(said, code="prune-read-elsewhere")


def reduces(node: Node) -> bool:
    """Whether a node sums over dimensions, or makes what is summed."""
    return node.target in REDUCTIONS or any(u.target in REDUCTIONS for u in node.users)


def lower(
    program: Program, region: Region, regions: Sequence[Region], kept: Kept, choices: Sequence[Choice], whole: str
) -> None:
    """Lower what stays of a site by its choices, or exactly, and report the site as one rewrite. whole: why keys and
    values of the heads that are gone had to stay."""
    before, at, how = len(program.rewrites), 0, []
    planned = any(choices[h] != DENSE for h in kept.heads)
    for rest in regions:
        heads = kept.heads[at : at + rest.site.heads]
        at += rest.site.heads
        how.append(lower_rest(program, rest, [choices[h] for h in heads], heads, planned))
    del program.rewrites[before:]
    total = region.site.heads
    said = f"{total - len(kept.heads)} of {total} heads removed" if regions else f"all {total} heads removed"
    groups = region.site.kv_heads - len(kept.groups)
    note = f"{groups} of {region.site.kv_heads} KV heads with them" if groups and regions else ""
    if whole:
        note = f"keys and values stay whole, {whole}"
    lowering = "; ".join([said, *dict.fromkeys(how)])
    program.rewrites.append(Rewrite(region.site, lowering, tuple(choices), note))
    program.done.add(region.site.name)


def lower_rest(program: Program, rest: Region, choices: Sequence[Choice], heads: Sequence[int], planned: bool) -> str:
    """Put the cheapest that serves these heads in the place of their SDPA call; what it is called. planned: whether
    any head of the site has a span, so that under a plan that may be exchanged each of them has a table."""
    plan = program.plan
    assert plan is not None
    if any(choice != DENSE for choice in choices) or (planned and program.watch is not None):
        no = lower_planned.unserved(program, rest, choices, heads)
        if no is None:
            build = insert_planned(program, choices, plan, rest.site.name, heads)
            return put(program, rest, build, described_choices(choices), equal=False)
        said = f"planned, but {no.reason}; the heads that stay are exact"
        program.notes.append(located(replace(no, reason=said, path=rest.site.name), rest.anchor))
    chosen = lower_exact.choose(program, rest)
    return as_one_call(rest) if isinstance(chosen, Refusal) else put(program, rest, *chosen)


def put(program: Program, rest: Region, build: Callable[[Region], Node], lowering: str, equal: bool = True) -> str:
    """Replace the SDPA call of the heads that stay; where that fails it stays, and the refusal is reported."""
    before = len(program.rewrites)
    program.replace(rest, build, lowering, equal=equal)
    return lowering if len(program.rewrites) > before else as_one_call(rest)


def as_one_call(rest: Region) -> str:
    return "SDPA is_causal" if rest.match.causal else "SDPA with the mask as it was" if rest.match.terms else "SDPA"
