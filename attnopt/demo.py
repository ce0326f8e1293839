"""The demo: a real trained model matched, profiled, planned under a budget, rewritten, checked and timed, and a page.

Every step calls what the commands call; the text is Python's own library source, held out from training.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnopt import backend, hf, settings, text
from attnopt.commands import bench_rows, emit, examine_model, say, stages, writable
from attnopt.commands.reporting import Known, plan_report
from attnopt.errors import BudgetError
from attnopt.ir import GraphReport
from attnopt.plan import Budget
from attnopt.planner.make import SEARCH_SHARE, Made, make_plan, uniform_at_cost
from attnopt.probe import Probe
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.progress import Progress
from attnopt.report import terminal
from attnopt.report.data import launched_sources, page_data
from attnopt.report.page import write_page

# (length, sequences) profiled, length planned and verified, sequences verified and looked at in the end. The verified
# length is none of the profiled ones. Sized for five minutes on two CPU cores.
FULL: dict[str, Any] = {
    "profile": ((1024, 6), (2048, 4), (4096, 2)),
    "length": 8192,
    "verify": 10,
    "final": 12,
    "rounds": 3,
}
# Half as many tokens in the end as in full: with a tenth, whether 1 % could be shown depended on the build of Python,
# whose library is the text.
QUICK: dict[str, Any] = {"profile": ((256, 4), (512, 3)), "length": 1024, "verify": 24, "final": 48, "rounds": 2}
LOSS_INCREASE = 1.0
# Documents of the retrieval probe, profiled at each length and asked for in the end.
PROBES = 1
Say = Callable[[str], None]


def partials(folder: Path) -> tuple[Path, Path]:
    """What an interrupted demo leaves of its profile and of its search, for the next of the same sizes to go on from;
    both stay until the report is there."""
    return folder / "profile.safetensors.partial", folder / "plan.json.partial"


def profile_demo(loaded: hf.Loaded, sizes: dict[str, Any], progress: Progress, tell: Say, partial: Path) -> Profile:
    tokens = text.stream([], loaded.tokenizer, "calibrate", 60_000)
    rows = [r[None] for n, count in sizes["profile"] for r in text.sequences(tokens, n, count, "calibrate")]
    probe = Probe(loaded.tokenizer)
    asked = [d.sample for n, _ in sizes["profile"] for d in probe.documents(n, PROBES, "calibrate")]
    return profile_model(loaded.model, [*rows, *asked], progress=progress, partial=partial, tell=tell)


def plan_demo(
    loaded: hf.Loaded, profile: Profile, sizes: dict[str, Any], progress: Progress, tell: Say, partial: Path
) -> Made:
    length = sizes["length"]

    def split(which: str, count: int) -> dict[int, torch.Tensor]:
        tokens = text.stream([], loaded.tokenizer, which, 2 * count * length)
        return {length: text.sequences(tokens, length, count, which)}

    def planned(percent: float, share: float) -> Made:
        return make_plan(
            loaded.model, "demo", profile, split("verify", sizes["verify"]), split("final", sizes["final"]),
            Budget("loss", percent), length, probe=Probe(loaded.tokenizer, split="final"), probe_documents=PROBES,
            progress=progress, report=lambda record: tell(f"   {record}"), partial=partial,
            tell=lambda line: tell(f"   {line}"), share=share,
        )  # fmt: skip

    # Chosen as the last that holds on one text, a plan may miss on the next. Each further look at that text asks for
    # more than the one before, and what is looked at is chosen farther inside.
    *first, last = ((part * LOSS_INCREASE, part * SEARCH_SHARE) for part in (1, 3 / 4, 1 / 2))
    for percent, share in first:
        try:
            return planned(percent, share)
        except BudgetError as error:
            tell(f"   {error.problem}\n   Planned again, farther inside the budget.")
    return planned(*last)


def uniform_increase(loaded: hf.Loaded, made: Made, sizes: dict[str, Any], progress: Progress) -> float:
    """Loss increase in percent, on the final split, of one window for all heads at the plan's own measured cost."""
    from attnopt.measure import Spans

    spans, length = Spans(loaded.model), sizes["length"]
    tokens = text.stream([], loaded.tokenizer, "final", 2 * sizes["final"] * length)
    ids, done = text.sequences(tokens, length, sizes["final"], "final"), 0
    spans.losses(ids[:1, :64], None)

    def step() -> None:
        nonlocal done
        done += 1
        progress(f"one window for all heads at {length} tokens", done, len(ids))

    choices = uniform_at_cost(made.problem, made.verified.solution.cost, list(spans.sites.values()))
    found = spans.losses(ids, choices, progress=step)
    return 100 * (sum(found.loss) / sum(made.dense[length].loss) - 1)


