"""Planners on equal terms: what each loses at the same share of query-key pairs.

    python -m benchmarks.planner                            # the shipped model
    python -m benchmarks.planner ./my-llama --lengths 1024,2048 --length 4096 --out planner.json
    python -m benchmarks.planner --quick                    # short and few, to check the script

Every planner sees the same calibration text. Plans of equal density at `--length` are run on held-out text there: the
loss against the dense model's, and the divergence from it. attnopt: damage from one profile, Lagrangian optimum. moa:
benchmarks/planners/moa.py, its Pareto front tried on the verify split and the best kept. uniform: one span for all
heads. random: the median of five draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt import hf, text
from attnopt.codegen.emit import write_atomically
from attnopt.cost import CostTable
from attnopt.ir import Choice, Site
from attnopt.measure import Sequences, Spans
from attnopt.planner import choices_from, front
from attnopt.planner.problem import make_problem
from attnopt.profiler import profile_model
from benchmarks.planners import fixed, moa

DENSITIES = (0.75, 0.5, 0.25, 0.125)
DRAWS = 5
Choices = Mapping[str, Sequence[Choice]]
Planner = Callable[[float], list[Choices]]


@dataclass(frozen=True)
class Row:
    """One planner at one density: the density it has, the loss increase in percent, KL in nats per token, and the
    seconds it took to plan, profile aside."""

    planner: str
    wanted: float
    density: float
    increase: float
    kl: float
    seconds: float


class Bench:
    """One model, its text and its profiles."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seconds = args, {}
        loaded = hf.load(args.model, hf.dtype_of(args.dtype), "cpu", "sdpa")
        self.model = loaded.model.eval()
        self.length: int = args.length

        def split(which: str, length: int, samples: int) -> Tensor:
            tokens = text.stream(args.text, loaded.tokenizer, which, 2 * samples * length)
            return text.sequences(tokens, length, samples, which)

        self.calibration = [r[None] for n in args.lengths for r in split("calibrate", n, args.samples)]
        self.verify = split("verify", self.length, max(2, args.samples // 2))
        self.final = split("final", self.length, 2 * args.samples)
        self.spans = Spans(self.model)
        self.spans.losses(self.final[:1, :64], None)
        self.spans.instrumented.need_sites()
        self.sites: list[Site] = list(self.spans.sites.values())
        self.heads = {s.name: s.heads for s in self.sites}
        self.dense: Sequences | None = None

    def timed(self, what: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = run()
        self.seconds[what] = round(time.perf_counter() - begin, 1)
        return found

    def density(self, choices: Choices) -> float:
        """Share of query-key pairs that a plan keeps at the length, over all heads."""
        spans = [candidate_span(c, self.length) for heads in choices.values() for c in heads]
        return statistics.fmean(fixed.density(self.length, s, w) for s, w in spans)

    def attnopt(self) -> Planner:
        profile = self.timed("attnopt profile", lambda: profile_model(self.model, self.calibration))
        problem = make_problem(profile, CostTable.by_density(), self.sites, self.length)
        points = front(problem)

        def plan(wanted: float) -> list[Choices]:
            enough = np.flatnonzero(points.cost <= wanted * problem.dense.cost)
            return [choices_from(problem, points.point(int(enough[0])))] if len(enough) else []

        return plan

    def moa(self) -> Planner:
        profiled, step = sorted(set(self.args.lengths)), min(self.args.lengths) // 2
        found = self.timed("moa profile", lambda: moa.profile(self.model, self.calibration))
        grid = moa.rules(profiled, (self.length,), step)
        loss = np.array([
            [torch.stack([moa.dropped(of_site[n], rule, n) for rule in grid], -1).numpy() for of_site in found.values()]
            for n in profiled
        ])  # fmt: skip

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
                best = problem if fits else best
            plans = moa.pareto(best) if best is not None else []
            made = [choices(p) for p in plans]
            fitting = [c for c in made if self.density(c) <= 1.01 * wanted]
            return sorted(fitting, key=lambda c: self.spans.losses(self.verify, c).mean_loss)[:1]

        return plan

    def rows(self, planners: Mapping[str, Planner], done: Callable[[Row], None]) -> list[Row]:
        self.dense = self.timed("dense", lambda: self.spans.losses(self.final, None))
        rows = []
        for name, planner in planners.items():
            for wanted in self.args.densities:
                begin = time.perf_counter()
                plans = planner(wanted)
                seconds = time.perf_counter() - begin
                seen = [(self.spans.losses(self.final, c, divergence=True), self.density(c)) for c in plans]
                if not seen:
                    continue
                seen.sort(key=lambda pair: pair[0].mean_loss)
                losses, density = seen[len(seen) // 2]
                increase = 100 * (losses.mean_loss / self.dense.mean_loss - 1)
                rows.append(Row(name, wanted, density, increase, losses.mean_kl, round(seconds, 2)))
                done(rows[-1])
        return rows


def candidate_span(choice: Choice, length: int) -> tuple[int, int]:
    from attnopt.registry import CANDIDATES

    return CANDIDATES[choice.candidate].span(dict(choice.params), length, None)


def table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="loss increase over dense, and KL in nats per token, at equal shares of query-key pairs")
    for column in ("planner", "asked", "density", "loss +%", "KL", "planned in"):
        shown.add_column(column, justify="left" if column == "planner" else "right")
    for r in rows:
        shown.add_row(
            r.planner, f"{r.wanted:g}", f"{r.density:.3f}", f"{r.increase:.3f}", f"{r.kl:.5f}", f"{r.seconds} s"
        )
    Console().print(shown)


def whole_numbers(given: str) -> list[int]:
    return sorted(int(n) for n in given.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--lengths", type=whole_numbers, default=[512, 1024, 2048], help="profiled")
    parser.add_argument("--length", type=int, default=4096, help="planned for, and measured at")
    parser.add_argument("--samples", type=int, default=4, help="calibration sequences of each length")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--planners", nargs="+", default=["attnopt", "moa", "uniform", "random"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.length, args.samples, args.densities = [256, 512], 1024, 2, [0.5, 0.25]
    bench = Bench(args)
    windows = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n < args.length]
    made: dict[str, Callable[[], Planner]] = {
        "attnopt": bench.attnopt,
        "moa": bench.moa,
        "uniform": lambda: lambda wanted: [fixed.uniform(bench.heads, args.length, wanted)],
        "random": lambda: (
            lambda wanted: [fixed.drawn(bench.heads, args.length, wanted, windows, seed) for seed in range(DRAWS)]
        ),
    }
    rows = bench.rows({name: made[name]() for name in args.planners}, lambda row: print(row, flush=True))
    table(rows)
    print("seconds:", bench.seconds)
    if args.out is not None:
        from attnopt.report.data import environment

        data = {"rows": [asdict(r) for r in rows], "seconds": bench.seconds, "environment": environment()}
        write_atomically(args.out, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
