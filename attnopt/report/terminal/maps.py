"""Maps of heads on a terminal: a letter and a colour per head, so that a map without colour still reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import short_labels

# From narrow to wide. Viridis in eight steps: its order is seen with any kind of colour vision, and in grey.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
LIGHT = 4  # the first step on which letters are black
LABEL = 28  # columns at most for a site's name; a longer one loses its beginning
RULED = 8  # heads from one mark of the ruler to the next, of maps with one column a head
# A sign of a map and its style.
Cell = tuple[str, str]


def print_map(to: Console, rows: Mapping[str, Sequence[Cell]], columns: str = "heads") -> None:
    """One line per site, one cell per head, or of what `columns` are, under a ruler. As many columns a cell as there is
    room for, two or one; more heads than that go into further blocks."""
    title, labels = short_labels(list(rows))
    labels = [name if len(name) <= LABEL else "…" + name[1 - LABEL :] for name in labels]
    margin, most = max(map(len, labels), default=0), max(map(len, rows.values()), default=0)
    room = max(to.width - margin - 2, RULED)
    wide = 2 if 2 * most <= room else 1
    block = most if wide * most <= room else room // wide // RULED * RULED
    if title:
        to.print(Text(f"{title} × {columns}", style="dim"))
    for start in range(0, most, block or 1):
        end = min(start + block, most)
        to.print(Text(" " * (margin + 1) + _ruler(start, end, wide), style="dim"), no_wrap=True, crop=True)
        for label, cells in zip(labels, rows.values(), strict=True):
            line = Text(label.rjust(margin) + " ")
            for sign, style in cells[start:end]:
                line.append(sign.ljust(wide), style=style)
            to.print(line, no_wrap=True, crop=True)


def _ruler(start: int, end: int, wide: int) -> str:
    """The numbers of some heads, each above its own."""
    step = RULED // wide
    line = ""
    for head in range(start, end, step):
        line = line.ljust((head - start) * wide) + str(head)
    return line


def print_legend(to: Console, entries: Iterable[tuple[str, str, str]]) -> None:
    """(sign, style, meaning), as many on a line as fit."""
    line = Text()
    for sign, style, meaning in entries:
        entry = Text.assemble((f" {sign} ", style), f" {meaning}   ")
        if line and len(line) + len(entry) - 3 > to.width:
            to.print(line)
            line = Text()
        line.append_text(entry)
    to.print(line)


def step_style(step: int) -> str:
    """Letters on a step of the ramp, in what is read on it."""
    step = min(max(step, 0), len(RAMP) - 1)
    return f"{'#000000' if step >= LIGHT else '#ffffff'} on {RAMP[step]}"


def ramp(share: float) -> str:
    """The style of a cell for a share of 1."""
    return step_style(int(max(share, 0.0) * len(RAMP)))