def run(folder: Path, quick: bool, progress: Progress, tell: Say) -> dict[str, Any]:
    """Run all stages, write profile.safetensors, plan.json and report.html into `folder`; returns the figures."""
    started = time.perf_counter()
    sizes = QUICK if quick else FULL
    length = sizes["length"]
    backend.clear_reports()
    progress("loading demo", 0, 0)
    tell(f"1. the model: {hf.demo_model_path().name}, trained on the standard library's source")
    loaded = hf.load("demo", torch.bfloat16)
    progress("tracing", 0, 0)
    graphs = examine_model(loaded, 256)
    tell(f"2. matched: {sum(len(g.sites) for g in graphs)} attentions")
    if tell is not silent:
        terminal.print_graphs(graphs)
    done_before = partials(folder)
    profile = profile_demo(loaded, sizes, progress, lambda line: tell(f"   {line}"), done_before[0])
    profile.save(folder / "profile.safetensors")
    tell(f"3. profiled at {', '.join(map(str, profile.lengths))} tokens, every head and span at once")
    tell(f"4. planning for {length} tokens, loss increase at most {LOSS_INCREASE:g} %")
    made = plan_demo(loaded, profile, sizes, progress, tell, done_before[1])
    made.plan.save(folder / "plan.json")
    final = next(m for m in made.plan.measured if m.split == "final")
    uniform = uniform_increase(loaded, made, sizes, progress)
    recalled = [final.dense_retrieval or 0.0, final.planned_retrieval or 0.0]
    tell(
        f"5. verified on held-out text at {final.length}: loss {final.dense_loss:.4f} -> {final.planned_loss:.4f}, "
        f"{final.increase:+.2f} % (at most {final.upper_95:.2f} %); "
        f"one window for all heads at the same cost: {uniform:+.2f} %; "
        f"answers about lines far above: {recalled[0]:.0%} dense, {recalled[1]:.0%} planned"
    )
    tokens = text.stream([], loaded.tokenizer, "final", 2 * length)
    ids = text.sequences(tokens, length, 1, "final")
    rows = bench_rows(loaded, ids, made.plan, "bf16", sizes["rounds"], False, progress, cache=False)
    tell("6. compiled and timed, all in one run, medians")
    if tell is not silent:
        terminal.print_bench(rows)
    planned, exact = (next(r for r in rows if r["variant"] == f"attnopt {kind}") for kind in ("planned", "exact"))
    result = {
        "report_file": str(folder / "report.html"),
        "plan_file": str(folder / "plan.json"),
        "profile_file": str(folder / "profile.safetensors"),
        "loss_increase_percent": final.increase,
        "loss_increase_upper_95_percent": final.upper_95,
        "uniform_loss_increase_percent": uniform,
        "retrieval": {"dense": final.dense_retrieval, "planned": final.planned_retrieval},
        "exact_over_inductor": exact["times_inductor"],
        "planned_over_exact": planned["times_exact"],
        "bench": rows,
        "seconds": time.perf_counter() - started,
    }
    write_page(folder / "report.html", page_of(result, made, profile, graphs))
    for path in done_before:
        path.unlink(missing_ok=True)
    return result


def page_of(result: dict[str, Any], made: Made, profile: Profile, graphs: list[GraphReport]) -> dict[str, Any]:
    """The full report of the demo's plan; graphs: those examined, before those compiled since."""
    reports = [*graphs, *backend.reports()]
    notes = [f"kernel target: {settings.target('cpu')}", *filter(None, [made.verified.undecided])]
    found = plan_report(made.plan, Known(profile, None, made.sites, made.tables, made.verified.records, reports, notes))
    summary = [
        ("exact, against inductor", f"{result['exact_over_inductor']:.2f} times as fast"),
        ("planned, against exact", f"{result['planned_over_exact']:.2f} times as fast"),
        ("loss increase on held-out text", f"{result['loss_increase_percent']:.2f} % "
         f"(at most {result['loss_increase_upper_95_percent']:.2f} %, budget {made.plan.budget})"),
        ("one window for all heads at the same cost", f"{result['uniform_loss_increase_percent']:.2f} %"),
    ]  # fmt: skip
    own = {"summary": summary, "bench": result["bench"], "kernels": launched_sources()}
    return page_data("attnopt demo", {**found, **own})


def silent(line: str) -> None:
    """What is said with --json."""


def command(args: argparse.Namespace) -> None:
    """``attnopt demo``."""
    folder = Path(args.out)
    writable(str(folder / "report.html"))
    with stages(args.progress) as progress:
        result = run(folder, args.quick, progress, silent if args.json else say)
    emit(args, result, lambda: say(f"\nreport: {os.path.abspath(result['report_file'])}"))
