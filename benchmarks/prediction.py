"""How well scores of heads predict what is measured: one head at a time, and many at once.

    python -m benchmarks.prediction                    # the shipped model, 1024 tokens; about ten minutes on a core
    python -m benchmarks.prediction ./my-llama --length 2048 --samples 8
    python -m benchmarks.prediction --quick            # few and short, to check the script
    python -m benchmarks.prediction --keep             # also benchmarks/results and docs/figures

Every score is computed on calibration text alone and is compared with the divergence from the dense model, KL in nats
per token, on text it never saw. Columns: `together`, attnopt's prediction, heads' losses correlated over rows;
`alone`, the same heads added as if independent; `first order`, the sum of t_i; `moa`, MoA's summed |E| (Fu et al.,
2024; benchmarks/planners/moa.py); `mass`, the attention that is dropped; `moved`, how far outputs move, the sum of
||delta O W_O||^2 (`attnopt profile --forward-only`). Only the first two are in nats.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from attnopt.codegen.emit import write_atomically
from attnopt.ir import DENSE
from attnopt.planner.interaction import correlations
from attnopt.planner.knapsack import together
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from benchmarks.planners import fixed, moa
from benchmarks.planners.page import fill, markdown
from benchmarks.planners.subject import Choices, Subject
from benchmarks.record import environment

TAKES = "10 min"
QUICK = ("--quick",)

# MoA keeps a block of 64 first keys, so that all scores are of one and the same span.
SINK = moa.BLOCK
MILD = 5.0
NATS = ("together", "alone")
SCORES = (*NATS, "first order", "moa", "mass", "moved")
# Passes without gradients, each over other rows: one looks at one block of rows in twenty-four.
PASSES = 6
Mixture = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One plan: the number of heads it replaces, what is measured, and what every score says of it."""

    kind: str
    replaced: int
    increase: float
    kl: float
    scores: dict[str, float]


