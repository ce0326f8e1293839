"""The console itself: how wide, how coloured, with what bars, and how an error is said."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnopt.errors import AttnoptError

WIDTH = 140  # of tables that go to a file or a pipe, where no terminal says how wide it is


def console(stderr: bool = False) -> Console:
    """A console that reads no markup; NO_COLOR and COLUMNS are honoured."""
    stream = sys.stderr if stderr else sys.stdout
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and not encoding.startswith("utf"):
        reconfigure(errors="replace")  # a module's name must not end the program
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


Advance = Callable[..., None]


@contextmanager
def progress(description: str, total: float | None = None, force: bool = False) -> Iterator[Advance]:
    """A transient bar on standard error, on a terminal or with `force`; yields ``advance(n=1, text=None)``.

    total: None for a bar without an end. text: replaces the description.
    """
    target = console(stderr=True)
    if not target.is_terminal:
        if not force:
            yield lambda n=1, text=None: None
            return
        target = Console(stderr=True, markup=False, emoji=False, highlight=False, force_terminal=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=target, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(n: float = 1, text: str | None = None) -> None:
            bar.update(task, advance=n, description=description if text is None else text)

        yield advance


def print_error(error: AttnoptError, to: Console | None = None) -> None:
    """The problem in red, what to do about it below."""
    to = to or console(stderr=True)
    to.print(Text(error.problem, style="bold red"), soft_wrap=True)
    if error.remedy:
        to.print(Text("  " + error.remedy), soft_wrap=True)


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


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")
