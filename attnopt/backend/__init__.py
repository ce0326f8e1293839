"""The torch.compile backend: capture, rewrite, hand to inductor. It never raises into Dynamo.

torch.compile(model, backend="attnopt")                                        exact, no plan needed
torch.compile(model, backend="attnopt", options={"plan": "plan.json"})         the plan's spans
torch.compile(model, backend="attnopt", options={"plan": LivePlan("plan.json")})   spans that may change later
torch.compile(model, backend="attnopt", options={"mode": "max-autotune", "inductor": {...}, "verify": True})
torch.compile(model, backend="attnopt", options={"history": True})             keeps the graph's text after each pass
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from attnopt import settings
from attnopt.backend import bypass, dump, structured, switches, told
from attnopt.backend.append import appending, with_longer
from attnopt.backend.inductor import SHIELDED, later, protected, to_inductor
from attnopt.backend.live import LivePlan
from attnopt.backend.origin import Origin, inside, is_compiled, origin
from attnopt.capture import capture, needs_grad
from attnopt.capture.constants import guarded, relied_at
from attnopt.capture.floats import give_floats_back
from attnopt.codegen import emit
from attnopt.errors import OptionError, PlanError, first_line
from attnopt.ir import GraphReport, Refusal, Step
from attnopt.passes import PIPELINE, Pass, Program
from attnopt.passes.append import Append
from attnopt.passes.fuel import Fuel
from attnopt.passes.graph_text import graph_text
from attnopt.plan import Plan

log = logging.getLogger("attnopt")
# Reports of the graphs compiled in this process, in order; a long-lived process keeps the last ones only.
MAX_REPORTS = 1000
_reports: list[tuple[GraphReport, Origin]] = []
# What `ATTNOPT_FUEL` rations: the replacements of this process.
FUEL = Fuel()


@dataclass(frozen=True)
class Options:
    """What torch.compile's options may hold: `inductor` are inductor's own settings, `mode` is torch.compile's.

    live: what was given as "plan", if it was a LivePlan; `plan` is then the one in force. history: the reports hold the
    graph's text as captured and after each pass that changed it.
    """

    plan: Plan | None = None
    live: LivePlan | None = None
    mode: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    verify: bool = False
    history: bool = False

    @classmethod
    def of(cls, options: dict[str, Any] | None) -> Options:
        """Validated options; an unknown name or a wrong value is an OptionError that says what is meant."""
        given = dict(options or {})
        names = [name for name in cls.__dataclass_fields__ if name != "live"]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                remedy = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(names)}."
                raise OptionError(f"attnopt has no option {name!r}.", remedy + ' Inductor\'s own go into "inductor".')
        plan = given.get("plan")
        live = plan if isinstance(plan, LivePlan) else None
        if live is not None:
            plan = live.plan
        if isinstance(plan, (str, Path)):
            plan = Plan.load(plan)
        if plan is not None and not isinstance(plan, Plan):
            raise OptionError(
                f'"plan" is a {type(plan).__name__}.', "Give the path of a plan file, a Plan or a LivePlan."
            )
        mode = given.get("mode")
        modes = ["default", *torch._inductor.list_mode_options()] if mode is not None else []
        if mode is not None and mode not in modes:
            near = difflib.get_close_matches(str(mode), modes, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(dict.fromkeys(modes))}."
            raise OptionError(f"{mode!r} is no mode of inductor.", remedy)
        inductor = given.get("inductor", {})
        if not isinstance(inductor, dict):
            raise OptionError('"inductor" must be a dict of inductor settings.', 'For example {"max_autotune": True}.')
        flags = {name: given.get(name, False) for name in ("verify", "history")}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise OptionError(f'"{name}" must be true or false.', "Leave it out for false.")
        if live is not None and freezing(inductor):
            said = "Inductor's freezing makes constants of the tables that a LivePlan changes."
            raise OptionError(said, "Give a Plan, or leave freezing off.")
        return cls(plan, live, mode, inductor, **flags)

    def patches(self) -> dict[str, Any]:
        """Inductor's configuration for these options."""
        chosen = torch._inductor.list_mode_options(self.mode) if self.mode not in (None, "default") else {}
        return {**chosen, **self.inductor}


def freezing(chosen: dict[str, Any]) -> bool:
    """Whether inductor will make constants of parameters and buffers, by its settings and those given."""
    from torch._inductor import config

    return bool(chosen.get("freezing", config.freezing))


def recorded(chosen: dict[str, Any], device: str) -> bool:
    """Whether inductor will record calls as CUDA graphs."""
    from torch._inductor import config

    return device == "cuda" and bool(chosen.get("triton.cudagraphs", config.triton.cudagraphs))


def reports() -> list[GraphReport]:
    """What was done to every graph compiled so far in this process."""
    return [report for report, _ in _reports]


def reports_of(subject: Any) -> tuple[list[GraphReport], bool]:
    """The reports of what was compiled for one module or function, in order, and whether it was compiled for it.

    subject: the module or function itself, or what torch.compile returned. Where nothing was, the reports of a twin
    that Dynamo shares compiled code with: a model of the same class and sizes, or a function made twice.
    """
    asked = inside(subject)
    own = [report for report, origin in _reports if origin.is_of(asked)]
    if own or not is_compiled(subject):
        return own, True
    return [report for report, origin in _reports if origin.is_of_a_twin(asked)], False


