"""One self-contained HTML page: nothing is loaded from anywhere, readable on a phone, light, dark and on paper.

    write_page(path, {"title": ..., "summary": [...], "graphs": graphs_json(...), "plan": plan_json(...), ...})

Every key is optional; a section appears when its data does. The figures on the page are those of the JSON data. Style
and script lie in attnopt/assets/report; the page's security policy lets no script run but that one.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from attnopt.codegen.emit import write_atomically
from attnopt.escapes import visible
from attnopt.report.page import code, heads, plans, sites, summary
from attnopt.report.page.pieces import Part, facts, figure, folded, soft
from attnopt.report.page.summary import Tile, strip

__all__ = ["LIMIT", "SECTIONS", "Tile", "render", "strip", "write_page"]

LIMIT = 1_900_000  # bytes; a larger page leaves its largest optional parts out and says so
ASSETS = Path(__file__).parents[2] / "assets" / "report"


def write_page(path: Path | str, data: Mapping[str, Any]) -> Path:
    """Write the page of `data`, whose keys are those of `SECTIONS` and "title"; a reader never sees half of it."""
    path = Path(path)
    write_atomically(path, render(data))
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page's text, under `LIMIT` bytes as long as its tables are."""
    made = [(name, heading, make(data)) for name, heading, keys, make in SECTIONS if any(data.get(k) for k in keys)]
    sections = [section for section in made if section[2]]
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style += heads.styles(data)
    left_out = _left_out([part for _, _, own in sections for part in own], LIMIT - len(style) - len(script))
    body = []
    for name, heading, own in sections:
        body.append(f'<section id="{name}"><h2>{escape(heading)}</h2>')
        body += [text if what not in left_out else soft(f"Left out for its size: {what}.") for text, what in own]
        body.append("</section>")
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    page = _document(str(data.get("title") or "attnopt"), style, script, links, "\n".join(body))
    # A name may hold what UTF-8 cannot, or HTML.
    return visible(page)


def _left_out(parts: list[Part], limit: int) -> set[str]:
    """The names of the largest parts without which the others are within `limit` bytes."""
    sizes = [(len(text.encode("utf-8", "replace")), what) for text, what in parts]
    total, found = sum(size for size, _ in sizes), set()
    for size, what in sorted((s for s in sizes if s[1]), reverse=True):
        if total <= limit:
            break
        total -= size
        found.add(what)
    return found


def _document(title: str, style: str, script: str, links: str, body: str) -> str:
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>"
        '<button type="button" id="theme" class="scripted" aria-label="colours: as the system">◐ auto</button>'
        f'</header>\n<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _figures(data: Mapping[str, Any]) -> list[Part]:
    return [(figure(caption, svg), f"the figure {caption}") for caption, svg in data["figures"].items()]


def _environment(data: Mapping[str, Any]) -> list[Part]:
    plain = {name: value for name, value in data["environment"].items() if not isinstance(value, Mapping)}
    nested = {name: value for name, value in data["environment"].items() if isinstance(value, Mapping)}
    return [(facts(plain.items()), ""), *((folded(name, facts(of.items())), "") for name, of in nested.items())]


# The section's id, its heading, the keys of the data of which it needs one, and its parts.
SECTIONS: list[tuple[str, str, tuple[str, ...], Callable[[Mapping[str, Any]], list[Part]]]] = [
    ("summary", "Summary", ("summary", "plan", "graphs", "profile"), summary.summary),
    ("notes", "Notes", ("notes",), summary.notes),
    ("sites", "Attentions", ("graphs",), sites.graphs),
    ("map", "Heads", ("plan", "profile", "candidates"), heads.heads),
    ("plan", "Plan", ("plan",), plans.plan),
    ("profile", "Profile", ("profile",), plans.profile),
    ("front", "Front", ("front",), plans.front),
    ("search", "Predicted against measured", ("records",), plans.records),
    ("bench", "Benchmark", ("bench",), plans.bench),
    ("pictures", "Before and after", ("pictures",), sites.pictures),
    ("kernels", "Emitted kernels", ("kernels",), code.kernels),
    ("figures", "Figures", ("figures",), _figures),
    ("environment", "Environment", ("environment",), _environment),
]
