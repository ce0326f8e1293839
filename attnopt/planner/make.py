"""From a profile to a verified plan: cost table, knapsack, search on the verify split, one look at the final split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attnopt import __version__, settings
from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import Costs, CostTable, WithFar, device_name, load_or_measure, load_or_measure_far
from attnopt.errors import OptionError, TextError
from attnopt.fingerprint import Fingerprint, digest, fingerprint_of
from attnopt.ir import Site
from attnopt.measure import Sequences, Spans
from attnopt.plan import Budget, Constraints, Lengths, Measured, Plan, choices_id, sidecar
from attnopt.planner.constraints import limits_of, protected, refuse_contradiction, refuse_impossible
from attnopt.planner.cuttable import not_cuttable
from attnopt.planner.evaluate import Evaluator, Kept, Progress, digest_of
from attnopt.planner.knapsack import Choices, Limits, Problem, choices_from, times_faster
from attnopt.planner.problem import (
    RETRIEVAL,
    Tables,
    closed,
    kept_dense,
    left_dense,
    make_problem,
    min_length_of,
    predicted_of,
    table_of,
)
from attnopt.planner.tried import allowed_families, not_pruned, tried_at
from attnopt.planner.verify import LEAST_SEQUENCES, TYPICAL_LOSS, Record, Verified, final_check, verify_loop
from attnopt.probe import Document, Probe, Recall, recall
from attnopt.profile_file import versions_here
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile

# Of each length, with 16 questions in one that has room for them.
PROBE_DOCUMENTS = 4
# The search aims inside the budget: of several plans tried, the one that holds was lucky on the verify split, and the
# final split is looked at once. On the demo model the final bound was 0.8 to 1.4 times the verify bound.
SEARCH_SHARE = 0.85


@dataclass
class Made:
    """A verified plan and how it came about; `dense` and `planned` are the losses on the final split, per length.
    notes: what no candidate can replace, and what could not be measured."""

    plan: Plan
    problem: Problem
    verified: Verified
    tables: dict[str, Costs]
    dense: dict[int, Sequences] = field(default_factory=dict)
    planned: dict[int, Sequences] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def cost_tables(
    sites: Sequence[Site], profile: Profile, target: str, device: str, lengths: Sequence[int], progress: Progress | None
) -> dict[str, CostTable]:
    """One measured table per site; sites of equal shape share it. Stored on this machine, so measured once."""
    made: dict[SpanPrefill, CostTable] = {}
    grid = profile.header.grid
    tables: dict[str, CostTable] = {}
    for site in sites:
        spec = spec_of(site, target)
        if spec not in made:
            made[spec] = load_or_measure(
                spec, lengths, windows_at(grid.windows, lengths), [max(grid.sinks)], device=device, rounds=5,
                progress=lambda done, of, what: progress(f"timing kernels at {what}", done, of) if progress else None,
            )  # fmt: skip
        tables[site.name] = made[spec]
    return tables


def spec_of(site: Site, target: str) -> SpanPrefill:
    """What a site's times are of."""
    return SpanPrefill(target, site.dtype, site.heads, site.kv_heads, site.head_dim, site.head_dim_v, False)


def with_far_parts(
    tables: Mapping[str, CostTable], sites: Sequence[Site], fitted: Fitted, allow: Sequence[str], target: str,
    device: str, lengths: Sequence[int], progress: Progress | None,
) -> dict[str, Costs]:  # fmt: skip
    """The tables with the times of the far parts that were tried anywhere, of sites where one may stand."""
    tried = {s.name: tried_at(fitted, s, allow, max(lengths)) for s in sites}
    every = {CANDIDATES[c.candidate].far_part(dict(c.params)) for found in tried.values() for c in found}
    parts = sorted(part for part in every if part[0])
    found: dict[str, Costs] = dict(tables)
    for site in sites:
        if parts and tried[site.name]:
            far = load_or_measure_far(
                spec_of(site, target), lengths, parts, device=device, rounds=5,
                progress=lambda done, of, what: progress(f"timing far parts at {what}", done, of) if progress else None,
            )  # fmt: skip
            found[site.name] = WithFar(tables[site.name], far)
    return found


