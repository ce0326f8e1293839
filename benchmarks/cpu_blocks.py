"""The CPU prefill over lists of blocks against dense causal SDPA, by density, length and size of block; thresholds.

    python -m benchmarks.cpu_blocks [--quick] [--keep] [--dtype bfloat16 float32] [--threads 1] [--out results.json]

Each block of rows lists the first block of keys, its own and others at random, so that this share of the causal blocks
is visited. Each case's result is compared with float64 first, at a length that the reference can hold. On one thread
the clock is that thread's CPU time, on more it is wall time; calls are interleaved, figures are medians of paired
ratios with their lower 95 % bounds. How long it takes to choose the blocks is no part of it.

    causal      times as fast as the best causal SDPA: K and V grouped or repeated
    share       of the work-saved ideal, 1 / density, that is reached over it
    whole       times as fast as the same kernel where every causal block is listed
    unbounded   times as fast as the same lists without a threshold; "skipped" is the share of blocks that it skips
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.reference_blocks import prefill as reference
from attnopt.codegen.spec import BlockPrefill
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES, QUICK = "6 min", ("--quick",)
HEADS, KV_HEADS = 4, 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# What is compared with float64: the reference goes block by block.
CHECKED = 520
DENSITIES = (0.5, 0.25, 0.125)
# Of the blocks of keys one in so many is loud, in the cases with a threshold, by so much above the others; and the
# logarithm of that threshold.
LOUD, ABOVE, BOUND = 5, 12.0, -3.0


@dataclass(frozen=True)
class Case:
    dtype: str
    dim: int
    length: int
    block: int
    density: float
    threads: int
    bounded: bool = False

    @property
    def record(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "dim": self.dim, "heads": f"{HEADS}/{KV_HEADS}", "length": self.length,
                "block": self.block, "density": self.density, "threads": self.threads}  # fmt: skip

    @property
    def emitted(self) -> Callable[..., Tensor]:
        return load(BlockPrefill("cpu", self.dtype, HEADS, KV_HEADS, self.dim, self.dim, self.block, False)).prefill

    def inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as a model has them, (1, heads, N, D) views of (1, N, heads, D)."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, length, h, self.dim, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
        if self.bounded:
            # One feature has all that makes a block loud: the score of its first key.
            q[..., 0], k[..., 0] = 1, 0
            k[:, :: LOUD * self.block, :, 0] = ABOVE * self.dim**0.5
        q, k, v = (x.to(getattr(torch, self.dtype)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def lists(self, length: int) -> tuple[Tensor, Tensor]:
        """counts (1, H, R), and blocks (1, H, R, R): of r + 1 causal blocks the first, the last, others at random."""
        rows = -(-length // self.block)
        size = (self.density * torch.arange(1, rows + 1)).ceil().int()
        liking = torch.rand(1, HEADS, rows, rows, generator=torch.Generator().manual_seed(1))
        liking[..., 0] = 2
        liking.diagonal(dim1=-2, dim2=-1).fill_(3)
        liking.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), -1)
        best = liking.argsort(-1, descending=True).masked_fill(torch.arange(rows) >= size[:, None], rows)
        return size.expand(1, HEADS, rows).contiguous(), best.sort(-1).values.int()


def error_of(case: Case) -> float:
    """Relative error against float64; infinite where other blocks are skipped."""
    q, k, v = case.inputs(CHECKED)
    heads, bounds = torch.arange(HEADS, dtype=torch.int32), bounds_of(case)
    rest = heads, *case.lists(CHECKED), bounds, case.dim**-0.5, None, 0
    out, expected = torch.empty_like(q), torch.empty_like(q, dtype=torch.float64)
    skipped = case.emitted(q, k, v, *rest, out)
    same = torch.equal(skipped, reference(q.double(), k.double(), v.double(), *rest, case.block, expected))
    return relative_error(out, expected) if same else float("inf")


def bounds_of(case: Case) -> Tensor:
    return torch.full((HEADS,), BOUND if case.bounded else -torch.inf)


@torch.no_grad()
def measure(cases: list[Case], repeats: int) -> Iterator[Row]:
    """Cases that differ in density alone, and their dense attention, in turn."""
    first = cases[0]
    q, k, v = first.inputs(first.length)
    out, heads, scale = torch.empty_like(q), torch.arange(HEADS, dtype=torch.int32), first.dim**-0.5
    calls: dict[str, Callable[[], Any]] = {
        "grouped": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "repeated": lambda: F.scaled_dot_product_attention(
            q, *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)), is_causal=True
        ),
    }
    if not first.bounded:
        whole, kernel, none = replace(first, density=1.0).lists(first.length), first.emitted, bounds_of(first)
        calls["whole"] = lambda: kernel(q, k, v, heads, *whole, none, scale, None, 0, out)
    skipped, visited = {}, {}
    for n, case in enumerate(cases):
        lists, emitted = case.lists(case.length), case.emitted
        for name, bounds in (("own", bounds_of(case)), ("unbounded", torch.full((HEADS,), -torch.inf))):
            calls[f"{name} {n}"] = lambda e=emitted, x=lists, b=bounds: e(q, k, v, heads, *x, b, scale, None, 0, out)
        visited[n] = int(lists[0].sum())
        skipped[n] = int(calls[f"own {n}"]().sum()) / visited[n]
        if not case.bounded:
            del calls[f"unbounded {n}"]
    times = interleaved(calls, repeats, "thread" if first.threads == 1 else "wall")
    rows = -(-first.length // first.block)
    for n, case in enumerate(cases):
        own = times[f"own {n}"]
        causal = min((ratio(times[name], own) for name in ("grouped", "repeated")), key=lambda pair: pair[0])
        density = visited[n] / (HEADS * rows * (rows + 1) / 2)
        if case.bounded:
            found = {"causal": causal, "unbounded": ratio(times[f"unbounded {n}"], own)}
        else:
            share = causal[0] * density, causal[1] * density
            found = {"causal": causal, "share": share, "whole": ratio(times["whole"], own)}
        shown = {**case.record, "skipped": round(skipped[n], 2)} if case.bounded else case.record
        ratios, lower = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
        medians = {"own": 1e3 * float(torch.tensor(own).median()), **{
            name: 1e3 * float(torch.tensor(times[name]).median()) for name in ("grouped", "repeated")}}  # fmt: skip
        yield Row(shown, error_of(case), TOLERANCE[case.dtype], ratios, lower, medians)


def groups(dtypes: list[str], threads: list[int], quick: bool) -> Iterator[list[Case]]:
    lengths = (512,) if quick else (4096, 8192)
    for count in threads:
        for dtype in dtypes:
            for dim in (64,) if quick else (64, 128):
                for length in lengths:
                    yield [Case(dtype, dim, length, 64, density, count) for density in DENSITIES]
            for block in () if quick else (16, 32, 128):
                yield [Case(dtype, 64, lengths[0], block, density, count) for density in DENSITIES[:2]]
            yield [Case(dtype, 64, lengths[0], 64, density, count, True) for density in (1.0, *DENSITIES[:2])]


def aims_of(rows: list[Row]) -> list[Aim]:
    """The least of each figure over its cases: of shares, those with blocks of 64."""
    found = []
    for dtype in sorted({row.case["dtype"] for row in rows}):
        held = [r for r in rows if not r.wrong and r.case["dtype"] == dtype and r.case["block"] == 64]
        for name, what, wanted in (("share", "share of the work-saved ideal", 0.75), ("unbounded", "threshold", 1.0)):
            values = [r.ratios[name] for r in held if name in r.ratios]
            found.append(Aim(f"{dtype}: {what}, blocks of 64", wanted, min(values, default=None)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, few cases, three repeats")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(TOLERANCE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the run to this file")
    parser.add_argument("--keep", action="store_true", help=f"write it to {RESULTS.name}/cpu_blocks-cpu.json")
    args = parser.parse_args()
    rows = []
    for cases in groups(args.dtype, args.threads, args.quick):
        torch.set_num_threads(cases[0].threads)
        for row in measure(cases, 3 if args.quick else args.repeats):
            rows.append(row)
            print(row, flush=True)
    aims = [] if args.quick else aims_of(rows)
    print(*aims, sep="\n")
    run = Run("cpu_blocks", rows, environment(), aims)
    for path in filter(None, (args.out, RESULTS / "cpu_blocks-cpu.json" if args.keep else None)):
        run.save(path)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG results: no speed-up of theirs was given")


if __name__ == "__main__":
    main()
