"""A model's calls under Dynamo: every graph goes through the pipeline, and none of them is compiled."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from attnopt import backend
from attnopt.errors import AttnoptError, ModelError
from attnopt.examine.breaks import Told
from attnopt.examine.calls import CACHES, Phase, decode, no_decoding, prefill
from attnopt.examine.records import Break, Examined, Graph, Recompile
from attnopt.examine.savings import Savings
from attnopt.examine.timing import Timings
from attnopt.hf.loading import Loaded
from attnopt.hf.tiny import summary
from attnopt.ir import GraphReport
from attnopt.passes import LOWER, PIPELINE, RECOGNISE, remove_dead_code
from attnopt.plan import Plan
from attnopt.progress import Progress

# Passes of examining alone, by the names that a report's history has for them.
OWN = ("savings", "timing")


def unrun(gm: GraphModule) -> Callable[..., Any]:
    """A call that answers with zeros where a traced graph has numbers, or the graph itself where its results may steer
    what comes after it (integers, booleans, sizes known only at run time): a long input then costs no memory."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    results = [n.meta.get("example_value") for n in output.args[0]]
    for held in results:
        static = isinstance(held, torch.Tensor) and all(isinstance(size, int) for size in held.shape)
        if not static or not held.dtype.is_floating_point:
            return gm.forward

    def zeros(held: torch.Tensor) -> torch.Tensor:
        # Small ones are real: code between two graphs may write to them.
        small = held.numel() <= 2**20
        return torch.zeros(held.shape if small else (), dtype=held.dtype, device=held.device).expand(held.shape)

    return lambda *_: tuple(map(zeros, results))


@torch.no_grad()
def examine_model(
    loaded: Loaded, length: int, padded: bool = False, plan: Plan | None = None
) -> list[GraphReport]:  # fmt: skip
    """The reports of one traced prompt, by a plan if one is given; nothing is compiled by inductor, and nothing is run
    that need not be.

    Dynamo forgets what it compiled before: it would leave code out without a word that used up its recompile limit.
    """
    torch._dynamo.reset()
    trace = Trace(loaded, prefill(loaded, length, padded, anew=False), plan=plan)
    trace.run(dynamic=False)
    return [graph.report for graph in trace.graphs]


def name_of(node: torch.fx.Node) -> str:
    """What the model calls an input: the last name of ``L['kwargs']['past_key_values'].layers[0].keys``."""
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    said = source() if callable(source) else source
    return (re.findall(r"[A-Za-z_]\w*", str(said)) or [node.name])[-1]


@contextmanager
def unsaid() -> Iterator[None]:
    """Dynamo's own warnings left out, which are about what is reported here; with TORCH_LOGS set all is said."""
    loggers = [] if "TORCH_LOGS" in os.environ else [logging.getLogger(name) for name in ("torch._dynamo", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            if loggers:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@torch.no_grad()
def examine(
    loaded: Loaded, length: int, *, padded: bool = False, lengths: Sequence[int] = (), timing: bool = False,
    dynamic: bool | None = None, prompt_only: bool = False, progress: Progress | None = None,
) -> Examined:  # fmt: skip
    """Every attention of a prompt of `length` tokens and of a step of generation after it, one sequence each.

    lengths: where savings are counted; timing: whether what is rewritten is timed as well; dynamic: as torch.compile
    takes it; prompt_only: nothing but the prompt, once. Dynamo forgets what it compiled before. ModelError where the
    prompt cannot be traced; a step that cannot is a note.
    """
    phases = [("prefill", "")]
    notes = []
    if not prompt_only:
        why = no_decoding(loaded.model)
        phases += [] if why else [("decode", kind) for kind in CACHES]
        notes += [why] if why else []
    graphs: list[Graph] = []
    breaks: list[Break] = []
    recompiles: list[Recompile] = []
    for n, (name, cache) in enumerate(phases):
        if progress is not None:
            progress(f"tracing {name} {cache}".strip(), n, len(phases))
        torch._dynamo.reset()
        try:
            made = decode(loaded, length, padded, cache, True) if cache else None
            trace = Trace(loaded, made or prefill(loaded, length, padded, not prompt_only), lengths, timing)
            with unsaid():
                trace.run(dynamic)
        except Exception as error:
            if not cache:
                raise
            notes.append(f"Decoding with a {cache} was not traced: {said(error)}")
            continue
        graphs += trace.graphs
        breaks += trace.breaks
        recompiles += trace.recompiles
    if progress is not None:
        progress("tracing", len(phases), len(phases))
    like = next(loaded.model.parameters(), torch.empty(0))
    return Examined(tuple(graphs), tuple(breaks), tuple(recompiles), tuple(notes), like.device.type)


def said(error: Exception) -> str:
    return error.problem if isinstance(error, AttnoptError) else summary(error)


@dataclass
class Trace:
    """One phase of a model, and what came of it. The graphs of the first call go through the pipeline."""

    loaded: Loaded
    phase: Phase
    lengths: Sequence[int] = ()
    timing: bool = False
    plan: Plan | None = None
    graphs: list[Graph] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    recompiles: list[Recompile] = field(default_factory=list)
    first: bool = True

    def run(self, dynamic: bool | None) -> None:
        told = Told(self.phase.name, self.phase.cache)
        compiled = torch.compile(self.loaded.model, backend=self.look, dynamic=dynamic)
        for call in self.phase.calls:
            self.first = not call.new
            try:
                compiled(*call.args, **call.kwargs)
            except Exception as error:
                self.explain(error, call.args, call.kwargs)
            known = {(b.cause, b.source) for b in self.breaks}
            self.breaks += [b for b in told.breaks() if (b.cause, b.source) not in known]
            self.recompiles += told.recompiles(call.new)

    def look(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if not self.first:
            return gm.forward
        savings, timings = Savings(self.lengths, self.phase.sizes), Timings()
        passes = PIPELINE
        if self.lengths or self.timing:
            passes = (*RECOGNISE, savings.run, *LOWER, *([timings.run] if self.timing else []), remove_dead_code.run)
        report = backend.rewrite(gm, inputs, backend.Options(self.plan), passes).report
        report = replace(report, history=tuple(step for step in report.history if step.name not in OWN))
        named = tuple(name_of(node) for node in gm.graph.nodes if node.op == "placeholder")
        self.graphs.append(Graph(report, self.phase.name, self.phase.cache, savings.found, timings.found, named))
        return unrun(gm)

    def explain(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise what is wrong: the model's own failure, or Dynamo's."""
        if isinstance(error, AttnoptError):
            raise error
        what = ", ".join([*("token ids" for _ in args), *kwargs])
        try:
            self.loaded.model(*args, **kwargs)
        except Exception as own:
            problem = f"The forward of {type(self.loaded.model).__name__} fails on {what}: {summary(own)}"
            remedy = "Mend the model, or choose another --length or --attention; nothing was traced."
            raise ModelError(problem, remedy) from own
        problem = f"torch.compile cannot trace {type(self.loaded.model).__name__}: {summary(error)}"
        raise ModelError(problem, "TORCHDYNAMO_VERBOSE=1 shows where; no backend can serve it.") from error
