"""Tables that a benchmark writes into a page of docs/, between two comments that name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnopt.codegen.emit import write_atomically


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, name: str, content: str) -> None:
    """Put `content` between ``<!-- name: begin -->`` and ``<!-- name: end -->``; ValueError where they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page.name} has no place for {name}")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    write_atomically(page, f"{before}{begin}\n{content}\n{after}")
