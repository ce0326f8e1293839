"""Heads whose blocks of keys are selected while running, timed on this device: the kernel that walks lists of blocks,
and the selections that make them.

    blocks = load_or_measure_blocks(spec, lengths, [Selection("pooled", (64.0,), params)])
    blocks.cost(4096, 64, visited=0.25, skipped=0.0)     # ms of one head's walk over a quarter of the causal blocks
    blocks.selection(4096, "pooled", (64.0,))            # ms of one head's selection

Everything of a length is timed in turn with dense attention, whose time is kept with it: two runs on a machine that
others use too compare by what dense took in each (`Joined`). The walk's time is a line in the blocks visited, of which
a skipped one costs its scores alone; a selection's does not depend on what it keeps, since all of its shapes are known
beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnopt.cost.table import log_log, on_line, positive, undamaged
from attnopt.cost.timing import device_key, interleaved, path_of
from attnopt.errors import AttnoptError
from attnopt.registry import CANDIDATES
from attnopt.selection import Lists, lists_of

if TYPE_CHECKING:
    from attnopt.codegen.spec import SpanPrefill

SCHEMA = 1
# Shares of blocks that lists are drawn with, beside those that always live.
DRAWN = (0.0, 0.25, 1.0)
# (length, block, share visited, share of these skipped) -> ms, and (length, candidate, what its time depends on) -> ms.
Walk = tuple[int, int, float, float]
Chosen = tuple[int, str, tuple[float, ...]]


class Selection(NamedTuple):
    """A selection to be timed: `timed` what its time depends on, the numbers of its method, last the size of blocks;
    `settings` one row of its operator's table."""

    name: str
    timed: tuple[float, ...]
    settings: tuple[float, ...]

    @property
    def fixed(self) -> tuple[int, ...]:
        return tuple(map(int, self.timed))


@dataclass(frozen=True)
class BlockTable:
    """Milliseconds per head for one sequence. key: as a CostTable's, and which kernel it was; dense: length -> ms of
    dense attention in the run that timed the rest."""

    key: tuple[tuple[str, str], ...]
    walks: tuple[tuple[Walk, float], ...]
    selections: tuple[tuple[Chosen, float], ...] = ()
    dense: tuple[tuple[int, float], ...] = ()

    @property
    def id(self) -> str:
        """Of what it was measured on: a plan finds its table again, whatever was timed beside since."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:12]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({n for (n, *_), _ in self.walks}))

    def of_dense(self, length: int) -> float:
        """Dense attention of one head, in the same runs; as `cost` between lengths."""
        return _along(self.dense, length)

    def cost(self, length: int, block: int, visited: float, skipped: float) -> float:
        """One head's walk over the share `visited` of all causal blocks, of which `skipped` are skipped. Never less
        than at the shortest length; above the longest as its square. AttnoptError for blocks that were not timed."""
        of = {n for (n, size, _, _), _ in self.walks if size == block}
        if not of:
            raise AttnoptError(f"No walk over blocks of {block} was timed.", "Time it with `load_or_measure_blocks`.")
        return _along([(n, self._at(n, block, visited, skipped)) for n in sorted(of)], length)

    def selection(self, length: int, name: str, timed: tuple[float, ...]) -> float:
        """One head's selection; between lengths as `cost`. AttnoptError for one that was not timed."""
        points = sorted((n, ms) for (n, *what), ms in self.selections if what == [name, timed])
        if not points:
            raise AttnoptError(f"No selection {name} {timed} was timed.", "Time it with `load_or_measure_blocks`.")
        return _along(points, length)

    def _at(self, length: int, block: int, visited: float, skipped: float) -> float:
        """At a measured length: between the shares measured on a line, never less than the least of them."""
        here = {(seen, left): ms for (n, size, seen, left), ms in self.walks if (n, size) == (length, block)}
        line = sorted((seen, ms) for (seen, left), ms in here.items() if not left)
        whole = on_line(line, visited)
        most = max(((left, seen, ms) for (seen, left), ms in here.items() if left), default=None)
        if most is None or not skipped:
            return whole
        left, seen, ms = most
        saved = max(on_line(line, seen) - ms, 0.0) / (left * seen)
        return max(whole - saved * skipped * visited, line[0][1])

    def _text(self) -> str:
        data = json.dumps({"schema": SCHEMA, "key": dict(self.key)}, indent=2)[:-2]
        for name in ("walks", "selections", "dense"):
            entries = getattr(self, name)
            lines = [[what, ms] if isinstance(what, int) else [*what, ms] for what, ms in entries]
            rows = ",\n    ".join(map(json.dumps, lines))
            data += f',\n  "{name}": [\n    {rows}\n  ]'
        return data + "\n}\n"

    def save(self, path: Path) -> None:
        from attnopt.codegen.emit import write_atomically

        write_atomically(path, self._text())

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """AttnoptError, with what to do, if the file is no such table of this schema."""
        with undamaged(path):
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or set(data) != {"schema", "key", "walks", "selections", "dense"}:
                raise ValueError(f"not schema {SCHEMA}")
            walks = tuple(
                ((int(n), int(size), positive(seen), positive(left, zero=True)), positive(ms))
                for n, size, seen, left, ms in data["walks"]
            )
            selections = tuple(
                ((int(n), str(name), tuple(map(float, timed))), positive(ms))
                for n, name, timed, ms in data["selections"]
            )
            dense = tuple((int(n), positive(ms)) for n, ms in data["dense"])
            return cls(tuple((str(k), str(v)) for k, v in data["key"].items()), walks, selections, dense)


