"""What exact mode saves on sliding windows and packed documents: attention alone and whole models, on the CPU.

    python -m benchmarks.exact_windows                 # the table, five minutes
    python -m benchmarks.exact_windows --quick         # 512 and 1024 tokens, to check the script
    python -m benchmarks.exact_windows --keep          # also benchmarks/results and docs/exact.md
    python -m benchmarks.exact_windows --only packed --dtype bfloat16

Attention alone is compiled by attnopt with its mask made in the graph, and compared with what inductor runs there, SDPA
with a boolean mask, and with causal SDPA. "share" is the speed-up over causal SDPA, divided by how many times fewer
pairs of a query and a key are kept. Models are compiled by inductor and by attnopt. Results are checked first: against
float64 at some rows of queries, and models against the uncompiled ones in float32.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.prefill_models import VOCAB, inputs_of, model_of
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "5 min"
QUICK = ("--quick",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative error: of an attention, and of a model of four layers.
TOLERANCE = {("attention", "float32"): 1e-5, ("attention", "bfloat16"): 1e-2}
TOLERANCE |= {("model", "float32"): 1e-4, ("model", "bfloat16"): 4e-2}
HEADS, KV_HEADS, DIM = 8, 2, 64
SHARE_AIM = {"float32": 0.65, "bfloat16": 0.50}
# Wall seconds spent on the times of one case, after three rounds of each call.
SECONDS = 6.0


@dataclass(frozen=True)
class Case:
    """kind: "attention" or a class of transformers; window: 0 for none; documents: 1 for none; padded: a sixteenth."""

    kind: str
    dtype: str
    length: int
    window: int = 0
    documents: int = 1
    padded: bool = False
    threads: int = 1

    @property
    def what(self) -> str:
        parts = [f"window {self.window}" if self.window else ""]
        parts.append(f"{self.documents} documents" if self.documents > 1 else "")
        return ", ".join(filter(None, [*parts, "padded" if self.padded else ""]))

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "mask": self.what, "dtype": self.dtype, "length": self.length,
                "threads": f"{self.threads} thread{'s' * (self.threads > 1)}"}  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    """Attention under windows of a quarter, an eighth and a 32nd, and in documents of many sizes; then whole models."""
    n = 1024 if quick else 8192
    for dtype, length in (("bfloat16", n), ("float32", n // 2)):
        for window in (length // 4, length // 8, length // 32):
            yield Case("attention", dtype, length, window)
        for documents in (8, 32):
            yield Case("attention", dtype, length, documents=documents)
        yield Case("attention", dtype, length, length // 32, documents=8)
    yield Case("LlamaModel", "bfloat16", n // 2, documents=16)
    yield Case("MistralModel", "bfloat16", n // 2, n // 16)
    if quick:
        return
    yield Case("MistralModel", "bfloat16", n // 2, n // 16, padded=True)
    yield Case("Gemma3TextModel", "bfloat16", n // 2, n // 16)
    yield Case("LlamaModel", "float32", n // 4, documents=16)
    yield Case("MistralModel", "float32", n // 4, n // 32)
    yield Case("attention", "bfloat16", n, n // 8, threads=2)
    yield Case("attention", "bfloat16", n, documents=8, threads=2)


def lengths_of(case: Case) -> list[int]:
    """Documents between a quarter and about twice the mean length."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.rand(case.documents, generator=generator) + 0.15
    ends = (parts.cumsum(0) / parts.sum() * case.length).round().long()
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long)).tolist()


def numbers_of(case: Case) -> Tensor:
    """The document of each token, (N,)."""
    return torch.arange(case.documents).repeat_interleave(torch.tensor(lengths_of(case)))


def kept(case: Case, doc: Tensor, rows: Tensor) -> Tensor:
    """Bool (rows, N): the keys that these queries keep."""
    i, j = rows[:, None], torch.arange(case.length)
    keep = (j <= i) & (doc[rows][:, None] == doc)
    return keep & (i - j < case.window) if case.window else keep


def pairs(case: Case) -> tuple[int, int]:
    """Pairs of a query and a key that are kept, and those of a causal mask."""
    doc, rows = numbers_of(case), torch.arange(case.length)
    starts = torch.searchsorted(doc, doc, right=False)
    first = torch.maximum(starts, rows - case.window + 1) if case.window else starts
    return int((rows - first + 1).sum()), case.length * (case.length + 1) // 2


