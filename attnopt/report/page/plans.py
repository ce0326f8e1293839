"""A plan's figures, the front it was taken from, the search that verified it, and the profile under it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.report import figures
from attnopt.report.cells import search_title
from attnopt.report.data.plans import kept_text, plan_facts, window_text
from attnopt.report.page.pieces import NO_MATPLOTLIB, Part, facts, figure, folded, soft, table


def plan(data: Mapping[str, Any]) -> list[Part]:
    held = data["plan"]
    said = {(str(label), str(value)) for label, value in data.get("summary") or ()}
    rows = [("plan", held["id"]), *plan_facts(held)]
    spans = [
        {"choice": s["label"], "heads": s["heads"], "sink": s["sink"],
         "window": window_text(s),
         "kept": kept_text(s)}
        for s in held["spans"]
    ]  # fmt: skip
    columns = [(key, key) for key in ("choice", "heads", "sink", "window", "kept")]
    length = held["lengths"]["planned"]
    return [
        # The summary may have said some of it.
        (facts((label, value) for label, value in rows if (label, value) not in said), ""),
        (f"<h3>Spans at {length} tokens</h3>" + table(columns, spans), ""),
    ]


def profile(data: Mapping[str, Any]) -> list[Part]:
    seen = data["profile"]
    grid = seen["grid"]
    columns = [(key, key) for key in ("length", "samples", "rows")]
    told = [("model", seen["fingerprint"]), ("windows", grid["windows"]), ("sinks", grid["sinks"]),
            ("dtypes", seen["dtypes"])]  # fmt: skip
    parts = [(facts(told) + table(columns, seen["lengths"]), "")]
    if seen["worst"]:
        first = seen["worst"][0]
        heading = f"Most damaged beyond a window of {first['window']} (sink {first['sink']} kept)"
        worst = [("site", "site"), ("head", "head"), ("length", "length"), ("nats_per_token", "nats per token")]
        parts.append((f"<h3>{heading}</h3>" + table(worst, seen["worst"]), ""))
    if not figures.available():
        return [*parts, (soft(NO_MATPLOTLIB), "")]
    charts = [(figure(caption, svg, "wide" if n == 0 else ""), f"the chart {caption}")
              for n, (caption, svg) in enumerate(figures.damage_figures(seen).items())]  # fmt: skip
    return parts + charts


FRONT_COLUMNS = [
    ("cost", "cost"), ("predicted", "predicted, nats per token"), ("kv_memory", "share of the KV cache"),
    ("chosen", "chosen"),
]  # fmt: skip


def front(data: Mapping[str, Any]) -> list[Part]:
    found = data["front"]
    unit = found["unit"]
    told = f"The cheapest plan for each predicted damage at {found['length']} tokens; cost in {unit}."
    if found.get("plan_unit", unit) != unit:
        told += f" The plan was made with costs in {found['plan_unit']}, which are not at hand."
    parts = [(soft(told), "")]
    points = [{**point, "chosen": "chosen" if point["chosen"] else ""} for point in found["points"]]
    if figures.available():
        if chart := figures.front_figure(found):
            parts.append((figure(f"Predicted damage over cost ({unit}), the chosen point ringed", chart, "wide"),
                          "the chart of the front"))  # fmt: skip
    else:
        parts.append((soft(NO_MATPLOTLIB), ""))
    parts.append((folded(f"The {len(points)} points as numbers", table(FRONT_COLUMNS, points)), "the points"))
    # The search has the same chart of its own.
    if found.get("measured") and not data.get("records"):
        parts += _measured(found["measured"], data)
    return parts


RECORD_COLUMNS = [
    ("step", "step"), ("predicted", "predicted, nats per token"), ("cost", "cost"), ("increase", "measured increase"),
    ("upper_95", "at most (95 %)"), ("length", "length"), ("verdict", "verdict"),
]  # fmt: skip


def records(data: Mapping[str, Any]) -> list[Part]:
    found = data["records"]
    return [(soft(search_title(found)), ""), *_measured(found, data)]


def _measured(found: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[Part]:
    """What was measured, beside what was predicted of it: as a chart, and as numbers."""
    rows = [
        {**row, "upper_95": "no bound" if row.get("upper_95") is None else row["upper_95"],
         "verdict": "holds" if row.get("holds") else "misses"}
        for row in found
    ]  # fmt: skip
    budget = (data.get("plan") or {}).get("budget", {})
    parts = []
    if figures.available():
        if chart := figures.search_figure(found, budget.get("limit"), budget.get("unit", "")):
            parts.append((figure("Predicted against measured", chart, "wide"), "the chart of the search"))
    else:
        parts.append((soft(NO_MATPLOTLIB), ""))
    return [*parts, (table(RECORD_COLUMNS, rows), "")]


def bench(data: Mapping[str, Any]) -> list[Part]:
    columns = dict.fromkeys(name for row in data["bench"] for name in row)
    return [(table([(name, name.replace("_", " ")) for name in columns], data["bench"]), "")]
