"""The line that says how far the work is: its figures, its width, and where nothing may be drawn."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from attnopt.report.terminal import progress
from attnopt.report.terminal.progress import Line, clock, each, following


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(what: str, done: int, of: int, width: int) -> str:
    shown = Line()
    shown.stage = following(None, what, done, of, 0.0, 0.0)
    to = io.StringIO()
    Console(file=to, width=width, height=9, color_system=None).print(shown)
    return to.getvalue()


def test_figures_are_of_the_stage() -> None:
    begun = following(None, "profiling", 0, 8, now=10.0, since=3.0)
    assert begun.figures(12.0) == ["0/8", "0:02"]
    first = following(begun, "profiling: 64 tokens, layers.0", 2, 8, now=14.0, since=12.0)
    assert first.figures(14.0) == ["2/8", "0.50/s", "0:04", "0:12 left"]
    # While nothing comes, the rate stays and what is left runs down.
    where = following(first, "profiling: 64 tokens, layers.1", 2, 8, now=20.0, since=14.0)
    assert where.figures(20.0) == ["2/8", "0.50/s", "0:10", "0:06 left"]
    # The next stage tells of its first step when that is done; it took the time since the last call.
    other = following(where, "verifying", 1, 4, now=30.0, since=20.0)
    assert other.figures(30.0) == ["1/4", "0.10/s", "0:10", "0:30 left"]
    assert following(other, "verifying", 1, 9, 31.0, 30.0).of == 9
    assert following(other, "tracing", 0, 0, 31.0, 30.0).figures(33.0) == ["0:02"]


def test_times_and_rates_are_short() -> None:
    assert [clock(s) for s in (0, 59.9, 60, 3600, 36061)] == ["0:00", "0:59", "1:00", "1:00:00", "10:01:01"]
    assert [each(r) for r in (120, 1.25, 0.125, 0.02)] == ["120/s", "1.2/s", "0.12/s", "50 s each"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_the_line_never_wraps(width: int) -> None:
    for what, of in (("profiling: 4096 tokens, model.layers.31.self_attn [/red], backward", 400), ("tracing", 0)):
        (shown,) = line(what, min(of, 37), of, width).splitlines()
        assert len(shown) < width
        assert shown.startswith(what[:8]) and ("37/400" in shown or not of or width == 20)


def test_a_terminal_gets_a_line_that_is_taken_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    to = Terminal()
    with progress("auto", to) as report:
        report("reading [text]", 0, 0)
        report("profiling", 1, 2)
    drawn = to.getvalue()
    assert "reading [text]" in drawn and "1/2" in drawn
    # What follows begins on an empty line.
    assert re.search(r"\x1b\[2K$", drawn)


def test_elsewhere_it_is_quiet_or_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for mode, to in (("auto", io.StringIO()), ("never", Terminal())):
        with progress(mode, to) as report:
            report("profiling", 1, 2)
        assert to.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    for mode, to in (("always", io.StringIO()), ("auto", Terminal())):
        with progress(mode, to) as report:
            for n in range(3):
                report("profiling: here", n, 2)
        assert to.getvalue() == "profiling: here, 0/2, 0:00\n"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
