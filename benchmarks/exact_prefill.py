"""Prefill of stock transformers classes: backend="attnopt" against backend="inductor", no plan, end to end.

    python -m benchmarks.exact_prefill --out exact.jsonl     # 27 classes, eager and sdpa, padded or not, fp32 and bf16
    python -m benchmarks.exact_prefill --quick               # three classes at 512 tokens, to check the script
    python -m benchmarks.exact_prefill --only Llama Bert --dtype bf16
    python -m benchmarks.exact_prefill --out exact.jsonl --keep   # also benchmarks/results and docs/exact.md

A cell is a class, its attention in transformers ("eager" or "sdpa"), padding and dtype; it runs in a process of its
own, where both sides are compiled, checked against the uncompiled model (in bf16 against its weights in float32), and
then called in turn. The figure is the median of the paired ratios of CPU time (above 1: attnopt is faster) with a
bootstrap 95 % interval. Cells that stand in the file of `--out` are not run again; those that failed are, with
`--again`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.prefill_models import CLASSES, inputs_of, model_of

TAKES = "3 h"
QUICK = ("--quick",)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest relative error (Frobenius) against the uncompiled model, four layers deep.
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}
AIM, FLOOR = 1.25, 0.97
QUICK = ("LlamaModel", "MistralModel", "BertModel")


@dataclass(frozen=True)
class Cell:
    name: str
    attention: str
    padded: bool
    dtype: str
    length: int

    def __str__(self) -> str:
        return f"{self.name} {self.attention} {'padded' if self.padded else 'plain'} {self.dtype} {self.length}"


def bootstrap(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """The 95 % interval of the median."""
    held = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = held[picks].median(1).values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def output_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The last hidden state, rows of padding left out: what they hold is not defined."""
    with torch.no_grad():
        found = model(**inputs)
    out = found.last_hidden_state.float()
    mask = inputs.get("attention_mask")
    return out if mask is None or out.shape[1] != mask.shape[1] else out[mask.bool()]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def run_cell(cell: Cell, rounds: int, seconds: float) -> dict[str, Any]:
    """Compile both sides, check them, time them in turn for `rounds` rounds or `seconds` of CPU time."""
    from attnopt import backend

    torch.set_num_threads(1)
    dtype = DTYPES[cell.dtype]
    try:
        model = model_of(cell.name, cell.attention, dtype, cell.length)
        inputs = inputs_of(cell.name, model, cell.length, cell.padded, dtype)
    except ValueError as error:
        return {**asdict(cell), "skipped": str(error).splitlines()[0][:160]}
    expected = output_of(model, inputs)
    if dtype != torch.float32:
        # Eager's own roundings are no truth: the same weights in float32 are.
        wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        expected = output_of(copy.deepcopy(model).float(), wide)
    sides: dict[str, Any] = {}
    errors, compile_s = {}, {}
    for side in ("inductor", "attnopt"):
        torch._dynamo.reset() if not sides else None
        sides[side] = torch.compile(model, backend=side, dynamic=False)
        begin = time.process_time()
        errors[side] = relative(output_of(sides[side], inputs), expected)
        compile_s[side] = round(time.process_time() - begin, 1)
    reports = backend.reports()
    said = {
        "rewrites": sorted({r.lowering for p in reports for r in p.rewrites}),
        "refusals": sorted({r.reason for p in reports for r in p.refusals}),
        "misses": sorted({m.reason for p in reports for m in p.misses}),
        "fallback": sorted({p.fallback for p in reports if p.fallback}),
        "rewritten": sum(len(p.rewrites) for p in reports), "sites": sum(len(p.sites) for p in reports),
    }  # fmt: skip
    row = {**asdict(cell), **said, "errors": errors, "compile_s": compile_s}
    # Unscaled scores in bf16 leave the tolerance through rounding alone: then inductor does as well.
    if not errors["attnopt"] <= max(TOLERANCE[cell.dtype], 1.5 * errors["inductor"]):
        return {**row, "wrong": f"relative error {errors}"}
    times = interleaved(sides, inputs, rounds, seconds)
    ratios = [a / b for a, b in zip(times["inductor"], times["attnopt"], strict=True)]
    low, high = bootstrap(ratios)
    return {
        **row, "ratio": statistics.median(ratios), "low": low, "high": high, "rounds": len(ratios),
        "milliseconds": {s: 1e3 * statistics.median(t) for s, t in times.items()},
    }  # fmt: skip


def interleaved(sides: dict[str, Any], inputs: dict[str, Any], rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of each call; which side goes first alternates, so that neither always finds a warm cache."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    gc.disable()
    begun = time.process_time()
    with torch.no_grad():
        for turn in range(rounds):
            for side in sorted(sides, reverse=bool(turn % 2)):
                begin = time.process_time()
                sides[side](**inputs)
                times[side].append(time.process_time() - begin)
            if turn >= 4 and time.process_time() - begun > seconds:
                break
    gc.enable()
    return times


def cells(args: argparse.Namespace) -> list[Cell]:
    names = [n for n in CLASSES if not args.only or any(o.lower() in n.lower() for o in args.only)]
    if args.quick and not args.only:
        names = list(QUICK)
    length = args.length or (512 if args.quick else 2048)
    dtypes = args.dtype or (["fp32"] if args.quick else list(DTYPES))
    # Every class once before any gets a second spelling: a run that is cut short is still a sample of all.
    grid = itertools.product(dtypes, (False, True), args.attention, names)
    return [Cell(name, attention, padded, dtype, length) for dtype, padded, attention, name in grid]


def in_its_own_process(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell)), "--rounds", str(args.rounds),
               "--seconds", str(args.seconds)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(cell), "failed": f"more than {args.limit} seconds"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"name"'):
            return dict(json.loads(line))
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit status {done.returncode}"]
    return {**asdict(cell), "failed": last[0][:240]}


