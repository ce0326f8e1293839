"""A step of the ragged cache, bfloat16, one layer: attention to it and the write into it, at half of the dense bytes.

Half is the density at which MoA (Fu et al., arXiv:2406.14909) gives its tokens per second. At equal memory a cache of
half the bytes has room for twice the sequences: our step has these, the fastest dense attention that is installed has
the others, and writes no token. Every call is one CUDA graph. benchmarks/cuda/generation.py has a whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from attnopt.cache import Layout
from attnopt.codegen.emit import load
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.self_check import TOLERANCE
from attnopt.codegen.spec import CacheStep
from benchmarks import timing
from benchmarks.cuda.baselines import decode_libraries, sdpa
from benchmarks.cuda.check import Check, random
from benchmarks.cuda.decode import LARGE, OF_COPY, graph_of, right
from benchmarks.cuda.device import Budget, Device
from benchmarks.cuda.prefill import BEST
from benchmarks.record import Aim, Row, relative_error
from benchmarks.spans import SINK, Sizes, dense

# What the KV heads keep of the tokens, in turn: half of them on average.
HALF = (1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16)
EQUAL_MEMORY = "tokens per second at equal memory, attention"
BATCHES = 3


def layout_of(sizes: Sizes, length: int, uneven: bool = False) -> Layout:
    """Heads that keep half of `length` tokens. uneven: those of one KV head do not all keep the same."""
    sink, share = max(1, SINK // sizes.shrink), sizes.heads // sizes.kv_heads
    spans = [(sink, max(1, int(HALF[g % len(HALF)] * length) - sink)) for g in range(sizes.kv_heads)]
    spans = [(0, length) if sink + window >= length else (sink, window) for sink, window in spans]
    heads = [(sink, max(1, window - h % share * uneven)) for sink, window in spans for h in range(share)]
    return Layout.of_spans(*zip(*heads, strict=True), sizes.kv_heads, length)


class Filled:
    """A cache of `batch` rows that lacks one token, and that token."""

    def __init__(self, sizes: Sizes, layout: Layout, batch: int, dim: int, device: Device) -> None:
        self.layout, self.scale = layout, dim**-0.5
        heads = sizes.heads, sizes.kv_heads, sizes.kv_heads
        self.new = tuple(random(device, "bfloat16", batch, h, 1, dim) for h in heads)
        self.cache = tuple(random(device, "bfloat16", batch, layout.slots, dim) for _ in range(2))
        self.tables = layout.tables(device.where)
        self.n = torch.empty(batch, dtype=torch.int32, device=device.where)
        self.module = load(CacheStep(device.target_of("cache_step"), "bfloat16", *heads[:2], dim, dim))

    @property
    def size(self) -> int:
        """Bytes of keys and values that are read."""
        return sum(x.numel() * x.element_size() for x in self.cache)

    def step(self) -> Tensor:
        self.n.fill_(self.layout.length - 1)
        found: Tensor = self.module.step(*self.new, *self.cache, self.n, None, *self.tables, self.scale, False)
        return found

    def expected(self, few: Tensor) -> Tensor:
        wide = (x[few].double() for x in (*self.new, *self.cache))
        n = torch.full_like(self.n[few], self.layout.length - 1)
        return reference(*wide, n, None, *self.tables, self.scale, False)


def cache_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """A prompt with padding, a chunk, and tokens one by one: every output, and the cache at the end."""
    for dtype in ("bfloat16", "float16", "float32"):
        for dim in sizes.dims if dtype == "bfloat16" else sizes.dims[:1]:
            length = max(64, sizes.checked[0])
            layout = layout_of(sizes, length, uneven=True)
            sizes_of = dtype, sizes.heads, sizes.kv_heads, dim, dim
            module = load(CacheStep(device.target_of("cache_step"), *sizes_of))
            tokens = [random(device, dtype, 2, h, length, dim) for h in (sizes.heads, *(sizes.kv_heads,) * 2)]
            valid = torch.rand(2, length, device=device.where) < 0.9
            valid[1, : length // 4] = False
            given = layout, tokens, valid, device.where
            yield Check(
                "cache", f"D = {dim}, {dtype}, up to {length} tokens",
                lambda m=module, g=given: history(m.step, *g), lambda g=given: history(reference, *g, wide=True),
                TOLERANCE[dtype],
            )  # fmt: skip


def history(
    step: Callable[..., Tensor], layout: Layout, tokens: list[Tensor], valid: Tensor, where: torch.device,
    wide: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of every step, one behind the other, and what the cache holds then."""
    dtype = torch.float64 if wide else tokens[0].dtype
    cache = [torch.zeros(2, layout.slots, x.shape[3], dtype=dtype, device=where) for x in tokens[1:]]
    n, at, found = torch.zeros(2, dtype=torch.int32, device=where), 0, []
    tables, length = layout.tables(where), layout.length
    for size in (length // 2, length // 4, 5, *(1,) * 8):
        new = [x[:, :, at : at + size].to(dtype) for x in tokens]
        found.append(step(*new, *cache, n, valid[:, at : at + size], *tables, 0.1, at == 0))
        at += size
    return torch.cat(found, 2), *cache, n


@torch.no_grad()
def measure(
    device: Device, sizes: Sizes, batch: int, length: int, copy: float, seconds: float, notes: list[str]
) -> Row:
    """A step of `batch` sequences, and of twice as many."""
    torch.manual_seed(0)
    dim, layout = sizes.dims[0], layout_of(sizes, length)
    once, twice = (Filled(sizes, layout, rows, dim, device) for rows in (batch, 2 * batch))
    few = torch.tensor(sorted({0, batch - 1}), device=device.where)
    calls, error = {}, 0.0
    for name, filled in (("attnopt", once), ("attnopt, twice the sequences", twice)):
        expected = filled.expected(few)
        calls[name] = graph_of(name, filled.step, device, notes)
        error = max(error, relative_error(calls[name]()[few], expected))
    q = once.new[0]
    keys, values = (random(device, "bfloat16", batch, sizes.kv_heads, length, dim) for _ in range(2))
    others = sdpa(q, keys, values, once.scale, dense(sizes), notes)
    others += decode_libraries(q, keys, values, once.scale, dense(sizes), notes)
    for baseline in right(others, expected_dense(q, keys, values, once.scale, few), few, notes):
        calls[baseline.name] = graph_of(baseline.name, baseline.call, device, notes)
    times = device.times(calls, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios, lower = {OF_COPY: once.size / median["attnopt"] / copy}, {}
    theirs = [name for name in times if not name.startswith("attnopt")]
    if theirs:
        best = min(theirs, key=median.__getitem__)
        ratios[BEST], lower[BEST] = timing.ratio(times[best], times["attnopt"])
        found = timing.ratio(times[best], times["attnopt, twice the sequences"])
        ratios[EQUAL_MEMORY], lower[EQUAL_MEMORY] = (2 * x for x in found)
    case = {"kernel": "cache", "batch": batch, "context": length, "MiB": once.size // 2**20}
    return Row(case, error, TOLERANCE["bfloat16"], ratios, lower, {name: 1e3 * x for name, x in median.items()})


def expected_dense(q: Tensor, keys: Tensor, values: Tensor, scale: float, few: Tensor) -> Tensor:
    """Every key, in float64, one sequence and KV head at a time."""
    share, found = q.shape[1] // keys.shape[1], []
    for entry in few.tolist():
        for group in range(keys.shape[1]):
            rows = q[entry, group * share : (group + 1) * share].double()
            weights = (rows @ keys[entry, group].double().T * scale).softmax(-1)
            found.append(weights @ values[entry, group].double())
    return torch.cat(found).view(len(few), *q.shape[1:])


def section(device: Device, sizes: Sizes, copy: float, budget: Budget) -> list[Row]:
    """Rows of every context, and its first batches, that there is time for."""
    order = [(length, batch) for length, batches in sizes.contexts for batch in batches[:BATCHES]]
    rows: list[Row] = []

    def one(at: int, length: int, batch: int) -> None:
        seconds = 0.5 * budget.left / (len(order) - at)
        rows.append(measure(device, sizes, batch, length, copy, seconds, budget.notes))
        print(f"  {rows[-1]}", flush=True)

    for at, (length, batch) in enumerate(order):
        budget.attempt(f"{batch} sequences of {length}", partial(one, at, length, batch))
    return rows


def aims(rows: list[Row], large: int = LARGE) -> list[Aim]:
    """What was set for a step of the cache, judged by the worst case; unmeasured where there is none."""
    right = [r for r in rows if not r.wrong and r.case["MiB"] * 2**20 >= large]
    shares = [r.ratios[OF_COPY] for r in right]
    equal = [r.lower[EQUAL_MEMORY] for r in right if EQUAL_MEMORY in r.lower]
    return [
        Aim(
            f"cache, {large // 2**20} MiB of K and V and more: share of the copy rate", 0.80, min(shares, default=None)
        ),
        # MoA claims 5.5 to 6.7 times for whole models, against transformers with FlashAttention 2.
        Aim("cache, half of the bytes: tokens per second of attention at equal memory", 3.0, min(equal, default=None)),
    ]
