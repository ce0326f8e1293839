"""Graph breaks and recompilations as Dynamo tells them, with cause and source line."""

from __future__ import annotations

import re
from collections import Counter
from traceback import FrameSummary

from torch._dynamo.utils import graph_break_reasons, guard_failures

from attnopt.examine.records import Break, Recompile


class Told:
    """What Dynamo has told since the last time it was asked; `torch._dynamo.reset` makes it forget."""

    def __init__(self, phase: str, cache: str) -> None:
        self.phase, self.cache = phase, cache
        self.breaks_before = len(graph_break_reasons)
        self.failures_before = {code: len(reasons) for code, reasons in guard_failures.items()}

    def breaks(self) -> list[Break]:
        new = graph_break_reasons[self.breaks_before :]
        self.breaks_before = len(graph_break_reasons)
        found = Counter((reason.reason, line_of(reason.user_stack)) for reason in new)
        return [Break(self.phase, self.cache, *parts_of(text), line, n) for (text, line), n in found.items()]

    def recompiles(self, when: str) -> list[Recompile]:
        """One for each function; where several compilations of it failed their guards, the latest one's first."""
        found = []
        for code, reasons in guard_failures.items():
            guards = [guard_of(text) for text in reasons[self.failures_before.get(code, 0) :]]
            self.failures_before[code] = len(reasons)
            if guards:
                lines = [line for _, line in guards if line] or [f"{code.co_filename}:{code.co_firstlineno}"]
                causes = tuple(dict.fromkeys(cause for cause, _ in guards))
                found.append(Recompile(self.phase, self.cache, when, code.co_qualname, lines[0], causes))
        return found


def line_of(stack: list[FrameSummary]) -> str:
    """file:line of the innermost frame."""
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""


def parts_of(text: str) -> tuple[str, str, str]:
    """(cause, explanation, remedy) of a break's text; what it does not have is empty."""
    lines = [line.strip() for line in text.strip().splitlines()]
    cause = lines[0] if lines else "Dynamo does not say why"

    def said(label: str) -> str:
        return next((line.removeprefix(label).strip() for line in lines[1:] if line.startswith(label)), "")

    return cause, said("Explanation:"), said("Hint:")


def guard_of(text: str) -> tuple[str, str]:
    """(a failed guard in one line, file:line that it came of if Dynamo says so): ``0/0: n == 8  # y = f(n)  # m.py:3 in
    forward`` is one, with the number of the compilation it belonged to before it."""
    whole = " ".join(re.sub(r"^\d+/\d+(_\d+)?: ", "", text.partition("\nUser stack trace")[0]).split())
    said = re.fullmatch(r"(?P<guard>.*?) # .*# (?P<line>\S+:\d+) in .*", whole)
    return (said["guard"], said["line"]) if said else (whole, "")
