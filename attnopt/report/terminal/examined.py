"""What would be done to a model, phase by phase, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import bytes_text, scaled
from attnopt.report.terminal.console import console, counted, print_titled, table
from attnopt.report.terminal.graphs import dtypes, print_passes, print_reason, print_rows, totals

Record = Mapping[str, Any]


def print_examined(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `examined_json`: totals, a table for each phase, savings, timings, breaks and recompilations."""
    to = to or console()
    to.print(Text(totals(found["counts"]), style="bold"))
    for phase in found["phases"]:
        to.print()
        rows = [row for row in found["rows"] if (row["phase"], row["cache"]) == (phase["phase"], phase["cache"])]
        to.print(Text(f"{title(phase)}: {short_totals(phase)}{dtypes(rows)}", style="bold"))
        if not rows:
            to.print("No attention was found in what was traced.")
        print_rows(rows, to)
    if not found["phases"]:
        to.print("Nothing was traced: the model has no operation that Dynamo records.")
    to.print()
    if found["savings"]:
        print_savings(found["savings"], to)
    if found["machine"]:
        print_timings(found, to)
    print_breaks(found["breaks"], to)
    print_recompiles(found["recompiles"], to)
    for note in found["notes"]:
        to.print(Text("note: " + note, style="yellow"))
    print_passes(found, to)


def short_totals(counts: Record) -> str:
    """What there is of anything, in one graph unless it says otherwise."""
    states = {"rewritten": "rewritten", "left_alone": "left alone", "not_recognised": "not recognised"}
    found = ", ".join(f"{counts[name]} {said}" for name, said in states.items() if counts[name])
    graphs = f" in {counts['graphs']} graphs" if counts["graphs"] > 1 else ""
    return counted(counts["sites"], "attention") + graphs + (f", {found}" if found else "")


def title(record: Record) -> str:
    return record["phase"] + (f", {record['cache']}" if record["cache"] else "")


def print_savings(savings: Sequence[Record], to: Console) -> None:
    sizes = {"mask_bytes": "mask", "repeated_bytes": "repeats", "scores_bytes": "scores"}
    held = {name: label for name, label in sizes.items() if any(row[name] for row in savings)}
    numeric = ("tokens", "pairs before", "after", *held.values())
    listed = table(["phase", *numeric], numeric)
    listed.columns[0].no_wrap = True
    shown, least = "", "<= " if to.options.ascii_only else "≤ "
    for row in (row for row in savings if row["pairs_before"]):
        most = least if row["at_most"] else ""
        pairs = scaled(row["pairs_before"]), most + scaled(row["pairs_after"])
        length = str(row["length"]) if row["length"] else "as traced"
        phase, shown = "" if title(row) == shown else title(row), title(row)
        listed.add_row(phase, length, *pairs, *(bytes_text(row[name]) if row[name] else "" for name in held))
    of = {"mask": "masks", "repeats": "copies of K and V for query heads that share them", "scores": "scores"}
    bytes_of = f"; bytes no longer made of {', '.join(of[label] for label in held.values())}" if held else ""
    print_titled(to, f"Counted for one sequence, in exact mode: query-key pairs{bytes_of}", listed)
    for name, unsized in {title(row): row["unsized"] for row in savings if row["unsized"]}.items():
        to.print(f"{name}: not counted is what follows no length: {counted(unsized, 'attention')}.")


def print_timings(found: Mapping[str, Any], to: Console) -> None:
    numeric = ("queries", "keys", "before ms", "after ms", "times as fast")
    listed = table(["", "site", *numeric, "becomes"], numeric)
    wrong = []
    for graph in found["graphs"]:
        for row in graph["timings"]:
            name = row["site"] + (f" and {row['like'] - 1} like it" if row["like"] > 1 else "")
            if row["wrong"]:
                wrong.append(f"{name} was not timed: {row['wrong']}")
                continue
            figures = (f"{row['before_ms']:.3g}", f"{row['after_ms']:.3g}", f"{row['ratio']:.2f}")
            listed.add_row(title(graph), name, str(row["queries"]), str(row["keys"]), *figures, row["lowering"])
    print_titled(to, f"Timed on {found['machine']}: medians, operation by operation, on equal results", listed)
    for line in wrong:
        to.print(Text(line, style="red"))


def print_breaks(breaks: Sequence[Record], to: Console) -> None:
    to.print(Text(counted(len(breaks), "graph break") if breaks else "No graph breaks.", style="bold" * bool(breaks)))
    for row in breaks:
        times = f", {row['times']} times" if row["times"] > 1 else ""
        said = f"{title(row)}: {row['cause']}{times}" + (f". {row['explanation']}" if row["explanation"] else "")
        print_reason(to, Text(said), row["source"])


def print_recompiles(recompiles: Sequence[Record], to: Console) -> None:
    count = counted(len(recompiles), "recompilation") if recompiles else "No recompilations."
    to.print(Text(count, style="bold" * bool(recompiles)))
    for row in recompiles:
        said = f"{title(row)}, {row['when'] or 'the first call'}: {'; '.join(row['causes'])}"
        print_reason(to, Text(said), f"{row['function']} at {row['source']}")
