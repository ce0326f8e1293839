"""A table of prefill times per head, interpolated and stored; and what is computed from any table of costs."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from attnopt.errors import AttnoptError

SCHEMA = 1
# A window must save this share of the dense time before it counts as a saving: timings repeat to a few percent.
MARGIN = 0.05
# Rows of a linear far part that meet one another directly.
CHUNK = 64
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Costs(Protocol):
    """What a planner asks of a table. kind: "measured", "roofline" or "density"; key_time: ms that decoding a token
    spends on one cached key of one KV head, or None where that is not known; lengths: those measured."""

    @property
    def kind(self) -> str: ...

    @property
    def id(self) -> str: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def key_time(self) -> float | None: ...

    def cost(self, length: int, sink: int, window: int) -> float: ...

    def group_cost(self, length: int) -> float: ...

    def far_cost(self, length: int, kind: str, rank: int) -> float: ...

    def block_cost(self, length: int, block: int, visited: float, skipped: float) -> float: ...

    def selection_cost(self, length: int, name: str, timed: tuple[float, ...], pairs: int) -> float: ...

    def scanned(self, length: int, features: int, dim: int) -> float: ...

    def gathered(self, length: int, count: int) -> float: ...

    def overhead(self, length: int) -> float: ...


class Counted:
    """What a step of decoding takes whose heads select, by the bytes that it reads, for where nothing is timed."""

    def scanned(self, length: int, features: int, dim: int) -> float:
        """One selection of a KV head by `features` of the `dim` of its keys, in keys with their values."""
        return length * features / dim / 2

    def gathered(self, length: int, count: int) -> float:
        """The `count` keys that one query head attends to."""
        return float(count)

    def overhead(self, length: int) -> float:
        """Nothing is read besides keys."""
        return 0.0


def itemsize(dtype: str) -> int:
    """Bytes of a number, by torch's name of its type."""
    return ITEM_BYTES[dtype]


def far_pairs(length: int, kind: str, rank: int) -> int:
    """Query-key pairs that do the work of one head's far part at `length`, for where nothing is timed.

    A row of "exp" makes `rank` features of q and of k, which is as many products of a pair's size; it reads and writes
    a state of as many rows, and meets the rows of its own chunk. "taylor" keeps 1 + rank + rank^2 features. "mean" is
    a pair and two running sums."""
    if kind == "mean":
        return 2 * length
    features = {"exp": rank, "taylor": 1 + rank + rank**2}[kind]
    return length * (rank + features + CHUNK)


def block_pairs(length: int, visited: float, skipped: float) -> float:
    """Query-key pairs that a walk over the share `visited` of a causal head's blocks does the work of: of a skipped one
    its scores alone, which is half."""
    return kept_pairs(length, 0, length) * visited * (1 - skipped / 2)


def kept_pairs(length: int, sink: int, window: int) -> int:
    """Query-key pairs a causal head keeps at `length`: sum over i of min(i + 1, w) + min(sink, keys before them)."""
    window = min(window, length)
    outside = length - window
    short = min(sink, outside)
    return window * (window + 1) // 2 + outside * window + short * (short + 1) // 2 + short * (outside - short)


@dataclass(frozen=True)
class CostTable(Counted):
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
    def kind(self) -> str:
        return "measured" if self.measured else "density"

    @property
    def key_time(self) -> float | None:
        """Of prefill alone."""
        return None

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
            return log_log(length, (left, self._at(left, 0, left)), (right, self._at(right, 0, right)))
        return log_log(length, (left, self._at(left, sink, min(window, left))), (right, self._at(right, sink, window)))

    def far_cost(self, length: int, kind: str, rank: int) -> float:
        """What stands in for one head's far keys, by density; a measured table of spans holds no times of it."""
        if self.measured:
            raise AttnoptError("This table holds times of spans only.", "Give one with far parts: attnopt.cost.Joined.")
        return far_pairs(length, kind, rank) / 1e6

    def block_cost(self, length: int, block: int, visited: float, skipped: float) -> float:
        """One head's walk over selected blocks, by density; a measured table of spans holds no times of it."""
        if self.measured:
            raise AttnoptError("This table holds times of spans only.", "Give one with blocks: attnopt.cost.Joined.")
        return block_pairs(length, visited, skipped) / 1e6

    def selection_cost(self, length: int, name: str, timed: tuple[float, ...], pairs: int) -> float:
        """One head's selection, by density: the `pairs` that do its work."""
        if self.measured:
            raise AttnoptError("This table holds times of spans only.", "Give one with blocks: attnopt.cost.Joined.")
        return pairs / 1e6

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
        return log_log(window, points[at - 1], points[at])

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
        with undamaged(path):
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or set(data) != {"schema", "key", "groups", "entries"}:
                raise ValueError(f"not schema {SCHEMA}")
            entries = tuple(((int(n), int(s), int(w)), positive(ms)) for n, s, w, ms in data["entries"])
            groups = tuple((int(n), positive(ms, zero=True)) for n, ms in data["groups"])
            return cls(tuple((str(k), str(v)) for k, v in data["key"].items()), entries, groups)


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """What a stored table lacks, or has too much, is said as an AttnoptError with what to do."""
    try:
        yield
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise AttnoptError(f"The cost table {path} is damaged: {e}.", "Delete it and measure again.") from e


def positive(value: Any, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{value!r} is no time")
    return float(value)


def log_log(x: float, left: tuple[float, float], right: tuple[float, float]) -> float:
    """The power law through two points, at x between them."""
    share = math.log(x / left[0]) / math.log(right[0] / left[0])
    return math.exp(math.log(left[1]) * (1 - share) + math.log(right[1]) * share)


def on_line(points: Sequence[tuple[float, float]], share: float) -> float:
    """The value at a share, of points ascending in it: on straight lines, never less than the first."""
    if share <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in pairwise(points):
        if share <= high:
            return a + (b - a) * (share - low) / (high - low)
    return points[-1][1] * share / points[-1][0]


def layer_cost(table: Costs, length: int, spans: Iterable[tuple[int, int]]) -> float:
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
