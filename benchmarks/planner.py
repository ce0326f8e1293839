"""Planners on equal terms: what each loses at the same share of query-key pairs.

    python -m benchmarks.planner                            # the shipped model; about half an hour on a core
    python -m benchmarks.planner ./my-llama --lengths 1024,2048 --length 4096 --out planner.json
    python -m benchmarks.planner --quick                    # short and few, to check the script
    python -m benchmarks.planner --keep                     # also benchmarks/results and docs/figures

Every planner sees the same calibration text. Plans of equal density at `--length` are run on held-out text there: the
loss against the dense model's, the divergence from it, and the share of answers of a retrieval probe that are left.

attnopt                damage from one profile, the Lagrangian optimum
attnopt, probe         the same with half as many documents of the probe beside the text
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.codegen.emit import write_atomically
from attnopt.cost import CostTable
from attnopt.ir import Choice
from attnopt.planner import choices_from, front
from attnopt.planner.problem import make_problem
from attnopt.probe import Probe
from attnopt.profiler import profile_model
from attnopt.report.data import environment
from benchmarks.planners import duo, fixed, moa
from benchmarks.planners.page import fill, markdown
from benchmarks.planners.subject import Choices, Outcome, Subject

DENSITIES = (0.75, 0.5, 0.25, 0.125)
DRAWS = 5
DOCUMENTS = 4
Planner = Callable[[float], list[Choices]]


@dataclass(frozen=True)
class Row:
    """One planner at one density: the density it has, the loss increase in percent, KL in nats per token, the share of
    the probe's answers recalled, and the seconds it took to plan, profile aside."""

    planner: str
    wanted: float
    density: float
    increase: float
    kl: float
    recall: float
    seconds: float


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
        self._influence: Mapping[str, Mapping[int, Tensor]] | None = None

    def timed(self, what: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = run()
        self.seconds[what] = round(time.perf_counter() - begin, 1)
        return found

    def density(self, choices: Choices) -> float:
        return self.subject.density(choices, self.length)

    def attnopt(self, probes: int = 0) -> Planner:
        """probes: documents of the retrieval probe that are profiled beside the text, of each length."""
        probe = Probe(self.subject.tokenizer)
        asked = [d.sample for n in self.args.lengths for d in probe.documents(n, probes, "calibrate")]
        profile = self.timed(
            f"attnopt profile, {probes} probes", lambda: profile_model(self.subject.model, [*self.calibration, *asked])
        )
        problem = make_problem(profile, CostTable.by_density(), self.subject.sites, self.length)
        points = front(problem)

        def plan(wanted: float) -> list[Choices]:
            enough = np.flatnonzero(points.cost <= wanted * problem.dense.cost)
            return [choices_from(problem, points.point(int(enough[0])))] if len(enough) else []

        return plan

    def moa(self, groups: str = "") -> Planner:
        """groups: "" scores query heads, "right" and "published" take the largest score of a group."""
        profiled, step = sorted(set(self.args.lengths)), min(self.args.lengths) // 4
        if self._influence is None:
            self._influence = self.timed("moa profile", lambda: moa.profile(self.subject.model, self.calibration))
        found = self._influence
        grid = moa.rules(profiled, (self.length,), step)
        kv_heads = {s.name: s.kv_heads for s in self.subject.sites}

        def of_site(name: str, length: int) -> np.ndarray:
            values = torch.stack([moa.dropped(found[name][length], rule, length) for rule in grid], -1).numpy()
            return moa.over_groups(values, kv_heads[name], groups == "published") if groups else values

        loss = np.array([[of_site(name, n) for name in found] for n in profiled])

        def choices(plan: np.ndarray) -> Choices:
            rules = [[grid[r] for r in layer] for layer in plan]
            params = [[{"sink": moa.BLOCK, "alpha": r.alpha, "beta": r.beta} for r in layer] for layer in rules]
            return {
                name: tuple(Choice.of("sink_window", p) for p in layer)
                for name, layer in zip(found, params, strict=True)
            }

        def plan(wanted: float) -> list[Choices]:
            # Its densities count blocks, and the widest row: what is asked of it is moved until its pairs are as many.
            low, high, best = 0.0, 1.0, None
            for _ in range(8):
                asked = (low + high) / 2
                problem = moa.Problem.of(loss, grid, profiled, (self.length,), asked)
                solved = moa.solve(problem, len(profiled) - 1)
                fits = solved is not None and self.density(choices(solved)) <= wanted
                # Nothing is feasible under a share of pairs that the narrowest rule has.
                low, high = (asked, high) if fits or solved is None else (low, asked)
                best = (problem, solved) if fits and solved is not None else best
            made = [choices(p) for p in ([best[1], *moa.pareto(best[0])] if best is not None else [])]
            fitting = [c for c in made if self.density(c) <= 1.01 * wanted]
            return sorted(fitting, key=lambda c: self.subject.spans.losses(self.verify, c).mean_loss)[:1]

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

        def plan(wanted: float) -> list[Choices]:
            count = sum(len(g) for g in gates.values())
            splits = (duo.split(gates, self.subject.heads, n, sink, window) for n in range(count, -1, -1))
            return next(([s] for s in splits if self.density(s) <= wanted), [])

        return plan

    def outcome(self, choices: Choices | None) -> tuple[Outcome, float]:
        recalled = self.subject.recalled(choices, self.probe, self.length, self.args.documents).share
        return self.subject.measure(choices or {}), recalled

    def rows(self, planners: Mapping[str, Planner], done: Callable[[Row], None]) -> list[Row]:
        self.timed("dense", lambda: self.subject.hold_out(self.final))
        dense, recalled = self.outcome(None)
        rows = [Row("dense", 1.0, 1.0, dense.increase, dense.kl, recalled, 0.0)]
        for name, planner in planners.items():
            for wanted in self.args.densities:
                begin = time.perf_counter()
                plans = planner(wanted)
                seconds = round(time.perf_counter() - begin, 2)
                seen = [(*self.outcome(c), self.density(c)) for c in plans]
                if not seen:
                    continue
                seen.sort(key=lambda found: found[0].kl)
                found, recalled, density = seen[len(seen) // 2]
                rows.append(Row(name, wanted, density, found.increase, found.kl, recalled, seconds))
                done(rows[-1])
        return rows


def table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    shown = Table(title="at equal shares of query-key pairs: loss increase over dense, KL in nats per token, recall")
    for column in ("planner", "asked", "density", "loss +%", "KL", "recall", "planned in"):
        shown.add_column(column, justify="left" if column == "planner" else "right")
    for r in rows:
        cells = (f"{r.density:.3f}", f"{r.increase:.3f}", f"{r.kl:.5f}", f"{r.recall:.0%}", f"{r.seconds} s")
        shown.add_row(r.planner, f"{r.wanted:g}", *cells)
    return shown


def described(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """The table of the documentation: KL, loss increase and recall of every planner at every density."""
    wanted = sorted({r.wanted for r in rows if r.planner != "dense"}, reverse=True)
    found = {(r.planner, r.wanted): r for r in rows}
    lines = []
    for name in dict.fromkeys(r.planner for r in rows if r.planner != "dense"):
        cells = [found.get((name, w)) for w in wanted]
        lines.append([name, *(f"{c.kl:.4f}; {c.increase:+.2f} %; {c.recall:.0%}" if c else "" for c in cells)])
    profiled = ", ".join(map(str, args.lengths))
    what = f"`{args.model}`, profiled at {profiled} tokens, measured at {args.length}; KL, loss increase, recall:"
    return f"{what}\n\n{markdown(['planner', *(f'{w:g}' for w in wanted)], lines)}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """KL and recall over density, one line a planner."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    made, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.8))
    for name in dict.fromkeys(r.planner for r in rows if r.planner != "dense"):
        points = sorted((r for r in rows if r.planner == name), key=lambda r: r.density)
        style = {"lw": 2.2, "zorder": 3} if name.startswith("attnopt") else {"lw": 1.2}
        axes[0].semilogy([r.density for r in points], [r.kl for r in points], "o-", ms=3, label=name, **style)
        axes[1].plot([r.density for r in points], [100 * r.recall for r in points], "o-", ms=3, label=name, **style)
    axes[0].set_ylabel("KL from the dense model, nats per token")
    axes[1].set_ylabel("answers recalled, %")
    for axis in axes:
        axis.set_xlabel("share of query-key pairs kept")
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
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of the retrieval probe, 16 questions each")
    parser.add_argument("--duo-steps", type=int, default=300, help="training steps of the gates; the paper takes 2000")
    parser.add_argument("--duo-span", type=whole_numbers, default=[16, 112], help="sink, window of streaming heads")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/figures")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.length, args.samples, args.densities = [256, 512], 1024, 2, [0.5, 0.25]
        args.documents, args.duo_steps = 1, 10
    return args


def uniform(bench: Bench) -> Planner:
    return lambda wanted: [fixed.uniform(bench.subject.heads, bench.length, wanted)]


def drawn(bench: Bench) -> Planner:
    windows = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n < bench.length]
    return lambda wanted: [
        fixed.drawn(bench.subject.heads, bench.length, wanted, windows, seed) for seed in range(DRAWS)
    ]


PLANNERS: dict[str, Callable[[Bench], Planner]] = {
    "attnopt": Bench.attnopt,
    "attnopt, probe": lambda bench: bench.attnopt(max(1, bench.args.samples // 2)),
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
    rows = bench.rows({name: PLANNERS[name](bench) for name in args.planners}, lambda row: console.print(str(row)))
    console.print(table(rows))
    console.print(f"seconds: {bench.seconds}")
    given = {name: str(value) for name, value in vars(args).items()}
    data = {
        "arguments": given, "rows": [asdict(r) for r in rows], "seconds": bench.seconds, "environment": environment()
    }  # fmt: skip
    root, stem = Path(__file__).parents[1], f"planner-{Path(args.model).name}"
    for path in [args.out] * (args.out is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(data, indent=1) + "\n")
    if args.keep:
        figure(rows, root / f"docs/figures/{stem}.svg")
        fill(root / "docs/planner.md", stem, described(args, rows))


if __name__ == "__main__":
    main()
