"""What heads selected while running add to a plan: fronts with them and without, and of each method by itself.

    python -m benchmarks.dynamic_front                         # the shipped model, profiled at 1024 and 2048 tokens
    python -m benchmarks.dynamic_front --profile p.safetensors --fitted f.safetensors --length 4096
    python -m benchmarks.dynamic_front --quick                 # few and short, to check the script
    python -m benchmarks.dynamic_front --keep                  # also benchmarks/results, docs/selection.md, a figure

The planner's problem at `--length`, costs timed on this machine (selections and walks included), is solved on ordinary
text and with answers to far lines weighed like text (`--retrieval 1`), for several sets of choices: `mixture`, all that
were tried; `static`, those that are not selected while running; and each method with dense alone. Every head may have
any choice of the set.

front      the least cost, as a share of dense, at which a set's predicted damage is within so many nats per token: the
           mixture must be nowhere above another set
measured   of the best plan of each set at some costs, on text and prompts that nothing was made with: divergence from
           the dense model on text, nats per token; the rise of the loss of answers to far lines, nats per token of an
           answer; and the answers that are left
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from attnopt.codegen.emit import write_atomically
from attnopt.distill import distill_model
from attnopt.fitted import Fitted
from attnopt.fitting.menu import Menu
from attnopt.planner import Front, Problem, choices_from, front, make_problem
from attnopt.planner.costs import costs_of
from attnopt.planner.problem import closed
from attnopt.probe import Probe, Recall
from attnopt.profile_file import Profile
from attnopt.profiler import DEFAULT_GRID, profile_model
from attnopt.registry import CANDIDATES
from attnopt.supervision import Sample
from benchmarks.planners.page import fill, markdown
from benchmarks.planners.subject import Subject
from benchmarks.planners.terms import Choices
from benchmarks.record import environment

TAKES = "40 min"
QUICK = ("--quick",)

FAMILIES = ("compensation", "blocks", "threshold")
WORKLOADS = {"ordinary text": 0.0, "recall prompts": 1.0}
# Shares of the dense time at which plans are measured, and predicted damages at which fronts are compared.
SHARES = (0.7, 0.5, 0.35, 0.25, 0.15)
NATS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MIXTURE, STATIC = "mixture", "static"


@dataclass(frozen=True)
class Measured:
    """share: of the dense time, as predicted; nats: KL(dense || plan) per token of text; answers: rise of the loss per
    token of an answer, in nats; recalled: share of the answers that are right."""

    share: float
    nats: float
    answers: float
    recalled: float


@dataclass(frozen=True)
class Line:
    """One set of choices on one workload. costs: the least share of dense's time within each of NATS, None where that
    is out of reach; measured: share asked for -> what the plan of that share was found to do."""

    workload: str
    name: str
    costs: tuple[float | None, ...]
    measured: dict[str, Measured]


def evidence(subject: Subject, args: argparse.Namespace) -> tuple[Profile, Fitted]:
    """The files that were given, or a profile and trials made here."""
    if args.profile and args.fitted:
        return Profile.load(args.profile), Fitted.load(args.fitted)
    probe = Probe(subject.tokenizer)
    texts = {n: subject.split("calibrate", n, 2 * args.samples) for n in args.lengths}
    halves = [
        [Sample(ids[None]) for n in args.lengths for ids in texts[n][part]]
        + [d.sample for n in args.lengths for d in probe.documents(n, 2, of)]
        for part, of in ((slice(args.samples), "profiled"), (slice(args.samples, None), "tried"))
    ]
    profile = profile_model(subject.model, halves[0], DEFAULT_GRID)
    return profile, distill_model(subject.model, [], halves[1], Menu(families=FAMILIES), profile=profile)


def sets_of(problem: Problem) -> dict[str, list[int]]:
    """The columns of every set of choices; of the methods those that any head is offered."""
    names = [choice.candidate for choice in problem.choices]
    there = [c for c in range(1, len(names)) if np.isfinite(problem.damage[:, c]).any()]
    static = [c for c in there if CANDIDATES[names[c]].far != "selected"]
    methods = {name: [c for c in there if names[c] == name] for name in dict.fromkeys(names[c] for c in there)}
    return {MIXTURE: there, STATIC: static, **methods}


def front_of(problem: Problem, columns: Sequence[int]) -> Front:
    """Of plans whose heads are dense or have a choice of these columns."""
    every = {site: range(10_000) for site, _ in problem.heads}
    others = [choice for c, choice in enumerate(problem.choices) if c and c not in columns]
    return front(closed(problem, every, others))


def least_cost(sweep: Front, nats: float, dense: float) -> float | None:
    found = sweep.pick(max_damage=nats)
    return None if found is None else found.cost / dense


def solved(
    subject: Subject,
    problem: Problem,
    workload: str,
    asked: Callable[[Choices | None], Recall],
    args: argparse.Namespace,
) -> list[Line]:
    """Fronts of all sets, and the plans at SHARES of those that are measured."""
    dense, lines, before = problem.dense.cost, [], asked(None).loss
    for name, columns in sets_of(problem).items():
        sweep = front_of(problem, columns)
        measured = {}
        for share in SHARES if not args.methods or name in (*args.methods, MIXTURE, STATIC) else ():
            solution = sweep.pick(max_cost=share * dense)
            if solution is None:
                continue
            choices = choices_from(problem, solution)
            kl, answers = subject.measure(choices).kl, asked(choices)
            measured[f"{share:g}"] = Measured(solution.cost / dense, kl, answers.loss - before, answers.share)
        lines.append(Line(workload, name, tuple(least_cost(sweep, nats, dense) for nats in NATS), measured))
    return lines


def behind(lines: Sequence[Line]) -> dict[str, float]:
    """By workload, by how much the mixture's front is above the best other set's at worst, as a ratio of costs."""
    found = {}
    for workload in dict.fromkeys(line.workload for line in lines):
        of = {line.name: line.costs for line in lines if line.workload == workload}
        ratios = [
            own / best
            for n, own in enumerate(of[MIXTURE])
            if own is not None
            and (best := min(costs[n] or math.inf for name, costs in of.items() if name != MIXTURE)) < math.inf
        ]
        found[workload] = max(ratios, default=1.0)
    return found


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Line]]:
    begin = time.perf_counter()
    subject = Subject(args.model)
    profile, fitted = evidence(subject, args)
    costs = costs_of(subject.sites, None, profile, args.length, fitted, FAMILIES, "cpu", None)
    subject.hold_out(subject.split("final", args.length, args.documents))
    probe, lines = Probe(subject.tokenizer, split="final"), []
    asked = partial(subject.recalled, probe=probe, length=args.length, documents=args.documents)
    for workload, retrieval in WORKLOADS.items():
        problem = make_problem(
            profile, costs, subject.sites, args.length, retrieval=retrieval, fitted=fitted, allow=FAMILIES
        )
        lines += solved(subject, problem, workload, asked, args)
    facts = {
        "model": args.model,
        "length": args.length,
        "profiled": list(profile.lengths),
        "dense_recalls": asked(None).share,
    }
    return {**facts, "behind": behind(lines), "seconds": round(time.perf_counter() - begin, 1)}, lines


PREDICTED = ("choices", *(f"≤ {nats:g}" for nats in NATS))
FOUND = ("choices", *(f"at {share:g}" for share in SHARES))


def predicted(line: Line) -> list[str]:
    """A row: costs within each damage."""
    return [line.name, *("" if cost is None else f"{cost:.2f}" for cost in line.costs)]


def found_at(line: Line) -> list[str]:
    """A row: what was measured at each share of the time."""
    at = [line.measured.get(f"{share:g}") for share in SHARES]
    return [line.name, *("" if m is None else f"{m.nats:.4f}; {m.answers:.3f}; {m.recalled:.0%}" for m in at)]


def tables(lines: Sequence[Line]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Title, header and rows: what is predicted of each workload, and what was measured."""
    found: list[tuple[str, tuple[str, ...], list[list[str]]]] = []
    for workload in dict.fromkeys(line.workload for line in lines):
        of = [line for line in lines if line.workload == workload]
        named = workload[0].upper() + workload[1:]
        found.append((f"{named}, predicted", PREDICTED, [predicted(line) for line in of]))
        found.append((f"{named}, measured", FOUND, [found_at(line) for line in of if line.measured]))
    return found


