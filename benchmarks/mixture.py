"""Dense, sparse, linear and pruned heads in one plan, and what is lost with each family switched off.

    python -m benchmarks run mixture                        # the shipped model and two trained here
    python -m benchmarks run mixture -- --models diffuse    # of demo, diffuse, recall
    python -m benchmarks run mixture -- --quick             # short and few, to check the script
    python -m benchmarks run mixture -- --keep              # also benchmarks/results, docs/figures and docs/linear.md

Every model is profiled, its heads' far parts are fitted and tried on the same text, and the planner is asked for the
least damage within shares of dense's cost: *prefill*, by the times of this machine, or *memory*, bytes of the cache.
Each plan then runs on held-out text, through the operators that ship. Families that it may use:

    all             sinks and windows, linear, taylor, compensation and pruned heads
    no linear, ...  all but one of them
    mean            sinks and windows, with or without RazorAttention's compensation token
    spans           sinks and windows alone: nothing of `attnopt distill`

Columns: *timed*, the attention of all layers once more, all plans interleaved, as a share of dense; *cache*, bytes of
one sequence, as a share of dense. A plan whose operators are not what its choices say has no figures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnopt.codegen.emit import write_atomically
from attnopt.cost import interleaved
from attnopt.ir import DENSE
from attnopt.mixed import attend
from attnopt.planner import choices_from, front
from benchmarks.mixtures.decoding import cache_bytes
from benchmarks.mixtures.subject import TOLERANCE, Choices, Sizes, Subject
from benchmarks.planners.page import fill, markdown
from benchmarks.record import environment

TAKES = "15 min"
QUICK = ("--quick",)

FAMILIES = ("linear", "taylor", "compensation", "prune")
ALLOWED: dict[str, tuple[str, ...]] = {
    "all": FAMILIES,
    **{f"no {name}": tuple(f for f in FAMILIES if f != name) for name in FAMILIES},
    "mean": ("compensation",),
    "spans": (),
}
OBJECTIVES = ("prefill", "memory")
SIZES = {
    "demo": Sizes((1024, 2048), 4096, 2, 2, steps=200),
    "diffuse": Sizes((1024, 2048), 8192, 2, 2, windows=(32, 128), steps=200),
    "recall": Sizes((1024, 2048), 4096, 2, 2, windows=(32, 128), steps=200),
}
SHORT = Sizes((256, 512), 768, 1, 1, features=(16,), ranks=(4,), windows=(32,), steps=20)
# A window is never cheap in time; a cache may be a hundredth.
SHARES = {"prefill": (0.5, 0.3, 0.15, 0.07), "memory": (0.3, 0.1, 0.03, 0.01)}
FEW = {"prefill": (0.5, 0.2), "memory": (0.5, 0.2)}


@dataclass(frozen=True)
class Row:
    """A plan of a model, asked for a share of dense's cost by an objective: that cost as planned, as timed in the end
    and in bytes of cache, all as shares of dense; what it loses; how many heads are what."""

    model: str
    objective: str
    families: str
    asked: float
    planned: float
    cache: float
    heads: dict[str, int]
    increase: float | None = None
    kl: float | None = None
    timed: float | None = None
    error: float = 0.0

    @property
    def wrong(self) -> bool:
        return not self.error <= TOLERANCE

    def __str__(self) -> str:
        at = f"{self.model}, {self.objective}, {self.families}, {self.asked:g}"
        if self.wrong:
            return f"{at}: WRONG, relative error {self.error:.1e} > {TOLERANCE:g}"
        what = ", ".join(f"{n} {name}" for name, n in self.heads.items())
        return f"{at}: loss {self.increase:+.3f} %, KL {self.kl:.5f}, cache {self.cache:.3f}; {what}"


class Mixture:
    """The plans of one model."""

    def __init__(self, subject: Subject, shares: Mapping[str, Sequence[float]]) -> None:
        self.subject, self.shares = subject, shares
        self.length = subject.sizes.length
        self.dense: Choices = {s.name: (DENSE,) * s.heads for s in subject.sites}
        self.plans: list[Choices] = [self.dense]
        self._seen: dict[str, tuple[float, float, float]] = {}

    def bytes(self, choices: Choices) -> int:
        return sum(cache_bytes(s, choices[s.name], self.length) for s in self.subject.sites)

    def rows(self, objective: str) -> list[Row]:
        found = []
        for name, allowed in ALLOWED.items():
            problem = self.subject.problem(self.length, objective, allowed)
            sweep = front(problem)
            for share in self.shares[objective]:
                solution = sweep.pick(max_cost=share * problem.dense.cost)
                if solution is None:
                    self.subject.say(f"{self.subject.name}, {objective}, {name}: nothing costs {share:g} of dense")
                    continue
                choices = choices_from(problem, solution)
                planned = solution.cost / problem.dense.cost
                found.append(self.row(objective, name, share, planned, choices))
                self.plans.append(choices)
                self.subject.say(str(found[-1]))
        return found

    def row(self, objective: str, families: str, share: float, planned: float, choices: Choices) -> Row:
        counts = Counter(c.candidate for of_site in choices.values() for c in of_site)
        cache = self.bytes(choices) / self.bytes(self.dense)
        bare = Row(self.subject.name, objective, families, share, planned, cache, dict(sorted(counts.items())))
        key = repr(sorted(choices.items()))
        # Several families often come to one plan, which is measured once.
        if key not in self._seen:
            error = self.subject.error(choices)
            right = error <= TOLERANCE
            outcome = self.subject.measure(choices, self.length, self.subject.sizes.final) if right else None
            self._seen[key] = error, *((outcome.increase, outcome.kl) if outcome is not None else (0.0, 0.0))
        error, increase, kl = self._seen[key]
        return replace(bare, error=error) if not error <= TOLERANCE else replace(
            bare, error=error, increase=increase, kl=kl
        )  # fmt: skip

    @torch.no_grad()
    def times(self, rounds: int) -> list[float]:
        """Milliseconds of all layers' attention under each of `plans`, of which equal ones are timed once."""
        subject = self.subject
        given = subject.inputs(subject.split("final", self.length, 1)[:1])

        def run(choices: Choices) -> None:
            for site in subject.sites:
                attend(*given[site.name], choices[site.name], site, subject.fitted, None)

        distinct = {repr(sorted(plan.items())): plan for plan in self.plans}
        found = interleaved([lambda plan=plan: run(plan) for plan in distinct.values()], rounds, "cpu")
        by = dict(zip(distinct, found, strict=True))
        return [by[repr(sorted(plan.items()))] for plan in self.plans]


