"""One step of a cache on the CPU: what a plan saves of the exact one, and a written buffer against inductor's code.

    python -m benchmarks run cpu_cache -- [--keep] [--out FILE] [--threads 1 2] [--no-inductor]

One new token. *planned*: `attnopt::attend_update`, which attends and writes, on a cache of a plan. Of its KV heads a
quarter, or where there are two one, hold every token, the rest 64 sinks and a window of an eighth of them; *ideal* is
how many times fewer bytes that is. A ratio says how many times as fast it is as

    exact     the same operator on a cache that holds every token for every head
    dense     SDPA on dense keys and values, the query heads of a KV head as rows, nothing written

and *share* is the ratio to exact over the ideal. *live*: `attnopt::live_attention`, on buffers that are filled to the
end, against

    inductor  compiled SDPA on keys and values that are repeated for every query head, as transformers does under a mask
    eager     SDPA with enable_gqa
    long      itself where the buffers are four times as long as what is filled, against the same memory cut off there;
              near 1 where the length does not matter

Between two calls of one layer a model reads its weights and the caches of its other layers; so here, ahead of every
call, 128 MB of something else are read, and each side has a cache of its own. Every result is checked against the
reference in float64. One thread: processor time of the thread; more: wall time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops  # noqa: F401  for the operators
from attnopt.cache import Layout
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.reference_live import attend as looked
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "10 minutes"
QUICK = ("--quick",)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SINKS = 64
# Less than the weights of one layer of a model with these heads, and many times the cache of a core.
BETWEEN = 2**27
# (query heads, KV heads, batch, tokens)
SIZES = [(8, 8, 1, 16384), (8, 2, 1, 16384), (32, 8, 1, 16384), (8, 8, 8, 4096)]
SHORT = [(8, heads, 1, length) for heads in (8, 2) for length in (1024, 4096)]
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    what: str
    threads: int
    dtype: str
    dim: int
    heads: int
    kv_heads: int
    batch: int
    length: int

    @property
    def share(self) -> int:
        return self.heads // self.kv_heads

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Sink and window of each query head."""
        whole = max(1, self.kv_heads // 4)
        groups = [(0, self.length)] * whole + [(SINKS, self.length // 8)] * (self.kv_heads - whole)
        return [span for span in groups for _ in range(self.share)]

    @property
    def ideal(self) -> float:
        kept = sum(min(self.length, sink + window) for sink, window in self.spans)
        return self.heads * self.length / kept if self.what == "planned" else 1.0

    def facts(self) -> dict[str, Any]:
        return {
            "what": self.what, "threads": self.threads, "dtype": self.dtype, "dim": self.dim,
            "heads": f"{self.heads}/{self.kv_heads}", "batch": self.batch, "length": self.length,
            "ideal": round(self.ideal, 2),
        }  # fmt: skip

    def normal(self, *shape: int, seed: int) -> Tensor:
        drawn = torch.randn(*shape, self.dim, generator=torch.Generator().manual_seed(seed))
        return drawn.to(getattr(torch, self.dtype))


class Stepping:
    """A cache one token short of full, and its step; `back` takes back what the last one counted."""

    def __init__(self, case: Case, spans: list[tuple[int, int]]) -> None:
        sinks, windows = zip(*spans, strict=True)
        layout = Layout.of_spans(sinks, windows, case.kv_heads, case.length)
        new = [case.normal(case.batch, h, 1, seed=n) for n, h in enumerate((case.heads, case.kv_heads, case.kv_heads))]
        cache = [case.normal(case.batch, layout.slots, seed=n) for n in (3, 4)]
        self.n = torch.full((case.batch,), case.length - 1, dtype=torch.int32)
        self.given = (*new, *cache, self.n, None, *layout.tables(), case.dim**-0.5, False)

    def back(self) -> None:
        self.n -= 1

    def __call__(self) -> Tensor:
        return torch.ops.attnopt.attend_update(*self.given)

    def error(self) -> float:
        """Against the reference in float64, on copies."""
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.given]
        wide[5] = self.n.clone()
        found = self()
        self.back()
        return relative_error(found, reference(*wide))  # type: ignore[arg-type]


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention to a static cache as transformers has it where there is a mask: K and V for every query head."""
    batch, groups, columns, dim = k.shape
    share = q.shape[1] // groups
    k, v = (
        x[:, :, None].expand(batch, groups, share, columns, dim).reshape(batch, groups * share, columns, dim)
        for x in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def planned(case: Case, _: bool) -> tuple[dict[str, Call], Callable[[], object], float]:
    """The calls by name, what goes before each of them, and the error."""
    ours, exact = Stepping(case, case.spans), Stepping(case, [(0, case.length)] * case.heads)
    rows = case.normal(case.batch, case.kv_heads, case.share, seed=0)
    k, v = (case.normal(case.batch, case.kv_heads, case.length, seed=n) for n in (5, 6))
    between, error = torch.ones(BETWEEN // 4), max(ours.error(), exact.error())

    def before() -> None:
        for one in (ours, exact):
            one.n.fill_(case.length - 1)
        between.sum()

    return {"ours": ours, "exact": exact, "dense": lambda: F.scaled_dot_product_attention(rows, k, v)}, before, error


def live(case: Case, inductor: bool) -> tuple[dict[str, Call], Callable[[], object], float]:
    q = case.normal(case.batch, case.heads, 1, seed=0)

    def buffers(times: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (case.normal(case.batch, case.kv_heads, times * case.length, seed=seed + n) for n in (0, 1))
        return k, v, (torch.arange(times * case.length) < case.length)[None, None, None]

    def attend(given: tuple[Tensor, Tensor, Tensor]) -> Call:
        return lambda: torch.ops.attnopt.live_attention(q, *given, case.dim**-0.5)

    tight, long, others = buffers(1, 1), buffers(4, 3), buffers(1, 1)
    cut = long[0][:, :, : case.length], long[1][:, :, : case.length], tight[2]
    calls = {"ours": attend(tight), "long": attend(long), "cut": attend(cut)}
    calls["eager"] = lambda: F.scaled_dot_product_attention(q, *others, enable_gqa=case.share > 1)
    if inductor:
        # Each shape is compiled for itself: after eight in one process dynamo would run it eagerly.
        torch._dynamo.reset()
        compiled = torch.compile(repeated, dynamic=False)
        again = buffers(1, 1)
        calls["inductor"] = lambda: compiled(q, *again)
    error = 0.0
    for name, given in (("ours", tight), ("long", long)):
        expected = looked(q.double(), given[0].double(), given[1].double(), given[2], case.dim**-0.5)
        error = max(error, relative_error(calls[name](), expected))
    return calls, torch.ones(BETWEEN // 4).sum, error


def measure(case: Case, repeats: int, inductor: bool) -> Row:
    torch.set_num_threads(case.threads)
    calls, before, error = {"planned": planned, "live": live}[case.what](case, inductor)
    times = interleaved(calls, repeats, "thread" if case.threads == 1 else "wall", seconds=8, before=before)
    bounds = {name: ratio(times[name], times["ours"]) for name in calls if name not in ("ours", "long", "cut")}
    if "long" in times:
        bounds["long"] = ratio(times["cut"], times["long"])
    ratios = {name: found for name, (found, _) in bounds.items()}
    lower = {name: low for name, (_, low) in bounds.items()}
    if case.what == "planned":
        ratios["share"], lower["share"] = ratios["exact"] / case.ideal, lower["exact"] / case.ideal
    medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    return Row(case.facts(), error, TOLERANCE[case.dtype], ratios, lower, medians)


def cases(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return [Case(what, 1, dtype, 64, 8, 2, 1, 2048) for what in ("planned", "live") for dtype in TOLERANCE]
    sizes = [*SIZES, *SHORT]
    return [
        Case(what, threads, dtype, 64, *size)
        for what in ("planned", "live") for threads in args.threads for dtype in args.dtype for size in sizes
    ]  # fmt: skip


def aims(rows: list[Row]) -> list[Aim]:
    """The worst of the cases of 16384 tokens, and of all that are long enough for what a call costs."""
    right = [row for row in rows if not row.wrong]

    def least(what: str, name: str, threads: int, length: int, shared: bool | None = None) -> float | None:
        found = []
        for row in right:
            heads, kv_heads = row.case["heads"].split("/")
            wanted = (row.case["what"], row.case["threads"]) == (what, threads) and row.case["length"] >= length
            if wanted and name in row.ratios and shared in (None, heads != kv_heads):
                found.append(row.ratios[name])
        return min(found, default=None)

    made = []
    for threads in sorted({row.case["threads"] for row in right}):
        count = f"{threads} thread" + "s" * (threads > 1)
        for said, wanted, found in (
            ("share of the ideal of a plan, 16384 tokens", 0.8, least("planned", "share", threads, 16384)),
            ("written buffer against inductor, grouped heads", 5.0, least("live", "inductor", threads, 16384, True)),
            ("written buffer against inductor, own KV heads", 0.95, least("live", "inductor", threads, 16384, False)),
            ("written buffer against eager, from 1024 tokens on", 1.0, least("live", "eager", threads, 1024)),
            ("a buffer four times as long", 1 / 1.1, least("live", "long", threads, 16384)),
        ):
            made.append(Aim(f"cache, least {said}, {count}", round(wanted, 2), found))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four small cases, nothing compiled")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="compile nothing")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for case in cases(args):
            rows.append(measure(case, args.repeats, args.inductor and not args.quick))
            print(rows[-1], flush=True)
    done = Run("cpu_cache", rows, environment(), [] if args.quick else aims(rows))
    for line in done.aims:
        print(line)
    for path in [args.out, RESULTS / "cpu_cache-cpu.json" if args.keep else None]:
        if path is not None:
            done.save(path)


if __name__ == "__main__":
    main()