def described(found: dict[str, Any], lines: Sequence[Line]) -> str:
    """For docs/selection.md."""
    parts = [f"{title}:\n\n{markdown(header, rows)}" for title, header, rows in tables(lines)]
    about = (
        f"`{found['model']}`, profiled at {', '.join(map(str, found['profiled']))} tokens, planned for and measured at "
        f"{found['length']}, where dense recalls {found['dense_recalls']:.0%} of the answers. Predicted: the least "
        "share of the dense time at which the damage is within so many nats per token. Measured, of the plan of such "
        "a share, on other text and prompts: divergence in nats per token of text; rise of the loss in nats per token "
        "of an answer; answers recalled."
    )
    return "\n\n".join([about, *parts])


def figure(lines: Sequence[Line], path: Path) -> None:
    """Predicted fronts: damage over the share of dense's time, a column for each workload."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    workloads = list(dict.fromkeys(line.workload for line in lines))
    made, axes = pyplot.subplots(1, len(workloads), figsize=(5.2 * len(workloads), 4.0), sharey=True, squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        for line in (line for line in lines if line.workload == workload):
            points = [(cost, nats) for cost, nats in zip(line.costs, NATS, strict=True) if cost is not None]
            wide = {MIXTURE: 2.6, STATIC: 1.8}.get(line.name, 0.9)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=wide, label=line.name)
        axis.set_title(workload)
        axis.set_yscale("log")
        axis.set_xlabel("share of the dense time, predicted")
    axes[0, 0].set_ylabel("predicted damage, nats per token")
    axes[0, 0].legend(frameon=False, fontsize=7)
    made.tight_layout()
    made.savefig(path, metadata={"Date": None})
    pyplot.close(made)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048], help="profiled and tried")
    parser.add_argument("--length", type=int, default=4096, help="planned for and measured")
    parser.add_argument("--samples", type=int, default=3, help="sequences profiled, and tried, at each length")
    parser.add_argument("--documents", type=int, default=3, help="sequences, and recall prompts, measured")
    parser.add_argument("--methods", nargs="*", default=[], help="measure these by themselves; by default all")
    parser.add_argument("--profile", help="a file, with --fitted, instead of making both")
    parser.add_argument("--fitted")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write the lines there")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results, docs/figures, docs/selection.md")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.length, args.samples, args.documents, args.methods = [256], 256, 1, 1, ["pooled"]
    return args


def main() -> None:
    args, console = arguments(), Console()
    # Of a file or a pipe: cells of a table are not cut.
    console.width = console.width if console.is_terminal else 160
    found, lines = run(args)
    for title, header, rows in tables(lines):
        shown = Table(*header, title=title)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for workload, ratio in found["behind"].items():
        console.print(f"{workload}: the mixture costs at most {ratio:.3f} times what the best other set does")
    root, stem = Path(__file__).parents[1], f"dynamic-front-{Path(args.model).name}-{args.length}"
    data = {**found, "nats": NATS, "lines": [asdict(line) for line in lines], "environment": environment()}
    for path in [args.json] * (args.json is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(data, indent=1) + "\n")
    if args.keep:
        figure(lines, root / f"docs/figures/{stem}.svg")
        fill(root / "docs/selection.md", stem, described(found, lines))


if __name__ == "__main__":
    main()
