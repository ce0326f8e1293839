"""Timings on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from attnopt.report.cells import cell_text, is_number
from attnopt.report.terminal.console import console, print_titled, table


def print_bench(rows: Sequence[Mapping[str, Any]], title: str = "Benchmark", to: Console | None = None) -> None:
    """Rows of whatever columns they hold, in the order of first appearance; numbers to four digits."""
    to = to or console()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [c for c in columns if any(is_number(row.get(c)) for row in rows)]
    listed = table([c.replace("_", " ") for c in columns], [c.replace("_", " ") for c in numeric])
    for row in rows:
        listed.add_row(*(cell_text(row.get(c)) for c in columns))
    print_titled(to, title, listed)
