"""`attnopt bisect`: find the rewrite that breaks an output, by leaving out all that come after it (`ATTNOPT_FUEL`).

    attnopt bisect MODEL            this process compares the model's logits with eager's
    attnopt bisect -- COMMAND ...   the command's exit code says whether its output is right

Either runs with no limit and with no rewrite at all; if the one is wrong and the other right, halving finds the number
of the first rewrite with which it is wrong. Every trial compiles anew, and none of them changes a file of the user's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt import backend, hf
from attnopt.benchmark import TOLERANCE
from attnopt.commands.common import any_ids, checked_sites, emit, load, stages
from attnopt.errors import AttnoptError, OptionError
from attnopt.instrument import logits_of
from attnopt.plan import Plan
from attnopt.progress import Progress
from attnopt.report import terminal
from attnopt.report.data import finite

# A copy of the model in a wider dtype, in bytes, up to which it is made to compare with.
AFFORDABLE = 4 * 2**30
# Rewrites at which the search for a bound ends, where the command left no dump that tells how many there are.
MOST = 2**16
UNSTEADY = "What is wrong may change from run to run: run it twice with ATTNOPT_FUEL=0."


@dataclass(frozen=True)
class Rewritten:
    """The last rewrite of a trial. leads: whether it is the first of its graph, which brings along what the passes
    before the rewriting changed in that graph."""

    site: str
    lowering: str
    note: str
    source: str
    leads: bool


@dataclass(frozen=True)
class Trial:
    """One run. fuel: the rewrites it was allowed, None for all. made: those it made; difference: from the reference,
    None where an exit code is all there is; said: the end of what a command printed, or the error of a run."""

    fuel: int | None
    good: bool
    made: int
    difference: float | None = None
    said: str = ""
    last: tuple[Rewritten, ...] = ()


@dataclass(frozen=True)
class Bisection:
    """What was found. verdict: "nothing" is broken, "rewrite" `number` breaks it, or it is broken "without" any."""

    verdict: str
    trials: tuple[Trial, ...]
    number: int | None = None
    given: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data. A difference is null where a run raised, a logit was not a number, or an exit code is all."""
        tried = {trial.fuel: trial for trial in self.trials}
        found = None
        if self.number is not None:
            without, along = tried[self.number - 1], tried[self.number]
            found = {
                "number": self.number,
                "rewrites": [asdict(rewrite) for rewrite in along.last],
                "difference_without": without.difference,
                "difference_with": along.difference,
            }
        listed = [{k: v for k, v in asdict(trial).items() if k != "last"} for trial in self.trials]
        data: dict[str, Any] = finite({"verdict": self.verdict, "culprit": found, "trials": listed, **self.given})
        return data


def bisection(run: Callable[[int | None], Trial], progress: Progress, given: dict[str, Any]) -> Bisection:
    """Search with `run`, which makes a trial with so much fuel; None is no limit."""
    trials: dict[int | None, Trial] = {}

    def good(fuel: int | None) -> bool:
        if fuel not in trials:
            what = "every rewrite" if fuel is None else f"{fuel} rewrites" if fuel else "no rewrite"
            progress(f"with {what}", 0, 1)
            trials[fuel] = run(fuel)
            progress(f"with {what}", 1, 1)
        return trials[fuel].good

    if good(None):
        return Bisection("nothing", tuple(trials.values()), None, given)
    if not good(0):
        return Bisection("without", tuple(trials.values()), None, given)
    # Right with `low`, wrong with `high`: with as many as there were without a limit, if that is known.
    low, high = 0, trials[None].made or 1
    while not trials[None].made and good(high):
        if high >= MOST:
            raise AttnoptError(f"With {high} rewrites the output is right, and without a limit it is wrong.", UNSTEADY)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    if good(high):
        raise AttnoptError(f"With all of its {high} rewrites the output is wrong at one time only.", UNSTEADY)
    return Bisection("rewrite", tuple(trials.values()), high, given)


@contextmanager
def fuelled(fuel: int | None) -> Iterator[None]:
    """This process with so much fuel, none of it used, and nothing compiled; all of that again after it."""
    before, made = os.environ.pop("ATTNOPT_FUEL", None), backend.FUEL.made
    if fuel is not None:
        os.environ["ATTNOPT_FUEL"] = str(fuel)
    torch._dynamo.reset()
    backend.clear_reports()
    backend.FUEL.made = 0
    try:
        yield
    finally:
        os.environ.pop("ATTNOPT_FUEL", None)
        if before is not None:
            os.environ["ATTNOPT_FUEL"] = before
        backend.FUEL.made = made
        torch._dynamo.reset()


