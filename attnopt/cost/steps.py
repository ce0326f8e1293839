"""A step of decoding whose heads select what they read of the cache, timed on this device beside one that reads all.

    steps = load_or_measure_steps(spec, lengths, features=[128, 16])
    steps.gathered(16384, 324)           # 324 keys of one head, wherever they lie, in keys that are read in order
    steps.scanned(16384, 16)             # one selection of a KV head by 16 features of its keys, in such keys

Bytes alone do not tell: a row that stands alone takes two to seven times as long to read as one among others, and what
a layer's call costs is a good part of a short step. Everything is one call of the operator that generation makes, the
newest token's write included, on a cache that the processor has not just seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.cost.table import log_log, on_line, positive, undamaged
from attnopt.cost.timing import device_key, interleaved, path_of
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from attnopt.codegen.reference_tokens import TokenRule
    from attnopt.codegen.spec import SpanPrefill

SCHEMA = 1
# Keys that every head reads, beside which what selecting them costs is timed: the last.
COUNTS = (64, 320)
# Keys of a window, by which is told what a step takes whatever it reads.
NARROW = 64
MOST_FIXED = 0.9
# Bytes that are read between two calls, of a step's other layers.
BETWEEN = 2**26
# (length, features that the selection looks at, 0 for none, keys that are read) -> ms.
Step = tuple[int, int, int]


@dataclass(frozen=True)
class StepTable:
    """Milliseconds of a layer's step for one sequence, all heads alike. key: as a CostTable's, and which kernel it was;
    spans: (length, window) -> ms, dense where the window is the length; steps: where heads select."""

    key: tuple[tuple[str, str], ...]
    spans: tuple[tuple[tuple[int, int], float], ...] = ()
    steps: tuple[tuple[Step, float], ...] = ()

    @property
    def id(self) -> str:
        """Of what it was measured on: a plan finds its table again, whatever was timed beside since."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:12]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(n for (n, window), _ in self.spans if window == n)

    def key_time(self, length: int) -> float:
        """ms that a dense step takes for one key of one KV head, beside what it takes whatever it reads."""
        dense = _along([(n, ms) for (n, window), ms in self.spans if window == n], length)
        return (dense - self._fixed(length)) / (length * int(dict(self.key)["kv_heads"]))

    def overhead(self, length: int) -> float:
        """A query head's part of what a step with spans takes whatever it reads, in keys that are read in order."""
        return self._fixed(length) / int(dict(self.key)["heads"]) / self.key_time(length)

    def _fixed(self, length: int) -> float:
        """On the line through a narrow window and all keys, at the timed length next to `length`."""
        at = min(self.lengths, key=lambda n: abs(n - length))
        here = sorted((window, ms) for (n, window), ms in self.spans if n == at)
        (narrow, least), (every, most) = here[0], here[-1]
        if every == narrow:
            return 0.0
        # At a few keys the two differ by chance alone: a key takes some time always.
        return min(max(least - narrow * (most - least) / (every - narrow), 0.0), MOST_FIXED * most)

    def gathered(self, length: int, count: int) -> float:
        """What one query head takes to read `count` keys it holds the places of, all of its step, in keys that are read
        in order; on a line between the numbers timed, never less than the least, and in proportion above the most."""
        counts = sorted({count for (_, features, count), _ in self.steps if not features})
        line = [(float(c), self._at(length, 0, c)) for c in counts]
        return on_line(line, count) / int(dict(self.key)["heads"]) / self.key_time(length)

    def scanned(self, length: int, features: int) -> float:
        """What selecting adds to that for one KV head and all of its query heads, in keys that are read in order; by
        numbers of features that were not timed as `gathered`."""
        timed = sorted({(features, count) for (_, features, count), _ in self.steps if features})
        if not timed:
            raise AttnoptError("No step that selects was timed.", "Time it with `load_or_measure_steps`.")
        added = [(float(f), max(self._at(length, f, c) - self._at(length, 0, c), 0.0)) for f, c in timed]
        return on_line(added, features) / int(dict(self.key)["kv_heads"]) / self.key_time(length)

    def _at(self, length: int, features: int, count: int) -> float:
        here = sorted((n, ms) for (n, f, c), ms in self.steps if (f, c) == (features, count))
        if not features and length > here[-1][0]:
            # As many keys are read of a longer cache.
            return here[-1][1]
        return _along(here, length)

    def _text(self) -> str:
        data = json.dumps({"schema": SCHEMA, "key": dict(self.key)}, indent=2)[:-2]
        for name, lines in (
            ("spans", [[*w, ms] for w, ms in self.spans]),
            ("steps", [[*w, ms] for w, ms in self.steps]),
        ):
            rows = ",\n    ".join(map(json.dumps, lines))
            data += f',\n  "{name}": [\n    {rows}\n  ]'
        return data + "\n}\n"

    def save(self, path: Path) -> None:
        from attnopt.codegen.emit import write_atomically

        write_atomically(path, self._text())

    @classmethod
    def load(cls, path: Path) -> StepTable:
        """AttnoptError, with what to do, if the file is no such table of this schema."""
        with undamaged(path):
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or set(data) != {"schema", "key", "spans", "steps"}:
                raise ValueError(f"not schema {SCHEMA}")
            spans = tuple(((int(n), int(window)), positive(ms)) for n, window, ms in data["spans"])
            steps = tuple(((int(n), int(features), int(c)), positive(ms)) for n, features, c, ms in data["steps"])
            return cls(tuple((str(k), str(v)) for k, v in data["key"].items()), spans, steps)


def _along(points: Sequence[tuple[int, float]], length: int) -> float:
    """The value at a length, of points ascending in it: in log-log between two, in proportion beyond the last."""
    if length >= points[-1][0]:
        return points[-1][1] * length / points[-1][0]
    right = next(n for n, (at, _) in enumerate(points) if length <= at)
    return points[right][1] if right == 0 else log_log(length, points[right - 1], points[right])


