"""Time one attention in every form that exact mode could find it in or lower it to, each compiled by inductor.

    python benchmarks/lowerings.py                       # the table behind attnopt/passes/pays.py, an hour
    python benchmarks/lowerings.py --quick               # 512 tokens, float32, four minutes
    python benchmarks/lowerings.py --group square --length 2048 --dtype bfloat16 --out lowerings.jsonl

One thread, CPU time of the process, the forms of a case interleaved, medians. Every form is checked against float64
first. Figures are times over the case's first form; rows of a file that exists already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops  # noqa: F401  (registers the operator)
from attnopt.codegen.span_cpu import causal_padded

TAKES = "1 h"
QUICK = ("--quick",)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One attention: its sizes, and the group of forms that are compared on it."""

    group: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    dim_v: int

    @property
    def key(self) -> str:
        sizes = f"{self.batch}x{self.heads}/{self.kv_heads}x{self.queries}x{self.keys}x{self.dim}/{self.dim_v}"
        return f"{self.group} {self.dtype} {sizes}"


def written(mask: Tensor | None = None, bias: Tensor | None = None) -> Form:
    """As transformers writes it: K and V repeated, the soft-max in float32."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[1] // k.shape[1]
        if share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores + mask
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)

    return form


def single(mask: Tensor | None = None, causal: bool = False, repeat: bool = False, widen: bool = False) -> Form:
    """One SDPA call; `repeat` copies K and V to every query head, `widen` pads q, k and v to one feature size."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share, scale, dim_v = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, v.shape[-1]
        if repeat:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        if widen:
            width = max(q.shape[-1], dim_v)
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out[..., :dim_v]

    return form


def packed(mask: Tensor | None = None) -> Form:
    """The query heads of a KV head as more rows of one head: no repeat, and larger products."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, k, v, mask, scale=q.shape[-1] ** -0.5)
        return out.reshape(*q.shape[:3], v.shape[3])

    return form


def chunked(chunk: int) -> Form:
    """Causal inside chunks of positions: every chunk is one more sample of the batch."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = (x.transpose(1, 2).unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        out = single(causal=True)(*split).transpose(1, 2)
        return out.unflatten(0, (q.shape[0], -1)).flatten(1, 2).transpose(1, 2)

    return form


def span(heads: int, window: int) -> Form:
    sinks, alphas = torch.zeros(heads, dtype=torch.int32), torch.full((heads,), 2**30, dtype=torch.int32)
    betas = torch.zeros(heads, dtype=torch.float64)

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.attnopt.span_attention(q, k, v, sinks, alphas, betas, None, q.shape[-1] ** -0.5, window, 0)

    return form


def additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, torch.finfo(dtype).min)


