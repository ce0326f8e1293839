"""From a profile to a verified plan: cost table, knapsack, search on the verify split, one look at the final split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attnopt.codegen.spec import KernelSpec
from attnopt.cost import CostTable, load_or_measure
from attnopt.errors import TextError
from attnopt.fingerprint import fingerprint_of
from attnopt.ir import Site
from attnopt.measure import Sequences, Spans
from attnopt.plan import Budget, Lengths, Plan, choices_id
from attnopt.planner.knapsack import Choices, Limits, Problem, choices_from
from attnopt.planner.problem import make_problem, min_length_of, predicted_of
from attnopt.planner.verify import LEAST_SEQUENCES, Evaluation, Record, Verified, final_check, verify_loop
from attnopt.profile_file import versions_here

if TYPE_CHECKING:
    from attnopt.profile_file import Profile

Progress = Callable[[str, int, int], None]
# Distinct spans in one layer: each costs the CPU target a group of calls of its own.
MAX_SPANS = 4
# The search aims inside the budget: of several plans tried, the one that holds was lucky on the verify split, and the
# final split is looked at once. On the demo model the final bound was 0.8 to 1.4 times the verify bound.
SEARCH_SHARE = 0.85


@dataclass
class Made:
    """A verified plan and how it came about; `dense` and `planned` are the losses on the final split, per length."""

    plan: Plan
    problem: Problem
    verified: Verified
    tables: dict[str, CostTable]
    dense: dict[int, Sequences] = field(default_factory=dict)
    planned: dict[int, Sequences] = field(default_factory=dict)


class Evaluator:
    """Measures choices against dense on fixed sequences (one tensor (samples, N) per length); dense is run once."""

    def __init__(
        self, spans: Spans, texts: Mapping[int, Tensor], divergence: bool, progress: Progress | None, what: str
    ) -> None:
        self.spans, self.texts, self.divergence = spans, texts, divergence
        self.progress, self.what = progress, what
        self.dense = {n: self._run(n, None) for n in texts}
        self.planned: dict[int, Sequences] = {}

    def _run(self, length: int, choices: Choices | None) -> Sequences:
        ids, done = self.texts[length], 0
        what = f"{self.what}, {'dense' if choices is None else 'planned'} at {length}"

        def step() -> None:
            nonlocal done
            done += 1
            if self.progress is not None:
                self.progress(what, done, len(ids))

        return self.spans.losses(ids, choices, self.divergence and choices is not None, step)

    def __call__(self, choices: Choices) -> list[Evaluation]:
        self.planned = {n: self._run(n, choices) for n in self.texts}
        return [Evaluation.between(n, self.dense[n], self.planned[n]) for n in self.texts]


def cost_tables(
    sites: Sequence[Site], profile: Profile, target: str, device: str, lengths: Sequence[int], progress: Progress | None
) -> dict[str, CostTable]:
    """One measured table per site; sites of equal shape share it. Stored on this machine, so measured once."""
    made: dict[KernelSpec, CostTable] = {}
    grid = profile.header.grid
    tables: dict[str, CostTable] = {}
    for site in sites:
        spec = KernelSpec(target, site.dtype, site.heads, site.kv_heads, site.head_dim, site.head_dim_v, False)
        if spec not in made:
            windows = sorted({w for w in grid.windows} | {n // d for n in lengths for d in (2, 4, 8)})
            made[spec] = load_or_measure(
                spec, lengths, windows, [max(grid.sinks)], device=device, rounds=5,
                progress=lambda done, of, what: progress(f"timing kernels at {what}", done, of) if progress else None,
            )  # fmt: skip
        tables[site.name] = made[spec]
    return tables


def check_text(texts: Mapping[int, Tensor], split: str) -> None:
    for length, ids in texts.items():
        if len(ids) < LEAST_SEQUENCES:
            raise TextError(
                f"The text gives {len(ids)} sequences of {length} tokens for the {split} split, "
                f"and {LEAST_SEQUENCES} are the least.",
                f"Give at least {LEAST_SEQUENCES * length} tokens a split, or verify at a shorter length.",
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
    tables: CostTable | Mapping[str, CostTable] | None = None,
    seed: int = 0,
    max_spans: int = MAX_SPANS,
    progress: Progress | None = None,
    report: Callable[[Record], None] | None = None,
) -> Made:
    """The fastest plan for `target_length` whose measured loss keeps `budget`.

    verify, final: {length: token ids int64 (samples, length)} of disjoint text; `final` is looked at once. A plan that
    misses the budget raises BudgetError and is not returned.
    """
    from attnopt import settings

    check_text(verify, "verify")
    check_text(final, "final")
    model.eval()
    spans = Spans(model)
    short = next(iter(verify.values()))[:1, :64]
    spans.losses(short, None)
    spans.instrumented.need_sites()
    sites = list(spans.sites.values())
    fingerprint = fingerprint_of(model, sites)
    profile.check_model(fingerprint)
    device = next(model.parameters()).device.type
    if tables is None:
        lengths = sorted({1024, 2048, 4096, target_length})
        tables = cost_tables(
            sites, profile, settings.target(device), device, [n for n in lengths if n <= target_length], progress
        )
    of_site = {s.name: tables if isinstance(tables, CostTable) else tables[s.name] for s in sites}
    problem = make_problem(profile, of_site, sites, target_length)
    evaluate = Evaluator(spans, verify, budget.kind == "kl", progress, "verifying")
    dense_loss = max(s.mean_loss for s in evaluate.dense.values())
    found = verify_loop(
        problem,
        evaluate,
        replace(budget, limit=SEARCH_SHARE * budget.limit),
        seed=seed,
        limits=Limits(spans=max_spans),
        dense_loss=dense_loss,
        report=report,
    )
    choices = choices_from(problem, found.solution)
    last = Evaluator(spans, final, budget.kind == "kl", progress, "final check")
    min_length = min_length_of(choices, sites, of_site)
    measured = final_check(last(choices), budget, choices_id(choices), seed)
    plan = Plan(
        model=name,
        fingerprint=fingerprint,
        budget=budget,
        lengths=Lengths(tuple(profile.lengths), target_length, tuple(sorted({*verify, *final}))),
        choices=choices,
        predicted=predicted_of(problem, found.solution, found.gap),
        measured=(*found.measured, *measured),
        min_length=min_length,
        cost_table="+".join(sorted({t.id for t in of_site.values()})),
        calibration=calibration_of(profile),
        seed=seed,
        versions=dict(versions_here()),
    )
    return Made(plan, problem, found, of_site, last.dense, last.planned)


def calibration_of(profile: Profile) -> str:
    import hashlib

    return hashlib.sha256(" ".join(profile.header.data).encode()).hexdigest()[:12]


def uniform_at_cost(problem: Problem, cost: float, sites: Sequence[Site]) -> Choices:
    """One sink+window for all heads, constant in the length, whose cost is nearest to `cost` (what a fixed window buys
    at the same price); the window is interpolated between the table's, so that the cost really is the same."""
    from attnopt.ir import Choice

    fixed = [(float(problem.cost[:, c].sum()), choice) for c, choice in enumerate(problem.choices) if choice.params]
    fixed = sorted(((ms, choice) for ms, choice in fixed if choice["beta"] == 0.0), key=lambda pair: pair[0])
    below = [x for x in fixed if x[0] <= cost] or fixed[:1]
    above = [x for x in fixed if x[0] > cost] or fixed[-1:]
    (low, a), (high, b) = below[-1], above[0]
    share = 0.0 if high <= low else (cost - low) / (high - low)
    window = round(a["alpha"] + share * (b["alpha"] - a["alpha"]))
    choice = Choice.of("sink_window", {"sink": max(a["sink"], b["sink"]), "alpha": window, "beta": 0.0})
    return {s.name: (choice,) * s.heads for s in sites}


__all__ = ["Evaluator", "Made", "cost_tables", "make_plan", "uniform_at_cost"]
