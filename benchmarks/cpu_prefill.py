"""The CPU prefill of per-head spans against SDPA and FlexAttention on the same mask: mixtures, windows, padding, GQA.

    python -m benchmarks.cpu_prefill [--quick] [--keep] [--dtype bfloat16 float32] [--threads 1 2] [--out results.json]

Each case's result is compared with float64 first. On one thread the clock is that thread's CPU time, on more it is wall
time; calls are interleaved, figures are medians of paired ratios with their lower 95 % bounds.

    ideal       ratio of causal to kept query-key pairs, padding left aside
    causal      times as fast as the best causal SDPA: K and V grouped or repeated; under padding, with a feature that
                hides padded keys
    share       of the ideal that is reached over it
    masked      times as fast as SDPA the way transformers calls it in a compiled graph: K and V repeated, a boolean
                mask
    flex        times as fast as compiled FlexAttention on the same mask, in blocks of 128 keys in bfloat16 and of 64 in
                float32, which are its fastest

Spans in shares of the length are timed where the measured cost table, which the planner asks, says that they pay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.span_cpu import causal_padded
from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import MARGIN, CostTable, break_even, layer_cost
from attnopt.cost.timing import measure as measure_costs
from benchmarks.block_mask import block_mask, many_shapes
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.spans import Spans
from benchmarks.timing import interleaved, ratio

TAKES = "15 min"
QUICK = ("--quick",)
HEADS, SINK = 8, 64
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# What is compared with float64 is no longer than this: the reference holds every score.
CHECKED = 1500
# Eight heads; 0 stands for a dense one. "mixture" keeps 1/3.55 of the pairs of 8192 tokens.
MIXTURE = (256, 256, 256, 256, 1024, 1024, 2048, 0)
# The same in shares of the length, for the search of a break-even.
SHARES = (1 / 32, 1 / 32, 1 / 32, 1 / 32, 1 / 8, 1 / 8, 1 / 4, 0)
BLOCK = {"float32": 64, "bfloat16": 128}


@dataclass(frozen=True)
class Case:
    """`padded`: "", or the side on which a sixteenth of the tokens are padding."""

    name: str
    dtype: str
    dim: int
    kv_heads: int
    length: int
    threads: int
    padded: str = ""
    flex: bool = True
    masked: bool = True

    @property
    def record(self) -> dict[str, Any]:
        shown = {"spans": self.name, "dtype": self.dtype, "dim": self.dim, "heads": f"{HEADS}/{self.kv_heads}",
                 "length": self.length, "threads": self.threads}  # fmt: skip
        return {**shown, "padded": self.padded} if self.padded else shown


def spans_of(case: Case) -> Spans:
    if case.name == "mixture":
        windows: tuple[int, ...] = MIXTURE
    elif case.name == "shares":
        windows = tuple(int(s * case.length) for s in SHARES)
    else:
        windows = (int(case.name.removeprefix("W")),) * HEADS
    return Spans(case.name, tuple(SINK if w else 0 for w in windows), tuple(w or 2**30 for w in windows))


def inputs(case: Case, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v as a model has them, (1, heads, N, D) views of (1, N, heads, D), and the padding mask."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(1, length, heads, case.dim, generator=generator).to(dtype).transpose(1, 2)
        for heads in (HEADS, case.kv_heads, case.kv_heads)
    )
    column, hidden = torch.arange(length)[None], length // 16
    pads = {"": None, "left": column >= hidden, "right": column < length - hidden}
    return q, k, v, pads[case.padded]


def prefill_of(case: Case) -> Callable[..., Tensor]:
    spec = SpanPrefill("cpu", case.dtype, HEADS, case.kv_heads, case.dim, case.dim, bool(case.padded))
    return load(spec).prefill


def error_of(case: Case) -> float:
    """Relative error against float64, spans shrunk with the length where the case is longer than what is checked."""
    length = min(case.length, CHECKED)
    q, k, v, pad = inputs(case, length)
    sinks, windows = spans_of(case).tables(torch.device("cpu"))
    shrunk = torch.where(windows < 2**30, (windows * length / case.length).ceil().int(), windows)
    expected = reference(q.double(), k.double(), v.double(), sinks, shrunk, case.dim**-0.5, pad)
    return relative_error(prefill_of(case)(q, k, v, sinks, shrunk, case.dim**-0.5, pad), expected)


def baselines(case: Case, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """Dense attention in its forms, and FlexAttention on the case's mask."""
    share, scale, length = HEADS // case.kv_heads, case.dim**-0.5, case.length

    def sdpa(mask: Tensor | None, repeat: bool) -> Tensor:
        keys, values = (x.repeat_interleave(share, 1) if repeat else x for x in (k, v))
        grouped = share > 1 and not repeat
        return F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=grouped)

    if pad is not None:
        found = {"causal": lambda: causal_padded(q, k, v, pad, scale)}
    else:
        found = {"causal": lambda: sdpa(None, False)}
        if share > 1:
            found["causal repeated"] = lambda: sdpa(None, True)
    if case.masked:
        keep = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        keep = keep if pad is None else keep & pad[:, None, None]
        found["masked"] = lambda: sdpa(keep, share > 1)
    if case.flex and pad is None:
        from torch.nn.attention.flex_attention import flex_attention

        mask = block_mask(spans_of(case), length, length, torch.device("cpu"), BLOCK[case.dtype])
        flex = torch.compile(flex_attention, dynamic=False)
        found["flex"] = lambda: flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=share > 1)
    return found


def ideal_of(case: Case) -> float:
    return HEADS * Spans("", (0,), (2**30,)).pairs(case.length) / spans_of(case).pairs(case.length)


