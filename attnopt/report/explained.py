"""attnopt.explain: what was done to a model or function, or is in a plan or profile, for a person, a page, a program.

print(attnopt.explain(model))            what the command line prints; a notebook shows its own form of it
attnopt.explain(model).history           the passes, with times and, where kept, what each changed
attnopt.explain(model).write("page.html")
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from attnopt import backend
from attnopt.errors import ModelError, OptionError
from attnopt.ir import GraphReport
from attnopt.plan import Plan
from attnopt.planner.again import told_sites
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.data import (
    launched_sources,
    of_graphs,
    page_data,
    plan_json,
    profile_json,
    visits_json,
    visits_lines,
)
from attnopt.report.fragment import fragment
from attnopt.report.history import History
from attnopt.report.page import write_page
from attnopt.report.terminal.console import Printer

if TYPE_CHECKING:
    from attnopt.hf.explained import Generation

NEVER_COMPILED = 'not compiled: compile it with backend="attnopt" and call it once'
NOT_YET = "not compiled yet: call it once"
SHARED = (
    "compiled for another of the same class and sizes: Dynamo compiles once, and calls of this one that meet the same "
    "guards run that code"
)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What is known of one thing. `name`: its class or function; `graphs`: what was compiled for it, in order;
    `generation`: what `attnopt.enable` did, of a transformers model; `plan`, `profile`: the one that was asked about,
    or the plan that is enabled; `notes`: what else is to be said."""

    name: str
    graphs: tuple[GraphReport, ...] = ()
    generation: Generation | None = None
    plan: Plan | None = None
    profile: Profile | None = None
    notes: tuple[str, ...] = ()

    @property
    def history(self) -> History:
        """The passes over all graphs, in order; printed, a log, with a diff of each change where texts are kept."""
        return History(self.graphs)

    @property
    def _generates(self) -> bool:
        """Whether there is something to say of generation: of a compiled model, only what is installed."""
        return self.generation is not None and (self.generation.enabled or not self.graphs)

    def __str__(self) -> str:
        return printed(self, terminal.console().width)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return fragment(self.page_data(), str(self.history) if self.graphs else "", self._map())

    def _map(self) -> str:
        """The plan or profile as the terminal shows it, in colours, as HTML."""
        if self.plan is None and self.profile is None:
            return ""
        to = Printer(
            file=io.StringIO(), width=110, record=True, force_terminal=True, color_system="truecolor", no_color=False
        )
        print_planned(self, to)
        return to.export_html(inline_styles=True, code_format="{code}")

    @property
    def visits(self) -> dict[str, list[dict[str, Any]]]:
        """What its heads visited so far whose keys are selected while running (`report.data.visits`)."""
        compiled = [site.name for graph in self.graphs for site in graph.sites]
        enabled = [] if self.generation is None else [layer.name for layer in self.generation.layers]
        return visits_json([*compiled, *enabled])

    def to_json(self) -> dict[str, Any]:
        """The data of all the rest: that of the page, the history and what is known of generation."""
        data = self.page_data()
        data["history"] = [change.to_json() for change in self.history]
        if self.generation is not None:
            data["generation"] = self.generation.to_json()
        return data

    def page_data(self) -> dict[str, Any]:
        """What `report.page.write_page` takes."""
        data: dict[str, Any] = {"notes": list(self.notes)}
        if self._generates:
            data["notes"] += str(self.generation).splitlines()
        if self.graphs:
            data |= {**of_graphs(self.graphs), "kernels": launched_sources()}
        if self.graphs or self._generates:
            data["visits"] = self.visits
            data["notes"] += visits_lines(data["visits"])
        return page_data(f"attnopt: {self.name}", data | self.planned())

    def planned(self) -> dict[str, Any]:
        """The data of the plan and of the profile that there are."""
        found = {}
        if self.plan is not None:
            found["plan"] = plan_json(self.plan, told_sites(self.plan))
        if self.profile is not None:
            found["profile"] = profile_json(self.profile)
        return found

    def write(self, path: Path | str) -> Path:
        """Write the page, one HTML file that loads nothing from elsewhere."""
        return write_page(path, self.page_data())


def explain(subject: Any) -> Explanation:
    """What attnopt did to a module or function, compiled or enabled for generation, or what a plan or profile says.

    subject: a module, what torch.compile returned or was given, a Plan or a Profile. OptionError for anything else.
    """
    if isinstance(subject, Plan):
        return Explanation(f"plan {subject.id}", plan=subject)
    if isinstance(subject, Profile):
        return Explanation(f"profile of model {subject.header.fingerprint.structure}", profile=subject)
    if not isinstance(subject, nn.Module) and not callable(subject):
        raise OptionError(
            f"A {type(subject).__name__} cannot be explained.",
            "Give a model or function, what torch.compile made of it, a Plan or a Profile.",
        )
    inner = backend.inside(subject)
    graphs, own = backend.reports_of(subject)
    notes = [SHARED] * (bool(graphs) and not own)
    generation = generation_if_any(inner)
    if not graphs and not (generation and generation.enabled):
        notes.append(NOT_YET if backend.is_compiled(subject) or backend.is_compiled(inner) else NEVER_COMPILED)
    name = (
        type(inner).__name__ if isinstance(inner, nn.Module) else getattr(inner, "__qualname__", type(inner).__name__)
    )
    plan = generation.plan if generation else None
    return Explanation(name, tuple(graphs), generation, plan, notes=tuple(notes))


def generation_if_any(model: Any) -> Generation | None:
    """Of a transformers model; that library is not imported to find out that it is none, and need not be installed."""
    if "transformers" not in sys.modules:
        return None
    from attnopt.hf.explained import generation_of

    try:
        return generation_of(model)
    except ModelError:
        return None


def printed(explained: Explanation, width: int) -> str:
    """The text of an explanation, as a terminal of so many columns shows it."""
    held = io.StringIO()
    to = Printer(file=held, width=width)
    if explained.graphs or explained.notes:
        to.print(f"{explained.name}: {'; '.join(explained.notes) or 'compiled by attnopt'}", soft_wrap=True)
    if explained.graphs:
        terminal.print_graphs(explained.graphs, to=to)
    if explained._generates:
        to.print(str(explained.generation), soft_wrap=True)
    for line in visits_lines(explained.visits):
        to.print(line, soft_wrap=True)
    print_planned(explained, to)
    return "\n".join(line.rstrip() for line in held.getvalue().splitlines())


def print_planned(explained: Explanation, to: Console) -> None:
    found = explained.planned()
    if "plan" in found:
        terminal.print_plan(found["plan"], to=to)
    if "profile" in found:
        terminal.print_profile(found["profile"], to=to)
