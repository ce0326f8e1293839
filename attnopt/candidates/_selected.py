"""Shared by the candidates whose blocks of keys are selected while running: where they stand, from scores to lists,
their reference.

A candidate says `keep`: which blocks of keys each block of queries visits. Added to that always: the first keys that
count, where sinks are, and the diagonal. Taken away always: what no query of the block may see. Within a block that is
visited, every key that causality, the model's own window and padding leave is kept, unless `skip` is given: then blocks
whose scores all lie ln(skip / M) under the largest met before are left out while walking (M keys; Yuan et al.,
"BLASST", arXiv:2512.12087), whatever selected them.

Of decoding nothing changes: the cache keeps every key, and one query attends to them all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from attnopt.candidates import Number, Param, Params, SpanCosts, refuse_span
from attnopt.candidates._tried import Tried
from attnopt.candidates.dense import UNBOUNDED
from attnopt.codegen.reference_blocks import prefill
from attnopt.codegen.spec import BLOCKS
from attnopt.ir import Choice, Refusal, Share, Site
from attnopt.selection import Asked, Lists, lists_of

if TYPE_CHECKING:
    from attnopt.feature_maps import FeatureMap

# Of every selecting candidate: rows and keys of a block, and the threshold below which a block is skipped, times M.
BLOCK = Param("block", int, BLOCKS[0], BLOCKS[-1], among=BLOCKS)
SKIP = Param("skip", float, 0.0, 65536.0, 1 / 64)
# Sizes of blocks that are tried: larger ones hold more keys that nobody asked for, smaller ones cost more to select.
OFFERED = (64,)


class Selected(Tried):
    """`params` of a subclass are its own; `block` and `skip` (0: never) are added to them. fixed: those of its own,
    whole numbers, on which shapes depend; heads that are served by one call share them, as they do `block`."""

    far = "selected"
    fixed: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.params = (*(p for p in cls.params if p not in (BLOCK, SKIP)), BLOCK, SKIP)

    @abstractmethod
    def keep(self, asked: Asked) -> Tensor:
        """The blocks worth visiting, bool and broadcastable to (B, h, R, C). Tensor operations alone, of shapes known
        beforehand; settings are there for each head, as `asked.setting(name)` (h, 1, 1)."""

    def select(self, asked: Asked) -> Lists:
        """What the kernel walks. A row block that may see anything visits at least that of `asked.always`."""
        shape = asked.q.shape[0], len(asked.heads), asked.rows, asked.columns
        kept = (self.keep(asked) | asked.always) & asked.possible
        return lists_of(kept.expand(shape))

    def refuse(self, site: Site) -> Refusal | None:
        return refuse_span(site)

    def rule(self, params: Params) -> tuple[int, int, float]:
        """Of the cache: every key."""
        return 0, UNBOUNDED, 0.0

    def method(self, params: Params) -> str:
        """Heads of one method are served by one call: its name, what is fixed, the size of its blocks: "pooled/64"."""
        return "/".join([self.name, *(str(int(params[name])) for name in (*self.fixed, "block"))])

    def cost(
        self, table: SpanCosts, params: Params, length: int, own_window: int | None = None, share: Share | None = None
    ) -> float:  # fmt: skip
        """Of the selection and the walk over what it keeps; where nothing is known of that, over every block."""
        visited, skipped = (1.0, 0.0) if share is None else (share.visited, share.skipped)
        # Blocks were counted among those within the model's own window: its share of all causal pairs.
        own = length if own_window is None else min(own_window, length)
        within = own * (2 * length - own + 1) / (length * (length + 1))
        walk = table.block_cost(length, int(params["block"]), visited * within, skipped)
        selection = table.selection_cost(length, self.name, self.timing(params), self.scored(params, length))
        return walk + selection

    def timing(self, params: Params) -> tuple[float, ...]:
        """What the time of its selection depends on, as numbers: what its shapes do."""
        return tuple(float(params[name]) for name in (*self.fixed, "block"))

    def scored(self, params: Params, length: int) -> int:
        """Query-key pairs that do the work of one head's selection, for where nothing is timed: by default each pair of
        blocks is scored and sorted, and each query and key read once. A pair is two products, of q and k and with v."""
        return 2 * (-(-length // int(params["block"]))) ** 2 + 2 * length

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, params: Params, scale: float, own_window: int | None = None,
        given: FeatureMap | Tensor | None = None, pad: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """k and v may be longer than q, whose queries then are the last; pad bool (B, M)."""
        heads = torch.arange(q.shape[1], device=q.device)
        table = torch.tensor([self.settings(params)] * len(heads), dtype=torch.float64)
        asked = asked_of(self, q, k, heads, table.to(q.device), scale, pad, own_window or 0)
        out = torch.empty_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).clone()
        bounds = bounds_of(asked)
        prefill(
            q, k, v, heads.int(), *self.select(asked), bounds, scale, pad, own_window or 0, asked.block, out
        )  # fmt: skip
        return out

    def offered(self, own: Mapping[str, Number], length: int) -> list[Choice]:
        """A choice of these parameters for each size of blocks that cuts `length` tokens into eight or more."""
        sizes = [block for block in OFFERED if 8 * block <= length] or [BLOCKS[0]]
        return [Choice.of(self.name, {**own, "block": block, "skip": own.get("skip", 0.0)}) for block in sizes]

    def settings(self, params: Params) -> tuple[float, ...]:
        """The parameters in their order, as a row of the operator's table."""
        return tuple(float(params[p.name]) for p in self.params)


def asked_of(
    candidate: Selected, q: Tensor, k: Tensor, heads: Tensor, table: Tensor, scale: float, pad: Tensor | None,
    window: int, fixed: Sequence[int] | None = None,
) -> Asked:  # fmt: skip
    """What a candidate selects from: heads int64 (h,), table (h, P) of settings in the order of its params, all beside
    q. fixed: the numbers of its method, where reading them from the table would wait for the device."""
    settings = {p.name: table[:, n].float() for n, p in enumerate(candidate.params)}
    names = (*candidate.fixed, "block")
    shared = dict(zip(names, fixed or [int(settings[name][0]) for name in names], strict=True))
    kv = heads // (q.shape[1] // k.shape[1])
    return Asked(q, k, heads, kv, settings, scale, shared["block"], pad, window, shared)


def bounds_of(asked: Asked) -> Tensor:
    """ln(skip / M) of every head, at most 0, -inf where `skip` is 0: float32 (h,), or (B, h) where M, the keys that
    count, is another in each entry of a padded batch."""
    keys = max(asked.k.shape[2], 1) if asked.pad is None else asked.pad.sum(-1, keepdim=True).clamp(min=1)
    return (asked.settings["skip"] / keys).clamp(max=1.0).log().to(torch.float32)
