"""What would be done to a model, phase by phase, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import counted, folded_name, otherwise, outcomes, phase_of, scaled
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.graphs import dtypes, print_passes, print_reason, print_rows
from attnopt.units import bytes_text

Record = Mapping[str, Any]


def print_examined(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `examined_json`: totals, a table for each phase, savings, timings, breaks and recompilations."""
    to = to or console()
    to.print(Text(outcomes(found["counts"]), style="bold"))
    for phase in found["phases"]:
        to.print()
        rows = [row for row in found["rows"] if (row["phase"], row["cache"]) == (phase["phase"], phase["cache"])]
        to.print(Text(f"{phase_of(phase)}: {short_outcomes(phase)}{dtypes(rows)}", style="bold"))
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


def short_outcomes(counts: Record) -> str:
    """What there is of anything, in one graph unless it says otherwise."""
    states = {"rewritten": "rewritten", "left_alone": "left alone", "not_recognised": "not recognised"}
    found = ", ".join(f"{counts[name]} {said}" for name, said in states.items() if counts[name])
    graphs = f" in {counts['graphs']} graphs" if counts["graphs"] > 1 else ""
    return counted(counts["sites"], "attention") + graphs + (f", {found}" if found else "")


def print_savings(savings: Sequence[Record], to: Console) -> None:
    sizes = {"mask_bytes": "masks", "repeated_bytes": "K and V", "scores_bytes": "scores"}
    held = {name: label for name, label in sizes.items() if any(row[name] for row in savings)}
    listed = table(["tokens", "pairs before", "after", *held.values()], ("pairs before", "after", *held.values()))
    shown, least = "", "<= " if to.options.ascii_only else "≤ "
    for row in (row for row in savings if row["pairs_before"]):
        if phase_of(row) != shown:
            listed.add_row(shown := phase_of(row))
        after = (least if row["at_most"] else "") + scaled(row["pairs_after"])
        length = f"  {row['length'] or 'as traced'}"
        memory = (bytes_text(row[name]) if row[name] else "" for name in held)
        listed.add_row(length, scaled(row["pairs_before"]), after, *memory)
    of = {"masks": "masks", "K and V": "K and V repeated for every query head", "scores": "scores"}
    bytes_of = f"; bytes no longer written, of all layers: {', '.join(of[x] for x in held.values())}" if held else ""
    print_titled(to, f"Counted for one sequence, in exact mode: query-key pairs{bytes_of}", listed)
    for row in savings:
        for line in otherwise(row):
            to.print(Text(f"{phase_of(row)}: {line}"))
    for name, unsized in {phase_of(row): row["unsized"] for row in savings if row["unsized"]}.items():
        to.print(f"{name}: {counted(unsized, 'attention')} not counted, whose lengths do not follow the tokens.")
    to.print()


def print_timings(found: Record, to: Console) -> None:
    """Of the data of `examined_json`: one row for sites that are alike."""
    numeric = ("queries × keys", "before", "after", "times as fast")
    listed = table(["site", *numeric], numeric)
    wrong, shown = [], ""
    for graph in found["graphs"]:
        for row in graph["timings"]:
            name = folded_name(row["site"], row["like"])
            if row["wrong"]:
                wrong.append(f"{phase_of(graph)}, {name}: not timed, {row['wrong']}")
                continue
            if phase_of(graph) != shown:
                listed.add_row(shown := phase_of(graph))
            figures = (f"{row['before_ms']:.3g}", f"{row['after_ms']:.3g}", f"{row['ratio']:.2f}")
            listed.add_row(f"  {name}", f"{row['queries']} × {row['keys']}", *figures)
    said = "median milliseconds, operation by operation, results equal"
    print_titled(to, f"Timed on {found['machine']}: {said}", listed)
    for line in wrong:
        to.print(Text(line, style="red"))


def print_breaks(breaks: Sequence[Record], to: Console) -> None:
    to.print(Text(counted(len(breaks), "graph break") if breaks else "No graph breaks.", style="bold" * bool(breaks)))
    for row in breaks:
        times = f", {row['times']} times" if row["times"] > 1 else ""
        said = f"{phase_of(row)}: {row['cause']}{times}" + (f". {row['explanation']}" if row["explanation"] else "")
        print_reason(to, Text(said), row["source"])


def print_recompiles(recompiles: Sequence[Record], to: Console) -> None:
    count = counted(len(recompiles), "recompilation") if recompiles else "No recompilations."
    to.print(Text(count, style="bold" * bool(recompiles)))
    for row in recompiles:
        said = f"{phase_of(row)}, {row['when'] or 'the first call'}: {'; '.join(row['causes'])}"
        print_reason(to, Text(said), f"{row['function']}, {row['source']}")