class Study:
    """The scores of one model at one length. A mixture holds, for every head in order, the index of a window or -1."""

    def __init__(self, subject: Subject, length: int, samples: int, draws: int) -> None:
        self.subject, self.length = subject, length
        self.windows = tuple(w for w in (16, 32, 64, 128, 256, 512, 1024, 2048) if w <= length // 2)
        # The first window that MoA's blocks can tell from narrower ones.
        self.block = self.windows.index(moa.BLOCK)
        calibration = [row[None] for row in subject.split("calibrate", length, samples)]
        grid = Grid((SINK,), self.windows)
        self.profile = profile_model(subject.model, calibration, grid, draws=draws)
        names = [s.name for s in subject.sites]
        seen = [self.profile.observations[name, length] for name in names]
        self.rho = correlations(self.profile, names, [length])
        moved = [profile_model(subject.model, calibration, grid, seed, forward_only=True) for seed in range(PASSES)]
        blocks = moa.profile(subject.model, calibration)
        rules = [moa.Rule(w, 0.0) for w in self.windows]
        influence = [torch.stack([moa.dropped(blocks[n][length], r, length) for r in rules], -1) for n in names]
        # (heads, windows) each.
        self.tables = {
            "alone": np.concatenate([(o.t2[:, 0] / 2 / o.tokens).numpy() for o in seen]),
            "first order": np.concatenate([(o.t1[:, 0] / o.tokens).numpy() for o in seen]),
            "moa": np.concatenate([x.numpy() for x in influence]),
            "mass": np.concatenate([(o.mass[:, 0] / o.tokens).numpy() for o in seen]),
            "moved": np.concatenate(
                [sum((p.observations[n, length].scores()[:, 0] for p in moved), torch.zeros(())).numpy() for n in names]
            ),
        }

    @property
    def heads(self) -> int:
        return len(self.rho)

    def scores(self, mixture: Mixture) -> dict[str, float]:
        picked = {
            name: np.array([table[h, w] if w >= 0 else 0.0 for h, w in enumerate(mixture)])
            for name, table in self.tables.items()
        }
        found = {name: float(values.sum()) for name, values in picked.items()}
        return {"together": together(picked["alone"], self.rho), **found}

    def choices(self, mixture: Mixture) -> Choices:
        left = iter(mixture)
        return {
            name: tuple(fixed.span(SINK, self.windows[w]) if (w := next(left)) >= 0 else DENSE for _ in range(count))
            for name, count in self.subject.heads.items()
        }

    def row(self, kind: str, mixture: Mixture) -> Row:
        outcome = self.subject.measure(self.choices(mixture))
        return Row(kind, sum(w >= 0 for w in mixture), outcome.increase, outcome.kl, self.scores(mixture))

    def singles(self) -> list[Mixture]:
        """Every head alone, with the narrowest window and with one in the middle."""
        picked = sorted({self.block, (self.block + len(self.windows)) // 2})
        return [tuple(w if h == head else -1 for h in range(self.heads)) for head in range(self.heads) for w in picked]

    def mixtures(self, count: int, seed: int = 0) -> list[Mixture]:
        """Of a random share of the heads, each with a random window of a block or more; every third of most heads with
        windows of a block or less, which is far from dense and nothing that MoA's blocks can tell apart."""
        rng, found = random.Random(seed), []
        for n in range(count):
            share = rng.choice((0.1, 0.2, 0.3, 0.5, 0.7, 0.9))
            least, most = rng.randrange(self.block, len(self.windows)), len(self.windows)
            if n % 3 == 2:
                share, least, most = rng.uniform(0.4, 1.0), 0, self.block + 1
            windows = range(len(self.windows))[least:most]
            found.append(tuple(rng.choice(windows) if rng.random() < share else -1 for _ in range(self.heads)))
        return [m for m in found if any(w >= 0 for w in m)]


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By kind and score: Spearman's rank correlation with the measured KL, and the ratios predicted / measured."""
    kinds: dict[str, list[Row]] = {
        "one head": [r for r in rows if r.kind == "one head"],
        f"mixtures up to {MILD:g} %": [r for r in rows if r.kind == "mixture" and r.increase <= MILD],
        f"mixtures over {MILD:g} %": [r for r in rows if r.kind == "mixture" and r.increase > MILD],
    }
    found: dict[str, dict[str, Any]] = {}
    for kind, of_kind in kinds.items():
        if len(of_kind) < 3:
            continue
        measured = np.array([r.kl for r in of_kind])
        found[kind] = {"plans": len(of_kind), "KL": [float(measured.min()), float(measured.max())]}
        for name in SCORES:
            values = np.array([r.scores[name] for r in of_kind])
            entry = {"spearman": float(spearmanr(values, measured)[0])}
            # What is under a thousandth of a thousandth of a nat is rounding, not damage.
            real = measured > 1e-6
            if name in NATS and real.any():
                tenth, median, ninth = np.quantile(values[real] / measured[real], (0.1, 0.5, 0.9))
                entry |= {"ratio": float(median), "low": float(tenth), "high": float(ninth)}
            found[kind][name] = entry
    return found


def cells_of(found: dict[str, dict[str, Any]], name: str) -> list[str]:
    """One score in a row of a table, a cell for each kind of plan."""
    cells = []
    for entry in found.values():
        of = entry[name]
        ratio = f"; {of['ratio']:.2f} ({of['low']:.2f} to {of['high']:.2f})" if "ratio" in of else ""
        cells.append(f"{of['spearman']:.3f}{ratio}")
    return cells


def table(found: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="rank correlation with the measured divergence; predicted over measured, median (10 % to 90 %)")
    shown.add_column("score")
    for kind, entry in found.items():
        shown.add_column(f"{kind} ({entry['plans']})", justify="right")
    for name in SCORES:
        shown.add_row(name, *cells_of(found, name))
    return shown


def described(found: dict[str, Any]) -> str:
    """The table of the documentation."""
    header = ["score", *(f"{kind} ({entry['plans']})" for kind, entry in found["summary"].items())]
    rows = [[name, *cells_of(found["summary"], name)] for name in SCORES]
    what = (
        f"`{found['model']}`, {found['length']} tokens, {found['samples']} sequences and {found['draws']} label draws:"
    )
    return f"{what}\n\n{markdown(header, rows)}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Predicted against measured, one panel each for attnopt's prediction, the heads added, and MoA's score."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    made, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.6), sharey=True)
    for axis, name in zip(axes, ("together", "alone", "moa"), strict=True):
        for kind, colour in (("one head", "#8a8f98"), ("mixture", "#1668a8")):
            points = [(r.scores[name], r.kl) for r in rows if r.kind == kind and r.kl > 1e-7 and r.scores[name] > 0]
            axis.loglog(*zip(*points, strict=True), "o", ms=3, color=colour, label=kind, alpha=0.8)
        if name in NATS:
            ends = [1e-7, 1.0]
            axis.loglog(ends, ends, color="black", lw=0.8)
        axis.set_xlabel(
            {"together": "attnopt: predicted KL", "alone": "heads added as if independent", "moa": "MoA's score"}[name]
        )
    axes[0].set_ylabel("measured KL, nats per token")
    axes[0].legend(frameon=False)
    made.tight_layout()
    made.savefig(path, metadata={"Date": None})
    pyplot.close(made)


def run(args: argparse.Namespace, progress: Callable[[list[Any], str], Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    subject = Subject(args.model, args.dtype, args.text)
    study = Study(subject, args.length, args.samples, args.draws)
    subject.hold_out(subject.split("final", args.length, args.samples))
    planned = [("one head", m) for m in study.singles()] + [("mixture", m) for m in study.mixtures(args.mixtures)]
    rows = [study.row(kind, mixture) for kind, mixture in progress(planned, "Measuring plans")]
    return {
        "model": args.model, "length": args.length, "samples": args.samples, "draws": args.draws,
        "sink": SINK, "windows": list(study.windows), "seconds": round(time.perf_counter() - begin, 1),
        "summary": summary(rows), "rows": [asdict(r) for r in rows], "environment": environment(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", nargs="*", default=[], help="files; by default the library's own source")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8, help="sequences to calibrate on, and as many to measure on")
    parser.add_argument("--draws", type=int, default=2, help="label draws of each")
    parser.add_argument("--mixtures", type=int, default=120)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/figures")
    args = parser.parse_args()
    if args.quick:
        args.length, args.samples, args.draws, args.mixtures = 256, 2, 1, 10
    console = Console()
    found = run(args, lambda items, what: track(items, what, console=console))
    console.print(table(found["summary"]))
    root, stem = Path(__file__).parents[1], f"prediction-{Path(args.model).name}"
    for path in [args.out] * (args.out is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    if args.keep:
        kept = [Row(**row) for row in found["rows"]]
        figure(kept, root / f"docs/figures/{stem}.svg")
        fill(root / "docs/planner.md", stem, described(found))


if __name__ == "__main__":
    main()
