"""Recorded results as runs, also in the formats older than benchmarks/record.py, so that all can be compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import SCHEMA, Aim, Row, Run


def exact_prefill(data: dict[str, Any]) -> Run:
    """A cell is a row; what was skipped or failed is a note."""
    from benchmarks.exact_prefill import AIM, FLOOR, TOLERANCE

    rows, notes = [], []
    for cell in data["rows"]:
        case = {"class": cell["name"], **{name: cell[name] for name in ("attention", "dtype", "length")}}
        case |= {"padding": "padded" if cell["padded"] else "plain"}
        if "errors" not in cell:
            notes.append(f"{' '.join(map(str, case.values()))}: {cell.get('skipped') or cell.get('failed')}")
            continue
        errors = cell["errors"]
        limit = max(TOLERANCE[cell["dtype"]], 1.5 * errors["inductor"])
        found = {"inductor": cell["ratio"]} if "ratio" in cell else {}
        low = {"inductor": cell["low"]} if "low" in cell else {}
        rows.append(Row(case, errors["attnopt"], limit, found, low, cell.get("milliseconds", {})))
    timed = [row for row in rows if not row.wrong and row.ratios]
    aims = []
    if timed:
        mean = statistics.geometric_mean(row.ratios["inductor"] for row in timed)
        least = min(row.lower["inductor"] for row in timed)
        aims = [
            Aim("geometric mean over inductor", AIM, mean),
            Aim("lower bound over inductor, every cell", FLOOR, least),
        ]
    return Run("exact_prefill", rows, data["environment"], aims, notes)


def end_to_end(data: dict[str, Any]) -> Run:
    """Every exact variant is a row. Planned ones differ from eager on purpose, and their check is a loss."""
    from attnopt import hf
    from attnopt.benchmark import TOLERANCE

    rows = []
    for r in data["rows"]:
        case = {"variant": r["variant"], "dtype": r["dtype"], "length": r["length"]}
        case |= {"padding": "padded" if r["padded"] else "plain"}
        if "planned" not in r["variant"]:
            limit = TOLERANCE[hf.dtype_of(r["dtype"])]
            times = {r["variant"]: r["milliseconds"]}
            rows.append(Row(case, r["error"], limit, {"inductor": r["times_inductor"]}, {}, times))
    return Run("end_to_end", rows, data["environment"], notes=["planned variants are left out"])


# Keys that a format alone has at its top -> its reader.
OLDER: dict[tuple[str, ...], Callable[[dict[str, Any]], Run]] = {
    ("rows", "summary", "environment"): exact_prefill,
    ("rows", "ratios", "uniform", "environment"): end_to_end,
}


def read(path: Path) -> Run:
    """The run in a file of benchmarks/results; SystemExit for one that holds no ratios of times."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") == SCHEMA:
        return Run.load(path)
    for keys, reader in OLDER.items():
        if set(keys) <= set(data):
            try:
                return reader(data)
            except KeyError:
                continue
    raise SystemExit(f"{path.name} holds no ratios of times that could be compared or drawn")
