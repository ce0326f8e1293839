"""Whether plans keep their budgets on text that no step of planning saw.

    python -m benchmarks.budgets                        # the shipped model: 3 budgets, 5 profiles; a quarter of an hour
    python -m benchmarks.budgets ./my-llama --budgets 0.5 2 --seeds 3 --out budgets.json
    python -m benchmarks.budgets --keep                 # also benchmarks/results and docs/planner.md

Each seed draws calibration text of its own; verify and final splits are as `attnopt plan` takes them. A plan is then
measured on as much text again, of files of the final split that were not looked at: its loss against the dense model's,
and the upper 95 % bound of that (paired bootstrap over sequences). A budget that no plan was shown to keep counts as
refused, and nothing is written for it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnopt import hf, text
from attnopt.codegen.emit import write_atomically
from attnopt.commands.profiling import PROBES
from attnopt.errors import BudgetError
from attnopt.measure import Spans
from attnopt.plan import Budget
from attnopt.planner import judge
from attnopt.planner.evaluate import Evaluator
from attnopt.planner.make import make_plan
from attnopt.probe import Probe
from attnopt.profiler import profile_model
from benchmarks.planners.page import fill, markdown
from benchmarks.record import environment

TAKES = "15 min"
QUICK = ("--budgets", "5", "--seeds", "1", "--lengths", "256", "--length", "512", "--samples", "2", "--sequences", "4")


@dataclass(frozen=True)
class Row:
    """One budget, in percent of the dense loss, under one seed: the predicted speed-up of prefill, and the increase
    with its upper bound on the final split and on fresh text; None and `why` where no plan was found."""

    budget: float
    seed: int
    speedup: float | None = None
    final: float | None = None
    final_upper: float | None = None
    fresh: float | None = None
    fresh_upper: float | None = None
    why: str = ""


def calibration(loaded: hf.Loaded, args: argparse.Namespace, seed: int) -> list[Tensor]:
    """`samples` sequences of each length, at random places of the calibration split."""
    tokens = text.stream(args.text, loaded.tokenizer, "calibrate", 600_000)
    rng = random.Random(seed)
    places = [(n, rng.randrange(len(tokens) - n)) for n in args.lengths for _ in range(args.samples)]
    return [tokens[at : at + n][None] for n, at in places]


def halves(loaded: hf.Loaded, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The final split, and text of the same split that is in none of its sequences."""
    tokens = text.stream(args.text, loaded.tokenizer, "final", 4 * args.sequences * args.length)
    rows = text.sequences(tokens, args.length, 2 * args.sequences, "final")
    return rows[::2], rows[1::2]


def rows_of(args: argparse.Namespace) -> list[Row]:
    loaded = hf.load(args.model, hf.dtype_of(args.dtype), "cpu", "sdpa")
    final, fresh = halves(loaded, args)
    tokens = text.stream(args.text, loaded.tokenizer, "verify", 2 * args.sequences * args.length)
    verify = text.sequences(tokens, args.length, args.sequences, "verify")
    spans = Spans(loaded.model)
    spans.losses(verify[:1, :64], None)
    unseen = Evaluator(spans, {args.length: fresh}, False, None, "fresh text")
    rows = []
    for seed in range(args.seeds):
        probe = Probe(loaded.tokenizer)
        asked = [d.sample for n in args.lengths for d in probe.documents(n, PROBES, f"calibrate {seed}")]
        profile = profile_model(loaded.model, [*calibration(loaded, args, seed), *asked], seed=seed)
        for limit in args.budgets:
            budget = Budget("loss", limit)
            try:
                made = make_plan(
                    loaded.model, args.model, profile, {args.length: verify}, {args.length: final}, budget, args.length,
                    seed=seed,
                )  # fmt: skip
            except BudgetError as error:
                rows.append(Row(limit, seed, why=str(error)))
            else:
                (found,) = unseen(made.plan.choices)
                again = judge(found, budget, "final", made.plan.choices_id, seed)
                last = next(m for m in made.plan.measured if m.split == "final")
                speedup = made.plan.predicted.speedup
                rows.append(Row(limit, seed, speedup, last.increase, last.upper_95, again.increase, again.upper_95))
            print(rows[-1], flush=True)
    return rows


def described(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    lines = []
    for limit in args.budgets:
        of = [r for r in rows if r.budget == limit]
        planned = [r for r in of if r.fresh is not None]
        kept = sum(r.fresh <= limit for r in planned if r.fresh is not None)
        shown = sum(r.fresh_upper <= limit for r in planned if r.fresh_upper is not None)
        fresh = ", ".join(f"{r.fresh:+.3f}" for r in planned)
        speed = ", ".join(f"{r.speedup:.2f}" for r in planned)
        lines.append([f"{limit:g} %", f"{len(planned)} of {len(of)}", speed, fresh, f"{kept}", f"{shown}"])
    header = ["budget", "planned", "times as fast", "increase on fresh text, %", "kept", "bound within, too"]
    what = f"`{args.model}`, profiled at {', '.join(map(str, args.lengths))} tokens, planned for {args.length}, "
    return f"{what}{args.sequences} sequences a split:\n\n{markdown(header, lines)}"


def arguments() -> argparse.Namespace:
    def whole_numbers(given: str) -> list[int]:
        return [int(n) for n in given.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 1.0, 5.0], help="percent of the dense loss")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lengths", type=whole_numbers, default=[512, 1024], help="profiled")
    parser.add_argument("--length", type=int, default=2048, help="planned for, and measured at")
    parser.add_argument("--samples", type=int, default=4, help="calibration sequences of each length")
    parser.add_argument("--sequences", type=int, default=24, help="of the verify and final splits, and of fresh text")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/planner.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    rows = rows_of(args)
    given = {name: str(value) for name, value in vars(args).items()}
    data = {"arguments": given, "rows": [asdict(r) for r in rows], "environment": environment()}
    root, stem = Path(__file__).parents[1], f"budgets-{Path(args.model).name}"
    for path in [args.out] * (args.out is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(data, indent=1) + "\n")
    print(described(args, rows))
    if args.keep:
        fill(root / "docs/planner.md", stem, described(args, rows))


if __name__ == "__main__":
    main()
