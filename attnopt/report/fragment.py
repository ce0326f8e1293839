"""An explanation inside a notebook: a piece of HTML without scripts, in the colours of whatever page it stands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from zlib import crc32

from attnopt.escapes import visible
from attnopt.report import figures
from attnopt.report.cells import cell_text, folded_name, outcomes
from attnopt.report.pictures import picture_svg

MOST_PICTURES = 3
# Lines and tints are shares of the page's own text colour: a notebook says in no common way whether it is dark.
STYLE = """
.attnopt{font:14px/1.5 system-ui,sans-serif;color:inherit;max-width:70rem}
.attnopt .name{font-weight:600;margin:.2rem 0}.attnopt .soft{opacity:.72;margin:.2rem 0}
.attnopt .scroll{overflow-x:auto}
.attnopt table{border-collapse:collapse;margin:.5rem 0;color:inherit;background:none}
.attnopt tr,.attnopt th,.attnopt td{background:none!important;color:inherit}
.attnopt th,.attnopt td{border:0;border-bottom:1px solid color-mix(in srgb,currentColor 22%,transparent);
padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;white-space:normal;max-width:26rem}
.attnopt th{font-weight:600;opacity:.72;white-space:nowrap}
.attnopt .done{color:#1a8a4e}.attnopt .left{color:#b0791b}.attnopt .unknown{color:#d1493c}
.attnopt summary{cursor:pointer;margin:.3rem 0}.attnopt svg{max-width:100%;height:auto}
.attnopt pre{font:12px/1.45 ui-monospace,monospace;overflow:auto;max-height:30rem;white-space:pre;padding:.6rem;
margin:.3rem 0;color:inherit;background:color-mix(in srgb,currentColor 5%,transparent)}
.attnopt ins{text-decoration:none;color:#1a8a4e}.attnopt del{text-decoration:none;color:#d1493c}
"""
COLUMNS = (
    ("site", "site"), ("pattern", "form"), ("heads", "heads"), ("dim", "dim"), ("mask", "keeps"), ("done", "done"),
    ("why", "note or reason"), ("source", "source"),
)  # fmt: skip
STATES = {"rewritten": "done", "left alone": "left", "not recognised": "unknown"}


def fragment(data: Mapping[str, Any], history: str, planned: str) -> str:
    """HTML of the data of a page. history: its text; planned: HTML of a plan or profile, of preformatted lines."""
    body = [f'<p class="name">{escape(data["title"])}</p>']
    body += [f'<p class="soft">{escape(note)}</p>' for note in data["notes"]]
    if "graphs" in data:
        body += graphs(data["graphs"])
        body += [opened(item["site"] + ", before and after: " + item["caption"], picture(item))
                 for item in data["pictures"][:MOST_PICTURES] if figures.available()]  # fmt: skip
    if planned:
        body.append(f"<pre>{planned}</pre>")
    if history:
        body.append(opened("History of the passes", f"<pre>{coloured(history.splitlines())}</pre>"))
    text = f'<div class="attnopt"><style>{STYLE}</style>{"".join(body)}</div>'
    # A name may hold what UTF-8 cannot, or HTML.
    return visible(text)


def graphs(found: Mapping[str, Any]) -> list[str]:
    """The counts in a line, and a row for each outcome."""
    notes = dict.fromkeys(note for graph in found["graphs"] for note in graph["notes"])
    said = f"<p>{outcomes(found['counts'])}</p>"
    return [said, table(found["rows"]), *(f'<p class="soft">{escape(note)}</p>' for note in notes)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column that no row says anything in is left out."""
    if not rows:
        return ""
    columns = [(key, name) for key, name in COLUMNS if key == "done" or any(row.get(key) for row in rows)]
    head = "".join(f"<th>{name}</th>" for _, name in columns)
    lines = []
    for row in rows:
        texts = {**row, "site": folded_name(row["site"], row["layers"]), "done": row["done"] or row["state"]}
        cells = (
            f'<td class="{STATES[row["state"]] if key == "done" else ""}">{escape(cell_text(texts.get(key)))}</td>'
            for key, _ in columns
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def opened(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def picture(item: Mapping[str, Any]) -> str:
    prefix = f"a{crc32((item['site'] + item['caption']).encode('utf-8', 'replace'))}"
    return figures.inline(picture_svg(item), prefix)


def coloured(lines: Iterable[str]) -> str:
    """Lines of a log, those of a diff marked."""
    tags = {"+": "ins", "-": "del"}
    marked = []
    for line in lines:
        tag = tags.get(line[4:5]) if line.startswith("    ") else None
        marked.append(f"<{tag}>{escape(line)}</{tag}>" if tag else escape(line))
    return "\n".join(marked)
