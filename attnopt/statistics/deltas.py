"""How far every candidate moves a block's outputs: squares of delta O_i, or of delta O_i W_O, without gradients.

Keys are cut at the bounds of the windows into runs that all rows of a block treat alike and the few columns between,
where a triangle decides. One product with v for each run then serves every window, from the near side and from the far
one, so nothing is obtained by subtracting two large sums. Symbols and shapes as in the package and in blocks.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.statistics.records import Grid


@dataclass(frozen=True)
class Block:
    """weights (x, r, R, n), of rows start <= i and keys low <= j; value (x, n, Dv)."""

    weights: Tensor
    value: Tensor
    low: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.weights.shape[2]


def factor_of(projection: Tensor, heads: int) -> Tensor:
    """(H, Dv, Dv) of an output projection's weight (out, H * Dv): |x F| = |x W_O| for every x of a head.

    W_O's slice enters through its Gram matrix alone, so a wide model costs no more than a narrow one.
    """
    slices = projection.detach().T.unflatten(0, (heads, -1)).double()
    values, vectors = torch.linalg.eigh(slices @ slices.mT)
    return vectors * values.clamp(min=0).sqrt()[:, None, :]


def moved_squares(
    block: Block, grid: Grid, kept: Tensor, dropped: Tensor, gone: Tensor, factor: Tensor | None
) -> Tensor:
    """||delta O_i F||^2 (x, r, R, S, W); kept and dropped mass and `gone`, where nothing is kept, of the same shape.

    factor: (x, r, Dv, Dv), or None for the identity.
    """
    tile = min(grid.sinks[-1], block.stop) if block.low == 0 else 0
    near, far, beside = _runs(block, grid.windows, tile)
    kept_tile, dropped_tile = _tile(block, grid, tile)
    output = (beside + block.weights[..., :tile] @ block.value[:, None, :tile])[..., None, None, :]
    kept, dropped = (mass.to(output.dtype)[..., None] for mass in (kept, dropped))
    from_kept = near[..., None, :, :] + kept_tile - kept * output
    from_dropped = dropped * output - far[..., None, :, :] - dropped_tile
    moved = torch.where(kept < 0.5, from_kept, from_dropped) / kept
    moved = torch.where(gone[..., None], -output, moved)
    if factor is not None:
        moved = (moved.flatten(2, 4) @ factor.to(moved.dtype)).view(moved.shape)
    return moved.square().sum(-1)


def _runs(block: Block, windows: tuple[int, ...], tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of A_ij v_j over the keys j >= tile: within each window and beyond it (x, r, R, W, Dv), and over all."""
    first = max(tile, block.low)

    def column(j: int) -> int:
        return min(max(j, first), block.stop) - block.low

    # Of window w, no row of the block keeps what is left of `opens`, and every row what is right of `closes`.
    opens = [column(block.start - w + 1) for w in windows]
    closes = [column(block.stop - w) for w in windows]
    cuts = sorted({column(first), column(block.stop), *opens, *closes})
    value = block.value[:, None]
    runs = [block.weights[..., a:b] @ value[..., a:b, :] for a, b in itertools.pairwise(cuts)]
    zero = torch.zeros_like(runs[0]) if runs else block.weights.new_zeros(*block.weights.shape[:3], value.shape[-1])
    left = [zero, *itertools.accumulate(runs)]
    right = [*reversed([*itertools.accumulate(reversed(runs))]), zero]
    near, far = [], []
    for window, begin, end in zip(windows, opens, closes, strict=True):
        inside, outside = right[cuts.index(end)], left[cuts.index(begin)]
        if begin < end:
            rows = torch.arange(block.start, block.stop, device=value.device)[:, None]
            keep = torch.arange(begin + block.low, end + block.low, device=value.device) > rows - window
            part, columns = block.weights[..., begin:end], value[..., begin:end, :]
            inside = inside + (part * keep) @ columns
            outside = outside + (part * ~keep) @ columns
        near.append(inside)
        far.append(outside)
    return torch.stack(near, -2), torch.stack(far, -2), left[-1]


def _tile(block: Block, grid: Grid, tile: int) -> tuple[Tensor, Tensor]:
    """Sums of A_ij v_j over the keys j < tile that each candidate keeps and drops, (x, r, R, S, W, Dv)."""
    device = block.weights.device
    columns, rows = torch.arange(tile, device=device), torch.arange(block.start, block.stop, device=device)
    sinks, windows = torch.tensor(grid.sinks, device=device), torch.tensor(grid.windows, device=device)
    keep = (columns < sinks[:, None, None]) | (rows[:, None, None, None] - columns < windows[:, None])  # (R, S, W, T)
    weights, value = block.weights[..., None, None, :tile], block.value[:, None, :tile]
    shape = (*block.weights.shape[:3], len(grid.sinks), len(grid.windows), value.shape[-1])

    def summed(mask: Tensor) -> Tensor:
        return ((weights * mask).flatten(2, 4) @ value).view(shape)

    return summed(keep), summed(~keep)
