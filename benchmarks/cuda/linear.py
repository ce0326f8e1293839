"""Linear attention to far keys, bfloat16: all heads of a layer, features made in the kernel, a window of 128 before it.

What is timed is the far part alone; the span and the merge that make a head of it are what any other head pays. The
floor is reading q, k and v once and writing the result once, at the rate of a copy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen import reference_linear
from attnopt.codegen.emit import load
from attnopt.codegen.self_check import TOLERANCE
from attnopt.codegen.self_check_linear import maps_of
from attnopt.codegen.spec import Linear, LinearBackward, LinearDecode, LinearPrefill, SpanPrefill
from attnopt.feature_maps import FeatureMap, key_features, query_features
from benchmarks import timing
from benchmarks.cuda.baselines import first, installed, tried
from benchmarks.cuda.check import Check, prefill_inputs, random
from benchmarks.cuda.device import Budget, Device
from benchmarks.record import Aim, Row, relative_error
from benchmarks.spans import Sizes, inputs, sampled_rows, uniform

OF_FLOOR, WINDOWS, FLA = "share of the byte floor", "a window of 1024", "flash-linear-attention"
FEATURES, WINDOW, SINK = 64, 128, 4
# flash-linear-attention reaches 0.09 to 0.14 of the floor by its authors' figures.
WANTED_SHARE, WANTED_SLOPE = 0.40, 1.05
TOLERANCE_BF16 = TOLERANCE["bfloat16"]


def tables(sizes: Sizes, device: Device, window: int = WINDOW) -> tuple[Tensor, Tensor, Tensor]:
    """heads, sinks, windows int32 (H,) of all heads."""
    heads = torch.arange(sizes.heads, dtype=torch.int32)
    sinks, windows = torch.full_like(heads, SINK), torch.full_like(heads, max(1, window // sizes.shrink))
    return tuple(x.to(device.where) for x in (heads, sinks, windows))  # type: ignore[return-value]


def linear_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Both kinds, padded and not, at every length that is checked: prefill, its gradients, and a step of decoding."""
    dim = sizes.dims[0]
    for kind, rank, dtype in (("exp", FEATURES, "bfloat16"), ("taylor", 8, "bfloat16"), ("exp", 24, "float32")):
        target = device.target_of("linear_prefill")
        sizes_of = target, dtype, sizes.heads, sizes.kv_heads, dim, dim, sizes.heads, kind, rank
        maps = maps_of(LinearPrefill(*sizes_of, False), device.where)
        given, exact = tables(sizes, device), TOLERANCE[dtype]
        for length in sizes.checked:
            q, k, v = prefill_inputs(sizes, dim, length, dtype, device)
            wide = [x.double() for x in (q, k, v)]
            pad = torch.rand(len(q), length, device=device.where) > 0.2 if length % 2 else None
            held = *given, maps, pad
            out, lse = reference_linear.prefill(wide[0], wide[1], wide[2], *held)
            what = f"{kind}/{rank}, D = {dim}, {dtype}, {length} tokens"
            spec = LinearPrefill(*sizes_of, pad is not None)
            yield Check(
                "linear", what, lambda spec=spec, x=(q, k, v), h=held: load(spec).prefill(*x, *h),
                lambda found=(out, lse): found, exact,
            )  # fmt: skip
            dout, dlse = random(device, dtype, *out.shape), torch.randn(lse.shape, device=device.where)
            backward = LinearBackward(*sizes_of, pad is not None)
            rounded = dout, dlse, q, k, v, out.to(q.dtype), lse.float()
            unrounded = dout.double(), dlse.double(), *wide, out, lse
            yield Check(
                "linear", f"{what}, gradients",
                lambda spec=backward, x=rounded, h=held: load(spec).backward(*x, *h),
                lambda x=unrounded, h=held: reference_linear.backward(*x, *h),
                2 * exact,
            )  # fmt: skip
        yield step_check(sizes_of, sizes, maps, device)


def step_check(sizes_of: tuple[Any, ...], sizes: Sizes, maps: FeatureMap, device: Device) -> Check:
    """One token of three sequences; some heads lose no key."""
    _, dtype, heads, _, dim, *_ = sizes_of
    q, k, v = (random(device, dtype, 3, *shape, dim) for shape in ((heads, 1), (heads,), (heads,)))
    slots = torch.arange(3 * heads, device=device.where, dtype=torch.int32).view(3, -1) % (heads + 1) - 1
    state = torch.rand(3, heads, maps.width, dim + 1, device=device.where)
    spec = LinearDecode(*sizes_of[:3], 1, *sizes_of[4:])
    served = tables(sizes, device)[0]

    def found() -> tuple[Tensor, ...]:
        kept = state.clone()
        return *load(spec).decode(q, k, v, slots, served, kept, maps), kept

    def expected() -> tuple[Tensor, ...]:
        kept = state.double()
        return *reference_linear.decode(q.double(), k.double(), v.double(), slots, served, kept, maps), kept

    return Check("linear", f"{spec.kind}/{spec.rank}, D = {dim}, {dtype}, a step", found, expected, TOLERANCE[dtype])


def floor_bytes(sizes: Sizes, dim: int, length: int) -> int:
    """q and the result of every head, k and v of every KV head, and the logarithm of every row's sum."""
    return length * (2 * 2 * dim * (sizes.heads + sizes.kv_heads) + 4 * sizes.heads)


