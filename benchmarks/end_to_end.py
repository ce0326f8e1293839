"""The demo model end to end: eager, inductor without and with a cache, attnopt exact and planned, in one run.

    python benchmarks/end_to_end.py                      # the table: bf16 and fp32, 4096 and 8192 tokens, ten minutes
    python benchmarks/end_to_end.py --quick              # bf16 at 1024, a minute, to check the script
    python benchmarks/end_to_end.py --plan plan.json     # with a plan made before: its losses are measured
    python benchmarks/end_to_end.py --out results.json   # also the raw figures with hardware and versions

Correctness comes first: a variant whose logits differ from eager's by more than the tolerance stops the run. Variants
are interleaved; figures are medians and ratios of one run. The plan is made here, at most 1 % of held-out loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from attnopt import hf, text
from attnopt.benchmark import TOLERANCE
from attnopt.codegen.emit import write_atomically
from attnopt.commands import bench_rows, stages
from attnopt.fingerprint import fingerprint_of
from attnopt.measure import Spans
from attnopt.plan import Budget, Plan
from attnopt.planner import judge
from attnopt.planner.evaluate import Evaluator
from attnopt.planner.make import Made, make_plan, uniform_at_cost
from attnopt.profiler import profile_model
from attnopt.report import terminal
from attnopt.report.data import environment, plan_json

TAKES = "10 min"
QUICK = ("--quick",)

Progress = Any


def split(loaded: hf.Loaded, which: str, lengths: list[int], samples: int) -> dict[int, torch.Tensor]:
    """As many tokens at each length: `samples` sequences of the longest."""
    stream = text.stream([], loaded.tokenizer, which)
    return {n: text.sequences(stream, n, samples * max(lengths) // n, which) for n in lengths}


def make(loaded: hf.Loaded, lengths: list[int], profiled: list[int], samples: int, progress: Progress) -> Made:
    """A plan for the longest of `lengths`, verified at all of them on as many tokens each; none of them is profiled."""
    tokens = text.stream([], loaded.tokenizer, "calibrate", 100_000)
    rows = [r[None] for n in profiled for r in text.sequences(tokens, n, 6, "calibrate")]
    profile = profile_model(loaded.model, rows, progress=progress)

    verify, final = (split(loaded, which, lengths, samples) for which in ("verify", "final"))
    return make_plan(
        loaded.model, "demo", profile, verify, final, Budget("loss", 1.0), max(lengths),
        progress=progress, report=lambda record: print(f"   {record}", flush=True),
    )  # fmt: skip


def uniform(
    loaded: hf.Loaded, made: Made, lengths: list[int], samples: int, progress: Progress
) -> list[dict[str, Any]]:
    """Loss increase of the plan and of one window for all heads at the plan's own measured cost, final split."""
    spans = Spans(loaded.model)
    texts = split(loaded, "final", lengths, samples)
    spans.losses(next(iter(texts.values()))[:1, :64], None)
    choices = uniform_at_cost(made.problem, made.verified.solution.cost, list(spans.sites.values()))
    found = Evaluator(spans, texts, False, progress, "one window for all heads")(choices)
    rows = []
    for e in found:
        measured = next(m for m in made.plan.measured if m.split == "final" and m.length == e.length)
        one = 100 * (sum(e.planned) / sum(e.dense) - 1)
        window = str(next(iter(choices.values()))[0])
        rows.append({
            "length": e.length, "plan_increase_percent": measured.increase, "plan_upper_95_percent": measured.upper_95,
            "uniform": window, "uniform_increase_percent": one, "uniform_over_plan": one / max(1e-9, measured.increase),
        })  # fmt: skip
    return rows


def losses_of(
    loaded: hf.Loaded, plan: Plan, lengths: list[int], samples: int, progress: Progress
) -> list[dict[str, Any]]:
    """Loss increase of a plan made before, final split."""
    spans = Spans(loaded.model)
    texts = split(loaded, "final", lengths, samples)
    spans.losses(next(iter(texts.values()))[:1, :64], None)
    plan.check(spans.sites.values(), fingerprint_of(loaded.model, list(spans.sites.values())))
    found = Evaluator(spans, texts, False, progress, "losses of the plan")(plan.choices)
    measured = [judge(e, plan.budget, "final", plan.choices_id) for e in found]
    return [
        {
            "length": m.length,
            "plan_increase_percent": m.increase,
            "plan_upper_95_percent": m.upper_95,
            "tokens": m.tokens,
        }
        for m in measured
    ]


def check(rows: list[dict[str, Any]], dtype: str) -> None:
    limit = TOLERANCE[hf.dtype_of(dtype)]
    for row in rows:
        if "planned" not in row["variant"] and not row["error"] <= limit:
            raise SystemExit(
                f"{row['variant']} at {row['length']} differs from eager by {row['error']:.2g} > {limit:g}"
            )


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case the ratios that matter."""
    found = []
    for case in dict.fromkeys((r["dtype"], r["length"], r["padded"]) for r in rows):
        ms = {r["variant"]: r["milliseconds"] for r in rows if (r["dtype"], r["length"], r["padded"]) == case}
        exact = ms["attnopt exact"]
        found.append({
            "dtype": case[0], "length": case[1], "padded": case[2],
            "exact / inductor": ms["inductor"] / exact,
            "exact / best other": min(ms["eager"], ms["inductor"], ms["inductor, cache"]) / exact,
            "exact, cache / inductor, cache": ms["inductor, cache"] / ms["attnopt exact, cache"],
            "planned / exact": exact / ms["attnopt planned"] if "attnopt planned" in ms else None,
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the raw figures here as JSON")
    parser.add_argument("--plan", type=Path, help="use this plan instead of making one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="bf16,fp32")
    args = parser.parse_args()
    lengths, profiled, samples = ([1024], [256, 512], 10) if args.quick else ([4096, 8192], [1024, 2048], 16)
    dtypes = ["bf16"] if args.quick else args.dtypes.split(",")
    rows: list[dict[str, Any]] = []
    plans: dict[str, Any] = {}
    fixed: list[dict[str, Any]] = []
    with stages() as progress:
        for dtype in dtypes:
            loaded = hf.load("demo", hf.dtype_of(dtype))
            if args.plan is not None:
                plan = Plan.load(args.plan)
                found = losses_of(loaded, plan, lengths, samples, progress)
            else:
                made = make(loaded, lengths, profiled, samples, progress)
                plan = made.plan
                found = uniform(loaded, made, lengths, samples, progress)
            plans[dtype] = plan_json(plan)
            fixed += [{"dtype": dtype, **r} for r in found]
            stream = text.stream([], loaded.tokenizer, "final", 4 * max(lengths))
            for n in lengths:
                for padded in (False, True):
                    ids = text.sequences(stream, n, 1, "final")
                    found = bench_rows(loaded, ids, plan, dtype, args.rounds, padded, progress)
                    check(found, dtype)
                    rows += [{**r, "padded": padded} for r in found]
    terminal.print_bench(rows, "Every variant, medians of one interleaved run")
    terminal.print_bench(verdicts(rows), "Ratios: above 1 is faster")
    terminal.print_bench(fixed, "Loss increase at the plan's cost")
    if args.out is not None:
        # Without variables: one is a folder of this machine.
        machine = {k: v for k, v in environment().items() if k != "variables"}
        data = {"rows": rows, "ratios": verdicts(rows), "uniform": fixed, "plans": plans, "environment": machine,
                "threads": torch.get_num_threads()}  # fmt: skip
        write_atomically(args.out, json.dumps(data, indent=1) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