def attention(case: Case) -> Callable[..., Tensor]:
    """As a model writes it: the mask from indices and documents' numbers, in the graph."""

    def fn(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])[:, None]
        j = torch.arange(q.shape[2])
        keep = j <= i
        if case.window:
            keep = keep & (i - j < case.window)
        if case.documents > 1:
            keep = keep & (doc[:, None] == doc)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[None, None], enable_gqa=True)

    return fn


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model has them: (B, heads, N, D) views of (B, N, heads, D)."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]
    shapes = [(1, case.length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    return q, k, v


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, doc: Tensor, rows: Tensor) -> Tensor:
    """The result at `rows` in float64, (1, H, rows, D)."""
    keys, values = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q[:, :, rows].double() @ keys.mT * DIM**-0.5
    return scores.masked_fill(~kept(case, doc, rows), float("-inf")).softmax(-1) @ values


def attention_row(case: Case) -> tuple[Row, list[str]]:
    """The row, and what attnopt said it did."""
    q, k, v = tensors(case)
    doc = numbers_of(case)
    compiled, said = compiled_by_attnopt(attention(case))
    mask = kept(case, doc, torch.arange(case.length))[None, None]
    ends = torch.tensor(lengths_of(case)).cumsum(0)
    rows = torch.cat([torch.linspace(0, case.length - 1, 96).long(), ends - 1, ends[:-1]]).unique()
    with torch.no_grad():
        found = compiled(q, k, v, doc)
        error = relative_error(found[:, :, rows], reference(case, q, k, v, doc, rows))
        calls: dict[str, Callable[[], object]] = {
            "attnopt": lambda: compiled(q, k, v, doc),
            "masked": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        }
        row = timed(case, "attention", calls, error)
    some, whole = pairs(case)
    if not row.wrong:
        share = row.ratios["causal"] * some / whole
        row = Row(row.case, error, row.tolerance, {**row.ratios, "share": share}, row.lower, row.times_ms)
    return row, said()


def compiled_by_attnopt(fn: Any) -> tuple[Callable[..., Any], Callable[[], list[str]]]:
    from attnopt import backend

    torch._dynamo.reset()
    before = len(backend.reports())
    compiled = torch.compile(fn, backend="attnopt", dynamic=False)
    return compiled, lambda: [line for report in backend.reports()[before:] for line in report.lines()]


def timed(case: Case, kind: str, calls: dict[str, Callable[[], object]], error: float) -> Row:
    """How many times as fast attnopt is as each other call; wall time where several threads share the work."""
    tolerance = TOLERANCE[kind, case.dtype]
    if not error <= tolerance:
        return Row(case.record(), error, tolerance, {}, {}, {})
    clock = "thread" if case.threads == 1 else "wall"
    times = interleaved(calls, 9, clock, SECONDS)
    found = {name: ratio(times[name], times["attnopt"]) for name in calls if name != "attnopt"}
    ratios, lower = {n: r for n, (r, _) in found.items()}, {n: low for n, (_, low) in found.items()}
    medians = {name: 1e3 * sorted(t)[len(t) // 2] for name, t in times.items()}
    return Row(case.record(), error, tolerance, ratios, lower, medians)


def model_row(case: Case) -> tuple[Row, list[str]]:
    """A whole model compiled by attnopt and by inductor."""
    dtype = DTYPES[case.dtype]
    model = model_of(case.kind, "sdpa", dtype, case.length)
    if case.documents > 1:
        generator = torch.Generator().manual_seed(0)
        positions = torch.cat([torch.arange(n) for n in lengths_of(case)])[None]
        ids = torch.randint(5, VOCAB, (1, case.length), generator=generator)
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    else:
        inputs = inputs_of(case.kind, model, case.length, case.padded, dtype)
    shown = inputs.get("attention_mask")

    def output(one: Any) -> Tensor:
        out: Tensor = one(**inputs).last_hidden_state
        return out if shown is None else out[shown.bool()]

    with torch.no_grad():
        expected = output(copy.deepcopy(model).float())
        compiled, said = compiled_by_attnopt(model)
        error = relative_error(output(compiled), expected)
        inductor = torch.compile(copy.deepcopy(model), backend="inductor", dynamic=False)
        output(inductor)
        calls: dict[str, Callable[[], object]] = {
            "attnopt": lambda: compiled(**inputs),
            "inductor": lambda: inductor(**inputs),
        }
        return timed(case, "model", calls, error), said()


def measured(wanted: list[Case]) -> Run:
    rows, notes = [], []
    for case in wanted:
        torch.set_num_threads(case.threads)
        row, said = attention_row(case) if case.kind == "attention" else model_row(case)
        left = [line for line in said if "left alone" in line or "not recognised" in line]
        notes += [f"{row.label}: {line}" for line in left]
        rows.append(row)
        print(row, flush=True)
        print(f"    {said[0] if said else 'no report'}", flush=True)
        gc.collect()
    return Run("exact_windows", rows, environment(), aims(rows), notes)


def aims(rows: list[Row]) -> list[Aim]:
    """The share of the ideal where that is 3 to 5, which is what was aimed at, and that nothing is slower."""
    right = [row for row in rows if not row.wrong]
    found = []
    for dtype, wanted in SHARE_AIM.items():
        some = [r.ratios for r in right if r.case["dtype"] == dtype and "share" in r.ratios]
        shares = [r["share"] for r in some if 3 <= r["causal"] / r["share"] <= 5]
        found.append(Aim(f"least share of an ideal of 3 to 5, {dtype}", wanted, min(shares, default=None)))
    lows = [low for r in right for n, low in r.lower.items() if n in ("masked", "inductor")]
    found.append(Aim("least lower bound over inductor", 0.97, min(lows, default=None)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 and 1024 tokens")
    parser.add_argument(
        "--only", nargs="+", help="cases whose name holds one of these: attention, window, documents, ..."
    )
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="write the run here")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and the section of docs/exact.md")
    args = parser.parse_args()
    wanted = [
        case
        for case in cases(args.quick)
        if (not args.dtype or case.dtype == args.dtype)
        and (not args.only or any(o in f"{case.kind} {case.what}" for o in args.only))
    ]
    run = measured(wanted)
    for aim in run.aims:
        print(aim)
    if args.out is not None:
        run.save(args.out)
    if args.keep:
        from benchmarks.windows_document import keep

        run.save(RESULTS / "exact_windows-cpu.json")
        keep(run)


if __name__ == "__main__":
    main()
