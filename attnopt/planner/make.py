"""From a profile to a verified plan: cost table, knapsack, search on the verify split, one look at the final split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attnopt import settings
from attnopt.cost import Costs
from attnopt.errors import OptionError, TextError
from attnopt.fingerprint import Fingerprint, fingerprint_of
from attnopt.ir import Site
from attnopt.measure import Sequences, Spans
from attnopt.plan import Budget, Constraints, Lengths, Measured, Plan, choices_id, sidecar
from attnopt.planner.constraints import limits_of, protected, refuse_contradiction, refuse_impossible
from attnopt.planner.costs import costs_of
from attnopt.planner.cuttable import not_cuttable
from attnopt.planner.evaluate import Evaluator, Kept, inputs_of
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
)
from attnopt.planner.reuse import settled, within_memory
from attnopt.planner.steps import fallen_back
from attnopt.planner.tried import allowed_families, not_pruned, visits_of
from attnopt.planner.verify import LEAST_SEQUENCES, TYPICAL_LOSS, Record, Verified, final_check, verify_loop
from attnopt.probe import Document, Probe, Recall, recall
from attnopt.profile_file import versions_here
from attnopt.progress import Progress
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
    """A verified plan and how it came about. sites: of the model, in the order in which they run; dense, planned: the
    losses on the final split, per length; notes: what no candidate can replace, and what could not be measured."""

    plan: Plan
    problem: Problem
    verified: Verified
    sites: tuple[Site, ...]
    tables: dict[str, Costs]
    dense: dict[int, Sequences] = field(default_factory=dict)
    planned: dict[int, Sequences] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_text(texts: Mapping[int, Tensor], split: str) -> None:
    for length, ids in texts.items():
        if len(ids) < LEAST_SEQUENCES:
            raise TextError(
                f"The text gives {len(ids)} sequences of {length} tokens for the {split} split, "
                f"and {LEAST_SEQUENCES} are the least.",
                f"Ask for {LEAST_SEQUENCES} samples or more of at least {LEAST_SEQUENCES * length} tokens a split, or "
                "verify at a shorter length.",
            )


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the problem that its plan solves: traced, checked against its profile, each site with its costs.
    notes: what no candidate can replace."""

    spans: Spans
    sites: tuple[Site, ...]
    fingerprint: Fingerprint
    profile: Profile
    fitted: Fitted | None
    tables: dict[str, Costs]
    asked: Constraints
    objective: str
    problem: Problem
    limits: Limits
    notes: tuple[str, ...]

    def plan(
        self, name: str, budget: Budget, lengths: Lengths, found: Verified, measured: Sequence[Measured], seed: int
    ) -> Plan:
        """The file of what the search found. measured: on the final split."""
        choices, asked, fitted = choices_from(self.problem, found.solution), self.asked, self.fitted
        # A cache asked to be small is so at every length, whether or not that saves time.
        small_cache = asked.max_kv_memory is not None or asked.max_kv_bytes is not None
        min_length = asked.dense_below
        if min_length is None:
            at = min_length_of(choices, self.sites, self.tables, fitted, self.objective)
            min_length = 0 if small_cache else at
        return Plan(
            model=name,
            fingerprint=self.fingerprint,
            budget=budget,
            lengths=lengths,
            choices=choices,
            predicted=predicted_of(self.problem, found.solution, found.gap),
            measured=(*found.measured, *measured),
            objective=self.objective,
            constraints=asked,
            min_length=min_length,
            cost_table="+".join(sorted({t.id for t in self.tables.values()})),
            calibration=calibration_of(self.profile),
            seed=seed,
            versions=dict(versions_here()),
            visits=visits_of(choices, fitted, lengths.planned),
            fitted=fitted.part_of(choices) if fitted is not None and sidecar.needed(choices) else None,
        )


