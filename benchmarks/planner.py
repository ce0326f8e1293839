"""Planners on equal terms: what each loses at the same cost of prefill.

    python -m benchmarks.planner                            # the shipped model; about half an hour on a core
    python -m benchmarks.planner ./my-llama --lengths 1024,2048 --length 4096 --out planner.json
    python -m benchmarks.planner --quick                    # short and few, to check the script
    python -m benchmarks.planner --keep --name mha          # also benchmarks/results and docs/figures

Every planner sees the same calibration text. Plans that cost as much as one window for all heads that keeps a share of
the query-key pairs at `--length` are run on held-out text there: the loss against the dense model's, the divergence
from it, and the share of answers of a retrieval probe that are left. `--equal time` (default) takes the times of the
emitted kernels on this machine, and in the end times all plans once more, interleaved; `--equal pairs` counts pairs.
With `--reach S` also the longest text of which nine tenths of what dense recalls are recalled where heads keep S keys
on average (MoA's effective context, which is measured at nine tenths of all answers).

attnopt                damage from one profile, two documents of the probe beside the text; the Lagrangian optimum
attnopt, text          the same without the probe
moa                    benchmarks/planners/moa.py; of its Pareto front the plan that is best on the verify split
moa, groups            the same with the largest influence of each KV group, where heads share keys
moa, published groups  the same with the groups that its code takes, which are others
duo                    benchmarks/planners/duo.py, in the manner of DuoAttention: gates trained on the probe
uniform                one span for all heads
random                 the median of five draws
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.codegen.emit import write_atomically
from attnopt.commands.profiling import PROBES
from attnopt.ir import Choice
from attnopt.planner import choices_from, front
from attnopt.planner.problem import make_problem
from attnopt.probe import Probe
from attnopt.profiler import profile_model
from benchmarks.planners import duo, fixed, moa
from benchmarks.planners.page import fill, markdown
from benchmarks.planners.subject import Subject
from benchmarks.planners.terms import Choices, Terms, times
from benchmarks.record import environment

TAKES = "30 min"
QUICK = ("--quick",)

DENSITIES = (0.75, 0.5, 0.25, 0.125)
DRAWS = 5
DOCUMENTS = 4
# Texts, in multiples of the mean span, of which answers are asked for; the share of dense's recall that is reached.
REACH, REACHED = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), 0.9
Planner = Callable[[Terms, float], list[Choices]]


@dataclass(frozen=True)
class Row:
    """One planner at one density: what its plan costs of dense by the terms and as timed in the end, the share of
    query-key pairs it keeps itself, the loss increase in percent, KL in nats per token, the share of the probe's
    answers recalled, and the seconds it took to plan, profile aside."""

    planner: str
    wanted: float
    cost: float
    density: float
    increase: float
    kl: float
    recall: float
    seconds: float
    measured: float = 1.0


class Bench:
    """One model, its text and its profiles."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seconds = args, dict[str, float]()
        self.subject = Subject(args.model, args.dtype, args.text)
        self.length: int = args.length
        self.calibration = [r[None] for n in args.lengths for r in self.subject.split("calibrate", n, args.samples)]
        self.verify = self.subject.split("verify", self.length, max(2, args.samples // 2))
        self.final = self.subject.split("final", self.length, 2 * args.samples)
        self.probe = Probe(self.subject.tokenizer, split="final")
        self.terms = self.timed(f"terms of {args.equal}", lambda: self.terms_at(self.length, args.equal))
        self._influence: Mapping[str, Mapping[int, Tensor]] | None = None

    def timed(self, what: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = run()
        self.seconds[what] = round(time.perf_counter() - begin, 1)
        return found

    def terms_at(self, length: int, equal: str) -> Terms:
        return Terms.of(self.subject.sites, length, equal)

    def attnopt(self, probes: int = PROBES) -> Planner:
        """probes: documents of the retrieval probe that are profiled beside the text, of each length."""
        probe = Probe(self.subject.tokenizer)
        asked = [d.sample for n in self.args.lengths for d in probe.documents(n, probes, "calibrate")]
        profile = self.timed(
            f"attnopt profile, {probes} probes", lambda: profile_model(self.subject.model, [*self.calibration, *asked])
        )

        def plan(terms: Terms, wanted: float) -> list[Choices]:
            problem = make_problem(profile, terms.tables, self.subject.sites, terms.length)
            found = front(problem).pick(max_cost=wanted * problem.dense.cost)
            return [choices_from(problem, found)] if found is not None else []

        return plan

    def moa(self, groups: str = "") -> Planner:
        """groups: "" scores query heads, "right" and "published" take the largest score of a group."""
        profiled, step = sorted(set(self.args.lengths)), min(self.args.lengths) // 4
        if self._influence is None:
            self._influence = self.timed("moa profile", lambda: moa.profile(self.subject.model, self.calibration))
        found = self._influence
        kv_heads = {s.name: s.kv_heads for s in self.subject.sites}

        def plan(terms: Terms, wanted: float) -> list[Choices]:
            grid = moa.rules(profiled, (terms.length,), step)

            def of_site(name: str, length: int) -> np.ndarray:
                values = torch.stack([moa.dropped(found[name][length], rule, length) for rule in grid], -1).numpy()
                return moa.over_groups(values, kv_heads[name], groups == "published") if groups else values

            loss = np.array([[of_site(name, n) for name in found] for n in profiled])
            made = moa_within(terms, wanted, loss, grid, profiled, list(found))
            verify = self.verify[:, : terms.length]
            return sorted(made, key=lambda c: self.subject.spans.losses(verify, c).mean_loss)[:1]

        return plan

    def duo(self) -> Planner:
        sink, window = self.args.duo_span
        body = getattr(self.subject.model, "model", None)
        if body is None:
            raise SystemExit("The DuoAttention split needs a model whose body is its attribute `model`; leave duo out.")
        probe = Probe(self.subject.tokenizer)
        examples = []
        for n in range(16):
            sample = probe.document(max(self.args.lengths), f"gates {n}").sample
            examples.append((sample.ids, sample.weights > 0))
        steps = self.args.duo_steps
        gates = self.timed("duo training", lambda: duo.train(body, examples, sink, window, steps=steps))
        # Sites are named from the body there, from the whole model here; their order is one.
        gates = dict(zip(self.subject.heads, gates.values(), strict=True))

        def plan(terms: Terms, wanted: float) -> list[Choices]:
            count = sum(len(g) for g in gates.values())
            splits = (duo.split(gates, self.subject.heads, n, sink, window) for n in range(count, -1, -1))
            return next(([s] for s in splits if terms.share(s) <= wanted), [])

        return plan

    def allowed(self, density: float) -> float:
        """The share of dense's cost that plans may take: that of one window of this density for all heads."""
        alike = fixed.uniform(self.subject.heads, self.length, density, lambda c: self.subject.density(c, self.length))
        return density if alike is None else self.terms.share(alike) * (1 + 1e-9)

    def recalled(self, choices: Choices | None, length: int) -> float:
        return self.subject.recalled(choices, self.probe, length, self.args.documents).share

    def rows(self, planners: Mapping[str, Planner], done: Callable[[Row], None]) -> list[Row]:
        self.timed("dense", lambda: self.subject.hold_out(self.final))
        rows = [Row("dense", 1.0, 1.0, 1.0, 0.0, 0.0, self.recalled(None, self.length), 0.0)]
        plans: list[Choices] = [{}]
        for name, planner in planners.items():
            for wanted in self.args.densities:
                begin = time.perf_counter()
                made = planner(self.terms, self.allowed(wanted))
                seconds = round(time.perf_counter() - begin, 2)
                seen = sorted(((self.subject.measure(c), n) for n, c in enumerate(made)), key=lambda s: s[0].kl)
                if not seen:
                    continue
                outcome, n = seen[len(seen) // 2]
                plans.append(made[n])
                facts = self.terms.share(made[n]), self.subject.density(made[n], self.length)
                recall = self.recalled(made[n], self.length)
                rows.append(Row(name, wanted, *facts, outcome.increase, outcome.kl, recall, seconds))
                done(rows[-1])
        found = self.timed("timing", lambda: times(self.subject.sites, self.length, plans))
        return [replace(row, measured=ms / found[0]) for row, ms in zip(rows, found, strict=True)]

    def reach(self, planners: Mapping[str, Planner], span: int, done: Callable[[str, int], None]) -> dict[str, int]:
        """The longest text of which answers are recalled, all shorter ones too, with `span` keys kept on average."""
        found = {}
        enough = {
            length: REACHED * self.recalled(None, length)
            for length in (int(r * span) for r in REACH if r * span <= self.args.reach_most)
        }
        for name, planner in planners.items():
            found[name] = 0
            for length, wanted in enough.items():
                made = planner(self.terms_at(length, "span"), span / length)
                if not made or self.recalled(made[0], length) < wanted:
                    break
                found[name] = length
            done(name, found[name])
        return found


def moa_within(
    terms: Terms, wanted: float, loss: np.ndarray, grid: list[moa.Rule], profiled: list[int], sites: list[str]
) -> list[Choices]:
    """MoA's Pareto front of plans within a share of the terms. Its own budget is a density that counts blocks, and the
    widest row: what is asked of it is moved until its plan just fits."""

    def choices(plan: np.ndarray) -> Choices:
        rules = [[grid[r] for r in layer] for layer in plan]
        params = [[{"sink": moa.BLOCK, "alpha": r.alpha, "beta": r.beta} for r in layer] for layer in rules]
        return {
            name: tuple(Choice.of("sink_window", p) for p in layer) for name, layer in zip(sites, params, strict=True)
        }

    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        asked = (low + high) / 2
        problem = moa.Problem.of(loss, grid, profiled, (terms.length,), asked)
        solved = moa.solve(problem, len(profiled) - 1)
        fits = solved is not None and terms.share(choices(solved)) <= wanted
        # Nothing is feasible under a share of pairs that the narrowest rule has.
        low, high = (asked, high) if fits or solved is None else (low, asked)
        best = (problem, solved) if fits and solved is not None else best
    made = [choices(p) for p in ([best[1], *moa.pareto(best[0])] if best is not None else [])]
    return [c for c in made if terms.share(c) <= 1.01 * wanted]


def table(rows: Sequence[Row], equal: str) -> Any:
    from rich.table import Table

    shown = Table(title=f"at equal {equal}: shares of dense, loss increase over dense, KL in nats per token, recall")
    for column in ("planner", "asked", "cost", "timed", "pairs", "loss +%", "KL", "recall", "planned in"):
        shown.add_column(column, justify="left" if column == "planner" else "right")
    for r in rows:
        shares = (f"{share:.3f}" for share in (r.cost, r.measured, r.density))
        cells = (*shares, f"{r.increase:.3f}", f"{r.kl:.5f}", f"{r.recall:.0%}", f"{r.seconds} s")
        shown.add_row(r.planner, f"{r.wanted:g}", *cells)
    return shown


def described(args: argparse.Namespace, rows: Sequence[Row], reach: Mapping[str, int]) -> str:
    """The tables of the documentation: KL, loss increase and recall of every planner at every share; and the reach."""
    wanted = sorted({r.wanted for r in rows if r.planner != "dense"}, reverse=True)
    found = {(r.planner, r.wanted): r for r in rows}
    lines = []
    for name in dict.fromkeys(r.planner for r in rows if r.planner != "dense"):
        cells = [found.get((name, w)) for w in wanted]
        texts = (f"{c.kl:.4f}; {c.increase:+.2f} %; {c.recall:.0%}; {c.measured:.2f}" if c else "" for c in cells)
        lines.append([name, *texts])
    profiled = ", ".join(map(str, args.lengths))
    equal = {"time": "measured prefill time", "pairs": "query-key pairs"}[args.equal]
    what = (
        f"`{args.name}`, profiled at {profiled} tokens, measured at {args.length}, at the {equal} of one window that "
        f"keeps such a share of the pairs; KL, loss increase, recall, share of the dense time measured (dense recalls "
        f"{rows[0].recall:.0%}):"
    )
    text = f"{what}\n\n{markdown(['planner', *(f'{w:g}' for w in wanted)], lines)}"
    if reach:
        longest = ", ".join(f"{name} {length}" for name, length in reach.items())
        text += f"\n\nEffective context with {args.reach} keys a head on average, of at most {args.reach_most} tokens"
        text += f" asked for: {longest}."
    return text


def figure(rows: Sequence[Row], equal: str, path: Path) -> None:
    """KL and recall over the share of dense's cost, one line a planner."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    made, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.8))
    for name in dict.fromkeys(r.planner for r in rows if r.planner != "dense"):
        points = sorted((r for r in rows if r.planner == name), key=lambda r: r.cost)
        style = {"lw": 2.2, "zorder": 3} if name.startswith("attnopt") else {"lw": 1.2}
        axes[0].semilogy([r.cost for r in points], [r.kl for r in points], "o-", ms=3, label=name, **style)
        axes[1].plot([r.cost for r in points], [100 * r.recall for r in points], "o-", ms=3, label=name, **style)
    axes[0].set_ylabel("KL from the dense model, nats per token")
    axes[1].set_ylabel("answers recalled, %")
    for axis in axes:
        axis.set_xlabel("share of dense prefill time" if equal == "time" else "share of query-key pairs kept")
    axes[0].legend(frameon=False, fontsize=8)
    made.tight_layout()
    made.savefig(path, metadata={"Date": None})
    pyplot.close(made)


def whole_numbers(given: str) -> list[int]:
    return [int(n) for n in given.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--lengths", type=whole_numbers, default=[512, 1024, 2048], help="profiled")
    parser.add_argument("--length", type=int, default=4096, help="planned for, and measured at")
    parser.add_argument("--samples", type=int, default=4, help="calibration sequences of each length")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--equal", choices=("time", "pairs"), default="time", help="what plans are made equal in")
    parser.add_argument("--reach", type=int, metavar="S", help="also the effective context at a mean span of S keys")
    parser.add_argument("--reach-most", type=int, default=4096, metavar="N", help="the longest text asked for there")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of the retrieval probe, 16 questions each")
    parser.add_argument("--duo-steps", type=int, default=300, help="training steps of the gates; the paper takes 2000")
    parser.add_argument("--duo-span", type=whole_numbers, default=[16, 112], help="sink, window of streaming heads")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/figures")
    parser.add_argument("--name", help="by which results are kept; default: the model's")
    args = parser.parse_args()
    args.name = args.name or Path(args.model).name
    if args.quick:
        args.lengths, args.length, args.samples, args.densities = [256, 512], 1024, 2, [0.5, 0.25]
        args.documents, args.duo_steps = 1, 10
    return args


def uniform(bench: Bench) -> Planner:
    def plan(terms: Terms, wanted: float) -> list[Choices]:
        found = fixed.uniform(bench.subject.heads, terms.length, wanted, terms.share)
        return [] if found is None else [found]

    return plan


def drawn(bench: Bench) -> Planner:
    def plan(terms: Terms, wanted: float) -> list[Choices]:
        windows = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n < terms.length]
        draws = (
            fixed.drawn_within(bench.subject.heads, terms.length, wanted, terms.share, windows, seed)
            for seed in range(DRAWS)
        )
        return [c for c in draws if c is not None]

    return plan


PLANNERS: dict[str, Callable[[Bench], Planner]] = {
    "attnopt": Bench.attnopt,
    "attnopt, text": lambda bench: bench.attnopt(0),
    "moa": Bench.moa,
    "moa, groups": lambda bench: bench.moa("right"),
    "moa, published groups": lambda bench: bench.moa("published"),
    "duo": Bench.duo,
    "uniform": uniform,
    "random": drawn,
}


def main() -> None:
    from rich.console import Console

    args = arguments()
    bench, console = Bench(args), Console()
    # Where no heads share keys, MoA with groups is MoA.
    grouped = any(s.heads != s.kv_heads for s in bench.subject.sites)
    planners = {name: PLANNERS[name](bench) for name in args.planners if grouped or "groups" not in name}
    rows = bench.rows(planners, lambda row: console.print(str(row)))
    reach: dict[str, int] = {}
    if args.reach:
        reach = bench.reach(planners, args.reach, lambda name, n: console.print(f"{name}: effective context {n}"))
    console.print(table(rows, args.equal))
    console.print(f"seconds: {bench.seconds}")
    given = {name: str(value) for name, value in vars(args).items()}
    data = {
        "arguments": given, "rows": [asdict(r) for r in rows], "reach": reach, "seconds": bench.seconds,
        "environment": environment(),
    }  # fmt: skip
    root, stem = Path(__file__).parents[1], f"planner-{args.name}"
    for path in [args.out] * (args.out is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(data, indent=1) + "\n")
    if args.keep:
        figure(rows, args.equal, root / f"docs/figures/{stem}.svg")
        fill(root / "docs/planner.md", stem, described(args, rows, reach))


if __name__ == "__main__":
    main()
