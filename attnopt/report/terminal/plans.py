"""A plan on a terminal: figures, the map of layers and heads, spans, the search, and one head's candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnopt.plan import UNITS
from attnopt.report import data
from attnopt.report.cells import bucket, cell_text, counted, far_sign, letter, search_title
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.maps import Cell, print_legend, print_map, ramp

# Styles of cells that no window tells apart.
DENSE_STYLE = "#000000 on #aab4c0"
FAR_STYLES = {
    "linear": "#000000 on #d6a4e8",
    "mean": "#000000 on #f2b07b",
    "gone": "#000000 on #ffffff",
    "selected": "#000000 on #8fd0e0",
    "tokens": "#000000 on #b8d977",
}
WIDE = 120  # columns from which on a candidate's reason stands in its own row, and not below
NARROWEST = 4  # windows of 2^4 keys and less have the ramp's first step


def print_plan(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `plan_json`: figures, a map of layers × heads, and the distinct spans with their counts."""
    to = to or console()
    to.print(Text(f"plan {found['id']}", style="bold"))
    print_facts(to, data.plan_facts(found))
    to.print()
    length = found["lengths"]["planned"]
    cell, legend = cells_of(found)
    print_map(to, {name: [cell(head) for head in heads] for name, heads in found["sites"].items()})
    print_legend(to, legend)
    to.print()
    right = ("heads", "sink", "window", "kept")
    listed = table(["choice", *right], right)
    for span in found["spans"]:
        window = data.window_text(span)
        listed.add_row(span["label"], str(span["heads"]), str(span["sink"]), window, data.kept_text(span))
    print_titled(to, f"Spans at {length} tokens", listed)


def print_facts(to: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Labels beside what they say; a budget that was kept in green, one that was missed in red."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts:
        style = {"kept": "green", "missed": "bold red"}.get(value.partition(":")[0], "") if label == "budget" else ""
        grid.add_row(Text(label, style="dim"), Text(value, style=style))
    to.print(grid)


def cells_of(plan: Mapping[str, Any]) -> tuple[Callable[[Mapping[str, Any]], Cell], list[tuple[str, str, str]]]:
    """How a head of `plan_json` is drawn, and the legend, with the number of heads of each kind."""
    spans, top = plan["spans"], max(bucket(plan["lengths"]["planned"]), NARROWEST + 1)
    buckets = sorted({bucket(span["window"]) for span in spans if not span["dense"] and not span["far"]})

    def cell(head: Mapping[str, Any]) -> Cell:
        if head["far"]:
            return far_sign(head), FAR_STYLES[head["far"]]
        if head["dense"]:
            return "#", DENSE_STYLE
        size = bucket(head["window"])
        return letter(buckets.index(size)), ramp((size - NARROWEST) / (top - NARROWEST))

    def meaning(span: Mapping[str, Any]) -> str:
        if span["far"]:
            return str(span["candidate"])
        return "dense" if span["dense"] else f"window <= {1 << bucket(span['window'])}"

    counts: dict[tuple[str, str, str], int] = {}
    for span in spans:
        entry = (*cell(span), meaning(span))
        counts[entry] = counts.get(entry, 0) + span["heads"]
    entries = sorted(counts.items(), key=lambda item: (not item[0][0].islower(), item[0][0] == "#", item[0][0]))
    return cell, [(sign, style, f"{said} ({count})") for (sign, style, said), count in entries]


def print_records(records: Sequence[Mapping[str, Any]], to: Console | None = None) -> None:
    """The verify search, of the data of `records_json`: one line per evaluation."""
    to = to or console()
    numeric = ("predicted", "cost", "increase", "at most", "length")
    listed = table(["step", *numeric, "verdict"], numeric)
    for record in records:
        verdict = Text("holds", style="green") if record["holds"] else Text("misses", style="red")
        bound = "no bound" if record["upper_95"] is None else f"{record['upper_95']:.4g}"
        figures = (f"{record['predicted']:.3g}", f"{record['cost']:.4g}", cell_text(record["increase"]), bound)
        listed.add_row(record["step"], *figures, str(record["length"]), verdict)
    print_titled(to, search_title(records), listed)


def print_head(found: Mapping[str, Any], every: bool = False, to: Console | None = None) -> None:
    """One head of `head_json`: its choice, why, and the candidates on its hull, or `every` one."""
    to = to or console()
    budget, price = found["budget"], found["price"]
    facts = [("chosen", str(found["chosen"])), ("because", str(found["reason"]))]
    if price is not None:
        facts.append(
            ("price", f"{price:.3g} nats per token for one {found['cost_unit']}, at the plan's point of the front")
        )
    counted_so = budget["nats"] is None or budget["unit"] == UNITS["kl"]
    said = "" if counted_so else f", {budget['nats']:.3g} nats per token"
    facts.append(("budget", f"{budget['limit']:g} {budget['unit']}{said}"))
    facts += [("visits", row["visits"]) for row in found["candidates"] if row["chosen"] and row["visits"]]
    to.print(Text(found["head"], style="bold"))
    print_facts(to, facts)
    to.print()
    print_candidates([row for row in found["candidates"] if every or row["hull"] or row["chosen"]], found, to)
    rest = sum(not (row["hull"] or row["chosen"]) for row in found["candidates"])
    if rest and not every:
        to.print(Text(f"{counted(rest, 'further candidate')} best at no price: --all lists them.", style="dim"))
    for note in found["notes"]:
        to.print(Text(note, style="dim"))


def print_candidates(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], to: Console) -> None:
    """Damage at each profiled length and as weighed, nats per token; cost as a share of dense pairs, a far part or a
    selection of blocks counted as the pairs of equal work; the chosen one is marked."""
    lengths = list(dict.fromkeys(n for row in found["candidates"] for n in row["damages"]))
    right = [*lengths, "weighed", "work", "budget"]
    wide = to.width >= WIDE
    listed = table(["", "choice", *right, *(["why"] if wide else [])], right)
    for row in rows:
        damages = [_figure(row["damages"].get(n)) for n in lengths]
        shares = ["?" if row[name] is None else f"{100 * row[name]:.3g} %" for name in ("cost", "share")]
        cells = [row["label"], *damages, _figure(row["damage"]), *shares, *([row["why"]] if wide else [])]
        listed.add_row(">" if row["chosen"] else "", *cells, style="bold" if row["chosen"] else "")
    title = f"Damage in nats per token at {' and '.join(lengths) or 'no'} tokens and as weighed for {found['length']}, "
    print_titled(to, title + "work as a share of dense pairs, share of the budget", listed)
    if not wide:
        print_facts(to, [(row["label"], row["why"]) for row in rows if not row["chosen"]])
        to.print()


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.2g}"
