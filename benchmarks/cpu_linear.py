"""Heads with a linear far part on the CPU, alone and as whole hybrid heads, against causal SDPA; time over length.

    python -m benchmarks.cpu_linear [--quick] [--keep] [--dtype bfloat16 float32] [--threads 1] [--out results.json]

A hybrid head is 4 sinks and a window of 128 under soft-max, a linear part for every other key, and their merge, which
inductor compiles as it does in a graph. Each case's result is compared with float64 first: every row of the first
1024, and of far parts the last row at full length, which holds the state. On one thread the clock is that thread's CPU
time, on more it is wall time; calls are interleaved, figures are medians of paired ratios with their lower 95 % bounds.
Memory is kept between calls: for arrays beyond 32 MB glibc would ask the system for fresh pages every time.

    causal      times as fast as dense causal SDPA of the same heads; of training steps, forward and backward of both
    flat        time of a token at 4096 tokens over that at this length: 1 where it does not grow
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops
from attnopt.codegen import reference_linear
from attnopt.codegen.reference_prefill import prefill_lse
from attnopt.feature_maps import FeatureMap, shapes
from attnopt.ops.merge import merge
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES, QUICK = "12 min", ("--quick",)
HEADS, DIM, SINK, WINDOW = 2, 64, 4, 128
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# What is compared with float64 row by row: the reference holds every weight.
CHECKED = 1024
# Lengths over which time per token is asked to be flat, against the first.
FLAT = (4096, 8192, 16384, 32768, 65536)
# SDPA at 32768 tokens would take seconds a call.
LONGEST_DENSE = 16384


@dataclass(frozen=True)
class Case:
    """form: "far", the linear part alone; "hybrid", the whole head; "training", forward and backward of such a one."""

    form: str
    map: str
    dtype: str
    length: int
    threads: int

    @property
    def maps(self) -> FeatureMap:
        """Random ones of the size that fitted ones have: exponents of some units."""
        kind, rank = self.map.split("/")
        generator = torch.Generator().manual_seed(0)
        size = {"wq": DIM**-0.5, "wk": DIM**-0.5, "bq": 0.3, "bk": 0.3, "u": 0.1, "u0": 0.5}
        wanted = shapes(HEADS, int(rank), DIM).items()
        return FeatureMap(kind, *(torch.randn(s, generator=generator) * size.get(name, 0.0) for name, s in wanted))

    def inputs(self, length: int) -> list[Tensor]:
        """q, k, v, (1, heads, N, D) views of (1, N, heads, D), as a model has them."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(1, length, HEADS, DIM, generator=generator) for _ in range(3)]
        return [x.to(getattr(torch, self.dtype)).transpose(1, 2) for x in made]


def tables() -> tuple[Tensor, Tensor]:
    return tuple(torch.full((HEADS,), n, dtype=torch.int32) for n in (SINK, WINDOW))  # type: ignore[return-value]


def far(q: Tensor, k: Tensor, v: Tensor, maps: FeatureMap) -> tuple[Tensor, Tensor]:
    heads, betas = torch.arange(HEADS, dtype=torch.int32), torch.zeros(HEADS, dtype=torch.float64)
    return ops.linear_far(q, k, v, heads, *tables(), betas, None, *maps.tensors, maps.kind, 0)


@cache
def compiled_merge() -> Callable[..., Tensor]:
    return torch.compile(lambda *parts: merge(*parts), dynamic=True)


def hybrid(q: Tensor, k: Tensor, v: Tensor, maps: FeatureMap) -> Tensor:
    betas = torch.zeros(HEADS, dtype=torch.float64)
    near = ops.span_attention_lse(q, k, v, *tables(), betas, None, DIM**-0.5, 0, 0)
    return compiled_merge()(*near, *far(q, k, v, maps))


