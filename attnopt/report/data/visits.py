"""What heads whose keys are selected while running visited in this process so far, as counted beside their kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnopt.ops.selected import tally
from attnopt.report.cells import counted, number_ranges


def visits_json(sites: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """By site, of every head that was served: blocks of keys that it could visit, those visited, of these those skipped
    by their scores, and calls. Sites of equal names in several models are counted together. Waits for the device."""
    found: dict[str, list[dict[str, Any]]] = {}
    for site in dict.fromkeys(sites):
        for head, row in enumerate(tally[site].tolist() if site in tally else ()):
            possible, visited, skipped, calls = row
            if calls:
                numbers = {"possible": possible, "visited": visited, "skipped": skipped, "calls": calls}
                found.setdefault(site, []).append({"head": head, **numbers})
    return found


def visits_lines(visits: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for every site."""
    lines = []
    for site, heads in visits.items():
        possible, visited, skipped = (sum(h[name] for h in heads) for name in ("possible", "visited", "skipped"))
        which, calls = number_ranges(h["head"] for h in heads), max(h["calls"] for h in heads)
        lines.append(
            f"{site}, heads {which}: {100 * visited / max(possible, 1):.3g} % of the blocks visited, of these "
            f"{100 * skipped / max(visited, 1):.3g} % skipped by their scores, in {counted(calls, 'call')}"
        )
    return lines
