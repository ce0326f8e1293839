"""What sections of the page are made of: facts, tables, figures, folded parts. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from zlib import crc32

from attnopt.report import figures
from attnopt.report.cells import cell_text, is_number

# A part of a section: its HTML, and what to call it if it must be left out (empty: it stays).
Part = tuple[str, str]
NO_MATPLOTLIB = "Charts are left out: matplotlib is not installed."


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None else cell_text(value)


def facts(rows: Iterable[tuple[Any, Any]]) -> str:
    cells = (f"<dt>{escape(str(label))}</dt><dd>{escape(plain(value))}</dd>" for label, value in rows)
    return f"<dl>{''.join(cells)}</dl>"


def counts(rows: Iterable[tuple[str, int]]) -> str:
    """Facts that are short enough to stand side by side."""
    cells = (f"<div><dt>{escape(label)}</dt><dd>{count}</dd></div>" for label, count in rows)
    return f'<dl class="counts">{"".join(cells)}</dl>'


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """columns: (key, heading). Numbers are aligned right; a key that no row holds a value for has no column."""
    columns = [(key, text) for key, text in columns if any(row.get(key) not in (None, "") for row in rows)]
    numeric = {key for key, _ in columns if all(is_number(row.get(key)) or row.get(key) in (None, "") for row in rows)}

    right = ' class="n"'

    def cell(tag: str, key: str, text: str) -> str:
        return f"<{tag}{right if key in numeric else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", key, text) for key, text in columns)
    body = "".join(f"<tr>{''.join(cell('td', k, _cell(row.get(k))) for k, _ in columns)}</tr>" for row in rows)
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return plain(value) if isinstance(value, (Mapping, list, tuple)) else cell_text(value)


def folded(summary: str, inner: str) -> str:
    """What is read by few: closed on a screen, open on paper. `inner` is HTML, `summary` is text."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def figure(caption: str, svg: str, kind: str = "") -> str:
    """An SVG with its caption, which is also its name for who cannot see it."""
    text = escape(caption)
    prefix = f"f{crc32(caption.encode('utf-8', 'replace'))}"
    drawn = figures.inline(svg, prefix)
    return (
        f'<figure class="{escape(kind)}"><div class="scroll" role="img" aria-label="{text}">{drawn}</div>'
        f"<figcaption>{text}</figcaption></figure>"
    )