def forms(case: Case) -> dict[str, dict[str, Form]]:
    """Sets of forms that compute the same, by name; the first of a set is what the others are compared with."""
    dtype, sizes = getattr(torch, case.dtype), (case.queries, case.keys)
    generator = torch.Generator().manual_seed(1)
    causal = torch.ones(sizes, dtype=torch.bool).tril(case.keys - case.queries)[None, None]
    pad = (torch.arange(case.keys) >= case.keys // 16)[None].repeat(case.batch, 1)
    broadcast, both = pad[:, None, None], causal & pad[:, None, None]
    found: dict[str, dict[str, Form]] = {
        "none": {"written": written(), "sdpa": single(), "sdpa all true": single(broadcast | True)},
        "padding": {
            "written": written(additive(broadcast, dtype)),
            "sdpa bool N x N": single(broadcast.expand(-1, 1, *sizes).contiguous()),
            "sdpa float N x N": single(additive(broadcast.expand(-1, 1, *sizes), dtype)),
            "sdpa bool broadcast": single(broadcast),
            "sdpa float broadcast": single(additive(broadcast, dtype)),
        },
    }
    if case.kv_heads < case.heads:
        found["none"]["sdpa repeated"] = single(repeat=True)
        found["none"]["sdpa packed"] = packed()
        found["padding"]["sdpa packed"] = packed(broadcast)
    if case.dim != case.dim_v:
        found["none"]["sdpa widened"] = single(widen=True)
    if case.queries == case.keys:
        known: dict[str, Form] = {
            "written": written(additive(causal, dtype)), "sdpa bool": single(causal),
            "sdpa float": single(additive(causal, dtype)), "is_causal": single(causal=True),
        }  # fmt: skip
        if case.kv_heads < case.heads:
            known["is_causal repeated"] = single(causal=True, repeat=True)
        if case.dim != case.dim_v:
            known["is_causal widened"] = single(causal=True, widen=True)
        found["causal"] = known
        found["causal padded"] = {
            "written": written(additive(both, dtype)), "sdpa bool": single(both),
            "sdpa float": single(additive(both, dtype)),
            "feature": lambda q, k, v: causal_padded(q, k, v, pad, q.shape[-1] ** -0.5),
        }  # fmt: skip
        slopes = torch.randn(1, case.heads, 1, 1, generator=generator)
        alibi = (slopes * torch.arange(case.keys)[None, None, None] / case.keys).to(dtype)
        found["alibi"] = {
            "written": written(additive(causal, dtype), alibi),
            "sdpa float": lambda q, k, v: single(alibi.masked_fill(~causal, torch.finfo(dtype).min))(q, k, v),
        }
        chunk = case.keys // 4
        block = causal & (torch.arange(case.keys)[:, None] // chunk == torch.arange(case.keys) // chunk)
        found[f"chunk {chunk}"] = {
            "written": written(additive(block, dtype)), "sdpa bool": single(block),
            "sdpa float": single(additive(block, dtype)), "chunked": chunked(chunk),
        }  # fmt: skip
        for window in sorted({case.keys // n for n in (16, 8, 4, 2) if case.keys // n >= 16}):
            band = causal & torch.ones(sizes, dtype=torch.bool).triu(1 - window)
            found[f"window {window}"] = {
                "written": written(additive(band, dtype)), "sdpa bool": single(band),
                "sdpa float": single(additive(band, dtype)), "span": span(case.heads, window),
                "is_causal": single(causal=True),
            }  # fmt: skip
    bias = torch.randn(1, case.heads, *sizes, generator=generator).to(dtype)
    found["bias"] = {"written": written(bias=bias), "sdpa float": single(bias)}
    return found


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model has them: (B, heads, N, D) views of (B, N, heads, D)."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, case.dtype)
    shapes = (
        (case.queries, case.heads, case.dim),
        (case.keys, case.kv_heads, case.dim),
        (case.keys, case.kv_heads, case.dim_v),
    )
    q, k, v = (torch.randn(case.batch, *s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    return q, k, v


def check(name: str, form: Form, expected: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> None:
    difference = (form(q, k, v).double() - expected)[:, :, rows]
    relative = float(difference.norm() / expected[:, :, rows].norm())
    if not relative <= TOLERANCE[q.dtype]:
        raise SystemExit(f"{name}: wrong result, relative error {relative:.2e}")


def measure(case: Case, kind: str, candidates: dict[str, Form], repeats: int) -> dict[str, object]:
    """Median CPU milliseconds of every form, and their ratios to the first."""
    q, k, v = tensors(case)
    compiled = {}
    # Rows whose every key is padded differ between the forms, and mean nothing.
    rows = slice(case.keys // 16 if "padded" in kind and case.queries > 1 else 0, None)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = next(iter(candidates.values()))(q, k, v).double()
        for name, form in candidates.items():
            compiled[name] = torch.compile(form, dynamic=False)
            if (kind, name) != (kind, "is_causal") or not kind.startswith("window"):
                check(f"{case.key}, {kind}, {name}", compiled[name], expected, q, k, v, rows)
            compiled[name](q, k, v)
        begin = time.process_time()
        next(iter(compiled.values()))(q, k, v)
        inner = max(1, int(0.01 / max(1e-6, time.process_time() - begin)))
        times: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(repeats):
            for name, form in compiled.items():
                begin = time.process_time()
                for _ in range(inner):
                    form(q, k, v)
                times[name].append((time.process_time() - begin) / inner)
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    first = next(iter(ms.values()))
    return {
        **asdict(case), "kind": kind, "milliseconds": {n: round(t, 4) for n, t in ms.items()},
        "gain": {n: round(first / t, 3) for n, t in ms.items()},
    }  # fmt: skip


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype in args.dtype:
        for n in args.length:
            yield Case("square", dtype, 1, 8, 8, n, n, 64, 64)
            yield Case("batch", dtype, 2, 8, 8, n, n, 64, 64)
            yield Case("grouped", dtype, 1, 8, 2, n, n, 64, 64)
            yield Case("decode", dtype, 1, 8, 2, 1, n, 64, 64)
            yield Case("cross", dtype, 1, 8, 8, max(1, n // 4), n, 64, 64)
        n = min(args.length)
        yield Case("latent", dtype, 1, 8, 8, n, n, 192, 128)
        yield Case("wide", dtype, 1, 8, 4, n, n, 256, 256)
        yield Case("narrow", dtype, 1, 8, 8, n, n, 16, 16)
        for tiny in (8, 32, 64, 128, 256):
            yield Case("tiny", dtype, 2, 8, 8, tiny, tiny, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens in float32")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--group", nargs="+", help="of these groups only: square, batch, grouped, decode, ...")
    parser.add_argument("--kind", nargs="+", help="masks that begin with one of these: none, padding, causal, ...")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append rows here as JSON lines, and skip those that are there")
    args = parser.parse_args()
    if args.quick:
        args.length, args.dtype = [512], ["float32"]
    torch.set_num_threads(1)
    done = set()
    if args.out is not None and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(*(row[f] for f in Case.__dataclass_fields__), row["kind"]) for row in rows}
    for case in cases(args):
        if args.group and case.group not in args.group:
            continue
        for kind, candidates in forms(case).items():
            if (*asdict(case).values(), kind) in done or (args.kind and not kind.startswith(tuple(args.kind))):
                continue
            row = measure(case, kind, candidates, args.repeats)
            gains = "  ".join(f"{name} {value:.2f}" for name, value in row["gain"].items())  # type: ignore[attr-defined]
            print(f"{case.key:44} {kind:14} {gains}", flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
