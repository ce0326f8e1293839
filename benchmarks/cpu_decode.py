"""Decoding over per-head caches on the CPU against one that keeps every token: SDPA packed and grouped, FlexAttention.

    python -m benchmarks run cpu_decode -- [--keep] [--out FILE] [--threads 1 2] [--no-flex]

One query a head. A cache has 64 sinks and a window for each KV head; *ideal* is how many times fewer slots it holds
than the dense one. A ratio says how many times as fast the emitted kernel is as

    packed   SDPA on the dense cache, the query heads of a KV head packed into rows; where sequences differ in length,
             under the mask that this takes
    grouped  SDPA on the dense cache as it is usually called, with enable_gqa
    padded   one SDPA call on the same spans, every head padded to the longest, under an additive mask
    flex     compiled FlexAttention on the dense cache, with the same spans as a block mask

and *share* is the ratio to packed over the ideal. Between two calls of one layer a model reads its weights and the
caches of its other layers; so here, ahead of every call, 128 MB of something else are read, and each side has a cache
of its own. Every result is checked against the reference in float64. One thread: processor time of the thread; more:
wall time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.emit import load
from attnopt.codegen.reference_decode import decode as reference
from attnopt.codegen.spec import SpanDecode
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "11 minutes"
QUICK = ("--quick",)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SINKS = 64
# Less than the weights of one layer of a model with these heads, and many times the cache of a core.
BETWEEN = 2**27
# Windows of eight KV heads, 0 for a dense one; more heads take them in turn.
MIXED = (256, 256, 256, 256, 1024, 1024, 2048, 0)
# Uneven: every sequence of the batch has a length of its own, from all tokens down to little over half of them.
MIXTURES = {"mixed": MIXED, "W1024": (1024,) * 8, "uneven": MIXED}
# (query heads, KV heads, batch, tokens)
SIZES = [(32, 8, 1, 8192), (32, 8, 1, 16384), (32, 32, 1, 8192), (32, 8, 8, 8192)]
SHORT = [(32, 8, 1, length) for length in (256, 512, 1024, 2048, 4096)]


@dataclass(frozen=True)
class Case:
    threads: int
    dtype: str
    dim: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    spans: str

    @property
    def capacities(self) -> list[int]:
        windows = [MIXTURES[self.spans][g % 8] for g in range(self.kv_heads)]
        return [min(SINKS + window, self.length) if window else self.length for window in windows]

    @property
    def order(self) -> list[int]:
        """KV heads as the cache stores them: where torch's operators serve it, those of equal capacity side by side."""
        if native.takes(getattr(torch, self.dtype), self.dim, self.dim):
            return list(range(self.kv_heads))
        return sorted(range(self.kv_heads), key=self.capacities.__getitem__)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        shorter = self.length // (2 * self.batch) if self.spans == "uneven" else 0
        return [self.length - entry * shorter for entry in range(self.batch)]

    @property
    def filled(self) -> list[list[int]]:
        """Slots of each sequence and KV head, in the order of the cache."""
        return [[min(self.capacities[g], length) for g in self.order] for length in self.lengths]

    @property
    def ideal(self) -> float:
        return self.batch * self.kv_heads * self.length / sum(map(sum, self.filled))

    def facts(self) -> dict[str, Any]:
        heads = f"{self.heads}/{self.kv_heads}"
        return {
            "threads": self.threads, "dtype": self.dtype, "dim": self.dim, "heads": heads, "batch": self.batch,
            "length": self.length, "spans": self.spans, "ideal": round(self.ideal, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Cache:
    """The dense cache k, v (B, G, N, D) and what of it the spans keep, as k, v (B, C, D), sinks first.

    there: query heads in the order of the cache; back: in that of the model.
    """

    q: Tensor
    there: Tensor
    back: Tensor
    k: Tensor
    v: Tensor
    kept_k: Tensor
    kept_v: Tensor
    starts: Tensor
    filled: Tensor


def cache_of(case: Case) -> Cache:
    generator = torch.Generator().manual_seed(0)
    dtype, length = getattr(torch, case.dtype), case.length
    q = torch.randn(case.batch, case.heads, 1, case.dim, generator=generator).to(dtype)
    k, v = (torch.randn(case.batch, case.kv_heads, length, case.dim, generator=generator).to(dtype) for _ in range(2))

    def kept(x: Tensor) -> Tensor:
        parts = []
        for group in case.order:
            size = case.capacities[group]
            sinks = min(SINKS, size)
            parts += [x[:, group, :sinks], x[:, group, length - (size - sinks) :]]
        return torch.cat(parts, 1)

    stored = [case.capacities[group] for group in case.order]
    starts = torch.tensor([0, *stored]).cumsum(0, dtype=torch.int32)
    there = torch.arange(case.heads).view(case.kv_heads, -1)[case.order].flatten()
    filled = torch.tensor(case.filled, dtype=torch.int32)
    return Cache(q, there, there.argsort(), k, v, kept(k), kept(v), starts, filled)


def spans_call(case: Case, cache: Cache) -> Callable[[], Tensor]:
    """The emitted kernel, and with it the permutations of heads that the order of the cache takes, if any."""
    decode = load(SpanDecode("cpu", case.dtype, case.heads, case.kv_heads, case.dim, case.dim)).decode
    rest = cache.kept_k, cache.kept_v, cache.starts, cache.filled, case.dim**-0.5
    if case.order == sorted(case.order):
        return lambda: decode(cache.q, *rest)
    return lambda: decode(cache.q.index_select(1, cache.there), *rest).index_select(1, cache.back)


def padded_call(case: Case, cache: Cache) -> Callable[[], Tensor]:
    """Every head padded to the longest, the mask in the dtype of q and made once: SDPA converts a boolean one."""
    longest = max(case.capacities)
    shape = (case.batch, case.kv_heads, longest, case.dim)
    k, v, mask = cache.q.new_zeros(shape), cache.q.new_zeros(shape), cache.q.new_zeros(*shape[:2], 1, longest)
    for group, (start, end) in enumerate(pairwise(cache.starts.tolist())):
        size = end - start
        k[:, group, :size], v[:, group, :size] = cache.kept_k[:, start:][:, :size], cache.kept_v[:, start:][:, :size]
        for entry, counts in enumerate(case.filled):
            mask[entry, group, :, counts[group] :] = float("-inf")
    rows = cache.q[:, cache.there].view(case.batch, case.kv_heads, -1, case.dim)
    mask = mask.expand(-1, -1, rows.shape[2], -1).contiguous()
    return lambda: F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)


def dense_mask(case: Case, cache: Cache) -> Tensor | None:
    """(B, 1, 1, N), additive, where sequences differ in length; None where they do not."""
    if len(set(case.lengths)) == 1:
        return None
    ends = torch.tensor(case.lengths)[:, None, None, None]
    mask = torch.zeros(case.batch, 1, 1, case.length, dtype=cache.q.dtype)
    return mask.masked_fill_(torch.arange(case.length) >= ends, float("-inf"))


def flex_call(case: Case, cache: Cache) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    share, last = case.heads // case.kv_heads, case.length - 1
    windows = torch.tensor([size - SINKS if size < case.length else case.length for size in case.capacities])

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < SINKS) | (last - j < windows[h // share])

    mask = create_block_mask(keep, None, case.heads, 1, case.length, device="cpu")
    # Each shape is compiled for itself: after eight in one process dynamo would run it eagerly.
    torch._dynamo.reset()
    compiled, k, v = torch.compile(flex_attention, dynamic=False), cache.k.clone(), cache.v.clone()
    return lambda: compiled(cache.q, k, v, block_mask=mask, enable_gqa=share > 1)


def measure(case: Case, repeats: int, flex: bool) -> Row:
    torch.set_num_threads(case.threads)
    cache = cache_of(case)
    rows, mask = cache.q.view(case.batch, case.kv_heads, -1, case.dim), dense_mask(case, cache)
    again_k, again_v, between = cache.k.clone(), cache.v.clone(), torch.ones(BETWEEN // 4)
    calls: dict[str, Callable[[], Tensor]] = {
        "spans": spans_call(case, cache),
        "packed": lambda: F.scaled_dot_product_attention(rows, cache.k, cache.v, attn_mask=mask),
        "grouped": lambda: F.scaled_dot_product_attention(
            cache.q, again_k, again_v, attn_mask=mask, enable_gqa=case.heads != case.kv_heads
        ),
    }
    if len(set(case.capacities)) > 1:
        calls["padded"] = padded_call(case, cache)
    if flex:
        calls["flex"] = flex_call(case, cache)
    wide = [x.double() for x in (cache.q[:, cache.there], cache.kept_k, cache.kept_v)]
    stored = reference(*wide, cache.starts, cache.filled, case.dim**-0.5)
    expected = {"spans": stored[:, cache.back], "padded": stored, "flex": stored[:, cache.back]}
    # What it is compared with on the same spans has to be right too.
    error = max(relative_error(calls[n]().view(stored.shape), x) for n, x in expected.items() if n in calls)
    clock = "thread" if case.threads == 1 else "wall"
    times = interleaved(calls, repeats, clock, seconds=8, before=between.sum)
    bounds = {name: ratio(times[name], times["spans"]) for name in calls if name != "spans"}
    ratios = {name: found for name, (found, _) in bounds.items()}
    lower = {name: low for name, (_, low) in bounds.items()}
    ratios["share"], lower["share"] = ratios["packed"] / case.ideal, lower["packed"] / case.ideal
    medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    return Row(case.facts(), error, TOLERANCE[case.dtype], ratios, lower, medians)


def cases(args: argparse.Namespace) -> list[tuple[Case, bool]]:
    """Cases, and whether FlexAttention is compiled for them: half a minute for the first, seconds for each after it."""
    if args.quick:
        return [(Case(1, dtype, 64, 8, 2, 1, 2048, "mixed"), False) for dtype in TOLERANCE]
    found = []
    for threads in args.threads:
        for dtype in args.dtype:
            for dim in args.dim:
                for sizes in SIZES:
                    for spans in MIXTURES if sizes[2] > 1 else ("mixed", "W1024"):
                        flex = args.flex and spans == "mixed" and sizes in SIZES[:2]
                        found.append((Case(threads, dtype, dim, *sizes, spans), flex))
            found += [(Case(threads, dtype, 128, *sizes, "mixed"), False) for sizes in SHORT]
    return found


def aims(rows: list[Row]) -> list[Aim]:
    """The worst of the cases that are long enough for what a call costs."""
    right = [row for row in rows if not row.wrong and row.case["length"] >= 8192]
    found = []
    for threads in sorted({row.case["threads"] for row in right}):
        for what, name, wanted in (
            ("share of the ideal against packed SDPA", "share", 0.85),
            ("against one padded call", "padded", 4.0),
            ("against FlexAttention", "flex", 1.0),
        ):
            seen = [row.ratios[name] for row in right if row.case["threads"] == threads and name in row.ratios]
            count = f"{threads} thread" + "s" * (threads > 1)
            found.append(Aim(f"decode, least {what}, {count}", wanted, min(seen) if seen else None))
    return found


def break_even(rows: list[Row]) -> list[str]:
    """From which length on the mixture of the short cases is no slower than packed SDPA on every token."""
    said = []
    short = [row for row in rows if not row.wrong and (row.case["dim"], row.case["spans"]) == (128, "mixed")]
    short = [row for row in short if (row.case["heads"], row.case["batch"]) == ("32/8", 1)]
    for threads, dtype in sorted({(row.case["threads"], row.case["dtype"]) for row in short}):
        own = [row for row in short if (row.case["threads"], row.case["dtype"]) == (threads, dtype)]
        slower = [row.case["length"] for row in own if row.ratios["packed"] < 1]
        least = min((row.case["length"] for row in own if row.case["length"] > max(slower, default=0)), default=None)
        where = f"from {least} tokens on" if least else "at no length measured"
        said.append(f"{dtype}, {threads} thread(s), mixed, heads 32/8 of 128: no slower than packed SDPA {where}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--no-flex", dest="flex", action="store_false", help="compile no FlexAttention")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for case, flex in cases(args):
            rows.append(measure(case, args.repeats, flex))
            print(rows[-1], flush=True)
    done = Run("cpu_decode", rows, environment(), [] if args.quick else aims(rows), break_even(rows))
    for line in (*done.aims, *done.notes):
        print(line)
    for path in [args.out, RESULTS / "cpu_decode-cpu.json" if args.keep else None]:
        if path is not None:
            done.save(path)


if __name__ == "__main__":
    main()
