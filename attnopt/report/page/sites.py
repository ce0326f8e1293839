"""What was compiled: every attention that was found, what was done to it, and why the others were left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from attnopt.report import figures
from attnopt.report.cells import formula, phase_of
from attnopt.report.page.examined import examined
from attnopt.report.page.pieces import NO_MATPLOTLIB, Part, counts, figure, folded, soft, table

SITE_COLUMNS = [
    ("site", "site"), ("phase", "phase"), ("layers", "layers"), ("graphs", "graphs"), ("form", "form"),
    ("mask", "keeps"), ("done", "rewritten to"), ("why", "note"), ("source", "source"),
]  # fmt: skip


def graphs(data: Mapping[str, Any]) -> list[Part]:
    found = data["graphs"]
    rows = found["rows"]
    parts = [(counts((name.replace("_", " "), count) for name, count in found["counts"].items()), "")]
    if done := [row for row in rows if row["state"] == "rewritten"]:
        parts.append(("<h3>Rewritten</h3>" + table(SITE_COLUMNS, [_row(row) for row in done]), ""))
    for state, heading in (("left alone", "Left alone, and why"), ("not recognised", "Not recognised, and why")):
        if rest := [row for row in rows if row["state"] == state]:
            parts.append((f"<h3>{heading}</h3>" + _reasons(rest), ""))
    parts += [(soft(note), "") for note in dict.fromkeys(note for graph in found["graphs"] for note in graph["notes"])]
    parts += examined(found)
    times = [{"pass": name, "ms": ms} for name, ms in found["pass_milliseconds"].items()]
    if times:
        shown = table([("pass", "pass"), ("ms", "milliseconds, all graphs")], times)
        parts.append((folded(f"Passes, {sum(row['ms'] for row in times):.0f} ms", shown), ""))
    return parts


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "phase": phase_of(row), "form": _form(row), "mask": formula(row["mask"])}


def _form(row: Mapping[str, Any]) -> str:
    """What kind of attention a row is: its pattern, heads and sizes, and dtype."""
    heads = f"{row['heads']} heads" + (f" of {row['dim']}" if row["dim"] else "") if row["heads"] else ""
    return ", ".join(text for text in (row["pattern"], heads, row["dtype"]) if text)


def _reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for who, a line for why, a line for where: reasons are sentences, and no column is wide enough."""
    items = []
    for row in rows:
        what = ", ".join(text for text in (_form(row), row["mask"] and f"keeps {formula(row['mask'])}") if text)
        who = f"<b>{escape(row['site'])}</b>" + (f' <span class="soft">{escape(what)}</span>' if what else "")
        times = f"{row['layers']} layers" if row["layers"] > 1 else ""
        times += "" if row["graphs"] < 2 else f"{', ' if times else ''}{row['graphs']} graphs"
        named = [
            phase_of(row),
            times,
            row["op"] and f"at {row['op']}",
            row["source"],
            row["page"] and f"explained in {row['page']}",
        ]
        where = " · ".join(text for text in named if text)
        items.append(f'<li>{who}<p>{escape(row["why"])}</p><p class="soft">{escape(where)}</p></li>')
    return f'<ul class="reasons">{"".join(items)}</ul>'


def pictures(data: Mapping[str, Any]) -> list[Part]:
    """The first of the pictures is open: a rewrite before and after."""
    if not figures.available():
        return [(soft(NO_MATPLOTLIB), "")]
    from attnopt.report.pictures import picture_svg

    parts = []
    for n, item in enumerate(data["pictures"]):
        caption = f"{item['site']}: {item['caption']}"
        drawn = figure(caption, picture_svg(item), "wide")
        parts.append((drawn if n == 0 else folded(caption, drawn), f"the picture of {caption}"))
    return parts
