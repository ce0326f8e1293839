"""A plan whose spans may change under a compiled model: the tables of its sites are written in place.

    live = attnopt.LivePlan("plan.json")
    model = torch.compile(model, backend="attnopt", options={"plan": live})
    ...
    live.change("other.json")       # nothing is traced or compiled; the next call runs the other plan

A compiled graph reads its spans from tensors, so another plan of equal shape is other values in them. What is part of
the graph itself, which sites are planned at all and from which length on, must be the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice
from attnopt.mixed import tables
from attnopt.plan import Plan

REMEDY = "Compile the model again with the other plan: torch._dynamo.reset(), then torch.compile."


class LivePlan:
    """A Plan, given or read from a file, and the tables that graphs compiled with it read."""

    def __init__(self, plan: Plan | str | Path) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        # Weakly: a plan must not keep the tables of a model that is gone.
        self._tables: dict[str, list[dict[str, weakref.ref[Tensor]]]] = {}

    def watch(self, site: str, held: Mapping[str, Tensor]) -> None:
        """Remember the tables of a site in a graph that is being compiled."""
        self._tables.setdefault(site, []).append({name: weakref.ref(tensor) for name, tensor in held.items()})

    def change(self, plan: Plan | str | Path) -> None:
        """Run `plan` from now on. PlanError, and nothing is changed, where that would need another graph."""
        new = plan if isinstance(plan, Plan) else Plan.load(plan)
        self._check(new)
        for site, graphs in self._tables.items():
            choices = new.choices[site]
            for name, values in tables(choices, len(choices)).items():
                for held in graphs:
                    tensor = held[name]()
                    if tensor is not None:
                        # One made in inference mode is written there; of any other, autograd has to count the write.
                        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                            tensor.copy_(values)
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
            # Without tables the site is dense attention in the graph, or there is no graph yet.
            if self._tables and site not in self._tables and dense(before) and not dense(choices):
                raise PlanError(f"The compiled plan leaves {site} dense, and this one does not.", REMEDY)


def dense(choices: Iterable[Choice]) -> bool:
    return all(choice == DENSE for choice in choices)