def measured(name: str, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of one model, and what is to be said of it."""
    sizes = SHORT if args.quick else SIZES[name]
    subject = Subject(name, sizes, lambda line: print(line, flush=True))
    mixture = Mixture(subject, FEW if args.quick else SHARES)
    rows = [row for objective in OBJECTIVES for row in mixture.rows(objective)]
    dense, *plans = mixture.times(2 if args.quick else 5)
    rows = [r if r.wrong else replace(r, timed=ms / dense) for r, ms in zip(rows, plans, strict=True)]
    return rows, [*subject.offers(), *against_window(rows)]


def against_window(rows: Sequence[Row]) -> list[str]:
    """RazorAttention's token against plain windows at equal cost."""
    said = []
    for objective in OBJECTIVES:
        of = {(r.families, r.asked): r for r in rows if r.objective == objective and not r.wrong}
        pairs = [(of["mean", a], of["spans", a]) for f, a in of if f == "mean" and ("spans", a) in of]
        lines = [f"{m.asked:g}: {m.kl:.4f} against {s.kl:.4f} nats ({m.heads.get('compensation', 0)} heads)"
                 for m, s in pairs]  # fmt: skip
        if lines:
            said.append(f"{rows[0].model}, {objective}: compensation tokens against plain windows, KL at a share of "
                        f"{'; '.join(lines)}.")  # fmt: skip
    return said


def described(name: str, rows: Sequence[Row], said: Sequence[str], sizes: Sizes) -> str:
    """A table for each objective, for the page."""
    parts = []
    for objective in OBJECTIVES:
        of = {(r.families, r.asked): r for r in rows if r.objective == objective}
        asked = sorted({a for _, a in of}, reverse=True)
        lines = [[families, *(cell(of.get((families, a)), objective) for a in asked)]
                 for families in dict.fromkeys(f for f, _ in of)]  # fmt: skip
        cost = {"prefill": "prefill time", "memory": "cache bytes"}[objective]
        parts.append(
            f"`{name}`, planned for {cost} at {sizes.length} tokens; loss increase, KL in nats per token, and the "
            f"share of dense that was timed (prefill) or is held (memory), by the share asked for:\n\n"
            + markdown(["families", *(f"{a:g}" for a in asked)], lines)
        )
    return "\n\n".join([*parts, *said])


def cell(row: Row | None, objective: str) -> str:
    if row is None:
        return ""
    if row.wrong or row.timed is None:
        return "WRONG"
    share = row.timed if objective == "prefill" else row.cache
    return f"{row.increase:+.2f} %; {row.kl:.4f}; {share:.2f}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """KL over the share of dense's cost, a line for each set of families: prefill as timed, and cache."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    made, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.8))
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        for name in ALLOWED:
            points = [r for r in rows if (r.objective, r.families) == (objective, name) and r.timed is not None]
            points = sorted(points, key=lambda r: -r.asked)
            shares = [r.timed if objective == "prefill" else r.cache for r in points]
            style = {"lw": 2.4, "zorder": 3} if name in ("all", "spans") else {"lw": 1.1}
            axis.plot(shares, [max(r.kl or 0.0, 1e-6) for r in points], "o-", ms=3, label=name, **style)
        axis.set_yscale("log")
        axis.set_xlabel("share of dense prefill time, as timed" if objective == "prefill" else "share of dense cache")
    axes[0].set_ylabel("KL from the dense model, nats per token")
    axes[0].legend(frameon=False, fontsize=8)
    made.tight_layout()
    made.savefig(path, metadata={"Date": None})
    pyplot.close(made)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results, docs/figures and docs/linear.md")
    args = parser.parse_args()
    if args.quick:
        args.models = args.models[:1] if args.models == list(SIZES) else args.models
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    root, data = Path(__file__).parents[1], dict[str, Any]()
    for name in args.models:
        rows, said = measured(name, args)
        data[name] = {"rows": [asdict(r) for r in rows], "said": said}
        text = described(name, rows, said, SHORT if args.quick else SIZES[name])
        print(text, flush=True)
        if args.keep:
            record = {"model": name, **data[name], "environment": environment()}
            write_atomically(root / f"benchmarks/results/mixture-{name}.json", json.dumps(record, indent=1) + "\n")
            figure(rows, root / f"docs/figures/mixture-{name}.svg")
            fill(root / "docs/linear.md", f"mixture-{name}", text)
    if args.out is not None:
        write_atomically(args.out, json.dumps({**data, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