def key_of(spec: SpanPrefill, device: str) -> tuple[tuple[str, str], ...]:
    """What the times of a site's shape depend on; `step` says whose kernel it is."""
    from attnopt.codegen import native

    dtype = getattr(torch, spec.dtype)
    compiled = spec.target == "cpu" and native.takes(dtype, spec.head_dim, spec.head_dim_v, "tokens")
    of_step = "compiled" if compiled else spec.target
    return (*device_key(spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, device), ("step", of_step))


def load_or_measure_steps(
    spec: SpanPrefill, lengths: Sequence[int], features: Sequence[int], *, device: str = "cpu", rounds: int = 9,
    progress: Callable[[int, int, str], None] | None = None,
) -> StepTable:  # fmt: skip
    """The table of a site's shape on this device: what is stored, and the lengths at which it lacks something timed
    now. Every length is stored when it is done. features: that selections look at, all of a head's or fewer."""
    key = key_of(spec, device)
    path = path_of(key, "steps")
    table = StepTable.load(path) if path.exists() else StepTable(key)
    todo = []
    for n in sorted(set(lengths)):
        there = {seen for (at, seen, _), _ in table.steps if at == n}
        if not {0, *features} <= there:
            # In one run with dense, or times would not compare.
            todo.append((n, sorted({*features, *there} - {0})))
    for done, (n, wanted) in enumerate(todo):
        if progress is not None:
            progress(done, len(todo), f"{n} tokens")
        spans, steps = _times(spec, n, wanted, device, rounds)
        table = replace(
            table,
            spans=tuple(sorted([*(entry for entry in table.spans if entry[0][0] != n), *spans])),
            steps=tuple(sorted([*(entry for entry in table.steps if entry[0][0] != n), *steps])),
        )
        table.save(path)
        if progress is not None:
            progress(done + 1, len(todo), f"{n} tokens")
    return table


def _times(
    spec: SpanPrefill, length: int, features: Sequence[int], device: str, rounds: int
) -> tuple[list[tuple[tuple[int, int], float]], list[tuple[Step, float]]]:
    """Median ms of steps with a narrow window and with all keys, and of those that read each of COUNTS or select the
    last of them."""
    from attnopt import ops  # noqa: F401  registers the operators
    from attnopt.cache import Layout
    from attnopt.codegen.reference_tokens import TokenRule

    drawn, dtype = torch.Generator().manual_seed(0), getattr(torch, spec.dtype)
    layout = Layout.of_spans([0] * spec.heads, [length] * spec.heads, spec.kv_heads, length)
    widths = spec.head_dim, spec.head_dim_v
    cache = [torch.randn(1, layout.slots, width, generator=drawn).to(device, dtype) for width in widths]
    sizes = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim_v)
    newest = [torch.randn(1, n, 1, d, generator=drawn).to(device, dtype) for n, d in sizes]
    table, spans = layout.tables(device)
    n, scale = torch.zeros(1, dtype=torch.int32, device=device), spec.head_dim**-0.5

    def span(cache: Sequence[Tensor], table: Tensor, spans: Tensor) -> Tensor:
        n.fill_(length - 1)
        out: Tensor = torch.ops.attnopt.attend_update(*newest, *cache, n, None, table, spans, scale, False)
        return out

    def some(quick: Tensor, state: Sequence[Any]) -> Tensor:
        n.fill_(length - 1)
        own = *cache, n, None, table, quick, spans, *state
        out: Tensor = torch.ops.attnopt.attend_tokens(*newest, *own, scale, False)
        return out

    counts = sorted({min(count, max(length // 2, 1)) for count in COUNTS})
    rules = {(0, count): TokenRule(count, 0, 1, every=1 << 16) for count in counts}
    for seen in features:
        rules[seen, counts[-1]] = TokenRule(counts[-1], 0, 1, channels=0 if seen == spec.head_dim else seen)
    calls = [partial(some, *_state(spec, layout, rule, cache[0], drawn)) for rule in rules.values()]
    window = min(NARROW, max(length // 2, 1))
    ring = Layout.of_spans([0] * spec.heads, [window] * spec.heads, spec.kv_heads, length)
    small = [x[:, : ring.slots].contiguous() for x in cache]
    calls += [partial(span, small, *ring.tables(device)), partial(span, cache, table, spans)]
    between = torch.ones(BETWEEN // 4, device=device)
    *times, narrow, every = interleaved(calls, rounds, device, before=between.sum)
    timed = [((length, *what), ms) for what, ms in zip(rules, times, strict=True)]
    return [((length, window), narrow), ((length, length), every)], timed


def _state(
    spec: SpanPrefill, layout: Any, rule: TokenRule, keys: Tensor, drawn: torch.Generator
) -> tuple[Tensor, list[Any]]:
    """What `attnopt::attend_tokens` takes of a layer all of whose heads follow one rule."""
    from attnopt.cache import TokenTable

    device, heads = keys.device, spec.heads
    table = TokenTable((rule,) * heads, (0,) * heads)
    picked = torch.full((1, heads, rule.count), -1, dtype=torch.int32, device=device)
    asked = keys.new_zeros(1, heads, spec.head_dim)
    age = torch.full((1, heads), -1, dtype=torch.int32, device=device)
    chosen = torch.arange(rule.channels, device=device).repeat(1, spec.kv_heads, 1)
    labels = torch.randn(1, rule.channels, layout.slots, generator=drawn).to(keys)
    state = [*table.tensors(layout.length, device), picked, asked, age, [], chosen, labels]
    return table.quick(layout, device), state
