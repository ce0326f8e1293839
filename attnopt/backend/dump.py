"""`ATTNOPT_DUMP`: each compiled graph leaves what was done to it in a folder.

    DIR/4711/                    a process, by its number
        kernels/KEY.py           the kernels it used
        002/                     a graph it compiled, by its number
            00.capture.txt       the graph as captured, and after each pass that changed it
            05.recover_masks.txt
            sites.txt            one line a site
            report.txt           what was done to each, and why not
            events.jsonl         the same for programs: passes, attempts, rewrites, refusals, misses
            plan.json            the plan, if there is one

A folder that cannot be written is said once, and nothing else comes of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

from attnopt import settings
from attnopt.codegen.emit import write_atomically
from attnopt.codegen.spec import KernelSpec
from attnopt.ir import GraphReport
from attnopt.plan import Plan

log = logging.getLogger("attnopt")
# By process and folder: the process's own folder in it, or None where that could not be written.
_folders: dict[tuple[int, Path], Path | None] = {}


def graph(number: int, report: GraphReport, plan: Plan | None) -> None:
    """Write the folder of a graph that was compiled, if such are asked for."""
    own = folder()
    if own is None:
        return
    place = own / f"{number:03d}"
    try:
        for name, text in files(report):
            write_atomically(place / name, text)
        if plan is not None:
            plan.save(place / "plan.json")
    except (OSError, ValueError) as error:
        give_up(error)


def kernel(spec: KernelSpec, source: str, path: Path) -> None:
    """Write a kernel that this process uses for the first time, if that is asked for."""
    own = folder()
    if own is None:
        return
    try:
        write_atomically(own / "kernels" / path.name, source)
    except OSError as error:
        give_up(error)


def folder() -> Path | None:
    """The folder of this process, made at first use; None where none is asked for, or none can be made."""
    asked = settings.dump()
    if asked is None:
        return None
    at = (os.getpid(), asked)
    if at not in _folders:
        try:
            # The process may change its folder later.
            _folders[at] = claimed(asked.resolve())
        except OSError as error:
            give_up(error)
    return _folders[at]


def claimed(inside: Path) -> Path:
    """A new folder by the number of this process; one of the same number may have been here before."""
    inside.mkdir(parents=True, exist_ok=True)
    own = str(os.getpid())
    for name in chain([own], (f"{own}-{n}" for n in count(2))):
        try:
            (inside / name).mkdir()
        except FileExistsError:
            continue
        return inside / name
    raise AssertionError


def give_up(error: OSError | ValueError) -> None:
    asked = settings.dump()
    assert asked is not None
    log.warning("ATTNOPT_DUMP: nothing more is written to %s: %s", asked, getattr(error, "strerror", "") or error)
    _folders[os.getpid(), asked] = None


def files(report: GraphReport) -> Iterator[tuple[str, str]]:
    """Name and content of the files of one graph."""
    for n, step in enumerate(report.history):
        text = report.source if n == 0 else step.text
        if text:
            yield f"{n:02d}.{step.name}.txt", text
    yield "sites.txt", "".join(f"{site}\n" for site in report.sites)
    yield "report.txt", "".join(f"{line}\n" for line in report.lines())
    yield "events.jsonl", "".join(json.dumps(event) + "\n" for event in events(report))


def events(report: GraphReport) -> Iterator[dict[str, Any]]:
    """What happened, in order: one record of plain data each, its kind under "event"."""
    for n, step in enumerate(report.history):
        yield {
            "event": "pass", "name": step.name, "milliseconds": round(step.milliseconds, 3), "before": step.before,
            "after": step.after, "changed": bool(step.text) or n == 0,
        }  # fmt: skip
    yield from ({"event": "attempt", **asdict(attempt)} for attempt in report.attempts)
    for rewrite in report.rewrites:
        yield {
            "event": "rewrite", "site": rewrite.site.name, "lowering": rewrite.lowering, "note": rewrite.note,
            "choices": list(map(str, rewrite.choices)), "source": rewrite.site.source,
        }  # fmt: skip
    yield from ({"event": "refusal", **asdict(no)} for no in report.refusals)
    yield from ({"event": "miss", **asdict(miss)} for miss in report.misses)
    yield from ({"event": "note", "text": note} for note in report.notes)
    if report.fallback:
        yield {"event": "fallback", "reason": report.fallback, "code": report.fallback_code}
