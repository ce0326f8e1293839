"""What is told of a compiled graph, by the level of `ATTNOPT_DEBUG`; each level tells what those below it do.

    1   the sites and what was done to each, what the plan came to, milliseconds by pass
    2   each reason in full, with the node, the source line and the page that explains it
    3   what each pass changed in the graph, as a diff
    4   the source of each emitted kernel, when it is first used
    5   what each pattern answered at each of its anchors, and how often each pattern and rule applied

Without `ATTNOPT_DEBUG` levels 1 and 2 go to the logger "attnopt", as INFO and DEBUG.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from attnopt import settings
from attnopt.codegen.spec import KernelSpec
from attnopt.escapes import visible
from attnopt.ir import GraphReport, Miss, Refusal
from attnopt.passes.graph_text import diffs

log = logging.getLogger("attnopt")
_graphs = count()


def tell(report: GraphReport) -> int:
    """To standard error, or to the logger where it listens and nothing is asked for by `ATTNOPT_DEBUG`. Returns the
    graph's number in this process."""
    number, level = next(_graphs), settings.debug()
    if level:
        text = "\n".join(line for _, line in lines(report, level, number))
        print(visible(text), file=sys.stderr, flush=True)
    elif log.isEnabledFor(logging.INFO):
        for at, line in lines(report, 2 if log.isEnabledFor(logging.DEBUG) else 1, number):
            log.log(logging.INFO if at == 1 else logging.DEBUG, "%s", visible(line))
    return number


def kernel(spec: KernelSpec, source: str, path: Path) -> None:
    """Told at level 4 when a kernel is first used in this process."""
    if settings.debug() >= 4:
        text = f"attnopt kernel: {spec}\n  spec {spec!r}\n  file {path}\n{source}"
        print(visible(text), file=sys.stderr, flush=True)


def lines(report: GraphReport, level: int, number: int = 0) -> Iterator[tuple[int, str]]:
    """(level it belongs to, line) of all that is told of a graph at `level`."""
    yield 1, f"attnopt graph {number}: {summary(report)}"
    yield from ((1, f"  {rewrite}") for rewrite in report.rewrites)
    yield from reasons(report, level)
    yield from ((1, f"  note: {note}") for note in report.notes)
    if report.history:
        each = ", ".join(f"{step.name} {step.milliseconds:.1f}" for step in report.history)
        yield 1, f"  {sum(step.milliseconds for step in report.history):.1f} ms: {each}"
    if level >= 3:
        for _, text in diffs(report.source, [(step.name, step.text) for step in report.history]):
            yield from ((3, f"  {line}") for line in text.splitlines())
    if level >= 5:
        yield from ((5, f"  tried {attempt}") for attempt in report.attempts)
        yield 5, f"  patterns matched: {counted(report)}"
        yield 5, "  rules applied: " + (", ".join(f"{name} {n}" for name, n in report.rules) or "none")


def summary(report: GraphReport) -> str:
    """Sites, rewritten, left alone, not recognised; and the heads of the sites that run by a plan."""
    rewritten = {rewrite.site.name for rewrite in report.rewrites}
    alone = {site.name for site in report.sites} - rewritten
    said = f"{len(report.sites)} attention{'s' * (len(report.sites) != 1)}, {len(rewritten)} rewritten"
    said += f", {len(alone)} left alone, {len(report.misses)} not recognised"
    heads = Counter(choice.candidate for rewrite in report.rewrites for choice in rewrite.choices)
    planned = ", ".join(f"{n} {candidate}" for candidate, n in heads.most_common()) or "no head of this graph"
    return said + (f"; plan {report.plan}: {planned}" if report.plan else "")


def reasons(report: GraphReport, level: int) -> Iterator[tuple[int, str]]:
    """What was left alone or not recognised, at level 1 by its code only."""
    seen: list[Miss | Refusal] = [*report.refusals, *report.misses]
    for reason in seen if report.whole is None else [report.whole, *seen]:
        if level >= 2:
            yield 2, f"  {reason}"
        else:
            state = "not recognised" if isinstance(reason, Miss) else "left alone"
            yield 1, f"  {reason.path or 'graph'}: {state} ({reason.code})"


def counted(report: GraphReport) -> str:
    """How many of the anchors it was asked about each pattern matched: ``sdpa 4 of 4, written-out 0 of 2``."""
    asked = Counter(attempt.pattern for attempt in report.attempts)
    hits = Counter(attempt.pattern for attempt in report.attempts if attempt.matched)
    return ", ".join(f"{name} {hits[name]} of {n}" for name, n in asked.items()) or "none was asked"
