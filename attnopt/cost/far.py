"""What stands in for a head's far keys, timed on this device: a linear tail or a mean token, with its merge.

    far = load_or_measure_far(spec, lengths, [("exp", 64), ("taylor", 8), ("mean", 0)])
    far.cost(4096, "exp", 64)            # ms of one head's prefill, beside what its span costs
    Joined(table, far)                   # both, as a planner asks for them (joined.py)

A far part visits every chunk of the text once, so its time grows with the length and hardly with the window.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnopt.cost.table import log_log, positive, undamaged
from attnopt.cost.timing import device_key, interleaved, path_of
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from attnopt.codegen.spec import SpanPrefill
    from attnopt.mixed import FarPart, HeldPart

SCHEMA = 1
# Kind and rank, as `Candidate.far_part` gives them.
Part = tuple[str, int]
# Far keys are those behind a window of so many.
WINDOW = 128


@dataclass(frozen=True)
class FarTable:
    """Milliseconds per head for one sequence. key: as a CostTable's; entries: (length, kind, rank) -> ms."""

    key: tuple[tuple[str, str], ...]
    entries: tuple[tuple[tuple[int, str, int], float], ...]

    def __post_init__(self) -> None:
        rows: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for (length, kind, rank), ms in sorted(self.entries):
            rows.setdefault((kind, rank), []).append((length, ms))
        object.__setattr__(self, "_rows", rows)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self._rows)  # type: ignore[attr-defined]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({n for (n, _, _), _ in self.entries}))

    @property
    def id(self) -> str:
        return hashlib.sha256(self._text().encode()).hexdigest()[:12]

    def cost(self, length: int, kind: str, rank: int) -> float:
        """Between two lengths, and two ranks, in log-log; never less than at the shortest length or least rank, and
        in proportion above the longest and the greatest. AttnoptError for a kind that was not timed."""
        ranks = sorted(r for k, r in self.parts if k == kind)
        if not ranks:
            raise AttnoptError(f"No {kind!r} far part was timed.", "Time it with `load_or_measure_far`.")
        return _along([(r, self._at(kind, r, length)) for r in ranks], rank)

    def _at(self, kind: str, rank: int, length: int) -> float:
        rows: dict[tuple[str, int], list[tuple[int, float]]] = self._rows  # type: ignore[attr-defined]
        return _along(rows[kind, rank], length)

    def _text(self) -> str:
        rows = ",\n    ".join(json.dumps([n, kind, rank, ms]) for (n, kind, rank), ms in self.entries)
        data = json.dumps({"schema": SCHEMA, "key": dict(self.key)}, indent=2)
        return data[:-2] + f',\n  "entries": [\n    {rows}\n  ]\n}}\n'

    def save(self, path: Path) -> None:
        from attnopt.codegen.emit import write_atomically

        write_atomically(path, self._text())

    @classmethod
    def load(cls, path: Path) -> FarTable:
        """AttnoptError, with what to do, if the file is no such table of this schema."""
        with undamaged(path):
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or set(data) != {"schema", "key", "entries"}:
                raise ValueError(f"not schema {SCHEMA}")
            entries = tuple(((int(n), str(kind), int(rank)), positive(ms)) for n, kind, rank, ms in data["entries"])
            return cls(tuple((str(k), str(v)) for k, v in data["key"].items()), entries)


def _along(points: Sequence[tuple[int, float]], x: int) -> float:
    """The value at x of points ascending in x."""
    at = bisect_left([x for x, _ in points], x)
    if at == len(points):
        last, value = points[-1]
        return value * x / last if last else value
    if at == 0 or points[at][0] == x:
        return points[at][1]
    return log_log(x, points[at - 1], points[at])


def load_or_measure_far(
    spec: SpanPrefill, lengths: Sequence[int], parts: Iterable[Part], *, device: str = "cpu", rounds: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> FarTable:  # fmt: skip
    """The table of a site's shape on this device: what is stored, and the lengths at which it lacks something timed
    now. Every length is stored when it is done."""
    key = device_key(spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, device)
    path = path_of(key, "far")
    table = FarTable.load(path) if path.exists() else FarTable(key, ())
    wanted = sorted(set(parts))
    there = dict(table.entries)
    todo = [n for n in sorted(set(lengths)) if any((n, *part) not in there for part in wanted)]
    for done, n in enumerate(todo):
        if progress is not None:
            progress(done, len(todo), f"{n} tokens")
        # All that was timed at this length is timed again: in one run, or times would not compare.
        every = sorted({*wanted, *((kind, rank) for at, kind, rank in there if at == n)})
        times = _times(spec, n, every, device, rounds)
        kept = [entry for entry in table.entries if entry[0][0] != n]
        found = [((n, kind, rank), ms) for (kind, rank), ms in zip(every, times, strict=True)]
        table = replace(table, entries=tuple(sorted([*kept, *found])))
        there = dict(table.entries)
        table.save(path)
        if progress is not None:
            progress(done + 1, len(todo), f"{n} tokens")
    return table


def _times(spec: SpanPrefill, length: int, parts: Sequence[Part], device: str, rounds: int) -> list[float]:
    """Median ms per head of every part on half of the heads, as a plan has it: some, not all."""
    from attnopt import ops
    from attnopt.mixed import FarPart, far_call

    drawn = torch.Generator().manual_seed(0)
    sizes = ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim_v))
    q, k, v = (torch.randn(1, n, length, d, generator=drawn).to(device, getattr(torch, spec.dtype)) for n, d in sizes)
    out = torch.empty_like(v[:, :1]).expand(-1, spec.heads, -1, -1).contiguous().zero_()
    lse = torch.zeros(1, spec.heads, length, device=device)
    heads = max(spec.heads // 2, 1)
    rules = (
        torch.zeros(spec.heads, dtype=torch.int32), torch.full((spec.heads,), WINDOW, dtype=torch.int32),
        torch.zeros(spec.heads, dtype=torch.float64),
    )  # fmt: skip

    def tail(held: HeldPart) -> Any:
        far = ops.compute(*far_call(q, k, v, rules, held, None, spec.head_dim**-0.5, 0))
        near = (x.index_select(1, held.index) for x in (out, lse))
        return out.index_copy(1, held.index, ops.merge(*near, *far))

    served = FarPart("", "", tuple(range(heads)))
    calls = [partial(tail, _drawn(served, kind, rank, spec.head_dim, drawn, device)) for kind, rank in parts]
    return [ms / heads for ms in interleaved(calls, rounds, device)]


def _drawn(part: FarPart, kind: str, rank: int, dim: int, drawn: torch.Generator, device: str) -> HeldPart:
    """A far part with maps at random, small enough that nothing overflows."""
    from attnopt.feature_maps import FeatureMap, shapes
    from attnopt.mixed import HeldPart

    heads = torch.tensor(part.heads, dtype=torch.int32)
    index = torch.tensor(part.heads, device=device)
    if kind == "mean":
        return HeldPart("mean", heads, index)
    small = 0.5 / math.sqrt(dim)
    tensors = [small * torch.randn(s, generator=drawn) for s in shapes(len(part.heads), rank, dim).values()]
    maps = FeatureMap(kind, *tensors).to(device)
    return HeldPart("linear", heads, index, maps.tensors, kind)
