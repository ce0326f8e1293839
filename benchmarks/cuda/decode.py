"""Decoding of one token a sequence by one layer, bfloat16: spans by KV head against the dense cache and FlexAttention.

Every call is one CUDA graph, ours and the others': what is compared is the GPU's time.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.reference_decode import decode as reference
from attnopt.codegen.spec import SpanDecode
from benchmarks import timing
from benchmarks.cuda.baselines import Baseline, Call, decode_libraries, flex, sdpa
from benchmarks.cuda.device import Budget, Device
from benchmarks.cuda.prefill import BEST, FLEX
from benchmarks.record import Aim, Row, relative_error
from benchmarks.spans import Sizes, Spans, dense, mixture

TOLERANCE = 1e-2
OF_COPY = "share of copy"
# Batches at which FlexAttention is timed: it is compiled anew for each, which takes seconds.
FLEX_AT = (1, 8, 64)
# Bytes of K and V from which a launch no longer counts beside reading them.
LARGE = 256 * 2**20


class Cache:
    """A dense cache and the part of it that spans keep: k, v (B, G, N, D); packed_k, packed_v (B, C, D)."""

    def __init__(self, sizes: Sizes, spans: Spans, batch: int, length: int, dim: int, device: Device) -> None:
        generator = torch.Generator(device.where).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device.where, dtype=torch.bfloat16, generator=generator)

        self.q = random(batch, sizes.heads, 1, dim)
        self.k, self.v = (random(batch, sizes.kv_heads, length, dim) for _ in range(2))
        share = sizes.heads // sizes.kv_heads
        starts, kept = [0], []
        for group in range(sizes.kv_heads):
            if len({spans.keys(length)[h] for h in range(group * share, (group + 1) * share)}) > 1:
                raise ValueError(f"the query heads of KV head {group} have different spans")
            sink, window = (table[group * share] for table in (spans.sinks, spans.windows))
            kept.append(
                [slice(0, length)] if sink + window >= length else [slice(0, sink), slice(length - window, None)]
            )
            starts.append(starts[-1] + min(length, sink + window))
        self.packed_k, self.packed_v = (
            torch.cat([x[:, g, part] for g, parts in enumerate(kept) for part in parts], 1) for x in (self.k, self.v)
        )
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device.where)
        self.filled = (self.starts[1:] - self.starts[:-1]).expand(batch, -1).contiguous()
        self.size = 2 * self.packed_k.numel() * self.packed_k.element_size()
        self.scale = dim**-0.5

    @property
    def few(self) -> Tensor:
        """Entries that are compared with float64: the first and the last."""
        return torch.tensor(sorted({0, len(self.q) - 1}), device=self.q.device)

    def expected(self) -> Tensor:
        few = self.few
        wide = [x[few].double() for x in (self.q, self.packed_k, self.packed_v)]
        return reference(*wide, self.starts, self.filled[few], self.scale)

    def expected_dense(self) -> Tensor:
        few = self.few
        share = self.q.shape[1] // self.k.shape[1]
        found = []
        for entry in few.tolist():
            for group in range(self.k.shape[1]):
                q = self.q[entry, group * share : (group + 1) * share].double()
                weights = (q @ self.k[entry, group].double().T * self.scale).softmax(-1)
                found.append(weights @ self.v[entry, group].double())
        return torch.cat(found).view(len(few), *self.q.shape[1:])


def kernel(sizes: Sizes, dim: int, device: Device):  # type: ignore[no-untyped-def]
    return load(SpanDecode(device.target, "bfloat16", sizes.heads, sizes.kv_heads, dim, dim))


def right(found: list[Baseline], expected: Tensor, few: Tensor, notes: list[str]) -> list[Baseline]:
    """Those whose result is right; the others are notes."""
    kept = []
    for baseline in found:
        error = relative_error(baseline.call()[few], expected)
        if error <= TOLERANCE:
            kept.append(baseline)
        else:
            notes.append(f"{baseline.name}: error {error:.1e} in decoding, not timed")
    return kept


def graph_of(name: str, call: Call, device: Device, notes: list[str]) -> Call:
    """The call as a CUDA graph; where it cannot be captured, the call itself and a note."""
    try:
        return device.graphed(call)
    except RuntimeError as error:
        notes.append(f"{name}: no CUDA graph ({str(error).splitlines()[0][:120]}), timed without")
        return call


@torch.no_grad()
def measure(
    device: Device, sizes: Sizes, batch: int, length: int, copy: float, seconds: float, notes: list[str]
) -> Row:
    """The mixture at one batch and context."""
    dim, spans = sizes.dims[0], mixture(sizes)
    cache = Cache(sizes, spans, batch, length, dim, device)
    module = kernel(sizes, dim, device)

    def ours() -> Tensor:
        return module.decode(cache.q, cache.packed_k, cache.packed_v, cache.starts, cache.filled, cache.scale)

    few = cache.few
    expected = cache.expected()
    error = relative_error(ours()[few], expected)
    all_dense = sdpa(cache.q, cache.k, cache.v, cache.scale, dense(sizes), notes)
    all_dense += decode_libraries(cache.q, cache.k, cache.v, cache.scale, dense(sizes), notes)
    alike = flex(cache.q, cache.k, cache.v, cache.scale, spans, device, notes) if batch in FLEX_AT else []
    others = right(all_dense, cache.expected_dense(), few, notes) + right(alike, expected, few, notes)
    calls = {b.name: graph_of(b.name, b.call, device, notes) for b in others}
    calls["attnopt"] = graph_of("attnopt", ours, device, notes)
    # A captured graph computes the same: what was allocated while capturing may not be what a replay writes.
    error = max(error, relative_error(calls["attnopt"]()[few], expected))
    times = device.times(calls, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios, lower = {}, {}
    against = {name: name for name in times if name == FLEX or name.startswith("FlashAttention")}
    dense_names = [n for n in times if n.startswith("SDPA")]
    if dense_names:
        against[BEST] = min(dense_names, key=median.__getitem__)
    for label, name in against.items():
        ratios[label], lower[label] = timing.ratio(times[name], times["attnopt"])
    ratios[OF_COPY] = cache.size / median["attnopt"] / copy
    case = {"kernel": "decode", "batch": batch, "context": length, "MiB": cache.size // 2**20}
    return Row(case, error, TOLERANCE, ratios, lower, {name: 1e3 * value for name, value in median.items()})


def section(device: Device, sizes: Sizes, copy: float, budget: Budget) -> list[Row]:
    """Rows of every context and batch that there is time for."""
    order = [(length, batch) for length, batches in sizes.contexts for batch in batches]
    rows: list[Row] = []

    def one(at: int, length: int, batch: int) -> None:
        seconds = 0.5 * budget.left / (len(order) - at)
        rows.append(measure(device, sizes, batch, length, copy, seconds, budget.notes))
        print(f"  {rows[-1]}", flush=True)

    for at, (length, batch) in enumerate(order):
        budget.attempt(f"{batch} sequences of {length}", partial(one, at, length, batch))
    return rows


def aims(rows: list[Row], large: int = LARGE) -> list[Aim]:
    """What was set for decoding, judged by the worst case; unmeasured where there is none."""
    right = [r for r in rows if not r.wrong]
    shares = [r.ratios[OF_COPY] for r in right if r.case["MiB"] * 2**20 >= large]
    flexes = [r.ratios[FLEX] for r in right if FLEX in r.ratios]
    return [
        Aim(
            f"decode, {large // 2**20} MiB of K and V and more: share of the copy rate", 0.80, min(shares, default=None)
        ),
        Aim("decode, spans by KV head: times as fast as FlexAttention", 3.0, min(flexes, default=None)),
    ]
