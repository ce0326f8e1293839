"""What was recognised in traced graphs, and what was done to it, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.text import Text

from attnopt.ir import GraphReport
from attnopt.report import data
from attnopt.report.cells import folded_name, formula, outcomes
from attnopt.report.terminal.console import console, table

STATES = {"rewritten": "green", "left alone": "yellow", "not recognised": "red"}
Row = Mapping[str, Any]


def print_graphs(reports: Sequence[GraphReport], to: Console | None = None) -> None:
    """Every site, what was done to it or why not; equal layers together."""
    to = to or console()
    found = data.graphs_json(reports)
    to.print(Text(outcomes(found["counts"]) + dtypes(found["rows"]), style="bold"))
    if not found["rows"]:
        to.print("No attention was found in what was compiled." if reports else "Nothing was compiled.")
    print_rows(found["rows"], to)
    print_passes(found, to)


def dtypes(rows: Sequence[Row]) -> str:
    """What all attentions compute in, where that is one dtype; else a column says it."""
    found = {row["dtype"] for row in rows if row["pattern"]}
    return f" ({found.pop()})" if len(found) == 1 else ""


def print_rows(rows: Sequence[Row], to: Console) -> None:
    """The sites; below them what is said of them, and what was not recognised, each with its place."""
    said: dict[tuple[str, str], int] = {}

    def becomes(row: Row) -> Text:
        done = Text(row["done"] or row["state"], style=STATES[row["state"]])
        if row["why"]:
            key = (row["why"], "" if row["state"] == "rewritten" and not row["page"] else place(row))
            done.append(f" [{said.setdefault(key, len(said) + 1)}]", style="default")
        return done

    sites = [row for row in rows if row["pattern"]]
    if sites:
        print_sites(sites, [becomes(row) for row in sites], to)
    for (why, where), n in said.items():
        print_reason(to, Text(f"[{n}] {why}"), where)
    for row in rows:
        if not row["pattern"]:
            head = Text(folded_name(row["site"], row["layers"]))
            head.append(f": {row['state']}, ", style=STATES[row["state"]])
            head.append(row["why"])
            print_reason(to, head, place(row))


def print_sites(sites: Sequence[Row], becomes: Sequence[Text], to: Console) -> None:
    """As a table, or where it is too wide for that, a few lines each."""
    # A column that says the same of all would take the room of others.
    differing = {"dtype": not dtypes(sites), "graphs": any(row["graphs"] > 1 for row in sites)}
    some = [name for name, differs in differing.items() if differs]
    listed = table(["site", "form", "heads", "dim", "keeps", "becomes", *some])
    keeps = [formula(row["mask"], not to.options.ascii_only) for row in sites]
    for row, mask, done in zip(sites, keeps, becomes, strict=True):
        cells = (folded_name(row["site"], row["layers"]), row["pattern"], row["heads"], row["dim"], mask, done)
        listed.add_row(*cells, *(str(row[name]) for name in some))
    if Measurement.get(to, to.options.update(width=1000), listed).maximum <= to.width:
        to.print(listed)
        return
    for row, mask, done in zip(sites, keeps, becomes, strict=True):
        graphs = f", in {row['graphs']} graphs" if row["graphs"] > 1 else ""
        to.print(Padding(Text(folded_name(row["site"], row["layers"])), (0, 0, 0, 1), expand=False))
        facts = f"{row['pattern']}, {row['heads']} heads of {row['dim']}, {row['dtype']}, keeps {mask}{graphs}"
        to.print(Padding(Text(facts), (0, 0, 0, 5), expand=False))
        to.print(Padding(done, (0, 0, 0, 5), expand=False))


def place(row: Row) -> str:
    """Where a reason was seen, and where it is explained: the node, its line in the model's file, the page."""
    return ", ".join(filter(None, (" at ".join(filter(None, (row["node"] or row["op"], row["source"]))), row["page"])))


def print_reason(to: Console, reason: Text, where: str) -> None:
    """A reason, and on lines of its own where it was seen; both wrap under themselves."""
    to.print(Padding(reason, (0, 0, 0, 1), expand=False))
    if where:
        to.print(Padding(Text(where, style="dim"), (0, 0, 0, 5), expand=False))


def print_passes(found: Mapping[str, Any], to: Console) -> None:
    for note in dict.fromkeys(note for graph in found["graphs"] for note in graph["notes"]):
        to.print(Text("note: " + note, style="yellow"))
    times = found["pass_milliseconds"]
    if times:
        each = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        to.print(Text(f"passes {sum(times.values()):.1f} ms: {each}", style="dim"))
