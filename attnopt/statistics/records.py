"""What is summed of one site: the candidates observed, the sums by name, and how those of two runs add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The sinks and windows observed: candidate (s, w) keeps key j of row i iff j <= i and (j < s or i - j < w)."""

    sinks: tuple[int, ...]
    windows: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values, least in (("sinks", self.sinks, 0), ("windows", self.windows, 1)):
            if not values or list(values) != sorted(set(values)) or values[0] < least:
                raise ValueError(f"{name} must be ascending, distinct and at least {least}: {values}")

    def index(self, sink: int, window: int) -> tuple[int, int]:
        return self.sinks.index(sink), self.windows.index(window)


def distance_buckets(length: int) -> list[int]:
    """Lower ends of the buckets of i - j: 0, 1, 2, 4, 8, ...; bucket n > 0 holds 2^(n-1) <= i - j < 2^n."""
    return [0] + [1 << n for n in range((length - 1).bit_length())]


def sum_shapes(heads: int, grid: Grid, length: int, delta: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of an Observation and their shapes."""
    spans = (heads, len(grid.sinks), len(grid.windows))
    shapes: dict[str, tuple[int, ...]] = {name: spans for name in ("t2", "t1", "sample_sq", "mass")}
    if delta:
        shapes["delta"] = spans
    shapes |= {"ablation_t2": (heads,), "entropy": (heads,)}
    shapes["mass_by_distance"] = (heads, len(distance_buckets(length)))
    return shapes


@dataclass
class Observation:
    """Sums of one site at one length; those of other batches, processes or ranks simply add. All float64, on the CPU.

    sums, by name, over rows i of all samples (H query heads, S sinks, W windows):
        t2 (H, S, W): sum t_i^2; t1: sum t_i; sample_sq: sum over samples of (sum_i t_i)^2; mass: sum of dropped mass
        delta (H, S, W), optional: sum ||delta O_i||^2
        ablation_t2 (H,): sum D_i^2, the t2 of dropping every key; entropy (H,): of A_i, nats
        mass_by_distance (H, buckets): sum of A_ij by i - j, see `distance_buckets`
    rows: query rows counted (padded ones are not). samples: sequences counted, once per backward pass.
    """

    heads: int
    grid: Grid
    length: int
    rows: int
    samples: int
    sums: dict[str, Tensor]

    @classmethod
    def zeros(cls, heads: int, grid: Grid, length: int, delta: bool = False) -> Observation:
        shapes = sum_shapes(heads, grid, length, delta)
        return cls(heads, grid, length, 0, 0, {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()})

    def __getattr__(self, name: str) -> Tensor:
        sums = self.__dict__.get("sums", {})
        if name not in sums:
            raise AttributeError(f"this observation does not hold {name!r}")
        return sums[name]

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(sorted(self.sums))

    def damage(self, head: int, sink: int, window: int) -> float:
        """Estimated KL(dense || dropped) of one head in nats, summed over the rows observed: t2 / 2."""
        return 0.5 * float(self.sums["t2"][head, *self.grid.index(sink, window)])

    def __iadd__(self, other: Observation) -> Observation:
        mine, theirs = ((o.heads, o.grid, o.length, o.held) for o in (self, other))
        if mine != theirs:
            raise ValueError(f"these observations do not add: {mine} and {theirs}")
        self._count(other.rows, other.samples, other.sums)
        return self

    def __add__(self, other: Observation) -> Observation:
        sums = {name: tensor.clone() for name, tensor in self.sums.items()}
        total = Observation(self.heads, self.grid, self.length, self.rows, self.samples, sums)
        total += other
        return total

    def _count(self, rows: int, samples: int, sums: Mapping[str, Tensor]) -> None:
        self.rows += rows
        self.samples += samples
        for name, tensor in sums.items():
            self.sums[name] += tensor.to("cpu", torch.float64)