@torch.no_grad()
def measure(case: Case, repeats: int) -> Row:
    q, k, v, pad = inputs(case, case.length)
    sinks, windows = spans_of(case).tables(torch.device("cpu"))
    emitted, scale = prefill_of(case), case.dim**-0.5
    calls = {"span": lambda: emitted(q, k, v, sinks, windows, scale, pad), **baselines(case, q, k, v, pad)}
    # FlexAttention's code has the number of threads in it.
    with many_shapes(), torch._inductor.config.patch({"cpp.threads": case.threads}):
        times = interleaved(calls, repeats, "thread" if case.threads == 1 else "wall")
    found = {name: ratio(times[name], times["span"]) for name in calls if name != "span"}
    best = min((n for n in found if n.startswith("causal")), key=lambda n: found[n][0])
    shown = {"causal": found[best], **{n: found[n] for n in ("masked", "flex") if n in found}}
    ratios, lower = ({n: pair[side] for n, pair in shown.items()} for side in (0, 1))
    ideal = ideal_of(case)
    ratios["share"], lower["share"] = ratios["causal"] / ideal, lower["causal"] / ideal
    medians = {name: 1e3 * float(torch.tensor(t).median()) for name, t in times.items()}
    return Row({**case.record, "ideal": round(ideal, 2)}, error_of(case), TOLERANCE[case.dtype], ratios, lower, medians)


def cases(dtypes: list[str], threads: list[int], quick: bool) -> Iterator[Case]:
    length = 1024 if quick else 8192
    for count in threads:
        for dtype in dtypes:
            for dim in (64,) if quick else (64, 128):
                for kv_heads in (2,) if quick else (8, 2):
                    yield Case("mixture", dtype, dim, kv_heads, length, count)
                yield Case("mixture", dtype, dim, 2, length, count, "left")
            if quick:
                continue
            yield Case("mixture", dtype, 64, 2, length, count, "right")
            for window in (256, 1024):
                yield Case(f"W{window}", dtype, 64, 2, length, count, masked=False)
            yield Case("mixture", dtype, 64, 2, 16384, count, masked=False, flex=False)


def by_cost_table(dtype: str, threads: int, quick: bool) -> tuple[list[Row], list[str]]:
    """Rows of the lengths at which the table says that `SHARES` pays, and what it says of the others."""
    lengths = [256, 512] if quick else [256, 512, 1024, 2048, 4096]
    torch.set_num_threads(threads)
    prefill = prefill_of(Case("shares", dtype, 64, 2, 0, threads))
    windows = sorted({int(s * n) for n in lengths for s in SHARES if s})
    table: CostTable = measure_costs(prefill, HEADS, 2, 64, dtype, lengths, windows, [SINK], rounds=3 if quick else 7)
    rows, notes = [], []
    least = break_even(table)
    for length in lengths:
        case = Case("shares", dtype, 64, 2, length, threads, masked=False, flex=False)
        spans = spans_of(case)
        planned = layer_cost(table, length, list(zip(spans.sinks, spans.windows, strict=True)))
        dense = layer_cost(table, length, [(0, length)] * HEADS)
        if length < least or planned >= (1 - MARGIN) * dense:
            said = f"costs {planned / dense:.2f} of dense" if length >= least else f"below the break-even of {least}"
            notes.append(f"{dtype}, {threads} threads, {length} tokens: the table refuses the mixture, it {said}")
        else:
            rows.append(measure(case, 5 if quick else 15))
    return rows, notes


def aims_of(rows: list[Row]) -> list[Aim]:
    """The least of each figure over its cases; the mixtures' ideals are between 3 and 5."""
    right = [r for r in rows if not r.wrong]
    found = []
    for dtype, share, flex in (("bfloat16", 0.5, 1.0), ("float32", 0.65, 2.0)):
        mixed = [r for r in right if r.case["spans"] == "mixture" and r.case["dtype"] == dtype and r.case["ideal"] <= 5]
        least = min((r.ratios["share"] for r in mixed), default=None)
        found.append(Aim(f"{dtype}: share of the work-saved ideal, mixtures", share, least))
        over = min((r.ratios["flex"] for r in mixed if "flex" in r.ratios), default=None)
        found.append(Aim(f"{dtype}: over FlexAttention, mixtures", flex, over))
    bounds = [r.lower["causal"] for r in right]
    return [*found, Aim("over dense causal SDPA, lower bound, every case", 0.97, min(bounds, default=None))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 tokens, few cases, three repeats")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(TOLERANCE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the run to this file")
    parser.add_argument("--keep", action="store_true", help=f"write it to {RESULTS.name}/cpu_prefill-cpu.json")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    rows: list[Row] = []
    notes: list[str] = []

    def told(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row.record()) if args.json else row, flush=True)

    for case in cases(args.dtype, args.threads, args.quick):
        torch.set_num_threads(case.threads)
        told(measure(case, 3 if args.quick else args.repeats))
    for dtype in args.dtype:
        for threads in args.threads:
            found, said = by_cost_table(dtype, threads, args.quick)
            for row in found:
                told(row)
            notes += said
    aims = [] if args.quick else aims_of(rows)
    if not args.json:
        print("\n".join([*notes, *map(str, aims)]))
    run = Run("cpu_prefill", rows, environment(), aims, notes)
    for path in filter(None, (args.out, RESULTS / "cpu_prefill-cpu.json" if args.keep else None)):
        run.save(path)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG results: no speed-up of theirs was given")


if __name__ == "__main__":
    main()
