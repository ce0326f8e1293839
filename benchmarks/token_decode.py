"""A step of decoding whose heads select what they read of the cache, against one that reads all of it, on the CPU.

    python -m benchmarks run token_decode -- [--keep] [--out FILE] [--lengths 4096 16384 32768] [--threads 1]

One new token, all query heads alike: 256 selected keys beside 4 sinks and 64 recent ones. Each side is one call of the
operator that generation makes, the new token's write included, on a cache of its own:

    selected   a step in which every head selects, by all features of all keys
    channels   the same, by the 16 features that weigh most
    reused     a step that attends to what an earlier one selected
    behind     a step that attends to what another layer selected

A ratio says how many times as fast each is as `attnopt::attend_update` on the same cache with every key, which is dense
decoding here, and `selected / packed` as torch's SDPA with the query heads of a KV head packed into rows. Ahead of
every call 128 MB of something else are read. Every result is checked against float64: `selected` and `reused` against
the definition (attnopt/codegen/reference_tokens.py).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops  # noqa: F401  registers the operators
from attnopt.cache import Layout, TokenTable
from attnopt.codegen import native
from attnopt.codegen.reference_token_step import relabel
from attnopt.codegen.reference_tokens import TokenRule, best, channels_of, grouped, of_channels
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "3 minutes"
QUICK = ("--lengths", "1024", "--dtype", "float32", "--repeats", "3")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
COUNT, SINK, RECENT, FEATURES = 256, 4, 64, 16
BETWEEN = 2**27


@dataclass(frozen=True)
class Case:
    threads: int
    dtype: str
    heads: int
    kv_heads: int
    dim: int
    length: int


class Side:
    """A cache of its own with all `tokens`, q (1, H, N, D), k and v (1, G, N, D), but the newest, and a step that adds
    it. behind: what another side picked."""

    def __init__(self, tokens: list[Tensor], rule: TokenRule | None, behind: Tensor | None = None) -> None:
        q, k = tokens[:2]
        heads, groups, length, dim, like = q.shape[1], *k.shape[1:], dict(dtype=q.dtype, device=q.device)
        self.tokens, self.scale, counts = tokens, dim**-0.5, dict(dtype=torch.int32, device=q.device)
        layout = Layout.of_spans([0] * heads, [length] * heads, groups, length)
        self.keys, self.values = (torch.zeros(1, layout.slots, dim, **like) for _ in range(2))
        self.n = torch.zeros(1, **counts)
        self.table, self.spans = layout.tables(q.device)
        self.state: tuple[object, ...] | None = None
        if rule is not None:
            chosen = TokenTable((rule,) * heads, (0 if behind is None else 1,) * heads)
            self.picked = torch.full((1, heads, rule.count), -1, **counts)
            asked = torch.zeros(1, heads, dim, **like)
            features = torch.arange(chosen.features, device=q.device).repeat(1, groups, 1)
            labels = torch.zeros(1, chosen.features, layout.slots, **like)
            sources = [] if behind is None else [behind]
            age = torch.full((1, heads), -1, **counts)
            self.quick = chosen.quick(layout, q.device)
            self.state = *chosen.tensors(length, q.device), self.picked, asked, age, sources, features, labels
        # As a prompt leaves it.
        for group, slot in enumerate(self.table[:, 0].tolist()):
            here = slice(slot, slot + length - 1)
            self.keys[:, here], self.values[:, here] = (x[:, group, :-1] for x in tokens[1:])
        self.n.fill_(length - 1)
        if rule is not None and rule.channels:
            relabel(tokens[0][:, :, :-1], None, self.keys, self.n, self.table, features, labels)

    def step(self) -> Tensor:
        self.n.fill_(self.tokens[1].shape[2] - 1)
        held = self.keys, self.values, self.n, None, self.table
        newest = [x[:, :, -1:] for x in self.tokens]
        if self.state is None:
            return torch.ops.attnopt.attend_update(*newest, *held, self.spans, self.scale, False)
        return torch.ops.attnopt.attend_tokens(*newest, *held, self.quick, self.spans, *self.state, self.scale, False)


def expected(tokens: list[Tensor], scale: float, rule: TokenRule, channels: Tensor | None = None) -> Tensor:
    """The newest token's output where every head selects now, in float64."""
    q, k, v = (x.double() for x in tokens)
    q, length = q[:, :, -1:], k.shape[2]
    narrow = (q, k) if channels is None else (of_channels(q, channels), of_channels(k, channels))
    j = torch.arange(length, device=q.device)
    keep = best(grouped(*narrow), rule.count) | (j < rule.sink) | (length - 1 - j < rule.recent)
    weights = (grouped(q, k) * scale).masked_fill(~keep, -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def measure(case: Case, repeats: int) -> Row:
    torch.set_num_threads(case.threads)
    made, dtype = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    sizes = case.heads, case.kv_heads, case.kv_heads
    tokens = [torch.randn(1, n, case.length, case.dim, generator=made).to(dtype) for n in sizes]
    often, once = TokenRule(COUNT, SINK, RECENT), TokenRule(COUNT, SINK, RECENT, every=1 << 16)
    sides = {"selected": Side(tokens, often), "reused": Side(tokens, once)}
    sides["channels"] = Side(tokens, TokenRule(COUNT, SINK, RECENT, channels=FEATURES))
    sides["behind"] = Side(tokens, often, sides["selected"].picked)
    sides["dense"] = Side(tokens, None)
    packed = tokens[0][:, :, -1].reshape(1, case.kv_heads, -1, case.dim).contiguous()
    calls: dict[str, Callable[[], Tensor]] = {name: side.step for name, side in sides.items()}
    calls["packed"] = lambda: F.scaled_dot_product_attention(packed, tokens[1], tokens[2])
    scale = case.dim**-0.5
    right = expected(tokens, scale, often)
    features = channels_of(*(x[:, :, :-1] for x in tokens[:2]), FEATURES)
    wanted = {"selected": right, "reused": right, "behind": right, "channels": expected(tokens, scale, often, features)}
    error = max(relative_error(calls[name](), x) for name, x in wanted.items())
    between = torch.ones(BETWEEN // 4)
    clock = "thread" if case.threads == 1 else "wall"
    times = interleaved(calls, repeats, clock, seconds=20, before=between.sum)
    bounds = {name: ratio(times["dense"], times[name]) for name in wanted}
    bounds["selected / packed"] = ratio(times["packed"], times["selected"])
    medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    ratios, lower = ({name: found[n] for name, found in bounds.items()} for n in (0, 1))
    return Row(asdict(case), error, TOLERANCE[case.dtype], ratios, lower, medians)


def aims(rows: list[Row]) -> list[Aim]:
    """That it is really faster than reading everything, where the kernel serves."""
    served = [row for row in rows if not row.wrong and not native.unusable(getattr(torch, row.case["dtype"]), "tokens")]
    found = []
    for name in ("selected", "channels", "reused", "behind"):
        seen = [row.lower[name] for row in served if row.case["length"] >= 16384]
        found.append(Aim(f"{name}, from 16384 keys on, least times as fast as dense", 1.0, min(seen, default=None)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for threads in args.threads:
            for dtype in args.dtype:
                for heads, kv_heads, dim in ((32, 8, 128), (8, 8, 64)):
                    for length in args.lengths:
                        rows.append(measure(Case(threads, dtype, heads, kv_heads, dim, length), args.repeats))
                        print(rows[-1], flush=True)
    notes = [f"dense decoding in {d}: {said}" for d in args.dtype if (said := native.unusable(getattr(torch, d)))]
    done = Run("token_decode", rows, environment(), aims(rows) if max(args.lengths) >= 16384 else [], notes)
    for line in (*done.aims, *done.notes):
        print(line)
    for path in [args.out, RESULTS / "token_decode-cpu.json" if args.keep else None]:
        if path is not None:
            done.save(path)


if __name__ == "__main__":
    main()
