"""The torch.compile backend: capture, rewrite, hand to inductor. It never raises into Dynamo.

torch.compile(model, backend="attnopt")                                        exact, no plan needed
torch.compile(model, backend="attnopt", options={"plan": "plan.json"})         the plan's spans
torch.compile(model, backend="attnopt", options={"plan": LivePlan("plan.json")})   spans that may change later
torch.compile(model, backend="attnopt", options={"mode": "max-autotune", "inductor": {...}, "verify": True})
"""

from __future__ import annotations

import difflib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from attnopt import settings
from attnopt.backend import bypass
from attnopt.backend.append import appending, with_longer
from attnopt.backend.inductor import SHIELDED, later, protected, to_inductor
from attnopt.backend.live import LivePlan
from attnopt.capture import capture, needs_grad
from attnopt.capture.constants import guarded, relied_at
from attnopt.capture.floats import give_floats_back
from attnopt.errors import OptionError, PlanError
from attnopt.ir import GraphReport, Refusal, Step
from attnopt.passes import PIPELINE, Pass, Program
from attnopt.passes.append import Append
from attnopt.plan import Plan

log = logging.getLogger("attnopt")
# Reports of the graphs compiled in this process, in order; a long-lived process keeps the last ones only.
MAX_REPORTS = 1000
_reports: list[GraphReport] = []


@dataclass(frozen=True)
class Options:
    """What torch.compile's options may hold: `inductor` are inductor's own settings, `mode` is torch.compile's.

    live: what was given as "plan", if it was a LivePlan; `plan` is then the one in force.
    """

    plan: Plan | None = None
    live: LivePlan | None = None
    mode: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    verify: bool = False

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
        inductor, verify = given.get("inductor", {}), given.get("verify", False)
        if not isinstance(inductor, dict):
            raise OptionError('"inductor" must be a dict of inductor settings.', 'For example {"max_autotune": True}.')
        if not isinstance(verify, bool):
            raise OptionError('"verify" must be true or false.', "Leave it out for false.")
        if live is not None and freezing(inductor):
            said = "Inductor's freezing makes constants of the tables that a LivePlan changes."
            raise OptionError(said, "Give a Plan, or leave freezing off.")
        return cls(plan, live, mode, inductor, verify)

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
    return list(_reports)


def clear_reports() -> None:
    _reports.clear()


def record(report: GraphReport) -> None:
    _reports.append(report)
    del _reports[:-MAX_REPORTS]
    if settings.debug():
        print("\n".join(report.lines()), file=sys.stderr)
    else:
        for line in report.lines():
            log.info(line)


@dataclass(frozen=True)
class Rewritten:
    """A graph, what was done to it, and under which conditions it may run: `constants` relied on, by the positions of
    the inputs they are, and inputs that are to be continued in place."""

    graph: GraphModule
    report: GraphReport
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    appends: tuple[Append, ...] = ()


def rewrite(gm: GraphModule, inputs: Sequence[Any], options: Options, passes: Sequence[Pass] = PIPELINE) -> Rewritten:
    """The rewritten functional graph, or `gm` itself with the reason in the report."""
    started = time.perf_counter()
    captured = capture(gm)
    exporting = Step("capture", (time.perf_counter() - started) * 1e3, len(gm.graph.nodes), 0)
    if isinstance(captured, Refusal):
        no = GraphReport(fallback=captured.reason, fallback_code=captured.code, history=(exporting,))
        return Rewritten(gm, no)
    exporting = replace(exporting, after=len(captured.graph.nodes))
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
    )
    if settings.debug() > 1:
        print(f"--- before\n{captured.code}", file=sys.stderr)
    program.run(passes)
    if settings.debug() > 1:
        print(f"--- after\n{captured.code}", file=sys.stderr)
    report = program.report()
    report = replace(report, history=(exporting, *report.history))
    # Nothing to gain: inductor gets the graph it would have had, so that nothing else can change.
    if not report.rewrites:
        return Rewritten(gm, report)
    relied = relied_at(captured, program.relied_on)
    give_floats_back(captured)
    return Rewritten(captured, report, relied, tuple(program.appends))


def left_alone(error: Exception) -> GraphReport:
    """The report of a graph at which something of ours, or inductor on what we made, failed."""
    log.warning("attnopt left a graph alone: %s: %s", type(error).__name__, error, exc_info=settings.debug() > 0)
    no = Refusal(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", code="pass-failed")
    return GraphReport(fallback=no.reason, fallback_code=no.code)


def attnopt(
    gm: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Entry point of torch.compile, whose own `mode` (given without options) means the same as the option.

    Mistakes in the options raise; anything else leaves the graph as it was.
    """
    bypass.called()
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
        except torch._dynamo.exc.RestartAnalysis:
            # Inductor asks Dynamo for another graph: no failure.
            raise
        except Exception as error:
            if settings.strict():
                raise
            made = Rewritten(gm, left_alone(error))
    return compiled(made, example_inputs, chosen)


def compiled(
    made: Rewritten, inputs: list[Any], chosen: Options, untouched: Callable[[], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """What inductor makes of a graph, under its conditions; `untouched` compiles what runs where they do not hold."""
    patches, kept_apart = protected(made.graph, chosen.patches())
    run = to_inductor(made.graph, with_longer(inputs, made.appends), patches)
    record(replace(made.report, notes=(*made.report.notes, SHIELDED)) if kept_apart else made.report)
    if made.appends and untouched:
        run = appending(run, made.appends, untouched)
    return guarded(run, untouched, made.constants) if made.constants and untouched else run


bypass.looked_up()
