"""What a pass finds of rows, added to an observation: the formulas that follow once rows are summed.

    t_i = sum_K dS / sum_K A = - sum_S dS / sum_K A

Both passes, `blocks` in PyTorch and `triton_pass`, sum A and dS over the keys that every candidate keeps and drops; the
rest is here. X = B * G folds batch and KV groups, r = H / G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.statistics.records import Observation, distance_buckets, row_signs, sum_shapes

# Below it the float32 weights of the kept keys are denormal; the row then counts as ablated (delta O = -O).
TINY_MASS = 1e-30


@dataclass(frozen=True, eq=False)
class Moved:
    """Sums of dS over the keys that candidates keep and drop, (x, r, R, S, W), and D_i (x, r, R); float64."""

    kept: Tensor
    dropped: Tensor
    dots: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of the groups x. float64.

    kept, dropped (x, r, R, S, W): mass of the keys that a candidate keeps and drops; beyond (buckets, x, r, R): mass
    from a distance on; entropy (x, r, R); at_key (x, r, up to 16): mass of the first keys, summed over the rows that
    count; moved: None without a gradient; squares (x, r, R, S, W): ||delta O||^2, where asked for.
    """

    kept: Tensor
    dropped: Tensor
    beyond: Tensor
    entropy: Tensor
    at_key: Tensor | None = None
    moved: Moved | None = None
    squares: Tensor | None = None


class Rows:
    """The sums of one pass, by name, each (X, r, ...) in float64 on q's device."""

    def __init__(self, q: Tensor, kv_heads: int, pad: Tensor | None, observation: Observation) -> None:
        (self.batch, self.heads, self.length, _), self.kv_heads = q.shape, kv_heads
        self.repeat, self.folded = self.heads // kv_heads, self.batch * kv_heads
        if (self.heads, self.length) != (observation.heads, observation.length):
            raise ValueError(
                f"{self.heads} heads of {self.length} rows do not fit an observation "
                f"of {observation.heads} heads of {observation.length}"
            )
        self.device, self.pad = q.device, pad
        self.observation, self.grid = observation, observation.grid
        # Every distance at which a candidate or a bucket begins: columns are summed between two of these.
        buckets = distance_buckets(self.length)
        self.edges = sorted({0, *self.grid.windows, *buckets})
        self.at_window = [self.edges.index(w) for w in self.grid.windows]
        self.at_bucket = [self.edges.index(d) for d in buckets]
        # The signs of this pass are its own, whichever runs it and whatever ran before.
        self.pass_key = observation.key or str(observation.samples)
        self.counted = 0
        shapes = sum_shapes(self.repeat, self.grid, self.length, observation.held)
        self.sums = {
            name: torch.zeros((self.folded, *shape), dtype=torch.float64, device=self.device)
            for name, shape in shapes.items()
            if name != "sample_sq"
        }

    def valid(self, x: slice, start: int, stop: int) -> Tensor:
        """bool (x, 1, R): rows that count."""
        if self.pad is None:
            return torch.ones(x.stop - x.start, 1, stop - start, dtype=torch.bool, device=self.device)
        return self.pad_of(x)[:, None, start:stop]

    def pad_of(self, x: slice) -> Tensor:
        """Padding by group, bool (x, N)."""
        assert self.pad is not None
        return self.pad[torch.arange(x.start, x.stop, device=self.pad.device) // self.kv_heads]

    def add(self, x: slice, start: int, valid: Tensor, part: Part) -> None:
        """Add what was found of the rows from `start` on, those that are valid (x, 1, R)."""
        self.counted += int(valid[-x.start % self.kv_heads :: self.kv_heads].sum())
        if part.at_key is not None:
            self.sums["mass_at_key"][x, :, : part.at_key.shape[-1]] += part.at_key
        self.sums["entropy"][x] += (part.entropy * valid).sum(-1)
        beyond = (part.beyond * valid).sum(-1).permute(1, 2, 0)
        self.sums["mass_by_distance"][x] += beyond - F.pad(beyond[..., 1:], (0, 1))
        gone, counts = part.kept < TINY_MASS, valid[..., None, None]
        self.sums["mass"][x] += (part.dropped.masked_fill(gone, 1.0) * counts).sum(2)
        if part.squares is not None:
            self.sums["delta"][x] += (part.squares * counts).sum(2, dtype=torch.float64)
        moved = part.moved
        if moved is None or "t2" not in self.sums:
            return
        # The side that holds less mass.
        t = torch.where(part.kept < 0.5, moved.kept, -moved.dropped) / part.kept
        t = torch.where(gone, -moved.dots[..., None, None], t) * counts
        self.sums["t1"][x] += t.sum(2)
        self.sums["t2"][x] += t.square().sum(2)
        if "sketch" in self.sums:
            self._sketch(t[..., -1, :].sum(-1), x, start)
        self.sums["ablation_t2"][x] += (moved.dots * valid).square().sum(2)

    def _sketch(self, t: Tensor, x: slice, start: int) -> None:
        """Add t (x, r, R) times the signs of its rows."""
        of = torch.arange(x.start, x.stop) // self.kv_heads
        signs = row_signs(self.pass_key, self.batch, self.length)[of, start : start + t.shape[2]]
        signs = signs.to(t.device, torch.float32)[:, None]
        self.sums["sketch"][x] += (t.float()[..., None, :] @ signs)[..., 0, :]

    def finish(self) -> None:
        """Add the pass to its observation."""
        unfold = {n: s.reshape(self.batch, self.heads, *s.shape[2:]) for n, s in self.sums.items()}
        total = {name: tensor.sum(0) for name, tensor in unfold.items()}
        if "sample_sq" in self.observation.sums:
            total["sample_sq"] = unfold["t1"].square().sum(0)
        self.observation._count(self.counted, self.batch, total)
