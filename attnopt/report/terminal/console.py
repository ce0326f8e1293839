"""The console itself: how wide, how coloured, and what a table looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from attnopt.escapes import visible

WIDTH = 140  # of tables that go to a file or a pipe, where no terminal says how wide it is


class Printer(Console):
    """A console that reads no markup, neither its own nor a terminal's, and that leaves it to the command line to end
    quietly when its reader has gone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            # Control segments are the console's own: they move the cursor.
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        self.quiet = True
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """A printer to standard output or error; NO_COLOR and COLUMNS are honoured."""
    stream = sys.stderr if stderr else sys.stdout
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and not encoding.startswith("utf"):
        reconfigure(errors="replace")  # a module's name must not end the program
    made = Printer(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


def table(columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numeric = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    return table


def print_titled(to: Console, title: str, table: Table) -> None:
    """A table under its title; rich would wrap a title of its own to the table's width."""
    to.print(Text(title, style="bold"))
    to.print(table)
