"""The full report of a plan, as the data of a page: whatever is known of it, each part from its own source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnopt import settings
from attnopt.cost import Costs
from attnopt.errors import ModelError
from attnopt.examine import examine_model
from attnopt.hf import Loaded
from attnopt.ir import GraphReport, Site
from attnopt.plan import Plan
from attnopt.planner.again import Posed, pose, told_sites
from attnopt.planner.costs import spec_of
from attnopt.planner.verify import Record
from attnopt.registry import TARGETS
from attnopt.report.data import (
    candidates_json,
    front_json,
    of_graphs,
    plan_json,
    profile_json,
    records_json,
)

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile


@dataclass(frozen=True, eq=False)
class Known:
    """What there is beside a plan. sites: of its model, in the order in which they run; tables: the costs it was made
    with, by site; records: of its search; graphs: of the model as it was traced with the plan at the planned length;
    device: where kernels would run."""

    profile: Profile | None = None
    fitted: Fitted | None = None
    sites: Sequence[Site] | None = None
    tables: dict[str, Costs] | None = None
    records: Sequence[Record] = ()
    graphs: Sequence[GraphReport] = ()
    notes: Sequence[str] = field(default=())
    device: str = "cpu"


def plan_report(plan: Plan, known: Known) -> dict[str, Any]:
    """The parts of a page about a plan, those of which nothing is known are absent."""
    sites = known.sites if known.sites is not None else told_sites(plan)
    found: dict[str, Any] = {"notes": list(known.notes), **of_graphs(known.graphs), "plan": plan_json(plan, sites)}
    if known.profile is not None:
        posed = pose(plan, known.profile, known.sites, known.fitted, known.tables)
        found["notes"] += posed.notes
        found |= _of_profile(plan, known.profile, posed, known)
    if known.records:
        found["records"] = records_json(known.records)
    if known.sites is not None:
        found["kernels"] = kernels(plan, known.sites, known.device)
    return found


def traced(loaded: Loaded, plan: Plan) -> tuple[list[GraphReport], list[str]]:
    """The graphs that a plan makes of its model at the planned length, since under its break-even its spans are not in
    them; or none, and a note that says why."""
    try:
        return examine_model(loaded, plan.lengths.planned, plan=plan), []
    except ModelError as error:
        return [], [f"The plan's graphs were not traced: {error.problem}"]


def _of_profile(plan: Plan, profile: Profile, posed: Posed, known: Known) -> dict[str, Any]:
    return {
        "profile": profile_json(profile),
        "front": front_json(plan, posed, known.records),
        "candidates": candidates_json(plan, profile, posed=posed),
    }


def kernels(plan: Plan, sites: Sequence[Site], device: str = "cpu") -> dict[str, str]:
    """The sources of the prefill kernels that a plan's sites are lowered to on a device, by name; one for all sites of
    a shape, none for those left dense."""
    target = settings.target(device.split(":")[0])
    specs = {spec_of(s, target) for s in sites if any(c.candidate != "dense" for c in plan.choices.get(s.name, ()))}
    emitters = {spec: f"{spec.target} {spec.kernel}" for spec in specs}
    return {spec.key(): TARGETS[name].emit(spec) for spec, name in emitters.items() if name in TARGETS}
