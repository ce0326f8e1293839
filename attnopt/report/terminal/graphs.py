"""What was recognised in traced graphs, and what was done to it, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from attnopt.ir import GraphReport
from attnopt.report import data
from attnopt.report.terminal.console import console, counted, print_titled, table

STATES = {"rewritten": "green", "left alone": "yellow", "not recognised": "red"}


def print_graphs(reports: Sequence[GraphReport], to: Console | None = None) -> None:
    """Every site, what was done to it or why not; equal layers together."""
    to = to or console()
    found = data.graphs_json(reports)
    counts = found["counts"]
    rows = found["rows"]
    title = (
        f"{counted(counts['sites'], 'attention')} in {counted(counts['graphs'], 'graph')}: {counts['rewritten']} "
        f"rewritten, {counts['left_alone']} left alone, {counts['not_recognised']} not recognised"
    )
    if not rows:
        to.print(Text(title, style="bold"))
        to.print("No attention was found in what was compiled." if reports else "Nothing was compiled.")
    else:
        several = any(row["graphs"] > 1 for row in rows)
        listed = table(["site", "pattern", "heads", "dim", "keeps", "done", "why"] + ["graphs"] * several)
        for row in rows:
            name = row["site"] + (f" ×{row['layers']}" if row["layers"] > 1 else "")
            done = Text(row["done"] or row["state"], style=STATES[row["state"]])
            why = row["why"]
            at = " at ".join(filter(None, (row["op"], row["source"])))
            place = "; ".join(filter(None, (at, row["page"])))
            if place and (row["state"] != "rewritten" or row["page"]):
                why += f" ({place})"
            cells = [name, row["pattern"], row["heads"], row["dim"], row["mask"], done, why]
            listed.add_row(*cells, *([str(row["graphs"])] if several else []))
        print_titled(to, title, listed)
    for note in dict.fromkeys(note for graph in found["graphs"] for note in graph["notes"]):
        to.print(Text("note: " + note, style="yellow"))
    times = found["pass_milliseconds"]
    if times:
        each = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        to.print(Text(f"passes {sum(times.values()):.1f} ms: {each}", style="dim"))