def _along(points: Sequence[tuple[int, float]], length: int) -> float:
    """The value at a length, of points ascending in it: in log-log between two, beyond the last as the square."""
    last, value = points[-1]
    if length > last:
        return value * (length / last) ** 2
    if length <= points[0][0]:
        return points[0][1]
    left, right = next((a, b) for a, b in pairwise(points) if length <= b[0])
    return right[1] if right[0] == length else log_log(length, left, right)


def key_of(spec: SpanPrefill, device: str) -> tuple[tuple[str, str], ...]:
    """What the times of a site's shape depend on; `walk` says whose kernel it is: on the CPU the compiled one also
    serves dtypes in which that of spans does not pay."""
    from attnopt.codegen import native

    compiled = spec.target == "cpu" and not native.unusable(getattr(torch, spec.dtype), "blocks")
    walk = "compiled" if compiled else spec.target
    return (*device_key(spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, device), ("walk", walk))


def load_or_measure_blocks(
    spec: SpanPrefill, lengths: Sequence[int], wanted: Sequence[Selection], *, device: str = "cpu", rounds: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> BlockTable:  # fmt: skip
    """The table of a site's shape on this device: what is stored, and the lengths at which it lacks something timed
    now. Every length is stored when it is done. The size of a selection's blocks is its setting `block`."""
    key = key_of(spec, device)
    path = path_of(key, "blocks")
    table = BlockTable.load(path) if path.exists() else BlockTable(key, ())
    selections = sorted({(w.name, w.timed): w for w in wanted}.values())
    sizes = sorted({w.fixed[-1] for w in selections})
    todo = []
    for n in sorted(set(lengths)):
        walked = {size for (at, size, *_), _ in table.walks if at == n}
        chosen = {(name, timed) for (at, name, timed), _ in table.selections if at == n}
        missing = [w for w in selections if (w.name, w.timed) not in chosen]
        if missing or not {*sizes} <= walked:
            todo.append((n, [size for size in sizes if size not in walked], missing))
    for done, (n, blocks, missing) in enumerate(todo):
        if progress is not None:
            progress(done, len(todo), f"{n} tokens")
        walks, selected, dense = _times(spec, n, blocks, missing, device, rounds)
        # What is timed later is told by what dense took when this length was first timed.
        before = dict(table.dense).get(n, dense)
        table = replace(
            table,
            walks=tuple(sorted(table.walks + tuple((of, ms * before / dense) for of, ms in walks))),
            selections=tuple(sorted(table.selections + tuple((of, ms * before / dense) for of, ms in selected))),
            dense=tuple(sorted({**dict(table.dense), n: before}.items())),
        )
        table.save(path)
        if progress is not None:
            progress(done + 1, len(todo), f"{n} tokens")
    return table


def _times(
    spec: SpanPrefill, length: int, blocks: Sequence[int], wanted: Sequence[Selection], device: str, rounds: int
) -> tuple[list[tuple[Walk, float]], list[tuple[Chosen, float]], float]:
    """Median ms per head, all in turn, on half of the heads, as a plan has it: some, not all; and of dense attention on
    all of them."""
    from attnopt.candidates._selected import asked_of
    from attnopt.codegen.emit import load

    drawn = torch.Generator().manual_seed(0)
    sizes = ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim_v))
    q, k, v = (torch.randn(1, n, length, d, generator=drawn).to(device, getattr(torch, spec.dtype)) for n, d in sizes)
    heads, scale = max(spec.heads // 2, 1), spec.head_dim**-0.5
    served = torch.arange(heads, device=device)

    def select(name: str, table: Tensor, fixed: Sequence[int]) -> Lists:
        found: Lists = CANDIDATES[name].select(asked_of(CANDIDATES[name], q, k, served, table, scale, None, 0, fixed))
        return found

    walks: list[tuple[Walk, Callable[[], Any]]] = []
    for block in blocks:
        walks += _walks(spec, q, k, v, heads, block, drawn)
    calls = [call for _, call in walks]
    for w in wanted:
        table = torch.tensor([w.settings] * heads, dtype=torch.float64, device=device)
        calls.append(partial(select, w.name, table, w.fixed))
    sinks, windows = (torch.full((spec.heads,), n, dtype=torch.int32, device=device) for n in (0, length))
    calls.append(partial(load(spec).prefill, q, k, v, sinks, windows, scale))
    *times, dense = interleaved(calls, rounds, device)
    per_head = [ms / heads for ms in times]
    chosen = [((length, w.name, w.timed), ms) for w, ms in zip(wanted, per_head[len(walks) :], strict=True)]
    return [(what, ms) for (what, _), ms in zip(walks, per_head, strict=False)], chosen, dense / spec.heads


def _walks(
    spec: SpanPrefill, q: Tensor, k: Tensor, v: Tensor, heads: int, block: int, drawn: torch.Generator
) -> list[tuple[Walk, Callable[[], Any]]]:
    """Calls of the kernel over random lists of several densities, and over all blocks where most are skipped; with what
    putting heads beside others' outputs costs."""
    from attnopt.codegen.emit import load
    from attnopt.codegen.spec import BlockPrefill
    from attnopt.selection import Asked

    length, device, served = q.shape[2], q.device, torch.arange(heads, device=q.device)
    asked = Asked(q, k, served, served // (spec.heads // spec.kv_heads), {}, spec.head_dim**-0.5, block)
    kernel = load(BlockPrefill(
        spec.target, spec.dtype, spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v, block, False
    )).prefill  # fmt: skip
    near = v.new_zeros(1, spec.heads, length, spec.head_dim_v)
    # Whose first block is met with scores that no other reaches: everything behind it is skipped.
    sharp_q, sharp_k = torch.zeros_like(q), torch.zeros_like(k)
    sharp_q[..., 0], sharp_k[:, :, :block, 0] = 1.0, 64.0

    def walk(q: Tensor, k: Tensor, lists: Lists, bound: float) -> Tensor:
        out = torch.empty_like(near)
        out.copy_(near)
        bounds = torch.full((heads,), bound, device=device)
        skipped: Tensor = kernel(q, k, v, served.int(), *lists, bounds, asked.scale, None, 0, out)
        return skipped

    found: dict[Walk, Callable[[], Any]] = {}
    causal = asked.possible.sum().item() * heads
    for share in DRAWN:
        random = torch.rand(1, heads, asked.rows, asked.columns, generator=drawn).to(device) < share
        lists = lists_of((random | asked.always) & asked.possible)
        found[length, block, lists.counts.sum().item() / causal, 0.0] = partial(walk, q, k, lists, -torch.inf)
    left = walk(sharp_q, sharp_k, lists, -1.0).sum().item() / causal
    if left:
        found[length, block, 1.0, left] = partial(walk, sharp_q, sharp_k, lists, -1.0)
    return list(found.items())
