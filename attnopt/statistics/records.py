"""What is summed of one site: the candidates observed, the sums by name, and how those of two runs add."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import ProfileError

# Sums that a backward pass yields, and those that any pass does.
BACKWARD = ("ablation_t2", "sample_sq", "sketch", "t1", "t2")
FORWARD = ("entropy", "mass", "mass_at_key", "mass_by_distance")
KNOWN = frozenset((*BACKWARD, *FORWARD, "delta"))
# What is kept of a retrieval probe.
PROBED = ("ablation_t2", "t2")
# The first keys whose mass is kept one by one: where a model that rests on its first tokens rests.
SINK_KEYS = 16
# Signs of the sketch. On the demo model the correlation of two heads, estimated over five windows, is then off by 0.051
# (root mean square) from that of their rows, with 1024 signs by 0.026.
SKETCH = 256


class MissingStatistic(ProfileError, AttributeError):
    """A sum that exists and was not gathered."""


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


@lru_cache(maxsize=1)
def row_signs(key: str, batch: int, length: int) -> Tensor:
    """Random signs (batch, length, SKETCH), int8, of the query rows of one pass; equal for equal arguments.

    A sum of rows times these is a Johnson-Lindenstrauss sketch (Achlioptas, "Database-friendly random projections",
    2003): products of sketches estimate products of what was summed, without keeping the rows. Sketches of two passes
    add if their signs are independent, hence the key.
    """
    seed = int.from_bytes(hashlib.sha256(f"{key} {length}".encode()).digest()[:7], "little")
    drawn = torch.randint(
        0, 2, (batch, length, SKETCH), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    return drawn.mul_(2).sub_(1)


def sum_names(delta: bool = False, backward: bool = True) -> tuple[str, ...]:
    """The sums that a pass gathers, ascending."""
    return tuple(sorted((*FORWARD, *(BACKWARD if backward else ()), *(("delta",) if delta else ()))))


def sum_shapes(heads: int, grid: Grid, length: int, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the sums of an Observation, by name."""
    spans = (heads, len(grid.sinks), len(grid.windows))
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("t2", "t1", "sample_sq", "mass", "delta"), spans),
        "ablation_t2": (heads,), "entropy": (heads,),
        "mass_by_distance": (heads, len(distance_buckets(length))), "mass_at_key": (heads, SINK_KEYS),
        "sketch": (heads, SKETCH),
    }  # fmt: skip
    return {name: shapes[name] for name in names}


@dataclass
class Observation:
    """Sums of one site at one length; those of other batches, processes or ranks simply add. All float64, on the CPU.

    sums, by name, over rows i of all samples (H query heads, S sinks, W windows):
        t2 (H, S, W): sum t_i^2; t1: sum t_i; sample_sq: sum over samples of (sum_i t_i)^2; mass: sum of dropped mass
        delta (H, S, W): sum ||delta O_i W_O||^2, W_O the head's slice of the output projection
        ablation_t2 (H,): sum D_i^2, the t2 of dropping every key; entropy (H,): of A_i, nats
        mass_by_distance (H, buckets): sum of A_ij by i - j, see `distance_buckets`
        mass_at_key (H, 16): sum of A_ij by j, of the first keys
        sketch (H, 256): sum r_ik t_i, of all windows at the most sinks, with signs r that are the same for all heads
        and sites of a pass: the mean over k of a product of two sketches estimates sum t_i t'_i (see `row_signs`)
    Forward-only runs hold neither t2, t1, sample_sq nor ablation_t2; delta is held where it was asked for.
    rows: query rows seen (padded ones are not). samples: sequences seen, once per backward pass. counted: the summed
    weights of the tokens whose loss was taken; None where every row's was. key: names the pass that is under way, see
    `row_signs`; without one their number does.
    probe, asked: t2 and ablation_t2 of the retrieval probe (attnopt/probe.py), which counts in nothing else here, and
    its tokens that were asked for; empty and 0 without one.
    """

    heads: int
    grid: Grid
    length: int
    rows: int
    samples: int
    sums: dict[str, Tensor]
    counted: float | None = None
    key: str = ""
    probe: dict[str, Tensor] = field(default_factory=dict)
    asked: float = 0.0

    @classmethod
    def zeros(cls, heads: int, grid: Grid, length: int, delta: bool = False, backward: bool = True) -> Observation:
        shapes = sum_shapes(heads, grid, length, sum_names(delta, backward))
        return cls(heads, grid, length, 0, 0, {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()})

    def __getattr__(self, name: str) -> Tensor:
        sums = self.__dict__.get("sums", {})
        if name in sums:
            return sums[name]
        if name in KNOWN:
            without = "--forward-only" if name in BACKWARD else "the statistics of `attnopt profile --forward-only`"
            raise MissingStatistic(
                f"This profile does not hold {name}, which is needed here; it holds {', '.join(self.held)}.",
                f"Profile again {'without' if name in BACKWARD else 'with'} {without}.",
            )
        raise AttributeError(f"an observation has no {name!r}")

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(sorted(self.sums))

    @property
    def tokens(self) -> float:
        """Tokens whose loss the sums are about, by weight: what a damage per token is divided by."""
        return float(self.rows) if self.counted is None else self.counted

    def damage(self, head: int, sink: int, window: int) -> float:
        """Estimated KL(dense || dropped) of one head in nats, summed over the rows observed: t2 / 2."""
        return 0.5 * float(self.t2[head, *self.grid.index(sink, window)])

    def scores(self) -> Tensor:
        """(H, S, W), per row or token: what heads and candidates are ranked by. Damages in nats where held, else
        how far the outputs move, which ranks worse and says nothing of the loss."""
        if "t2" in self.sums:
            return self.t2 / 2 / max(self.tokens, 1e-9)
        return self.delta / max(self.rows, 1)

    def __iadd__(self, other: Observation) -> Observation:
        mine, theirs = ((o.heads, o.grid, o.length, o.held) for o in (self, other))
        if mine != theirs:
            raise ValueError(f"these observations do not add: {mine} and {theirs}")
        tokens = self.tokens + other.tokens
        weighted = self.counted is not None or other.counted is not None
        self._count(other.rows, other.samples, other.sums)
        self.counted = tokens if weighted else None
        self.probe = {name: tensor + self.probe.get(name, 0.0) for name, tensor in other.probe.items()} or self.probe
        self.asked += other.asked
        return self

    def __add__(self, other: Observation) -> Observation:
        sums = {name: tensor.clone() for name, tensor in self.sums.items()}
        total = replace(self, sums=sums)
        total += other
        return total

    def as_probe(self) -> Observation:
        """What was observed of a text that is a probe, to be added to what was of other text."""
        fresh = {name: torch.zeros_like(tensor) for name, tensor in self.sums.items()}
        probe = {name: self.sums[name] for name in PROBED}
        return replace(self, rows=0, samples=0, sums=fresh, counted=None, probe=probe, asked=self.tokens)

    @property
    def of_probe(self) -> Observation | None:
        """The probe's sums, about the tokens asked for, as an observation of its own; None without one."""
        return replace(self, sums=self.probe, counted=self.asked, probe={}, asked=0.0) if self.probe else None

    def _count(self, rows: int, samples: int, sums: Mapping[str, Tensor]) -> None:
        self.rows += rows
        self.samples += samples
        for name, tensor in sums.items():
            self.sums[name] += tensor.to("cpu", torch.float64)