def case_of(
    model: nn.Module, profile: Profile, ids: Tensor, target_length: int, asked: Constraints, objective: str,
    tables: Tables | Callable[[Sequence[Site]], Tables] | None, fitted: Fitted | None, progress: Progress | None,
) -> Case:  # fmt: skip
    """The problem of `make_plan`. ids int64 (1, n): what the model is traced with; asked: with the families that are
    weighed. ProfileError where the profile is of another model, OptionError where nothing is within the constraints."""
    if "prune" in asked.allow and asked.dense_below:
        raise OptionError(
            "A pruned head is gone at every length, and --dense-below wants it back under one.",
            "Leave prune out of --allow, or --dense-below away.",
        )
    spans = traced(model, ids, fitted, progress)
    sites = tuple(spans.sites.values())
    fingerprint = fingerprint_of(model, sites)
    profile.check_model(fingerprint)
    if fitted is not None:
        fitted.check_model(fingerprint)
    device = spans.device.type
    of_site = costs_of(sites, tables, profile, target_length, fitted, asked.allow, device, progress, objective)
    notes = left_dense(sites, asked.allow)
    whole: dict[str, str] = {}
    if "prune" in asked.allow:
        assert fitted is not None
        whole = not_cuttable(model, ids, sites, fingerprint, fitted)
        notes += tuple(f"{name} keeps all heads: {reason}." for name, reason in whole.items())
    problem, limits = posed(profile, of_site, sites, target_length, asked, objective, fitted, tuple(whole))
    return Case(spans, sites, fingerprint, profile, fitted, of_site, asked, objective, problem, limits, notes)


def traced(model: nn.Module, ids: Tensor, fitted: Fitted | None, progress: Progress | None) -> Spans:
    """The model, in evaluation, with spans that can be put in; its sites are known. ids int64 (1, n)."""
    model.eval()
    spans = Spans(model, fitted)
    if progress is not None:
        progress("tracing", 0, 0)
    spans.losses(ids, None)
    spans.instrumented.need_sites()
    return spans


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
    asked = replace(constraints or Constraints(), allow=allowed_families(allow, fitted))
    short = next(iter(verify.values()))[:1, :64]
    case = case_of(model, profile, short, target_length, asked, objective, tables, fitted, progress)
    inputs = inputs_of(model, case.fingerprint, fitted, verify, final) if partial is not None else {}
    kept = Kept.begin(inputs, partial, tell or (lambda line: None))
    evaluate = Evaluator(case.spans, verify, budget.kind == "kl", progress, "verifying", kept)
    dense_loss = max((s.mean_loss for s in evaluate.dense.values()), default=TYPICAL_LOSS)
    case = replace(case, problem=settled(case.problem, budget.nats(dense_loss)))
    refuse_contradiction(case.problem, case.limits, budget, dense_loss)
    found = verify_loop(
        case.problem, evaluate, budget, share=share, seed=seed, limits=case.limits, exact=exact, dense_loss=dense_loss,
        report=report,
    )  # fmt: skip
    choices = choices_from(case.problem, found.solution)
    last = Evaluator(case.spans, final, True, progress, "final check", kept)
    faster = times_faster(case.problem.dense.cost, found.solution.cost)
    described = f"The plan, {faster:.2f} times as fast as dense by its costs,"
    measured = final_check(last(choices), budget, choices_id(choices), seed, described)
    notes = case.notes
    if probe is not None:
        measured, unasked = retrieved(case.spans, choices, probe, measured, probe_documents, seed, progress)
        notes += unasked
    lengths = Lengths(tuple(profile.lengths), target_length, tuple(sorted({*verify, *final})))
    plan = case.plan(name, budget, lengths, found, measured, seed)
    notes += without_effect(plan)
    if not any(table.kind == "roofline" for table in case.tables.values()):
        notes += fallen_back(choices, case.sites, settings.target(case.spans.device.type))
    return Made(plan, case.problem, found, case.sites, case.tables, last.dense, last.planned, notes)


def without_effect(plan: Plan) -> tuple[str, ...]:
    """What to say of lengths that a plan was made for, or verified at, and at which it runs dense."""
    short = sorted(n for n in {plan.lengths.planned, *plan.lengths.verified} if n < plan.min_length)
    if not short:
        return ()
    of = "as asked" if plan.constraints.dense_below is not None else "since it is predicted to save nothing there"
    return (
        f"The plan changes nothing at {', '.join(map(str, short))} tokens, which it was made for or verified at: under "
        f"{plan.min_length} tokens every head runs dense, {of}. Plan for more tokens (--length), or keep it at every "
        "length (--dense-below 0).",
    )


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
    problem = within_memory(problem, limits)
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
