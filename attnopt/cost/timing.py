"""Time the emitted kernels on this device, every span of a length interleaved, and keep the tables."""

from __future__ import annotations

import hashlib
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnopt import __version__, settings
from attnopt.codegen import native
from attnopt.cost.table import CostTable

if TYPE_CHECKING:
    from attnopt.codegen.spec import SpanPrefill

# A timed sample repeats a call until it lasts this long.
SAMPLE_SECONDS = 2e-3
# Rounds over all spans of a length are fewer where one takes long, but never fewer than these.
MOST_SECONDS, LEAST_ROUNDS = 60.0, 3
Prefill = Callable[..., torch.Tensor]


def measure(
    prefill: Prefill, heads: int, kv_heads: int, head_dim: int, dtype: str, lengths: Sequence[int],
    windows: Sequence[int], sinks: Sequence[int], *, target: str = "cpu", device: str = "cpu",
    threads: int | None = None, rounds: int = 7, progress: Callable[[int, int, str], None] | None = None,
) -> CostTable:  # fmt: skip
    """Time `prefill(q, k, v, sinks, windows, scale)` with all heads alike, for every length, sink and window.

    Each length's variants, dense among them, run interleaved in a new order every round, so that what disturbs the
    machine disturbs all; medians are kept. `progress(done, of, what)` is called as each length is done.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        entries: list[tuple[tuple[int, int, int], float]] = []
        groups: list[tuple[int, float]] = []
        for done, length in enumerate(sorted(set(lengths))):
            spans = [(0, length)] + [(s, w) for s in sorted(set(sinks)) for w in sorted(set(windows)) if w < length]
            times, group = _measure_length(prefill, (heads, kv_heads, head_dim), dtype, device, length, spans, rounds)
            entries += [((length, s, w), ms / heads) for (s, w), ms in zip(spans, times, strict=True)]
            groups.append((length, group))
            if progress is not None:
                progress(done + 1, len(set(lengths)), f"{length} tokens")
        return CostTable(device_key(target, dtype, heads, kv_heads, head_dim, device), tuple(entries), tuple(groups))
    finally:
        torch.set_num_threads(before)


def _measure_length(
    prefill: Prefill, shape: tuple[int, int, int], dtype: str, device: str, length: int,
    spans: list[tuple[int, int]], rounds: int,
) -> tuple[list[float], float]:  # fmt: skip
    """Median ms of a call for each of `spans` (all heads alike), and the ms of one more group of heads."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, n, length, dim, generator=generator).to(device, getattr(torch, dtype)) for n in sizes)
    tables = [([s] * heads, [w] * heads) for s, w in spans]
    # What one more group of heads costs: spans a token apart are equal work in distinct groups, and dense heads beside
    # others are a call of their own where all others share one.
    narrow = spans[1 + (len(spans) - 1) // 2] if len(spans) > 1 else None
    block, half = math.ceil(heads / min(heads, 4)), heads // 2
    if narrow is not None and heads > 1:
        tables.append(([narrow[0]] * heads, [max(narrow[1] - h // block, 1) for h in range(heads)]))
        tables.append(([0] * half + [narrow[0]] * (heads - half), [length] * half + [narrow[1]] * (heads - half)))
    calls = []
    for table in tables:
        sink, window = (torch.tensor(x, device=device) for x in table)
        calls.append(lambda s=sink, w=window: prefill(q, k, v, s, w, dim**-0.5))
    times = interleaved(calls, rounds, device)
    if len(times) == len(spans) or narrow is None:
        return times, 0.0
    *times, apart, beside = times
    dense, own, distinct = times[0], times[spans.index(narrow)], len(set(tables[-2][1]))
    extra = (apart - own) / max(distinct - 1, 1), beside - (half * dense + (heads - half) * own) / heads
    return times, max(*extra, 0.0)


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int, device: str, before: Callable[[], Any] | None = None
) -> list[float]:
    """Median milliseconds of each call. before: what else is done ahead of every single one, untimed."""

    # One thread's own time does not count what others take: on two cores with a load of 7, 7 of 13 selections of blocks
    # that need 0.4 to 1.1 ms read 2.5 to 4.1 ms by the wall.
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed(call: Callable[[], Any], repeats: int) -> float:
        if before is not None:
            before()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (clock() - start) / repeats

    with torch.no_grad():
        for call in calls:
            call()
        once = before is not None
        repeats = [1 if once else max(1, math.ceil(SAMPLE_SECONDS / max(timed(call, 1), 1e-7))) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        one = sum(timed(call, 1) for call in calls)
        rounds = max(min(rounds, int(MOST_SECONDS / max(one, 1e-9))), LEAST_ROUNDS)
        order, rng = list(range(len(calls))), random.Random(0)
        for _ in range(rounds):
            rng.shuffle(order)
            for index in order:
                samples[index].append(timed(calls[index], repeats[index]))
    return [1e3 * statistics.median(s) for s in samples]


def device_name(device: str = "cpu") -> str:
    """The device's own name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_key(
    target: str, dtype: str, heads: int, kv_heads: int, head_dim: int, device: str = "cpu"
) -> tuple[tuple[str, str], ...]:
    """What a measured time depends on; equal keys share one stored table."""
    key = {
        "device": device_name(device), "target": target, "dtype": dtype, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "threads": torch.get_num_threads(), "torch": torch.__version__, "attnopt": __version__,
    }  # fmt: skip
    if target == "cpu":
        key["native"] = not native.unusable(getattr(torch, dtype))
    return tuple((name, str(value)) for name, value in key.items())


def path_of(key: tuple[tuple[str, str], ...], what: str = "") -> Path:
    """The file of the table with this key, under the cache folder. what: is timed, where that is not spans."""
    values = dict(key)
    shape = f"h{values['heads']}k{values['kv_heads']}d{values['head_dim']}"
    stem = "_".join([*[what] * bool(what), values["target"], shape, values["dtype"]])
    return settings.cache_dir() / "costs" / f"{stem}_{hashlib.sha256(repr(sorted(key)).encode()).hexdigest()[:10]}.json"


def load_or_measure(
    spec: SpanPrefill, lengths: Sequence[int], windows: Sequence[int], sinks: Sequence[int], *, device: str = "cpu",
    rounds: int = 7, progress: Callable[[int, int, str], None] | None = None,
) -> CostTable:  # fmt: skip
    """The table of `spec`'s emitted kernel on this device: what is stored, and what it lacks timed now. Every length is
    stored when it is done, so that an interrupted run goes on where it was."""
    path = path_of(device_key(spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, device))
    table = CostTable.load(path) if path.exists() else None
    there = {} if table is None else dict(table.entries)
    todo = []
    for n in sorted(set(lengths)):
        wanted = {(n, s, w) for s in sinks for w in windows if w < n} | {(n, 0, n)}
        if not wanted <= set(there):
            todo.append(n)
    for done, n in enumerate(todo):
        from attnopt.codegen.emit import load

        # What was timed at this length before is timed again: in one run, or times would not compare.
        more = {w for at, _, w in there if at == n and w < n}, {s for at, s, w in there if at == n and w < n}
        if progress is not None:
            progress(done, len(todo), f"{n} tokens")
        found = measure(
            load(spec).prefill, spec.heads, spec.kv_heads, spec.head_dim, spec.dtype, [n],
            sorted({*windows, *more[0]}), sorted({*sinks, *more[1]}), target=spec.target, device=device, rounds=rounds,
        )  # fmt: skip
        table = found if table is None else _replaced(table, found, n)
        there = dict(table.entries)
        table.save(path)
        if progress is not None:
            progress(done + 1, len(todo), f"{n} tokens")
    assert table is not None
    return table


def _replaced(table: CostTable, found: CostTable, length: int) -> CostTable:
    """`table` with the times of one length from `found`."""
    entries = [e for e in table.entries if e[0][0] != length] + list(found.entries)
    groups = [g for g in table.groups if g[0] != length] + list(found.groups)
    return CostTable(table.key, tuple(sorted(entries, key=lambda e: e[0][0])), tuple(sorted(groups)))