def windows_at(windows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Windows to time: those observed, and the larger shares of each length that a rule may ask for."""
    return sorted({*windows} | {n // d for n in lengths for d in (2, 4, 8)})


def check_text(texts: Mapping[int, Tensor], split: str) -> None:
    for length, ids in texts.items():
        if len(ids) < LEAST_SEQUENCES:
            raise TextError(
                f"The text gives {len(ids)} sequences of {length} tokens for the {split} split, "
                f"and {LEAST_SEQUENCES} are the least.",
                f"Ask for {LEAST_SEQUENCES} samples or more of at least {LEAST_SEQUENCES * length} tokens a split, or "
                "verify at a shorter length.",
            )


def make_plan(
    model: nn.Module,
    name: str,
    profile: Profile,
    verify: Mapping[int, Tensor],
    final: Mapping[int, Tensor],
    budget: Budget,
    target_length: int,
    *,
    tables: Tables | Callable[[Sequence[Site]], Tables] | None = None,
    objective: str = "prefill",
    constraints: Constraints | None = None,
    fitted: Fitted | None = None,
    allow: Sequence[str] | None = None,
    exact: float | None = None,
    probe: Probe | None = None,
    probe_documents: int = PROBE_DOCUMENTS,
    seed: int = 0,
    progress: Progress | None = None,
    report: Callable[[Record], None] | None = None,
    partial: Path | None = None,
    tell: Callable[[str], None] | None = None,
    share: float = SEARCH_SHARE,
) -> Made:
    """The cheapest plan for `target_length`, by `objective`, whose measured loss keeps `budget` and the constraints.

    verify, final: {length: token ids int64 (samples, length)} of disjoint text; `final` is looked at once. tables:
    costs, or a function from sites to them; measured here by default. fitted: what `attnopt distill` fitted and tried;
    allow: its families to weigh, by default all but "prune". exact: seconds that HiGHS may take over each point tried.
    probe: asks the plan, and dense, for far lines in `probe_documents` documents of each length. partial: a file of the
    losses measured so far; the next call on the same model and text, whatever it asks for, measures none of them again.
    It is left there. tell: given a line that says whether that file was taken up. share: of the budget, what the search
    aims at. A plan that misses the budget raises BudgetError and is not returned; constraints that contradict each
    other raise OptionError.
    """
    check_text(verify, "verify")
    check_text(final, "final")
    families = allowed_families(allow, fitted)
    if "prune" in families and constraints is not None and constraints.dense_below is not None:
        raise OptionError(
            "A pruned head is gone at every length, and --dense-below wants it back under one.",
            "Leave prune out of --allow, or --dense-below away.",
        )
    model.eval()
    spans = Spans(model, fitted)
    short = next(iter(verify.values()))[:1, :64]
    if progress is not None:
        progress("tracing", 0, 0)
    spans.losses(short, None)
    spans.instrumented.need_sites()
    sites = list(spans.sites.values())
    fingerprint = fingerprint_of(model, sites)
    profile.check_model(fingerprint)
    if fitted is not None:
        fitted.check_model(fingerprint)
    device = next(model.parameters()).device.type
    if callable(tables):
        tables = tables(sites)
    if tables is None:
        lengths = [n for n in sorted({1024, 2048, 4096, target_length}) if n <= target_length]
        target = settings.target(device)
        tables = timed = cost_tables(sites, profile, target, device, lengths, progress)
        if fitted is not None:
            tables = with_far_parts(timed, sites, fitted, families, target, device, lengths, progress)
    of_site = {s.name: table_of(tables, s) for s in sites}
    asked = replace(constraints or Constraints(), allow=families)
    notes = left_dense(sites, families)
    whole: dict[str, str] = {}
    if "prune" in families:
        assert fitted is not None
        whole = not_cuttable(model, short, sites, fingerprint, fitted)
        notes += tuple(f"{name} keeps all heads: {reason}." for name, reason in whole.items())
    problem, limits = posed(profile, of_site, sites, target_length, asked, objective, fitted, tuple(whole))
    inputs = inputs_of(model, fingerprint, fitted, verify, final) if partial is not None else {}
    kept = Kept.begin(inputs, partial, tell or (lambda line: None))
    evaluate = Evaluator(spans, verify, budget.kind == "kl", progress, "verifying", kept)
    dense_loss = max((s.mean_loss for s in evaluate.dense.values()), default=TYPICAL_LOSS)
    refuse_contradiction(problem, limits, budget, dense_loss)
    found = verify_loop(
        problem,
        evaluate,
        budget,
        share=share,
        seed=seed,
        limits=limits,
        exact=exact,
        dense_loss=dense_loss,
        report=report,
    )
    choices = choices_from(problem, found.solution)
    last = Evaluator(spans, final, True, progress, "final check", kept)
    # A cache asked to be small is so at every length, whether or not that saves time.
    saves_time = objective in ("prefill", "mixed") and asked.max_kv_memory is None and asked.max_kv_bytes is None
    min_length = min_length_of(choices, sites, of_site) if saves_time else 0
    faster = times_faster(problem.dense.cost, found.solution.cost)
    described = f"The plan, {faster:.2f} times as fast as dense by its costs,"
    measured = final_check(last(choices), budget, choices_id(choices), seed, described)
    if probe is not None:
        measured, unasked = retrieved(spans, choices, probe, measured, probe_documents, seed, progress)
        notes += unasked
    plan = Plan(
        model=name,
        fingerprint=fingerprint,
        budget=budget,
        lengths=Lengths(tuple(profile.lengths), target_length, tuple(sorted({*verify, *final}))),
        choices=choices,
        predicted=predicted_of(problem, found.solution, found.gap),
        measured=(*found.measured, *measured),
        objective=objective,
        constraints=asked,
        min_length=max(min_length, asked.dense_below or 0),
        cost_table="+".join(sorted({t.id for t in of_site.values()})),
        calibration=calibration_of(profile),
        seed=seed,
        versions=dict(versions_here()),
        fitted=fitted.part_of(choices) if fitted is not None and sidecar.needed(choices) else None,
    )
    return Made(plan, problem, found, of_site, last.dense, last.planned, notes)


def inputs_of(
    model: nn.Module, fingerprint: Fingerprint, fitted: Fitted | None, verify: Mapping[int, Tensor],
    final: Mapping[int, Tensor],
) -> dict[str, str]:  # fmt: skip
    """What a measured loss depends on, beside the choices and the sequence."""
    weight = next(model.parameters())
    device = weight.device.type
    return {
        "model": fingerprint.structure,
        "weights": digest(model),
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
        "dtype": str(weight.dtype),
        "device": f"{device_name(str(weight.device))}, {settings.target(device)}",
        "setting": f"native {settings.native()}, disabled {', '.join(sorted(settings.disabled()))}",
        "text": f"{digest_of(verify)} {digest_of(final)}",
        "file of fits": hashlib.sha256(fitted.to_bytes()).hexdigest()[:16] if fitted is not None else "",
        "version": " ".join(f"{name} {version}" for name, version in (("attnopt", __version__), *versions_here())),
    }


def posed(
    profile: Profile, tables: Tables, sites: Sequence[Site], length: int, asked: Constraints, objective: str,
    fitted: Fitted | None = None, whole: Sequence[str] = (),
) -> tuple[Problem, Limits]:  # fmt: skip
    """The problem with its protected heads, and its limits; OptionError where nothing is within them. whole: sites none
    of whose heads can be removed."""
    protect = protected(sites, asked, profile)
    weight = RETRIEVAL if asked.retrieval is None else asked.retrieval
    free = make_problem(
        profile, tables, sites, length, objective=objective, retrieval=weight, fitted=fitted, allow=asked.allow
    )
    if "prune" in asked.allow:
        kept = {site: list(heads) for site, heads in not_pruned(profile, [s.name for s in sites]).items()}
        kept |= {s.name: list(range(s.heads)) for s in sites if s.name in whole}
        free = closed(free, kept, [c for c in free.choices if CANDIDATES[c.candidate].far == "gone"])
    problem = kept_dense(free, protect)
    limits = limits_of(problem, asked, objective)
    refuse_impossible(problem, limits, free)
    return problem, limits


def answered(spans: Spans, choices: Choices | None, documents: Sequence[Document]) -> Recall:
    """What a plan, or dense, recalls of `documents`."""
    return recall(lambda ids: spans.logits(ids.to(spans.device), choices), documents)


def retrieved(
    spans: Spans, choices: Choices, probe: Probe, measured: tuple[Measured, ...], count: int, seed: int,
    progress: Progress | None,
) -> tuple[tuple[Measured, ...], tuple[str, ...]]:  # fmt: skip
    """The measurements with what dense and planned recall of far lines at each length; and the lengths without room."""
    found, notes = [], []
    for done, at in enumerate(measured):
        if progress is not None:
            progress(f"asking for far lines: {at.length} tokens", done, len(measured))
        try:
            documents = probe.documents(at.length, count, f"final {seed}")
        except TextError as error:
            notes.append(f"No retrieval was measured at {at.length} tokens: {error.problem}")
            found.append(at)
            continue
        dense, planned = (answered(spans, c, documents).share for c in (None, choices))
        found.append(replace(at, dense_retrieval=dense, planned_retrieval=planned))
    spans.set(None)
    return tuple(found), tuple(notes)


def calibration_of(profile: Profile) -> str:
    return hashlib.sha256(" ".join(profile.header.data).encode()).hexdigest()[:12]


def uniform_at_cost(problem: Problem, cost: float, sites: Sequence[Site]) -> Choices:
    """One sink+window for all heads, constant in the length, whose cost is nearest to `cost` (what a fixed window buys
    at the same price); the window is interpolated between the table's, so that the cost really is the same."""
    from attnopt.ir import Choice

    spans = [(c, choice) for c, choice in enumerate(problem.choices) if choice.candidate == "sink_window"]
    fixed = [(float(problem.cost[:, c].sum()), choice) for c, choice in spans if choice["beta"] == 0.0]
    fixed = sorted(fixed, key=lambda pair: pair[0])
    below = [x for x in fixed if x[0] <= cost] or fixed[:1]
    above = [x for x in fixed if x[0] > cost] or fixed[-1:]
    (low, a), (high, b) = below[-1], above[0]
    share = 0.0 if high <= low else (cost - low) / (high - low)
    window = round(a["alpha"] + share * (b["alpha"] - a["alpha"]))
    choice = Choice.of("sink_window", {"sink": max(a["sink"], b["sink"]), "alpha": window, "beta": 0.0})
    return {s.name: (choice,) * s.heads for s in sites}


__all__ = ["Evaluator", "Made", "cost_tables", "make_plan", "uniform_at_cost"]
