"""What two plans or profiles do not have in common, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import is_number, without_common
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.maps import print_legend, print_map, step_style

SAME = ("·", "dim")
LESS, MORE, OTHER = ("-", step_style(1)), ("+", step_style(6)), ("~", step_style(4))
MARKED = 0.1  # of all ranks: a head that moved further is marked


def print_difference(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of `plans_json` or `profiles_json`: totals side by side, then a map of the heads that differ, then which."""
    to = to or console()
    one, other = found["files"]
    to.print(Text(f"{one} -> {other}", style="bold"))
    for note in found["notes"]:
        to.print(Text(note, style="yellow"))
    if found["same"]:
        to.print(Text(f"The {found['of']} do not differ."))
        return
    if found["of"] == "plans":
        _print_plans(to, found)
    else:
        _print_profiles(to, found)


def _print_plans(to: Console, found: Mapping[str, Any]) -> None:
    _side_by_side(to, found["totals"])
    if found["settings"]:
        _side_by_side(to, found["settings"])
    to.print(Text(f"{found['changed']} of {found['heads']} heads have another choice.", style="bold"))
    if not found["changed"]:
        return

    def cell(head: Mapping[str, Any]) -> tuple[str, str]:
        before, after = head["kept"]
        if not head["changed"]:
            return SAME
        if before is None or after is None or before == after:
            return OTHER
        return LESS if after < before else MORE

    print_map(to, {site: [cell(head) for head in heads] for site, heads in found["sites"].items()})
    print_legend(to, [(*LESS, "keeps less"), (*MORE, "keeps more"), (*OTHER, "as much, or not known"), (*SAME, "same")])
    to.print()
    every = [*found["sites"], *(row["sites"] for row in found["changes"])]
    title, names = without_common(every)
    names = names[len(found["sites"]) :]
    listed = table(["*" if title else "sites", "heads", "was", "is", "work"], ("work",))
    for name, row in zip(names, found["changes"], strict=True):
        work = " -> ".join("?" if cost is None else f"{100 * cost:.3g}" for cost in row["cost"])
        listed.add_row(name, row["heads"], *row["labels"], f"{work} %")
    where = f" of {title}" if title else ""
    print_titled(to, f"What changed{where}, and its work as a share of dense pairs", listed)


def _print_profiles(to: Console, found: Mapping[str, Any]) -> None:
    if found["settings"]:
        _side_by_side(to, found["settings"])
    beyond = f"what is lost beyond a window of {found['window']} (sink {found['sink']} kept), {found['unit']}"
    columns = ["length", "heads", "rank correlation", "other / one"]
    listed = table(columns, columns)
    for row in found["lengths"]:
        listed.add_row(str(row["length"]), str(row["heads"]), _said(row["correlation"]), _said(row["ratio"]))
    print_titled(to, f"Heads by {beyond}", listed)
    if not found["moved"]:
        to.print("No head has another rank.")
        return
    heads = sum(map(len, found["sites"].values()))

    def cell(head: Mapping[str, Any]) -> tuple[str, str]:
        before, after = head["ranks"]
        return SAME if abs(after - before) <= MARKED * heads else MORE if after < before else LESS

    print_map(to, {site: [cell(head) for head in row] for site, row in found["sites"].items()})
    moved = f"by more than {MARKED:.0%} of all ranks"
    print_legend(to, [(*MORE, f"more damaged, {moved}"), (*LESS, "less damaged"), (*SAME, "as before")])
    to.print()
    right = ["head", "was", "is", "rank was", "rank is"]
    listed = table(["site", *right], right)
    for row in found["moved"]:
        damages, ranks = ([f"{x:.3g}" for x in row[name]] for name in ("damages", "ranks"))
        listed.add_row(row["site"], str(row["head"]), *damages, *ranks)
    print_titled(to, "Heads that moved most; rank 1 is the most damaged", listed)


def _side_by_side(to: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Figures with their change, or what was asked for in words."""
    figures = all(_is_figure(row["one"]) and _is_figure(row["other"]) for row in rows)
    listed = table(
        ["", "one", "other", *(["change"] if figures else [])], ("one", "other", "change") if figures else ()
    )
    listed.columns[0].no_wrap = True
    for row in rows:
        cells = [row["what"], _said(row["one"]), _said(row["other"])]
        cells += [_change(row["one"], row["other"])] if figures else []
        listed.add_row(*cells, style="" if row["one"] != row["other"] else "dim")
    to.print(listed)


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, bool) or is_number(value)


def _said(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _change(one: Any, other: Any) -> str:
    """By how much a figure rose or fell; nothing where that says nothing."""
    if not is_number(one) or not is_number(other) or not one or one == other:
        return ""
    return f"{100 * (other / one - 1):+.3g} %"