def stored(path: Path | None, again: bool) -> dict[Cell, dict[str, Any]]:
    found = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        row = json.loads(line)
        if not (again and ("failed" in row or "wrong" in row)):
            found[Cell(*(row[f] for f in Cell.__dataclass_fields__))] = row
    return found


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over all cells and per class, and the cells that break the promise."""
    timed = [r for r in rows if "ratio" in r]
    by_class = {
        n: geometric([r["ratio"] for r in timed if r["name"] == n]) for n in dict.fromkeys(r["name"] for r in timed)
    }
    kinds = {
        f"{a}{', padded' if p else ''}, {d}": geometric(
            [r["ratio"] for r in timed if (r["attention"], r["padded"], r["dtype"]) == (a, p, d)]
        )
        for a, p, d in dict.fromkeys((r["attention"], r["padded"], r["dtype"]) for r in timed)
    }
    return {
        "cells": len(timed), "geometric mean": geometric([r["ratio"] for r in timed]), "aim": AIM, "floor": FLOOR,
        "by class": by_class, "by kind": kinds,
        "below the floor": [str(Cell(*(r[f] for f in Cell.__dataclass_fields__))) for r in timed if r["high"] < FLOOR],
        "lower bound below the floor": [
            str(Cell(*(r[f] for f in Cell.__dataclass_fields__))) for r in timed if r["low"] < FLOOR
        ],
        "wrong": [r["name"] for r in rows if "wrong" in r], "failed": [r["name"] for r in rows if "failed" in r],
    }  # fmt: skip


def environment() -> dict[str, Any]:
    from benchmarks.record import environment as machine

    return {**machine(), "threads": 1}


def table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="CPU time of inductor over that of attnopt: above 1 is faster")
    for column in ("class", "attention", "padded", "dtype", "ratio", "95 %", "ms", "error", "what was done"):
        shown.add_column(column, justify="right" if column in ("ratio", "ms", "error") else "left")
    for r in rows:
        head = (r["name"], r["attention"], "yes" if r["padded"] else "", r["dtype"])
        if "ratio" not in r:
            reason = next(f"{k}: {r[k]}" for k in ("skipped", "failed", "wrong") if k in r)
            shown.add_row(*head, "", "", "", "", reason)
            continue
        did = "; ".join(r["rewrites"]) or "left alone: " + "; ".join(r["refusals"] + r["misses"] + r["fallback"])
        colour = "red" if r["high"] < FLOOR else "yellow" if r["low"] < FLOOR else ""
        ratio = f"[{colour}]{r['ratio']:.2f}[/]" if colour else f"{r['ratio']:.2f}"
        interval = f"{r['low']:.2f} to {r['high']:.2f}"
        shown.add_row(
            *head, ratio, interval, f"{r['milliseconds']['attnopt']:.0f}", f"{r['errors']['attnopt']:.0e}", did
        )
    Console(width=None if sys.stdout.isatty() else 180).print(shown)


def keep(data: dict[str, Any]) -> None:
    """benchmarks/results/exact_prefill-cpu.json, docs/exact.md and its figure."""
    from attnopt.codegen.emit import write_atomically
    from benchmarks.prefill_document import document, figure
    from benchmarks.windows_document import with_section

    root = Path(__file__).resolve().parents[1]
    rows = ",\n".join(json.dumps(row) for row in data["rows"])
    rest = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)[:-2]
    write_atomically(root / "benchmarks/results/exact_prefill-cpu.json", f'{rest},\n "rows": [\n{rows}\n]}}\n')
    write_atomically(root / "docs/exact.md", with_section(document(data)))
    (root / "docs/figures").mkdir(exist_ok=True)
    figure(data, root / "docs/figures/exact.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="append a JSON line per cell; the summary goes beside it")
    parser.add_argument("--only", nargs="+", help="classes whose name holds one of these")
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], choices=["eager", "sdpa"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--length", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=40, help="CPU time spent on a cell's timing, at least 5 rounds"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a cell is given up")
    parser.add_argument("--again", action="store_true", help="run again what failed")
    parser.add_argument("--stored", action="store_true", help="run nothing: what the file of --out holds")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results, docs/exact.md and its figure")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run_cell(Cell(**json.loads(args.cell)), args.rounds, args.seconds)))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    done = stored(args.out, args.again)
    wanted = [cell for cell in cells(args) if cell in done or not args.stored]
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=len(wanted))
        for cell in wanted:
            bar.update(task, description=str(cell))
            if cell not in done:
                done[cell] = in_its_own_process(cell, args)
                if args.out is not None:
                    with args.out.open("a") as file:
                        file.write(json.dumps(done[cell]) + "\n")
            bar.advance(task)
    rows = [done[cell] for cell in wanted]
    data = {"summary": summary(rows), "rows": rows, "environment": environment()}
    table(rows)
    print(json.dumps(data["summary"], indent=1))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    if args.keep:
        keep(data)


if __name__ == "__main__":
    main()
