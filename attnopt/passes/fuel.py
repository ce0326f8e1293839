"""Fuel: how many sites a process may still replace, to find the replacement that is wrong by leaving others out."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt import settings


@dataclass
class Fuel:
    """Counts the sites that were replaced in the graphs that share it; `ATTNOPT_FUEL` is the most there may be."""

    made: int = 0

    def left(self, more: int) -> bool:
        """Whether another may be replaced where the graph at hand has `more` beside those of earlier graphs."""
        limit = settings.fuel()
        return limit is None or self.made + more < limit
