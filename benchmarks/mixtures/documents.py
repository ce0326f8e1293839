"""Made-up documents whose far past matters in a known way, and how well anyone could predict them.

A document is pairs of a marker and a value: ``m v m v ...``. Each of F markers has T values of its own, and each
document draws, for every marker, a distribution over those from Dirichlet(concentration): what is to be learned while
reading. Markers follow a table that all documents share: the next one is mostly a function of the last two.

    diffuse   8 markers, 16 values, concentration 0.15: hundreds of occurrences, all alike, add up to a histogram
    recall    64 markers, 8 values, concentration 0.02: nearly always one value, most often seen far above

Both take the same attention, from a marker to the values of that marker; in the first it spreads over an eighth of all
keys, in the second it must find one key among thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "calibrate", "verify", "final")


@dataclass(frozen=True)
class Documents:
    """markers: F; values: T of each marker; follow: how often the table decides the next marker, else all are alike
    likely. Token ids: markers are 0 to F - 1, value t of marker f is F + f T + t."""

    name: str
    markers: int
    values: int
    concentration: float
    follow: float

    @property
    def vocabulary(self) -> int:
        return self.markers * (1 + self.values)

    def sequences(self, which: str, length: int, samples: int, seed: int = 0) -> Tensor:
        """Token ids int64 (samples, length); the same for the same arguments, disjoint draws for other splits."""
        rng = np.random.default_rng([SPLITS.index(which), seed, length])
        pairs = -(-length // 2)
        marker = self._markers(rng, pairs, samples)
        shares = rng.dirichlet(np.full(self.values, self.concentration), (samples, self.markers)).cumsum(-1)
        # The last share is one but for rounding: a draw above it is of the last value.
        above = rng.random((samples, pairs, 1)) > np.take_along_axis(shares, marker[..., None], 1)[..., :-1]
        value = self.markers + marker * self.values + above.sum(-1)
        return torch.from_numpy(np.stack((marker, value), -1).reshape(samples, -1)[:, :length].astype(np.int64))

    def _markers(self, rng: np.random.Generator, pairs: int, samples: int) -> np.ndarray:
        """Markers (samples, pairs)."""
        table = np.random.default_rng(0).integers(self.markers, size=(self.markers, self.markers))
        free = rng.integers(self.markers, size=(pairs, samples))
        decided = rng.random((pairs, samples)) < self.follow
        for n in range(2, pairs):
            free[n] = np.where(decided[n], table[free[n - 2], free[n - 1]], free[n])
        return free.T

    def best_losses(self, ids: Tensor, window: int | None = None) -> Tensor:
        """Nats (samples, pairs) of every value, for whoever knows the concentration and sees the last `window` tokens
        (all, if None), exactly: the Dirichlet prior with the counts of that marker's values among them."""
        found = torch.zeros(ids.shape[0], ids.shape[1] // 2, dtype=torch.float64)
        seen = None if window is None else max(1, window // 2)
        for row, of_row in zip(ids.tolist(), found, strict=True):
            counts, totals = np.zeros(self.vocabulary), np.zeros(self.markers)
            for n in range(len(row) // 2):
                marker, value = row[2 * n], row[2 * n + 1]
                share = (counts[value] + self.concentration) / (totals[marker] + self.concentration * self.values)
                of_row[n] = -np.log(share)
                counts[value] += 1
                totals[marker] += 1
                # The pairs that a query at the next marker sees: its own marker is one token of the window.
                if seen is not None and n >= seen:
                    counts[row[2 * (n - seen) + 1]] -= 1
                    totals[row[2 * (n - seen)]] -= 1
        return found


DIFFUSE = Documents("diffuse", 8, 16, 0.15, 0.7)
RECALL = Documents("recall", 64, 8, 0.02, 0.0)
KINDS = {kind.name: kind for kind in (DIFFUSE, RECALL)}