def clear_reports() -> None:
    """Forget what was done so far."""
    _reports.clear()


def record(report: GraphReport, inputs: Sequence[Any] = ()) -> int:
    """Keep a report and tell it; returns the graph's number in this process."""
    _reports.append((report, origin(inputs)))
    del _reports[:-MAX_REPORTS]
    return told.tell(report)


def announce(report: GraphReport, inputs: Sequence[Any], plan: Plan | None) -> None:
    """Keep a report, tell it and dump it: nothing here may cost the graph that was compiled."""
    try:
        dump.graph(record(report, inputs), report, plan)
        structured.report(report)
    except Exception as error:
        if settings.strict():
            raise
        log.warning("attnopt could not tell what it did: %s: %s", type(error).__name__, first_line(error))


@dataclass(frozen=True)
class Rewritten:
    """A graph, what was done to it, and under which conditions it may run: `constants` relied on, by the positions of
    the inputs they are, and inputs that are to be continued in place."""

    graph: GraphModule
    report: GraphReport
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    appends: tuple[Append, ...] = ()


def rewrite(
    gm: GraphModule, inputs: Sequence[Any], options: Options, passes: Sequence[Pass] | None = None
) -> Rewritten:
    """The rewritten functional graph, or `gm` itself with the reason in the report; by PIPELINE, or `passes`."""
    off = settings.disabled()
    if "all" in off:
        no = Refusal("ATTNOPT_DISABLE switches all of attnopt off", code="switched-off")
        return Rewritten(gm, GraphReport(fallback=no.reason, fallback_code=no.code))
    started = time.perf_counter()
    captured = capture(gm)
    exporting = Step("capture", (time.perf_counter() - started) * 1e3, len(gm.graph.nodes), 0)
    if isinstance(captured, Refusal):
        why = GraphReport(fallback=captured.reason, fallback_code=captured.code, history=(exporting,))
        return Rewritten(gm, why)
    exporting = replace(exporting, after=len(captured.graph.nodes))
    texts = options.history or settings.keeps_texts()
    source = graph_text(captured.graph) if texts else ""
    device = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    program = Program(
        captured,
        needs_grad=needs_grad(inputs),
        device=device,
        plan=options.plan,
        verify=options.verify,
        watch=options.live.watch if options.live is not None else None,
        room=True,
        recorded=recorded(options.patches(), device),
        texts=texts,
        fuel=FUEL,
    )
    program.run(PIPELINE if passes is None else passes)
    report = program.report()
    FUEL.made += len(report.rewrites)
    missing = (f"ATTNOPT_DISABLE switches off {', '.join(sorted(off))}",) if off else ()
    report = replace(report, history=(exporting, *report.history), source=source, notes=(*report.notes, *missing))
    # Nothing to gain: inductor gets the graph it would have had, so that nothing else can change.
    if not report.rewrites:
        return Rewritten(gm, report)
    relied = relied_at(captured, program.relied_on)
    give_floats_back(captured)
    return Rewritten(captured, report, relied, tuple(program.appends))


def left_alone(error: Exception) -> GraphReport:
    """The report of a graph at which something of ours, or inductor on what we made, failed."""
    log.warning("attnopt left a graph alone: %s: %s", type(error).__name__, error, exc_info=settings.debug() > 0)
    no = Refusal(f"{type(error).__name__}: {first_line(error)}", code="pass-failed")
    return GraphReport(fallback=no.reason, fallback_code=no.code)


def attnopt(
    gm: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Entry point of torch.compile, whose own `mode` (given without options) means the same as the option.

    Mistakes in the options raise; anything else leaves the graph as it was.
    """
    bypass.called()
    switches.check()
    chosen = Options.of(options if mode is None else {**(options or {}), "mode": mode})
    try:
        made = rewrite(gm, example_inputs, chosen)
    except Exception as error:
        if settings.strict() or isinstance(error, PlanError):
            raise
        made = Rewritten(gm, left_alone(error))
    if made.graph is not gm:
        try:
            return compiled(made, example_inputs, chosen, lambda: later(gm, chosen.patches()))
        except Exception as error:
            FUEL.made -= len(made.report.rewrites)
            # By a restart inductor asks Dynamo for another graph: no failure.
            if settings.strict() or isinstance(error, torch._dynamo.exc.RestartAnalysis):
                raise
            made = Rewritten(gm, left_alone(error))
    return compiled(made, example_inputs, chosen)


def compiled(
    made: Rewritten, inputs: list[Any], chosen: Options, untouched: Callable[[], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """What inductor makes of a graph, under its conditions; `untouched` compiles what runs where they do not hold."""
    patches, kept_apart = protected(made.graph, chosen.patches())
    # Before inductor's own passes, which change it.
    structured.graph(made.graph.graph)
    run = to_inductor(made.graph, with_longer(inputs, made.appends), patches)
    report = replace(made.report, notes=(*made.report.notes, SHIELDED)) if kept_apart else made.report
    announce(report, inputs, chosen.plan)
    if made.appends and untouched:
        run = appending(run, made.appends, untouched)
    return guarded(run, untouched, made.constants) if made.constants and untouched else run


emit.on_load += [told.kernel, dump.kernel]
bypass.looked_up()
