"""A plan on a terminal: figures, the map of layers and heads, spans, the search, and one head's candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnopt.plan import Plan
from attnopt.planner.verify import Record
from attnopt.report import data
from attnopt.report.cells import bucket, cell_text, far_sign, letter
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.maps import print_legend, print_map, ramp

DENSE_COLOUR = "#707a8a"
FAR_COLOURS = {"linear": "#a98be0", "mean": "#63b0e8", "gone": "#f2f2f2"}


def print_plan(plan: Plan, to: Console | None = None) -> None:
    """Figures, a map of layers × heads, and the distinct spans with their counts."""
    to = to or console()
    found = data.plan_json(plan)
    grid = Table.grid(padding=(0, 2))
    for label, value in data.plan_facts(found):
        grid.add_row(Text(label, style="dim"), Text(value))
    to.print(Text(f"plan {found['id']}", style="bold"))
    to.print(grid)
    to.print()
    length = found["lengths"]["planned"]
    buckets = sorted({bucket(span["window"]) for span in found["spans"] if not span["dense"] and not span["far"]})
    top = max(bucket(length), 1)

    def cell(head: Mapping[str, Any]) -> tuple[str, str]:
        if head["far"]:
            return far_sign(head), FAR_COLOURS[head["far"]]
        if head["dense"]:
            return "#", DENSE_COLOUR
        size = bucket(head["window"])
        return letter(buckets.index(size)), ramp(size / top)

    print_map(to, {name: [cell(head) for head in heads] for name, heads in found["sites"].items()})
    entries = [(letter(n), ramp(b / top), f"window <= {1 << b}") for n, b in enumerate(buckets)]
    fars = {s["candidate"]: (far_sign(s), FAR_COLOURS[s["far"]], s["candidate"]) for s in found["spans"] if s["far"]}
    print_legend(to, [*entries, *fars.values(), ("#", DENSE_COLOUR, "dense")])
    right = ("heads", "sink", "window", "kept")
    listed = table(["choice", "heads", "sink", "window", "kept"], right)
    for span in found["spans"]:
        window = "none" if span["far"] == "gone" else "all" if span["dense"] else str(span["window"])
        listed.add_row(span["choice"], str(span["heads"]), str(span["sink"]), window, f"{100 * span['kept']:.1f} %")
    print_titled(to, f"Spans at {length} tokens", listed)


def print_records(records: Sequence[Record], to: Console | None = None) -> None:
    """The verify search, one line per evaluation."""
    to = to or console()
    numeric = ("predicted", "cost", "increase", "at most", "length")
    listed = table(["step", *numeric, "budget"], numeric)
    for record in records:
        worst = record.worst
        verdict = Text("holds", style="green") if record.holds else Text("misses", style="red")
        figures = (f"{record.predicted:.3g}", f"{record.cost:.4g}", f"{worst.increase:.4g}", f"{worst.upper_95:.4g}")
        listed.add_row(record.step, *figures, str(worst.length), verdict)
    print_titled(to, "Search on the verify split", listed)


def print_candidates(rows: Sequence[Mapping[str, Any]], title: str = "Candidates", to: Console | None = None) -> None:
    """Rows {choice, damage, cost, chosen, why} of one head, nats per token and what `title` says of costs; the chosen
    one marked."""
    to = to or console()
    listed = table(["", "choice", "damage (nats per token)", "cost", "why"], ("damage (nats per token)", "cost"))
    for row in rows:
        style = "bold green" if row.get("chosen") else ""
        cells = [cell_text(row.get(name)) for name in ("choice", "damage", "cost", "why")]
        listed.add_row(">" if row.get("chosen") else "", *cells, style=style)
    print_titled(to, title, listed)