def far(found: Tensor, reference: Tensor) -> float:
    """The largest relative difference of one token's logits; infinite where any is not a number."""
    found, reference = found.double().flatten(0, -2), reference.double().flatten(0, -2)
    apart = (found - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    worst = float(apart.max())
    return worst if math.isfinite(worst) else math.inf


@torch.no_grad()
def reference_of(model: nn.Module, ids: Tensor) -> tuple[Tensor, str]:
    """Eager's logits in the widest dtype there is memory for, and what they are called."""
    held = {p.dtype for p in model.parameters()}
    own = next(iter(held), torch.float32)
    elements = sum(p.numel() for p in (*model.parameters(), *model.buffers()))
    for dtype in (torch.float64, torch.float32):
        if own.itemsize < dtype.itemsize and elements * dtype.itemsize <= AFFORDABLE:
            return logits_of(copy.deepcopy(model).to(dtype), ids), f"eager in {str(dtype).removeprefix('torch.')}"
    return logits_of(model, ids), f"eager in {str(own).removeprefix('torch.')}"


def of_model(
    loaded: hf.Loaded, length: int, progress: Progress, plan: Plan | None = None, tolerance: float | None = None
) -> Bisection:
    """Find the rewrite that makes a model's logits differ from eager's by more than `tolerance`, relative."""
    model = loaded.model
    ids = any_ids(loaded, length)
    progress("eager", 0, 1)
    reference, called = reference_of(model, ids)
    with torch.no_grad():
        eager = far(logits_of(model, ids), reference)
    if tolerance is None:
        # Twice the tolerance of a whole model's logits, since this is its worst token.
        least = 2 * TOLERANCE.get(next(model.parameters()).dtype, 1e-4)
        tolerance = max(least, 4 * eager) if math.isfinite(eager) else least
    progress("eager", 1, 1)
    limit = tolerance

    @torch.no_grad()
    def run(fuel: int | None) -> Trial:
        with fuelled(fuel):
            options = {"plan": plan} if plan is not None else {}
            call = torch.compile(model, backend=backend.attnopt, dynamic=False, options=options)
            difference, said = math.inf, ""
            try:
                difference = far(logits_of(call, ids, model), reference)
            except Exception as error:
                cause = getattr(error, "inner_exception", error)
                if isinstance(cause, AttnoptError):
                    raise cause from None
                said = f"{type(error).__name__}: {error}"
            made = [(n, r) for report in backend.reports() for n, r in enumerate(report.rewrites)]
            last = tuple(Rewritten(r.path, r.lowering, r.note, r.site.source, leads=n == 0) for n, r in made[-1:])
            return Trial(fuel, difference <= limit, len(made), difference, said, last)

    given = {"tolerance": limit, "reference": called, "eager_difference": eager, "length": length}
    return bisection(run, progress, given)


def of_command(command: list[str], progress: Progress) -> Bisection:
    """Find the rewrite with which a command ends with another exit code than 0."""

    def run(fuel: int | None) -> Trial:
        with tempfile.TemporaryDirectory(prefix="attnopt-bisect-") as folder:
            wanted = {"ATTNOPT_FUEL": "none" if fuel is None else str(fuel), "ATTNOPT_DUMP": folder}
            try:
                done = subprocess.run(
                    command, env=os.environ | wanted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
                )
            except OSError as error:
                reason = error.strerror or str(error)
                raise OptionError(f"{command[0]} cannot be run: {reason}.", "Check the name of the command.") from None
            made = rewrites_in(Path(folder))
            last = tuple(each[-1] for each in made if fuel and len(each) == fuel)
            said = done.stdout.decode(errors="replace")[-2000:]
            return Trial(fuel, done.returncode == 0, max(map(len, made), default=0), None, said, last)

    return bisection(run, progress, {"command": command})


def rewrites_in(folder: Path) -> list[list[Rewritten]]:
    """The rewrites of each process that left a dump in `folder`, in order."""
    found = []
    for process in sorted(path for path in folder.iterdir() if path.is_dir()):
        rewrites: list[Rewritten] = []
        for file in sorted(process.glob("*/events.jsonl")):
            events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            own = [event for event in events if event["event"] == "rewrite"]
            rewrites += [
                Rewritten(e["site"], e["lowering"], e["note"], e["source"], leads=n == 0) for n, e in enumerate(own)
            ]
        found.append(rewrites)
    return found


def bisect(args: argparse.Namespace) -> None:
    """Say what was found; an output that is broken ends with 1."""
    if (args.model is None) == (args.of_command is None):
        raise OptionError("What is to be bisected?", "Give a MODEL, or a command after --.")
    with stages(args.progress) as progress:
        if args.of_command is not None:
            if not args.of_command:
                raise OptionError("There is no command after --.", "For example: attnopt bisect -- python check.py")
            found = of_command(args.of_command, progress)
        else:
            if args.plan is not None and args.tolerance is None:
                said = "A plan changes the output on purpose."
                raise OptionError(said, "Say with --tolerance how much it may, for example 0.1.")
            plan = Plan.load(args.plan) if args.plan is not None else None
            loaded = load(args)
            if plan is not None:
                checked_sites(plan, loaded)
            found = of_model(loaded, args.length, progress, plan, args.tolerance)
    data = found.to_json()
    emit(args, data, lambda: terminal.print_bisection(data))
    if found.verdict == "rewrite":
        fuel = (found.number or 0) - 1
        raise AttnoptError(f"Rewrite {found.number} breaks the output.", f"ATTNOPT_FUEL={fuel} runs without it.")
    if found.verdict == "without":
        raise AttnoptError("The output is wrong without any rewrite too.", "attnopt's rewrites are not what breaks it.")
