"""What examining a model adds to its graphs: what exact mode would save, timings, graph breaks and recompilations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from attnopt.report.cells import otherwise, phase_of, scaled
from attnopt.report.page.pieces import Part, soft, table
from attnopt.units import bytes_text

SAVING_COLUMNS = [
    ("phase", "phase"), ("length", "tokens"), ("before", "pairs before"), ("after", "pairs after"),
    ("mask_bytes", "masks"), ("repeated_bytes", "copies of K and V, all layers"),
    ("scores_bytes", "scores, all layers"),
]  # fmt: skip
TIMING_COLUMNS = [
    ("phase", "phase"), ("site", "site"), ("queries", "queries"), ("keys", "keys"), ("before_ms", "before, ms"),
    ("after_ms", "after, ms"), ("ratio", "times as fast"), ("lowering", "becomes"), ("wrong", "not timed, because"),
]  # fmt: skip


def examined(graphs: Mapping[str, Any]) -> list[Part]:
    """Of the data of `examined_json`; of `graphs_json`, which has none of it, nothing."""
    parts = []
    if rows := [row for row in graphs.get("savings") or () if row["pairs_before"]]:
        heading = "<h3>What exact mode saves, counted for one sequence: query-key pairs, and bytes no longer made</h3>"
        told = [soft(f"{phase_of(row)} {line}".strip()) for row in rows for line in otherwise(row)]
        shown = table(SAVING_COLUMNS, [_saving(row) for row in rows]) + "".join(told)
        parts.append((heading + shown, "what exact mode saves"))
    timings = [_timing(graph, row) for graph in graphs["graphs"] for row in graph.get("timings") or ()]
    if timings:
        heading = f"<h3>Timed on {escape(graphs['machine'])}: medians, on equal results</h3>"
        parts.append((heading + table(TIMING_COLUMNS, timings), "the timings"))
    breaks = [
        (phase_of(row), row["cause"] + (f", {row['times']} times" if row["times"] > 1 else ""), row["explanation"],
         row["source"])
        for row in graphs.get("breaks") or ()
    ]  # fmt: skip
    again = [
        (phase_of(row), "; ".join(row["causes"]), row["when"], f"{row['function']} at {row['source']}")
        for row in graphs.get("recompiles") or ()
    ]
    for heading, listed in (("Graph breaks", breaks), ("Recompilations", again)):
        if listed:
            parts.append((f"<h3>{heading}</h3>" + _causes(listed), heading.lower()))
    return parts


def _saving(row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        name: bytes_text(row[name]) if row[name] else "" for name in ("mask_bytes", "repeated_bytes", "scores_bytes")
    }
    return {
        "phase": phase_of(row), "length": row["length"] or "as traced", "before": scaled(row["pairs_before"]),
        "after": ("≤ " if row["at_most"] else "") + scaled(row["pairs_after"]), **sizes,
    }  # fmt: skip


def _timing(graph: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A rewriting that gives other results has no times."""
    name = row["site"] + (f" and {row['like'] - 1} like it" if row["like"] > 1 else "")
    times = dict.fromkeys(("before_ms", "after_ms", "ratio")) if row["wrong"] else {}
    return {**row, **times, "phase": phase_of(graph), "site": name}


def _causes(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """rows: phase, cause, what more is known of it, place."""
    items = []
    for phase, cause, more, place in rows:
        where = " · ".join(text for text in (phase, place) if text)
        said = f"<b>{escape(cause)}</b>" + (f"<p>{escape(more)}</p>" if more else "")
        items.append(f'<li>{said}<p class="soft">{escape(where)}</p></li>')
    return f'<ul class="reasons">{"".join(items)}</ul>'
