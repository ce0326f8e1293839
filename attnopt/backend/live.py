"""A plan whose spans may change under a compiled model: the tables of its sites are written in place.

    live = attnopt.LivePlan("plan.json")
    model = torch.compile(model, backend="attnopt", options={"plan": live})
    ...
    live.change("other.json")       # nothing is traced or compiled; the next call runs the other plan

A compiled graph reads its spans from tensors, so another plan of equal shape is other values in them. What is part of
the graph itself must be the same: which sites are planned at all and from which length on, which heads have a part for
their far keys and of which kind, its feature maps, and which heads are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice
from attnopt.mixed import far_of, far_parts, gone, tables
from attnopt.plan import Plan

if TYPE_CHECKING:
    from attnopt.fitted import Fitted

REMEDY = "Compile the model again with the other plan: torch._dynamo.reset(), then torch.compile."


class LivePlan:
    """A Plan, given or read from a file, and the tables that graphs compiled with it read."""

    def __init__(self, plan: Plan | str | Path) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        # Weakly: a plan must not keep the tables of a model that is gone.
        self._tables: dict[str, list[Watched]] = {}

    def watch(self, site: str, held: Mapping[str, Tensor], heads: Sequence[int]) -> None:
        """Remember the tables of some query heads of a site in a graph that is being compiled."""
        tensors = {name: weakref.ref(tensor) for name, tensor in held.items()}
        self._tables.setdefault(site, []).append(Watched(tuple(heads), tensors))

    def change(self, plan: Plan | str | Path) -> None:
        """Run `plan` from now on. PlanError, and nothing is changed, where that would need another graph."""
        new = plan if isinstance(plan, Plan) else Plan.load(plan)
        self._check(new)
        for site, graphs in self._tables.items():
            for watched in graphs:
                watched.write([new.choices[site][head] for head in watched.heads])
        self.plan = new

    def _check(self, new: Plan) -> None:
        old = self.plan
        if new.fingerprint != old.fingerprint:
            raise PlanError(f"The plan for {new.model!r} is of another model than {old.model!r}.", REMEDY)
        if new.min_length != old.min_length:
            said = f"The plan runs dense below {new.min_length} tokens, the compiled one below {old.min_length}."
            raise PlanError(said, REMEDY)
        if set(new.choices) != set(old.choices):
            other = ", ".join(sorted(set(new.choices) ^ set(old.choices))[:3])
            raise PlanError(f"Only one of the two plans names {other}.", REMEDY)
        for site, choices in new.choices.items():
            before = old.choices[site]
            if len(choices) != len(before):
                raise PlanError(f"The plan has {len(choices)} heads at {site}, the compiled one {len(before)}.", REMEDY)
            if more := {c.candidate for c in choices} - {c.candidate for c in before} - {DENSE.candidate}:
                said = f"The compiled plan has no {', '.join(sorted(more))} at {site}, which this one wants."
                raise PlanError(said, REMEDY)
            for head, (now, then) in enumerate(zip(choices, before, strict=True)):
                if far_of(now) != far_of(then):
                    said = f"Head {head} of {site} is {then} in the compiled plan and {now} in this one."
                    raise PlanError(f"{said} Only what a span keeps can change.", REMEDY)
            if not equal_maps(site, choices, new.fitted, old.fitted):
                raise PlanError(f"The feature maps of {site} are others than those of the compiled plan.", REMEDY)
            # Without tables the site is dense attention in the graph, or there is no graph yet.
            if self._tables and site not in self._tables and dense(before) and not dense(choices):
                raise PlanError(f"The compiled plan leaves {site} dense, and this one does not.", REMEDY)


@dataclass(frozen=True)
class Watched:
    """The tables of some query heads of a site in one compiled graph."""

    heads: tuple[int, ...]
    tensors: Mapping[str, weakref.ref[Tensor]]

    def write(self, choices: Sequence[Choice]) -> None:
        """The spans of these choices, one for each of the heads."""
        for name, values in tables(choices, len(choices)).items():
            tensor = self.tensors[name]()
            if tensor is not None:
                # One made in inference mode is written there; of any other, autograd has to count the write.
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(values)


def equal_maps(site: str, choices: Sequence[Choice], new: Fitted | None, old: Fitted | None) -> bool:
    """Whether the heads' feature maps and the means of those that are gone are the same, number by number."""
    if new is old:
        return True
    if new is None or old is None:
        return not any(part.map_name for part in far_parts(choices)) and not gone(choices)
    same = all(
        torch.equal(a, b)
        for part in far_parts(choices)
        if part.map_name
        for a, b in zip(*(x.map_of(site, part.map_name, part.heads).tensors for x in (new, old)), strict=True)
    )
    return same and (not gone(choices) or torch.equal(*(x.mean_of(site, gone(choices)) for x in (new, old))))


def dense(choices: Iterable[Choice]) -> bool:
    return all(choice == DENSE for choice in choices)