def error_at(found: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: FeatureMap, sizes: Sizes) -> float:
    """Relative Frobenius error of the rows of `sampled_rows` against float64, of the first head and the last."""
    if not bool(found.isfinite().all()):
        return float("inf")
    spans = uniform(WINDOW, sizes)
    rows = sampled_rows(spans, q.shape[2]).to(q.device)
    away = norm = 0.0
    j = torch.arange(k.shape[2], device=q.device)
    for head in (0, q.shape[1] - 1):
        own, group = maps.of([head]), head // (q.shape[1] // k.shape[1])
        f, g = query_features(q[:, [head]][:, :, rows].double(), own)[0], key_features(k[:, [group]].double(), own)
        far = (j >= SINK) & (rows[:, None] - j >= spans.windows[0])
        weights = (f @ g.mT) * far
        expected = weights @ v[:, [group]].double() / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        away += float((found[:, [head]][:, :, rows].double() - expected).square().sum())
        norm += float(expected.square().sum())
    return (away / max(norm, 1e-300)) ** 0.5


def library(q: Tensor, k: Tensor, v: Tensor, maps: FeatureMap, notes: list[str]) -> Any:
    """flash-linear-attention's chunked kernel, or None and a note. Its features are made beforehand and not timed, it
    has a KV head for each query head, no window and no sum of weights: what is left out is in its favour."""
    ops = installed("fla.ops.linear_attn", notes)
    if ops is None:
        return None
    share, heads = q.shape[1] // k.shape[1], range(q.shape[1])
    # Head by head: in float32 the features of all are gigabytes.
    f = torch.stack([query_features(q[:, [h]], maps.of([h]))[0][:, 0].to(q.dtype) for h in heads], 2)
    g = torch.stack([key_features(k[:, [h // share]], maps.of([h]))[:, 0].to(q.dtype) for h in heads], 2)
    values = v.repeat_interleave(share, 1).transpose(1, 2).contiguous()

    def call() -> Tensor:
        return first(ops.chunk_linear_attn(q=f, k=g, v=values, scale=1.0, normalize=False))

    if not tried(FLA, call, notes):
        return None
    weights = g[0, :, 0].double() @ f[0, -1, 0].double()
    error = relative_error(call()[0, -1, 0], weights @ values[0, :, 0].double())
    if error <= TOLERANCE_BF16:
        return call
    notes.append(f"{FLA}: error {error:.1e} in the last row, not timed")
    return None


@torch.no_grad()
def measure(device: Device, sizes: Sizes, length: int, copy: float, seconds: float, notes: list[str]) -> Row:
    """All heads of a layer, one sequence."""
    dim = sizes.dims[0]
    q, k, v = inputs(sizes, dim, length, device.where)
    form = "bfloat16", sizes.heads, sizes.kv_heads, dim, dim
    spec: Linear = LinearPrefill(device.target_of("linear_prefill"), *form, sizes.heads, "exp", FEATURES, False)
    maps, module = maps_of(spec, device.where), load(spec)
    own = partial(module.prefill, q, k, v, *tables(sizes, device), maps)
    window = load(SpanPrefill(device.target, *form, False))
    spans = uniform(1024, sizes).tables(device.where)
    calls: dict[str, Any] = {"attnopt": own, WINDOWS: partial(window.prefill, q, k, v, *spans, dim**-0.5)}
    if (call := library(q, k, v, maps, notes)) is not None:
        calls[FLA] = call
    error = error_at(own()[0], q, k, v, maps, sizes)
    times = device.times(calls, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios, lower = {OF_FLOOR: floor_bytes(sizes, dim, length) / copy / median["attnopt"]}, {}
    for name in times:
        if name != "attnopt":
            ratios[name], lower[name] = timing.ratio(times[name], times["attnopt"])
    case = {"kernel": "linear", "features": FEATURES, "dim": dim, "length": length}
    return Row(case, error, TOLERANCE_BF16, ratios, lower, {name: 1e3 * value for name, value in median.items()})


def section(device: Device, sizes: Sizes, copy: float, budget: Budget) -> list[Row]:
    """Rows of every length there is time for, 4096 tokens first."""
    lengths = (4096 // sizes.shrink, *sizes.lengths)
    rows: list[Row] = []

    def one(at: int, length: int) -> None:
        rows.append(measure(device, sizes, length, copy, 0.5 * budget.left / (len(lengths) - at), budget.notes))
        print(f"  {rows[-1]}", flush=True)

    for at, length in enumerate(lengths):
        budget.attempt(f"{length} tokens", partial(one, at, length))
    return rows


def slope(rows: list[Row]) -> float | None:
    """The time of a token at the most tokens up to 65536 over that at the fewest; None of fewer than two lengths."""
    of = sorted((r for r in rows if r.case["length"] <= 65536), key=lambda r: r.case["length"])
    if len(of) < 2:
        return None
    least, most = (r.times_ms["attnopt"] / r.case["length"] for r in (of[0], of[-1]))
    return most / least


def aims(rows: list[Row]) -> list[Aim]:
    """What was set for linear heads, judged by the worst case; unmeasured where there is none."""
    of = [r for r in rows if not r.wrong]

    def worst(name: str) -> float | None:
        return min((r.ratios[name] for r in of if name in r.ratios), default=None)

    return [
        Aim("linear heads: share of the byte floor", WANTED_SHARE, worst(OF_FLOOR)),
        Aim("linear heads, from 4096 tokens: times as fast as windows of 1024", 1.0, worst(WINDOWS)),
        Aim("linear heads: times as fast as flash-linear-attention, worst case", 1.0, worst(FLA)),
        Aim("linear heads: a token's time at 65536 tokens over that at 4096", WANTED_SLOPE, slope(of), True),
    ]
