"""Maps of heads on a terminal: a letter and a colour per head, so that a map without colour still reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnopt.report.cells import short_labels

WIDE = 40  # from so many heads on, a cell of a map is one column and not two
# From narrow to wide, readable on dark and light alike; dense stands apart.
RAMP = ("#1a9850", "#53ae5d", "#8cc665", "#c3d968", "#f0d95f", "#fdb44f", "#f4793c", "#d7402b")


def print_map(to: Console, rows: Mapping[str, Sequence[tuple[str, str]]], columns: str = "heads") -> None:
    """One line per site, one cell (letter, colour) per head, or of what `columns` are."""
    title, labels = short_labels(list(rows))
    wide = 1 if max(map(len, rows.values()), default=0) > WIDE else 2
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column(overflow="fold")
    if title:
        to.print(Text(f"{title} × {columns}", style="dim"))
    for label, cells in zip(labels, rows.values(), strict=True):
        line = Text()
        for sign, colour in cells:
            line.append(sign.ljust(wide), style=f"black on {colour}")
        grid.add_row(Text(label), line)
    to.print(grid)


def print_legend(to: Console, entries: Iterable[tuple[str, str, str]]) -> None:
    line = Text()
    for sign, colour, meaning in entries:
        line.append(f" {sign} ", style=f"black on {colour}")
        line.append(f" {meaning}   ")
    to.print(line)


def ramp(share: float) -> str:
    return RAMP[min(int(max(share, 0.0) * len(RAMP)), len(RAMP) - 1)]
