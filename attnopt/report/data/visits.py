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
    """A line for every site, from the head with the least to that with the most."""
    lines = []
    for site, heads in visits.items():
        visited = _between([h["visited"] / max(h["possible"], 1) for h in heads])
        skipped = _between([h["skipped"] / max(h["visited"], 1) for h in heads])
        which, calls = number_ranges(h["head"] for h in heads), max(h["calls"] for h in heads)
        lines.append(
            f"{site}, head{'s' * (len(heads) > 1)} {which}: {visited} of the blocks visited, of these {skipped} "
            f"skipped by their scores, in {counted(calls, 'call')}"
        )
    return lines


def _between(shares: list[float]) -> str:
    """ "12.5 %", or "12.5 to 88 %" where heads differ."""
    return " to ".join(dict.fromkeys(f"{100 * share:.3g}" for share in (min(shares), max(shares)))) + " %"
