"""Time the CPU prefill against dense causal SDPA: one thread, CPU time of that thread, interleaved, medians, ratios.

    python benchmarks/cpu_prefill.py [--quick] [--json] [--dim 32] [--length 4096]

Each row is checked against the plain-PyTorch reference before it is timed. Columns: *ideal* is the ratio of causal to
kept query-key pairs, *ratio* the time of dense SDPA over the time of the emitted prefill, *share* their quotient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from attnopt.codegen import span_cpu
from attnopt.codegen.emit import load
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.spec import SpanPrefill

HEADS, KV_HEADS = 8, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Eight heads over four KV heads; 0 stands for a dense head.
MIXTURES = {"mixed": (256, 256, 256, 256, 1024, 1024, 2048, 0), "uneven": (128, 512, 256, 256, 1024, 256, 2048, 0)}


@dataclass(frozen=True)
class Case:
    dtype: str
    dim: int
    length: int
    sink: int
    windows: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Row:
    """dense_ms is printed for orientation only; the machine's load moves it, and the ratio much less."""

    dtype: str
    dim: int
    length: int
    sink: int
    name: str
    error: float
    dense_ms: float
    ideal: float
    ratio: float
    share: float


def medians(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of this thread for each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for call in functions.values():
        call()
    for _ in range(repeats):
        for name, call in functions.items():
            begin = time.thread_time()
            call()
            times[name].append(time.thread_time() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def pairs(length: int, sink: int, window: int) -> int:
    """Kept query-key pairs of one head."""
    grown = min(sink + window, length)
    return grown * (grown + 1) // 2 + (length - grown) * (sink + window)


def inputs(case: Case, length: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """q, k, v as a model has them, (B, heads, N, D) views of (B, N, heads, D), and the two span tables."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(batch, length, heads, case.dim, generator=generator).to(dtype).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    windows = torch.tensor([w or 2**30 for w in case.windows], dtype=torch.int32)
    sinks = torch.tensor([case.sink if w else 0 for w in case.windows], dtype=torch.int32)
    return q, k, v, sinks, windows


def prefill_of(case: Case, padded: bool = False) -> Callable[..., torch.Tensor]:
    return load(SpanPrefill("cpu", case.dtype, HEADS, KV_HEADS, case.dim, case.dim, padded)).prefill


def error(case: Case, length: int) -> float:
    """Relative Frobenius error against the reference in float64; refuses a row that is out of tolerance."""
    q, k, v, sinks, windows = inputs(case, length)
    scale = case.dim**-0.5
    expected = reference(q.double(), k.double(), v.double(), sinks, windows, scale)
    found = prefill_of(case)(q, k, v, sinks, windows, scale).double()
    relative = float((found - expected).norm() / expected.norm())
    if not relative <= TOLERANCE[getattr(torch, case.dtype)]:
        sys.exit(f"{case}: wrong result, relative error {relative:.2e}")
    return relative


def measure(case: Case, repeats: int) -> Row:
    relative = error(case, min(case.length, 3000))
    q, k, v, sinks, windows = inputs(case, case.length)
    scale, emitted = case.dim**-0.5, prefill_of(case)
    times = medians(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True),
            "span": lambda: emitted(q, k, v, sinks, windows, scale),
        },
        repeats,
    )
    kept = sum(pairs(case.length, int(s), int(w)) for s, w in zip(sinks, windows, strict=True))
    ideal = HEADS * pairs(case.length, 0, case.length) / kept
    ratio = times["dense"] / times["span"]
    dense = times["dense"] * 1e3
    return Row(case.dtype, case.dim, case.length, case.sink, case.name, relative, dense, ideal, ratio, ratio / ideal)


def measure_padded(dtype: str, dim: int, length: int, repeats: int) -> dict[str, float | int | str]:
    """Times over unpadded causal SDPA of `causal_padded` and of the explicit masks it replaces."""
    q, k, v, _, _ = inputs(Case(dtype, dim, length, 0, (0,) * HEADS, "padded"), length)
    pad = torch.arange(length)[None] >= 100
    keep = torch.ones(length, length, dtype=torch.bool).tril().logical_and(pad[:, None]).view(1, 1, length, length)
    additive = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, float("-inf"))

    def sdpa(mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    found, expected = span_cpu.causal_padded(q, k, v, pad, dim**-0.5)[:, :, 100:], sdpa(keep)[:, :, 100:]
    relative = float((found - expected).float().norm() / expected.float().norm())
    if not relative <= TOLERANCE[q.dtype]:
        sys.exit(f"causal_padded {dtype} {dim} {length}: wrong result, relative error {relative:.2e}")
    calls = {
        "causal": lambda: sdpa(None),
        "boolean": lambda: sdpa(keep),
        "additive": lambda: sdpa(additive),
        "causal_padded": lambda: span_cpu.causal_padded(q, k, v, pad, dim**-0.5),
    }
    times = medians(calls, repeats)
    ratios = {name: times[name] / times["causal"] for name in ("causal_padded", "boolean", "additive")}
    return {"dtype": dtype, "dim": dim, "length": length, "error": relative, **ratios}


def cases(args: argparse.Namespace) -> list[Case]:
    lengths = args.length or ([2048] if args.quick else [2048, 4096, 8192])
    found = []
    for dtype in args.dtype:
        for dim in args.dim:
            for length in lengths:
                for window in (128, 512) if args.quick else (64, 128, 256, 512, 1024, 2048):
                    if window * 2 <= length:
                        found.append(Case(dtype, dim, length, args.sink, (window,) * HEADS, str(window)))
                for name, windows in MIXTURES.items():
                    found.append(Case(dtype, dim, length, args.sink, windows, name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length, two windows, three repeats")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dim", nargs="+", type=int, default=[32])
    parser.add_argument("--length", nargs="+", type=int)
    parser.add_argument("--sink", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if args.quick else 7
    rows, padded = [], []
    if not args.json:
        print("dtype      dim      N  window    error  dense ms  ideal  ratio  share")
    for case in cases(args):
        row = measure(case, repeats)
        rows.append(asdict(row))
        if not args.json:
            print(
                f"{row.dtype:9} {row.dim:4} {row.length:6} {row.name:>7} {row.error:8.1e} {row.dense_ms:9.1f} "
                f"{row.ideal:6.2f} {row.ratio:6.2f} {row.share:6.2f}",
                flush=True,
            )
    if not args.json:
        print("\npadding: time over unpadded causal SDPA of causal_padded, a boolean and an additive mask")
    for dtype in args.dtype:
        for dim in args.dim:
            for length in args.length or ([2048] if args.quick else [4096, 8192]):
                padded.append(measure_padded(dtype, dim, length, 3))
                if not args.json:
                    texts = (
                        f"{value:.2g}" if isinstance(value, float) else str(value) for value in padded[-1].values()
                    )
                    print("  ".join(texts), flush=True)
    if args.json:
        print(json.dumps({"threads": 1, "torch": torch.__version__, "prefill": rows, "padded": padded}, indent=1))


if __name__ == "__main__":
    main()
