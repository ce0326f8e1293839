"""attnopt.explain: what was done to a model or function, or is in a plan or profile, for a person, a page, a program.

print(attnopt.explain(model))            what the command line prints; a notebook shows its own form of it
attnopt.explain(model).history           the passes, with times and, where kept, what each changed
attnopt.explain(model).write("page.html")
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from attnopt import backend
from attnopt.errors import ModelError, OptionError
from attnopt.ir import GraphReport
from attnopt.plan import Plan
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.data import (
    environment,
    graphs_json,
    launched_sources,
    plan_facts,
    plan_json,
    profile_json,
    visits_json,
    visits_lines,
)
from attnopt.report.fragment import fragment
from attnopt.report.history import History
from attnopt.report.page import write_page
from attnopt.report.pictures import pictures_json
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
        width = terminal.console().width
        return printed(self, Printer(file=io.StringIO(), width=width))

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
        return visits_json(site.name for graph in self.graphs for site in graph.sites)

    def to_json(self) -> dict[str, Any]:
        """The data of all the rest: that of the page, the history and what is known of generation."""
        data = self.page_data()
        data["history"] = [change.to_json() for change in self.history]
        if self.generation is not None:
            data["generation"] = self.generation.to_json()
        return data

    def page_data(self) -> dict[str, Any]:
        """What `report.page.write_page` takes."""
        data: dict[str, Any] = {"title": f"attnopt: {self.name}", "notes": list(self.notes)}
        if self._generates:
            data["notes"] += str(self.generation).splitlines()
        if self.graphs:
            data["graphs"] = graphs_json(self.graphs)
            data["pictures"] = pictures_json(self.graphs)
            data["kernels"] = launched_sources()
            data["visits"] = self.visits
            data["notes"] += visits_lines(data["visits"])
        if self.plan is not None:
            data["plan"] = plan_json(self.plan)
            data["summary"] = plan_facts(data["plan"])
        if self.profile is not None:
            data["profile"] = profile_json(self.profile)
        return {**data, "environment": environment()}

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


def printed(explained: Explanation, to: Console) -> str:
    """The text of an explanation, by a console that writes into memory."""
    if explained.graphs or explained.notes:
        to.print(f"{explained.name}: {'; '.join(explained.notes) or 'compiled by attnopt'}", soft_wrap=True)
    if explained.graphs:
        terminal.print_graphs(explained.graphs, to=to)
        for line in visits_lines(explained.visits):
            to.print(line, soft_wrap=True)
    if explained._generates:
        to.print(str(explained.generation), soft_wrap=True)
    print_planned(explained, to)
    held: Callable[[], str] = to.file.getvalue  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in held().splitlines())


def print_planned(explained: Explanation, to: Console) -> None:
    if explained.plan is not None:
        terminal.print_plan(explained.plan, to=to)
    if explained.profile is not None:
        terminal.print_profile(explained.profile, to=to)
