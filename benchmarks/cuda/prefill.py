"""Prefill of one layer, one sequence, bfloat16: the mixture and uniform windows against dense and equal masks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

import torch

from attnopt.codegen.emit import load
from attnopt.codegen.spec import SpanPrefill
from benchmarks import timing
from benchmarks.cuda.baselines import Baseline, flex, libraries, sdpa
from benchmarks.cuda.device import Budget, Device
from benchmarks.record import Aim, Row
from benchmarks.spans import Sizes, Spans, dense, inputs, mixture, sampled_error, uniform

TOLERANCE = 1e-2
# SDPA's efficient backend takes some three times as long as its others; at these lengths it would cost the others their
# rounds.
SLOW_FROM = 65536
BEST, FLEX = "best SDPA", "FlexAttention"
LIBRARIES = ("FlashAttention 3", "FlashAttention 2", "FlashInfer")
PER_WORK, OF_MATMUL = "best SDPA / work saved", "share of matmul"


def kernel(sizes: Sizes, dim: int, device: Device, dtype: str = "bfloat16"):  # type: ignore[no-untyped-def]
    return load(SpanPrefill(device.target, dtype, sizes.heads, sizes.kv_heads, dim, dim, False))


def right(found: list[Baseline], q, k, v, scale: float, notes: list[str]) -> list[Baseline]:  # type: ignore[no-untyped-def]
    """Those whose result is right; the others are notes."""
    kept = []
    for baseline in found:
        error = sampled_error(q, k, v, baseline.spans, scale, baseline.call())
        if error <= TOLERANCE:
            kept.append(baseline)
        else:
            notes.append(f"{baseline.name}, {baseline.spans.name}, {q.shape[2]} tokens: error {error:.1e}, not timed")
    return kept


def best(times: Mapping[str, list[float]], prefix: str) -> str | None:
    """The fastest of those whose name begins so."""
    names = [n for n in times if n.startswith(prefix)]
    return min(names, key=lambda n: statistics.median(times[n]), default=None)


def row_of(
    spans: Spans, dim: int, length: int, error: float, times: Mapping[str, list[float]], others: list[str],
    pairs: int, matmul: float,
) -> Row:  # fmt: skip
    """Our times against those of `others` and the best dense ones; pairs: that dense causal attention keeps."""
    case = {"kernel": "prefill", "heads": spans.name, "dim": dim, "length": length}
    ours = times[f"attnopt {spans.name}"]
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios, lower = {}, {}
    against = {name.removesuffix(f" {spans.name}"): name for name in others}
    against = {**{f"{name}, dense": name for name in LIBRARIES if name in times}, **against}
    if (fastest := best(times, "SDPA")) is not None:
        against = {BEST: fastest, **against}
    for label, name in against.items():
        ratios[label], lower[label] = timing.ratio(times[name], ours)
    if BEST in ratios:
        saved = pairs / spans.pairs(length)
        ratios[PER_WORK], lower[PER_WORK] = ratios[BEST] / saved, lower[BEST] / saved
    ratios[OF_MATMUL] = 4 * dim * spans.pairs(length) / statistics.median(ours) / matmul
    shown = {name: 1e3 * median[name] for name in [f"attnopt {spans.name}", *against.values()]}
    return Row(case, error, TOLERANCE, ratios, lower, shown)


def measure(
    device: Device, sizes: Sizes, dim: int, length: int, matmul: float, seconds: float, notes: list[str]
) -> list[Row]:
    """All kinds of heads at one length, in turn in one run, beside the dense kernels."""
    q, k, v = inputs(sizes, dim, length, device.where)
    scale, module = dim**-0.5, kernel(sizes, dim, device)
    all_dense = dense(sizes)
    slow = ("efficient",) if length >= SLOW_FROM else ()
    held = sdpa(q, k, v, scale, all_dense, notes, slow) + libraries(q, k, v, scale, all_dense, notes)
    calls = {b.name: b.call for b in right(held, q, k, v, scale, notes)}
    errors: dict[str, float] = {}
    others: dict[str, list[str]] = {}
    kinds = [mixture(sizes), *(uniform(w, sizes) for w in (256, 1024, 4096))]
    for spans in kinds:
        sinks, windows = spans.tables(device.where)

        def ours(sinks: torch.Tensor = sinks, windows: torch.Tensor = windows) -> torch.Tensor:
            return module.prefill(q, k, v, sinks, windows, scale)

        errors[spans.name] = sampled_error(q, k, v, spans, scale, ours())
        found = flex(q, k, v, scale, spans, device, notes) + libraries(q, k, v, scale, spans, notes)
        found = right(found, q, k, v, scale, notes)
        calls[f"attnopt {spans.name}"] = ours
        others[spans.name] = [f"{b.name} {spans.name}" for b in found]
        calls |= {f"{b.name} {spans.name}": b.call for b in found}
    with torch.no_grad():
        times = device.times(calls, seconds)
    pairs = all_dense.pairs(length)
    return [row_of(s, dim, length, errors[s.name], times, others[s.name], pairs, matmul) for s in kinds]


def section(device: Device, sizes: Sizes, matmul: float, budget: Budget) -> list[Row]:
    """Rows of every head dimension and length that there is time for, the most telling first."""
    rows: list[Row] = []
    order = [(dim, n) for dim in sizes.dims for n in sizes.lengths]

    def one(at: int, dim: int, length: int) -> None:
        # Half of an even share is for the timing itself: the rest is compiling and checking.
        found = measure(device, sizes, dim, length, matmul, 0.5 * budget.left / (len(order) - at), budget.notes)
        rows.extend(found)
        print("\n".join(f"  {row}" for row in found), flush=True)

    for at, (dim, length) in enumerate(order):
        budget.attempt(f"D = {dim}, {length} tokens", partial(one, at, dim, length))
    return rows


def aims(rows: list[Row], dim: int, least: int) -> list[Aim]:
    """What was set for prefill, judged by the worst case from `least` tokens on; unmeasured where there is none."""
    of = [r for r in rows if not r.wrong and r.case["dim"] == dim]
    mixed = [r for r in of if r.case["heads"] == "mixture" and r.case["length"] >= least]

    def worst(name: str, among: list[Row]) -> float | None:
        return min((r.ratios[name] for r in among if name in r.ratios), default=None)

    flexes = [r.ratios[FLEX] for r in of if FLEX in r.ratios]
    mean = statistics.geometric_mean(flexes) if flexes else None
    at = f"D = {dim}, from {least} tokens"
    return [
        Aim(f"mixture, {at}: times as fast as the best SDPA over the work saved", 0.70, worst(PER_WORK, mixed)),
        Aim(f"mixture, {at}: share of the measured matmul rate, kept pairs", 0.45, worst(OF_MATMUL, mixed)),
        Aim(f"prefill, D = {dim}: times as fast as FlexAttention, geometric mean", 1.15, mean),
        Aim(f"prefill, D = {dim}: times as fast as FlexAttention, worst case", 1.0, min(flexes, default=None)),
    ]
