"""What is being done, how far it is and how long the rest will take: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TextIO

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from attnopt.escapes import visible
from attnopt.progress import Progress

# Seconds between two lines of a log.
HEARTBEAT = 30.0
# Columns of the whole line, and of the bar in it.
WIDEST, BAR = 100, 12
# Of the figures, so that they do not jump as they grow.
WIDTHS = (5, 9, 5, 10)
# Columns that what is done keeps on a narrow terminal; figures go before it has fewer.
LEAST = 12
TURNING = {True: "-\\|/", False: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"}


@dataclass(frozen=True)
class Stage:
    """One stage: begun at `started`, seconds on the clock, with `first` of its `of` steps done."""

    what: str
    done: int
    of: int
    first: int
    started: float
    last: float

    def rate(self) -> float:
        """Steps a second, as of the last one that was done; 0 before there is one."""
        return (self.done - self.first) / max(self.last - self.started, 1e-9) if self.done > self.first else 0.0

    def figures(self, now: float) -> list[str]:
        """Counted, the rate, elapsed and left: what is known of these."""
        elapsed = clock(now - self.started)
        if not self.of:
            return [elapsed]
        counted, rate = f"{self.done:>{len(str(self.of))}}/{self.of}", self.rate()
        if not rate:
            return [counted, elapsed]
        left = max(0.0, (self.of - self.done) / rate - (now - self.last))
        return [counted, each(rate), elapsed, f"{clock(left)} left"]


def following(stage: Stage | None, what: str, done: int, of: int, now: float, since: float) -> Stage:
    """The stage after a call. One that begins with a step already done took it since the last call, at `since`."""
    same = stage is not None and stage.what.partition(": ")[0] == what.partition(": ")[0]
    if stage is not None and same and stage.of == of and done >= stage.done:
        return replace(stage, what=what, done=done, last=now if done > stage.done else stage.last)
    return Stage(what, done, of, max(done - 1, 0), since if done else now, now)


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def each(rate: float) -> str:
    """12/s, 1.2/s, 0.12/s, or how long one takes."""
    if rate < 0.1:
        return f"{1 / rate:.0f} s each"
    return f"{rate:.{0 if rate >= 10 else 1 if rate >= 1 else 2}f}/s"


class Line:
    """The line on a terminal, as wide as that allows: the bar gives way first, then figures."""

    def __init__(self) -> None:
        self.stage: Stage | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        if self.stage is None:
            return
        # One column is left free: a terminal goes to the next line when the last is written.
        now, width = time.monotonic(), min(options.max_width - 1, WIDEST)
        parts = [f"{part:>{n}}" for part, n in zip(self.stage.figures(now), WIDTHS, strict=False)]
        bar = drawn(self.stage, now, options.ascii_only) if width >= 60 else ""
        while len(parts) > 1 and width - len("  ".join(parts)) < LEAST:
            parts.pop(1)
        figures = "  ".join(parts)
        room = max(width - len(figures) - len(bar) - (4 if bar else 2), 8)
        what = Text(self.stage.what)
        what.truncate(room, overflow="ellipsis", pad=True)
        line = Text("  ").join([what, *([Text(bar, style="cyan")] if bar else []), Text(figures)])
        line.truncate(max(width, 1), overflow="crop")
        line.no_wrap = True
        yield line


def drawn(stage: Stage, now: float, plain: bool) -> str:
    if not stage.of:
        frames = TURNING[plain]
        return frames[int(8 * now) % len(frames)].ljust(BAR)
    full = BAR * min(stage.done, stage.of) // stage.of
    return ("#" if plain else "━") * full + ("." if plain else "┄") * (BAR - full)


@contextmanager
def progress(mode: str = "auto", to: TextIO | None = None) -> Iterator[Progress]:
    """What to call as work goes on, in stages. mode "auto": a line that is drawn again and again, on standard error,
    where that is a terminal, and nothing elsewhere; "always": elsewhere a line every HEARTBEAT seconds; "never":
    nothing. to: in place of standard error.
    """
    stream = sys.stderr if to is None else to
    target = Console(file=stream, markup=False, emoji=False, highlight=False)
    # Not the console's own word for it: FORCE_COLOR makes that a terminal of every log.
    terminal = stream.isatty() and not target.is_dumb_terminal
    stage: Stage | None = None
    since, line, live = time.monotonic(), Line(), None
    told = since - HEARTBEAT

    def report(what: str, done: int, of: int) -> None:
        nonlocal stage, since, live, told
        now = time.monotonic()
        before, stage, since = stage, following(stage, visible(what), done, of, now, since), now
        line.stage = stage
        if terminal and live is None:
            live = Live(line, console=target, transient=True, refresh_per_second=8, redirect_stdout=sys.stdout.isatty())
            live.start(refresh=True)
        elif live is not None and (before is None or before.started != stage.started):
            live.refresh()
        elif not terminal and now - told >= HEARTBEAT:
            told = now
            print(", ".join([stage.what, *stage.figures(now)]), file=stream, flush=True)

    shown = mode == "always" or (mode == "auto" and stream.isatty())
    try:
        yield report if shown else lambda what, done, of: None
    finally:
        if live is not None:
            live.stop()