def keep_memory() -> None:
    """Of glibc: nothing mapped for itself (M_MMAP_MAX), nothing given back (M_TRIM_THRESHOLD)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(-4, 0)
        set_option(-1, 2**30)


def expected_hybrid(q: Tensor, k: Tensor, v: Tensor, maps: FeatureMap) -> Tensor:
    heads = torch.arange(HEADS)
    return merge(
        *prefill_lse(q, k, v, *tables(), DIM**-0.5), *reference_linear.prefill(q, k, v, heads, *tables(), maps)
    )


def error_of(case: Case) -> float:
    """The largest relative error against float64."""
    inputs, maps = case.inputs(min(case.length, CHECKED)), case.maps
    wide = [x.double() for x in inputs]
    if case.form == "training":
        leaves, double = ([x.requires_grad_() for x in given] for given in (inputs, wide))
        weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(hybrid(*leaves, maps), leaves, weight.to(inputs[0].dtype))
        right = torch.autograd.grad(expected_hybrid(*double, maps), double, weight.to(inputs[0].dtype).double())
        return max(relative_error(a, b) for a, b in zip(found, right, strict=True))
    if case.form == "hybrid":
        return relative_error(hybrid(*inputs, maps), expected_hybrid(*wide, maps))
    found, right = far(*inputs, maps)[0], reference_linear.prefill(*wide, torch.arange(HEADS), *tables(), maps)[0]
    return max(relative_error(found, right), error_of_last_row(case, maps))


def error_of_last_row(case: Case, maps: FeatureMap) -> float:
    """Of the far part at full length: a state in float64, read once."""
    inputs, heads, nothing = case.inputs(case.length), torch.arange(HEADS), torch.full((1, HEADS), -1)
    q, k, v = (x.double() for x in inputs)
    state = reference_linear.state(k, v, heads, HEADS, *tables(), maps)
    right = reference_linear.decode(q[:, :, -1:], k[:, 0], v[:, 0], nothing, heads, state, maps)
    return max(relative_error(a[:, :, -1:], b) for a, b in zip(far(*inputs, maps), right, strict=True))


def calls_of(case: Case) -> dict[str, Callable[[], Any]]:
    inputs, maps = case.inputs(case.length), case.maps
    dense = partial(F.scaled_dot_product_attention, *inputs, is_causal=True)
    if case.form == "training":
        leaves, weight = [x.requires_grad_() for x in inputs], torch.ones_like(inputs[0])
        return {
            "own": lambda: torch.autograd.grad(hybrid(*leaves, maps), leaves, weight),
            "causal": lambda: torch.autograd.grad(dense(), leaves, weight),
        }
    own = far if case.form == "far" else hybrid
    calls: dict[str, Callable[[], Any]] = {"own": partial(own, *inputs, maps)}
    if case.length <= LONGEST_DENSE:
        calls["causal"] = dense
    if case.length > FLAT[0]:
        short, times = case.inputs(FLAT[0]), case.length // FLAT[0]
        # As many tokens, in short sequences.
        calls["flat"] = lambda: [own(*short, maps) for _ in range(times)]
    return calls


def measure(case: Case, repeats: int) -> Row:
    grad = torch.enable_grad if case.form == "training" else torch.inference_mode
    with grad():
        error = error_of(case)
        times = interleaved(calls_of(case), repeats, "thread" if case.threads == 1 else "wall")
    found = {name: ratio(times[name], times["own"]) for name in times if name != "own"}
    ratios, lower = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
    medians = {name: 1e3 * float(torch.tensor(t).median()) for name, t in times.items()}
    tolerance = TOLERANCE[case.dtype] * (2 if case.form == "training" else 1)
    return Row(asdict(case), error, tolerance, ratios, lower, medians)


def cases(dtypes: list[str], threads: list[int], quick: bool) -> Iterator[Case]:
    for count in threads:
        for dtype in dtypes:
            if quick:
                yield from (Case(form, "exp/32", dtype, 512, count) for form in ("far", "hybrid", "training"))
                continue
            for form in ("far", "hybrid"):
                yield from (Case(form, "exp/64", dtype, length, count) for length in FLAT)
            for held in ("exp/32", "taylor/8", "taylor/16"):
                yield Case("hybrid", held, dtype, 16384, count)
            yield from (Case("training", "exp/64", dtype, length, count) for length in (4096, 16384))


def aims_of(rows: list[Row]) -> list[Aim]:
    """Speed at 16384 tokens with 64 features; the least flatness of far parts, at any length from 8192 on."""
    right = [row for row in rows if not row.wrong and row.case["map"] == "exp/64" and row.case["form"] != "training"]
    found = []
    for dtype in TOLERANCE:
        own = [row for row in right if row.case["dtype"] == dtype]
        for form in ("far", "hybrid"):
            here = [row for row in own if row.case["form"] == form]
            fast = [row.lower["causal"] for row in here if row.case["length"] == 16384]
            flat = [row.ratios["flat"] for row in here if "flat" in row.ratios]
            name = {"far": "linear far part", "hybrid": "window of 128 and linear far part"}[form]
            found.append(Aim(f"{name}, {dtype}: over causal SDPA at 16384 tokens", 3.0, min(fast, default=None)))
            least = "growth of the time of a token from 4096 to 65536 tokens, percent"
            grown = 100 * (1 / min(flat) - 1) if flat else None
            found.append(Aim(f"{name}, {dtype}: {least}", 5.0, grown, at_most=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, three cases for each dtype, three repeats")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=list(TOLERANCE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the run to this file")
    parser.add_argument("--keep", action="store_true", help=f"write it to {RESULTS.name}/cpu_linear-cpu.json")
    args = parser.parse_args()
    keep_memory()
    rows: list[Row] = []
    for case in cases(args.dtype, args.threads, args.quick):
        torch.set_num_threads(case.threads)
        rows.append(measure(case, 3 if args.quick else args.repeats))
        print(rows[-1], flush=True)
    aims = [] if args.quick else aims_of(rows)
    print("\n".join(map(str, aims)))
    run = Run("cpu_linear", rows, environment(), aims)
    for path in filter(None, (args.out, RESULTS / "cpu_linear-cpu.json" if args.keep else None)):
        run.save(path)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG results: no speed-up of theirs was given")


if __name__ == "__main__":
    main()
