"""What one head's attention costs: a table measured on this device, or kept pairs where nothing was measured.

    table = load_or_measure(spec, lengths, windows, sinks)      # the emitted kernel's milliseconds, stored once
    table.cost(4096, sink=4, window=512)                        # ms of one head's prefill, one sequence
    layer_cost(table, 4096, [(4, 512)] * 6 + [(0, 4096)] * 2)   # ms of a layer: heads, and a fixed cost per group

The emitted kernels run one group per distinct span of a layer, so a layer costs
``sum over heads of cost(head) + group_cost * (distinct spans - 1)``.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnopt import __version__, settings
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from attnopt.codegen.spec import KernelSpec

SCHEMA = 1
# A window must save this share of the dense time before it counts as a saving: timings repeat to a few percent.
MARGIN = 0.05
# A timed sample repeats a call until it lasts this long.
SAMPLE_SECONDS = 2e-3
Prefill = Callable[..., torch.Tensor]


def kept_pairs(length: int, sink: int, window: int) -> int:
    """Query-key pairs a causal head keeps at `length`: sum over i of min(i + 1, w) + min(sink, keys before them)."""
    window = min(window, length)
    outside = length - window
    short = min(sink, outside)
    return window * (window + 1) // 2 + outside * window + short * (short + 1) // 2 + short * (outside - short)


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of prefill per head, for one sequence.

    key: what it was measured on: device, target, dtype, heads, kv_heads, head_dim, threads, versions.
    entries: (length, sink, window) -> ms per head; (length, 0, length) is dense. groups: length -> ms a layer pays for
    every distinct span after the first. With measured False (`by_density`) costs are millions of kept pairs.
    """

    key: tuple[tuple[str, str], ...]
    entries: tuple[tuple[tuple[int, int, int], float], ...]
    groups: tuple[tuple[int, float], ...] = ()
    measured: bool = True

    def __post_init__(self) -> None:
        rows: dict[tuple[int, int], list[tuple[int, float]]] = {}
        dense = {n: ms for (n, _, w), ms in self.entries if w >= n}
        for (n, sink, window), ms in sorted(self.entries):
            if window < n:
                rows.setdefault((n, sink), []).append((window, ms))
        object.__setattr__(self, "_dense", dict(sorted(dense.items())))
        object.__setattr__(self, "_rows", rows)
        if self.measured and ({n for (n, _, _), _ in self.entries} != set(dense) or not dense):
            raise ValueError("the dense time of a length is missing")

    @classmethod
    def by_density(cls) -> CostTable:
        """A table of kept pairs (in millions), for where nothing can be measured; `unit` says so."""
        return cls((("target", "density"),), (), (), measured=False)

    @property
    def unit(self) -> str:
        return "ms" if self.measured else "million kept pairs"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Measured lengths, ascending."""
        return tuple(self._dense)  # type: ignore[attr-defined]

    @property
    def id(self) -> str:
        return hashlib.sha256(self._text().encode()).hexdigest()[:12] if self.measured else "density"

    def cost(self, length: int, sink: int, window: int) -> float:
        """One head's cost at `length`, interpolated in log-log. Nothing below the measured: under the smallest
        measured window or length, that one's time. Above the longest length, kept pairs scale its time."""
        window = min(window, length)
        if not self.measured:
            return kept_pairs(length, sink, window) / 1e6
        lengths = self.lengths
        if length > lengths[-1]:
            longest = lengths[-1]
            inner = longest if window == length else min(window, longest)
            share = kept_pairs(length, sink, window) / kept_pairs(longest, sink, inner)
            return self._at(longest, sink, inner) * share
        at = bisect_left(lengths, length)
        right = lengths[at]
        if right == length or at == 0:
            return self._at(right, sink, right if window >= length else window)
        left = lengths[at - 1]
        if window >= length:
            return _log_log(length, (left, self._at(left, 0, left)), (right, self._at(right, 0, right)))
        return _log_log(length, (left, self._at(left, sink, min(window, left))), (right, self._at(right, sink, window)))

    def group_cost(self, length: int) -> float:
        """What every distinct span of a layer after the first costs at `length`, in `unit`; nearest measured length."""
        if not self.groups:
            return 0.0
        return min(self.groups, key=lambda item: abs(math.log(item[0] / length)))[1]

    def _at(self, length: int, sink: int, window: int) -> float:
        """Cost at a measured length."""
        dense = self._dense[length]  # type: ignore[attr-defined]
        rows: dict[tuple[int, int], list[tuple[int, float]]] = self._rows  # type: ignore[attr-defined]
        sinks = sorted(s for n, s in rows if n == length)
        if window >= length or not sinks:
            return dense
        # A sink not measured costs what the next larger measured one does.
        points = [*rows[length, next((s for s in sinks if s >= sink), sinks[-1])], (length, dense)]
        at = bisect_left([w for w, _ in points], window)
        if at == 0 or points[at][0] == window:
            return points[at][1]
        return _log_log(window, points[at - 1], points[at])

    def _text(self) -> str:
        data = {"schema": SCHEMA, "key": dict(self.key), "groups": [list(item) for item in self.groups]}
        rows = ",\n    ".join(json.dumps([n, s, w, ms]) for (n, s, w), ms in self.entries)
        return json.dumps(data, indent=2)[:-2] + f',\n  "entries": [\n    {rows}\n  ]\n}}\n'

    def save(self, path: Path) -> None:
        from attnopt.codegen.emit import write_atomically

        write_atomically(path, self._text())

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """AttnoptError, with what to do, if the file is no cost table of this schema."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or set(data) != {"schema", "key", "groups", "entries"}:
                raise ValueError(f"not schema {SCHEMA}")
            entries = tuple(((int(n), int(s), int(w)), _positive(ms)) for n, s, w, ms in data["entries"])
            groups = tuple((int(n), _positive(ms, zero=True)) for n, ms in data["groups"])
            return cls(tuple((str(k), str(v)) for k, v in data["key"].items()), entries, groups)
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise AttnoptError(f"The cost table {path} is damaged: {e}.", "Delete it and measure again.") from e


def _positive(value: Any, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _log_log(x: float, left: tuple[float, float], right: tuple[float, float]) -> float:
    """The power law through two points, at x between them."""
    share = math.log(x / left[0]) / math.log(right[0] / left[0])
    return math.exp(math.log(left[1]) * (1 - share) + math.log(right[1]) * share)


def layer_cost(table: CostTable, length: int, spans: Iterable[tuple[int, int]]) -> float:
    """One layer's cost, in the table's unit, with the given (sink, window) per head."""
    clamped = [(s if w < length else 0, min(w, length)) for s, w in spans]
    return sum(table.cost(length, s, w) for s, w in clamped) + table.group_cost(length) * (len(set(clamped)) - 1)


def break_even(table: CostTable) -> int:
    """The measured length under which no window saves: from it on, at every measured length, some window is MARGIN
    cheaper than dense. One more than the longest measured length if none is there; 0 for a table by density."""
    if not table.measured:
        return 0
    found = table.lengths[-1] + 1
    for length in reversed(table.lengths):
        best = min((ms for (n, _, w), ms in table.entries if n == length and w < n), default=math.inf)
        if best >= (1 - MARGIN) * table.cost(length, 0, length):
            break
        found = length
    return found


# Measuring


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
    # Spans a token apart are equal work and distinct groups; their times against one group's are the fixed cost.
    narrow = spans[1 + (len(spans) - 1) // 2] if len(spans) > 1 else None
    split = min(heads, 4)
    if narrow is not None and split > 1:
        block = math.ceil(heads / split)
        tables.append(([narrow[0]] * heads, [max(narrow[1] - h // block, 1) for h in range(heads)]))
    calls = []
    for table in tables:
        sink, window = (torch.tensor(x, device=device) for x in table)
        calls.append(lambda s=sink, w=window: prefill(q, k, v, s, w, dim**-0.5))
    times = _interleaved(calls, rounds, device)
    if len(times) == len(spans) or narrow is None:
        return times, 0.0
    distinct = len(set(tables[-1][1]))
    return times[:-1], max((times[-1] - times[spans.index(narrow)]) / max(distinct - 1, 1), 0.0)


def _interleaved(calls: Sequence[Callable[[], Any]], rounds: int, device: str) -> list[float]:
    """Median milliseconds of each call."""

    def timed(call: Callable[[], Any], repeats: int) -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    with torch.no_grad():
        for call in calls:
            call()
        repeats = [max(1, math.ceil(SAMPLE_SECONDS / max(timed(call, 1), 1e-7))) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
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
    return tuple((name, str(value)) for name, value in key.items())


def path_of(key: tuple[tuple[str, str], ...]) -> Path:
    """The file of the table with this key, under the cache folder."""
    values = dict(key)
    stem = f"{values['target']}_h{values['heads']}k{values['kv_heads']}d{values['head_dim']}_{values['dtype']}"
    return settings.cache_dir() / "costs" / f"{stem}_{hashlib.sha256(repr(sorted(key)).encode()).hexdigest()[:10]}.json"


def load_or_measure(
    spec: KernelSpec, lengths: Sequence[int], windows: Sequence[int], sinks: Sequence[int], *, device: str = "cpu",
    rounds: int = 7, progress: Callable[[int, int, str], None] | None = None,
) -> CostTable:  # fmt: skip
    """The stored table of `spec`'s emitted kernel on this device if it holds what is asked for, else a new one."""
    key = device_key(spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, device)
    path = path_of(key)
    wanted = {(n, s, w) for n in lengths for s in sinks for w in windows if w < n} | {(n, 0, n) for n in lengths}
    if path.exists():
        table = CostTable.load(path)
        if wanted <= {entry for entry, _ in table.entries}:
            return table
    from attnopt.codegen.emit import load

    table = measure(
        load(spec).prefill, spec.heads, spec.kv_heads, spec.head_dim, spec.dtype, lengths, windows, sinks,
        target=spec.target, device=device, rounds=rounds, progress=progress,
    )  # fmt: skip
    table.save(path)
    return table
