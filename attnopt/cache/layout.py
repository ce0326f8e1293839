"""How a layer's cache is laid out: a sink and a ring of slots for every KV head, one behind the other in one buffer.

A KV head holds what any of its query heads may ask for: the largest sink and the largest window among them, each head
applying its own when computing. Windows are those of the plan at the length the cache is made for, and stay.

    capacity = min(roundup16(N), roundup16(sink + window + slack))

A KV head that would have a slot for every one of N tokens holds token p in slot p, and never wraps. Which slot a token
has otherwise: attnopt/codegen/slots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.codegen import slots
from attnopt.codegen.work_list import tell_table
from attnopt.errors import OptionError, PlanError
from attnopt.ir import DENSE, Choice, Site
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.plan import Plan

# Slots a capacity is a multiple of: a tile of keys has a multiple of 16 of them, and a page would waste up to half of a
# small window.
ROUNDED_TO = 16
# The window of a KV head that holds every token: wider than any ring, so that it may not wrap; within 32 bits.
EVERY = 1 << 30


@dataclass(frozen=True)
class Layout:
    """starts, capacities, sinks, windows: of each KV head, in slots of the layer's buffer; a head that holds every
    token has the sink 0 and the window EVERY. head_sinks, head_windows: of each query head, which is what it computes
    with. length: N, the tokens a row may have; slack: how many of them can be taken back.
    """

    starts: tuple[int, ...]
    capacities: tuple[int, ...]
    sinks: tuple[int, ...]
    windows: tuple[int, ...]
    head_sinks: tuple[int, ...]
    head_windows: tuple[int, ...]
    length: int
    slack: int = 0

    @classmethod
    def of(cls, choices: Sequence[Choice] | None, site: Site, length: int, slack: int = 0) -> Layout:
        """The layout for one choice per query head of a site, all dense if there are none, at N = `length`.

        PlanError for a choice that is more than a span, or a wrong number of them.
        """
        choices = [DENSE] * site.heads if choices is None else choices
        refuse(choices, site)
        spans = [CANDIDATES[c.candidate].span(dict(c.params), length, site.mask.window) for c in choices]
        return cls.of_spans([s for s, _ in spans], [w for _, w in spans], site.kv_heads, length, slack)

    @classmethod
    def of_spans(
        cls, sinks: Sequence[int], windows: Sequence[int], kv_heads: int, length: int, slack: int = 0
    ) -> Layout:
        """The layout for a sink and a window per query head. OptionError for a length or a slack there cannot be."""
        if length < 1 or slack < 0:
            raise OptionError(
                f"A cache of {length} tokens with a slack of {slack} cannot be made.",
                "Give a max_length of 1 or more and a slack of 0 or more.",
            )
        share = len(sinks) // kv_heads
        sinks, windows = ([min(max(x, 0), length) for x in xs] for xs in (sinks, windows))
        most, capacities, rows = _rounded(length), [], []
        for first in range(0, len(sinks), share):
            sink, window = max(sinks[first : first + share]), max(windows[first : first + share])
            capacity = min(most, _rounded(sink + window + slack))
            capacities.append(capacity)
            rows.append((0, EVERY) if capacity >= length else (sink, window))
        starts = tuple(accumulate(capacities, initial=0))[:-1]
        own_sinks, own_windows = zip(*rows, strict=True)
        return cls(starts, tuple(capacities), own_sinks, own_windows, tuple(sinks), tuple(windows), length, slack)

    @property
    def slots(self) -> int:
        """Slots of the layer."""
        return sum(self.capacities)

    @property
    def rings(self) -> tuple[int, ...]:
        """Slots of each KV head's ring."""
        return tuple(capacity - sink for capacity, sink in zip(self.capacities, self.sinks, strict=True))

    @property
    def whole(self) -> tuple[bool, ...]:
        """Which KV heads hold every token."""
        return tuple(window == EVERY for window in self.windows)

    def tables(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """What `attnopt::attend_update` reads: int32 (G, 4) of start, capacity, sink and window of each KV head, and
        int32 (H, 2) of sink and window of each query head."""
        table: list[tuple[int, ...]] = list(zip(self.starts, self.capacities, self.sinks, self.windows, strict=True))
        spans: list[tuple[int, ...]] = list(zip(self.head_sinks, self.head_windows, strict=True))
        # Neither is an inference tensor: Dynamo takes those for inputs of another kind.
        with torch.inference_mode(False):
            made = tuple(torch.tensor(rows, dtype=torch.int32, device=device) for rows in (table, spans))
        if not torch.compiler.is_compiling():
            # Kernels for a GPU plan by their values, and need not wait for it to learn them.
            for tensor, rows in zip(made, (table, spans), strict=True):
                tell_table(tensor, tuple(chain.from_iterable(rows)))
        return made  # type: ignore[return-value]

    def slot_of(self, positions: Tensor, head: int) -> Tensor:
        """The slots, in the layer's buffer, of positions int (...,) in KV head `head`."""
        return self.starts[head] + slots.slots(positions, self.capacities[head], self.sinks[head])

    def positions_of(self, n: Tensor, head: int) -> Tensor:
        """The positions that the slots of KV head `head` hold after n tokens, -1 in empty ones: n int (...,) -> int64
        (..., capacity)."""
        return slots.held(n, self.capacities[head], self.sinks[head])

    def nbytes(self, head_dim: int, head_dim_v: int, dtype: torch.dtype, batch: int = 1) -> int:
        """Bytes of the layer's keys and values."""
        return batch * self.slots * (head_dim + head_dim_v) * dtype.itemsize

    def ideal_bytes(self, head_dim: int, head_dim_v: int, dtype: torch.dtype, batch: int = 1) -> int:
        """Bytes if every KV head had exactly the slots that its query heads can ask for: no slack, no rounding."""
        share = len(self.head_sinks) // len(self.starts)
        spans = (
            max(self.head_sinks[first : first + share]) + max(self.head_windows[first : first + share])
            for first in range(0, len(self.head_sinks), share)
        )
        return batch * sum(min(self.length, span) for span in spans) * (head_dim + head_dim_v) * dtype.itemsize

    def __str__(self) -> str:
        whole = sum(self.whole)
        heads, full = len(self.starts), len(self.starts) * self.length
        return (
            f"{self.slots} slots for {heads} KV heads of {self.length} tokens ({100 * self.slots / full:.0f} %), "
            f"{whole} of them whole"
        )


def layouts_of(plan: Plan | None, sites: Iterable[Site], length: int, slack: int = 0) -> dict[str, Layout]:
    """The layout of every site by its name, at N = `length`. A site that the plan has nothing for is dense, and so is
    every site below the plan's least length.

    PlanError where a head is replaced by more than a span, is gone, or the plan has another number of heads.
    """
    made = {}
    for site in sites:
        choices = plan.choices.get(site.name) if plan is not None else None
        if choices is not None:
            refuse(choices, site)
            assert plan is not None
            choices = choices if length >= plan.min_length else None
        made[site.name] = Layout.of(choices, site, length, slack)
    return made


def refuse(choices: Sequence[Choice], site: Site) -> None:
    """Raise PlanError where a ragged cache cannot serve these choices, one per query head of the site."""
    if len(choices) != site.heads:
        raise PlanError(
            f"The plan has {len(choices)} heads at {site.name}, this model has {site.heads}.",
            "Profile and plan this model: `attnopt profile`, then `attnopt plan`.",
        )
    for head, choice in enumerate(choices):
        far = CANDIDATES[choice.candidate].far
        if far not in ("", "selected"):
            what = "is gone" if far == "gone" else f"needs {choice.candidate} for its far keys"
            raise PlanError(
                f"Head {head} of {site.name} {what}, and a cache for generation holds spans only.",
                "Make a plan of spans alone: run `attnopt plan` without --allow.",
            )


def _rounded(slots: int) -> int:
    return -(-slots // ROUNDED_TO) * ROUNDED_TO
