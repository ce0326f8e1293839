"""Training on the CPU: forward and backward of per-head spans, and of sliding windows, against SDPA's.

    python -m benchmarks.cpu_backward [--quick] [--keep] [--dtype bfloat16 float32] [--threads 1] [--out results.json]

The gradients of each case are compared with float64 first. Both sides run under autograd, from q, k and v to their
gradients; calls are interleaved, on one thread by that thread's CPU time, and figures are medians of paired ratios with
their lower 95 % bounds.

    ideal       ratio of causal to kept query-key pairs
    causal      times as fast as dense causal SDPA, grouped heads not repeated
    share       of the ideal that is reached over it
    backward    as `causal`, the backward pass alone
    masked      of sliding windows: times as fast as SDPA under the model's boolean mask, which they stand for without
                a plan
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops
from attnopt.codegen.reference_backward import backward as reference
from attnopt.codegen.reference_prefill import prefill_lse, span_mask
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES, QUICK = "10 min", ("--quick",)
HEADS, KV_HEADS, SINK = 8, 4, 32
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# What is compared with float64 is no longer than this: the reference holds every score.
CHECKED = 1024
# Windows of the heads in shares of the length, 1 for a dense one: it keeps a third of the pairs.
MIXTURE = (1, 1 / 4, 1 / 4, *(1 / 16,) * 5)


@dataclass(frozen=True)
class Case:
    """spans: "mixture", "W256" for a plan of one window beside sinks, or "sliding 1/16" for the model's own window."""

    spans: str
    dtype: str
    dim: int
    length: int
    threads: int

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Sinks and windows, int32 (heads,), shrunk as the length is."""
        if self.spans == "mixture":
            windows = [int(length * s) for s in MIXTURE]
        elif self.spans.startswith("W"):
            windows = [int(self.spans[1:]) * length // self.length] * HEADS
        else:
            windows = [length // int(self.spans.split("/")[1])] * HEADS
        sinks = [0 if w == length or self.spans.startswith("sliding") else SINK for w in windows]
        return torch.tensor(sinks, dtype=torch.int32), torch.tensor(windows, dtype=torch.int32)

    def inputs(self, length: int) -> list[Tensor]:
        """q, k, v and the gradient at the output, (1, heads, N, D) views of (1, N, heads, D), as a model has them."""
        generator = torch.Generator().manual_seed(0)
        kv_heads = HEADS if self.spans.startswith("sliding") else KV_HEADS
        made = [torch.randn(1, length, h, self.dim, generator=generator) for h in (HEADS, kv_heads, kv_heads, HEADS)]
        return [x.to(getattr(torch, self.dtype)).transpose(1, 2) for x in made]


def planned(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, windows: Tensor) -> Tensor:
    betas = torch.zeros(HEADS, dtype=torch.float64)
    return ops.span_attention_lse(q, k, v, sinks, windows, betas, None, q.shape[-1] ** -0.5, 0, 0)[0]


def error_of(case: Case) -> float:
    """The largest relative error of dq, dk and dv against float64."""
    *inputs, weight = case.inputs(min(case.length, CHECKED))
    tables = case.tables(inputs[0].shape[2])
    leaves = [x.requires_grad_() for x in inputs]
    found = torch.autograd.grad(planned(*leaves, *tables), leaves, weight)
    wide, scale = [x.detach().double() for x in inputs], case.dim**-0.5
    expected = reference(weight.double(), *wide, *prefill_lse(*wide, *tables, scale), *tables, scale)
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def calls_of(case: Case) -> dict[str, Callable[[], Any]]:
    *inputs, weight = case.inputs(case.length)
    tables = case.tables(case.length)
    leaves = [x.requires_grad_() for x in inputs]
    grouped = inputs[0].shape[1] != inputs[1].shape[1]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped)

    def trained(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), leaves, weight)

    def again(out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True)

    calls = {"span": trained(lambda: planned(*leaves, *tables)), "causal": trained(dense),
             "span backward": again(planned(*leaves, *tables)), "causal backward": again(dense())}  # fmt: skip
    if case.spans.startswith("sliding"):
        keep = span_mask(case.length, *(x[:1] for x in tables))[None]
        calls["masked"] = trained(lambda: F.scaled_dot_product_attention(*leaves, keep))
    return calls


def ideal_of(case: Case) -> float:
    sinks, windows = case.tables(case.length)
    rows = torch.arange(1, case.length + 1)
    return float(HEADS * rows.sum() / torch.minimum(rows, (sinks + windows)[:, None]).sum())


def measure(case: Case, repeats: int) -> Row:
    times = interleaved(calls_of(case), repeats, "thread" if case.threads == 1 else "wall")
    found = {name: ratio(times[name], times["span"]) for name in ("causal", "masked") if name in times}
    found["backward"] = ratio(times["causal backward"], times["span backward"])
    ideal = ideal_of(case)
    found["share"] = found["causal"][0] / ideal, found["causal"][1] / ideal
    ratios, lower = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
    medians = {name: 1e3 * float(torch.tensor(t).median()) for name, t in times.items()}
    return Row(
        {**asdict(case), "ideal": round(ideal, 2)}, error_of(case), TOLERANCE[case.dtype], ratios, lower, medians
    )


def cases(dtypes: list[str], threads: list[int], quick: bool) -> Iterator[Case]:
    for count in threads:
        for dtype in dtypes:
            if quick:
                yield from (Case(s, dtype, 64, 512, count) for s in ("mixture", "sliding 1/8"))
                continue
            for length in (2048, 4096, 8192):
                yield from (Case(s, dtype, 64, length, count) for s in ("mixture", "W256", "W1024"))
            yield Case("mixture", dtype, 128, 4096, count)
            for length in (512, 1024, 2048):
                yield from (Case(f"sliding 1/{part}", dtype, 64, length, count) for part in (16, 8, 4, 2))


def aims_of(rows: list[Row]) -> list[Aim]:
    """Of plans, where enough is saved to expect it, the least figure."""
    plans = [r for r in rows if not r.wrong and r.case["ideal"] >= 2.99 and not r.case["spans"].startswith("sliding")]
    return [
        Aim(f"{dtype}: forward and backward over dense causal SDPA, ideal of 3 and more, lower bound", 1.0,
            min((r.lower["causal"] for r in plans if r.case["dtype"] == dtype), default=None))
        for dtype in TOLERANCE
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, two cases for each dtype, three repeats")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(TOLERANCE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the run to this file")
    parser.add_argument("--keep", action="store_true", help=f"write it to {RESULTS.name}/cpu_backward-cpu.json")
    args = parser.parse_args()
    rows: list[Row] = []
    for case in cases(args.dtype, args.threads, args.quick):
        torch.set_num_threads(case.threads)
        rows.append(measure(case, 3 if args.quick else args.repeats))
        print(rows[-1], flush=True)
    aims = [] if args.quick else aims_of(rows)
    print("\n".join(map(str, aims)))
    run = Run("cpu_backward", rows, environment(), aims)
    for path in filter(None, (args.out, RESULTS / "cpu_backward-cpu.json" if args.keep else None)):
        run.save(path)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG results: no speed-up of theirs was given")


if __name__ == "__main__":
    main()
