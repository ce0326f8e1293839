"""What exact mode would not compute or store any more, counted from the sites' own masks at chosen lengths.

Two passes in the pipeline: `Savings.run` stands between recognising and lowering, and asks of every region what would
be chosen if the sizes that stand for a length were that length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from attnopt.examine.records import Counted, Saving
from attnopt.ir import Mask, Refusal, Region
from attnopt.passes import pays
from attnopt.passes.arrange import term_dims
from attnopt.passes.lower_exact import choose, repeats_keys, scores_stay
from attnopt.passes.program import Program
from attnopt.passes.verify import hint
from attnopt.patterns import RawTerm, checked
from attnopt.patterns.layout import Atom

aten = torch.ops.aten

# What lowerings compute, by how their names begin: the pairs that the mask's formula keeps; all pairs, or as many as
# a cache holds; all pairs.
KEPT = ("SDPA is_causal", pays.SPAN, "SDPA, chunks of", pays.PRINTED, pays.DOCUMENTS)
FILLED = (pays.LIVE, pays.GROWN)
ALL = ("SDPA without a mask", pays.PACKED, pays.PADDING, pays.AS_IT_WAS, "SDPA with a mask of one row")
# Those of them that read no mask as large as the scores.
WITHOUT_MASK = (*KEPT, "SDPA without a mask", pays.PADDING, "SDPA with a mask of one row")
VIEWS = (
    aten.slice.Tensor, aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.alias.default,
    aten.reshape.default, aten.select.int, aten.detach.default,
)  # fmt: skip


class Savings:
    """The savings of a graph at `lengths`. sizes: those that stand for a length; where there are none, or no lengths,
    the sizes that were traced are counted."""

    def __init__(self, lengths: Sequence[int], sizes: Iterable[int]) -> None:
        self.sizes = frozenset(sizes)
        self.lengths = tuple(lengths) if self.sizes else (0,)
        self.found: tuple[Saving, ...] = ()

    def run(self, program: Program) -> None:
        self.found = tuple(self.at(program, length) for length in self.lengths) if program.regions else ()

    def scaled(self, length: int, size: int) -> int:
        return length if length and size in self.sizes else size

    def at(self, program: Program, length: int) -> Saving:
        regions = [r for r in program.regions if not length or self.sizes & set(extents(r))]
        chosen = {region.site.name: self.chosen(program, region, length) for region in regions}
        repeated = scores = 0
        sites = []
        for region in regions:
            queries, keys = (self.scaled(length, size) for size in extents(region))
            lowering, why = chosen[region.site.name]
            sites.append(counted(region, queries, keys, lowering, why))
            if lowering:
                batch, heads = (hint(size) for size in region.q.meta["val"].shape[:2])
                item = region.k.meta["val"].element_size()
                widths = region.site.head_dim + region.site.head_dim_v
                repeated += repeats_keys(region) * batch * heads * keys * widths * item
                scores += (region.site.pattern != "sdpa") * batch * heads * queries * keys * item
        masks = self.masks(program, regions, {name for name, (done, _) in chosen.items() if begins(done, WITHOUT_MASK)},
                           length)  # fmt: skip
        return Saving(length, masks, repeated, scores, tuple(sites), len(program.regions) - len(regions))

    def chosen(self, program: Program, region: Region, length: int) -> tuple[str, str]:
        """(lowering, "") or ("", why not) at a length."""
        queries, keys = (self.scaled(length, size) for size in extents(region))
        form = choose(program, region, (queries, keys))
        if isinstance(form, Refusal):
            return "", form.reason
        no = scores_stay(program, region)
        return (form[1], "") if no is None else ("", no.reason)

    def masks(self, program: Program, regions: list[Region], without: set[str], length: int) -> int:
        """Bytes of the masks that only attentions `without` a mask had read."""
        inside = {n for r in program.regions for n in (*r.match.inner, r.anchor, r.out)}
        bases: dict[Node, int] = {}
        needed: set[Node] = set()
        for region in program.regions:
            for term in (t for t in region.match.terms if not checked(t)):
                base = base_of(term.node)
                if region not in regions or region.site.name not in without or read_outside(base, inside):
                    needed.add(base)
                else:
                    bases[base] = max(bases.get(base, 0), self.bytes_of(region, term, length))
        return sum(size for base, size in bases.items() if base not in needed)

    def bytes_of(self, region: Region, term: RawTerm, length: int) -> int:
        """What a mask takes; axes along which it repeats itself take nothing."""
        _, (batch, heads, queries, keys) = term_dims(region.match, term)
        size = int(term.node.meta["val"].element_size()) * extent((*batch, *heads))
        # Only these are lengths: as many heads as tokens were traced are not.
        return size * self.scaled(length, extent(queries)) * self.scaled(length, extent(keys))


def extents(region: Region) -> tuple[int, int]:
    """Queries and keys, as traced."""
    return hint(region.q.meta["val"].shape[2]), hint(region.k.meta["val"].shape[2])


def extent(axis: Iterable[Atom]) -> int:
    """Places along an axis, as traced; 1 where a mask has no such axis."""
    return math.prod(hint(atom.size) for atom in axis)


def begins(lowering: str, names: Sequence[str]) -> bool:
    return lowering.startswith(tuple(names))


def counted(region: Region, queries: int, keys: int, lowering: str, why: str) -> Counted:
    """One site. Before, an SDPA call that was told is_causal computes what that keeps, anything else every pair."""
    batch, heads = (hint(size) for size in region.q.meta["val"].shape[:2])
    mask, match = region.site.mask, region.match
    own = Mask(causal=True) if match.causal and not match.terms else Mask()
    before = after = pairs(own, queries, keys, 0)
    at_most = False
    if begins(lowering, KEPT):
        traced = extents(region)
        aligned = isinstance(mask.offset, str) or mask.offset == traced[1] - traced[0]
        after = pairs(mask, queries, keys, keys - queries if aligned else int(mask.offset))
        at_most = mask.padded or bool(mask.terms or mask.opaque)
    elif begins(lowering, FILLED):
        at_most = True
    elif lowering:
        after = queries * keys
    return Counted(region.site.name, lowering, why, batch * heads * before, batch * heads * after, at_most)


def pairs(mask: Mask, queries: int, keys: int, offset: int) -> int:
    """Pairs (i, j) that the bounds of a mask keep, i < queries and j < keys; its data may keep fewer."""
    i = torch.arange(queries) + offset
    low, high = torch.zeros_like(i), torch.full_like(i, keys - 1)
    if mask.causal:
        high = torch.minimum(high, i)
    if mask.window is not None:
        low = torch.maximum(low, i - mask.window + 1)
        high = torch.minimum(high, i + mask.window - 1) if mask.symmetric else high
    if mask.chunk:
        begin = i.div(mask.chunk, rounding_mode="floor") * mask.chunk
        low, high = torch.maximum(low, begin), torch.minimum(high, begin + mask.chunk - 1)
    return int((high - low + 1).clamp(min=0).sum())


def base_of(node: Node) -> Node:
    """What a view is a view of."""
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def read_outside(base: Node, inside: set[Node]) -> bool:
    """Whether anything but the attentions reads it."""
    users: list[Any] = list(base.users)
    while users:
        user = users.pop()
        if user in inside:
            continue
        if user.target not in VIEWS and not user.meta.get("made_for_masks"):
            return True
        users += list(user.users) if user.target in VIEWS else []
    return False
