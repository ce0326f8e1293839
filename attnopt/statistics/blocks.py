"""One streamed pass over blocks of query rows: every candidate's sums, and the gradients, in O(N) memory.

dS_ij = A_ij (g_ij - D_i), the gradient at the soft-capped scores, is formed for dq and dk anyway, and its rows sum to
0; hence t_i = sum_K dS / sum_K A = - sum_S dS / sum_K A (rows.py). Taking the side that holds less mass avoids every
cancellation, also at a kept mass of 1e-20. Symbols as in the package.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import settings
from attnopt.statistics.deltas import Block, moved_squares
from attnopt.statistics.records import SINK_KEYS, Observation
from attnopt.statistics.rows import TINY_MASS, Moved, Part, Rows

MASKED = -1e30  # finite, so that weight * score is 0 and not NaN where the weight is 0
ROWS = 64  # query rows of a block; measured on a CPU at N = 4096: 32 to 128 are alike, 256 takes 1.7 times as long
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 26  # elements of one block of weights: a core's L2 cache, a share of GPU memory


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    scale: float,
    pad: Tensor | None,
    observation: Observation,
    window: int | None = None,
    rows: int = ROWS,
    factor: Tensor | None = None,
    starts: Sequence[int] | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """One pass over blocks of `rows` query rows: recompute the weights, add the sums, return dq, dk, dv (or None).

    Shapes as in `Observe`; grad (B, H, N, Dv). Memory O(N) for the gradients plus one block of at most
    max(rows * N * H / G, CPU_BLOCK or GPU_BLOCK) weights, float32 (float64 for float64 inputs). factor (H, Dv, Dv): see
    `deltas.factor_of`. starts: the first rows of the blocks that are looked at, without `grad`; all of them by default.
    Where the kernel target is Triton, as on a GPU, `triton_pass` does what it can do of this.
    """
    if starts is not None and grad is not None:
        raise ValueError("gradients need every row")
    starts = range(0, q.shape[2], rows) if starts is None else starts
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if grad is not None and settings.target(q.device.type) == "triton" and in_triton(q, k, v, observation):
            from attnopt.statistics import triton_pass

            return triton_pass.stream(q, k, v, grad, scale, pad, observation, window, softcap)
        work = _Pass(q, k, v, grad, scale, pad, observation, window, rows, factor, softcap)
        for first, last in work.groups():
            for start in starts:
                work.block(first, last, start, min(start + rows, q.shape[2]))
        return work.finish()


def in_triton(q: Tensor, k: Tensor, v: Tensor, observation: Observation) -> bool:
    """Whether Triton's kernels can serve a pass with gradients. Where they were asked for and cannot, a warning."""
    if importlib.util.find_spec("triton") is None:
        refused = "the package triton is not installed"
    else:
        from attnopt.statistics import triton_pass

        refused = triton_pass.refused(q, k, v, observation)
    if refused:
        warnings.warn(f"The profiler's pass runs in PyTorch, not in Triton: {refused}.", RuntimeWarning, stacklevel=3)
    return not refused


def drawn_starts(length: int, rows: int, share: int, seed: int) -> list[int]:
    """The first rows of one block of `rows` in every `share` in turn, drawn: every row is as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    blocks = math.ceil(length / rows)
    drawn = torch.randint(share, (math.ceil(blocks / share),), generator=generator).tolist()
    # Beyond the end there is nothing; of a text so short that nothing is left, the last block.
    found = [b for n, at in enumerate(drawn) if (b := n * share + at) < blocks]
    return [b * rows for b in found or [blocks - 1]]


class _Pass:
    """The state of one streamed pass. Batch and KV groups are folded into one dimension X = B * G of blocks
    (x, r, R, n): x of X, r = H / G query heads, R query rows, n keys."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor | None,
        scale: float,
        pad: Tensor | None,
        observation: Observation,
        window: int | None,
        rows: int,
        factor: Tensor | None,
        softcap: float,
    ) -> None:
        self.found = Rows(q, k.shape[1], pad, observation)
        (self.batch, self.heads, self.length, _), self.kv_heads = q.shape, k.shape[1]
        self.repeat, self.folded = self.found.repeat, self.found.folded
        self.scale, self.pad, self.window, self.rows, self.softcap = scale, pad, window, rows, softcap
        self.grid, self.dtypes = observation.grid, (q.dtype, k.dtype, v.dtype)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.grad = self._fold(q), None if grad is None else self._fold(grad)
        self.k, self.v = (x.to(self.wide).reshape(self.folded, self.length, -1) for x in (k, v))
        self.factor = None
        if factor is not None:
            self.factor = factor.view(self.kv_heads, self.repeat, *factor.shape[1:]).repeat(self.batch, 1, 1, 1)
        self.grads = None
        if grad is not None:
            self.grads = (torch.empty_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v))
        self.edges = self.found.edges
        self.sinks = torch.tensor(self.grid.sinks, device=q.device)
        self.distances = torch.tensor(self.edges, device=q.device)

    def _fold(self, x: Tensor) -> Tensor:
        return x.reshape(self.folded, self.repeat, self.length, -1)

    def groups(self) -> Iterable[tuple[int, int]]:
        """Ranges of X whose blocks fit the budget together."""
        budget = GPU_BLOCK if self.q.is_cuda else CPU_BLOCK
        step = max(1, budget // (self.repeat * min(self.rows, self.length) * self.length))
        return ((x, min(x + step, self.folded)) for x in range(0, self.folded, step))

    def block(self, first: int, last: int, start: int, stop: int) -> None:
        """Rows start <= i < stop of groups first <= x < last: sums and gradients."""
        tile = min(max(self.rows, self.grid.sinks[-1]), stop)  # leading columns, summed apart: see _split
        low = 0 if self.window is None else max(0, start - self.window + 1)
        low = 0 if low < tile else low
        # Scores in units of the soft-cap; c stands in the slope then.
        scale = self.scale / (self.softcap or 1.0)
        x, shape = slice(first, last), (last - first, self.repeat, stop - start, stop - low)
        key, value = self.k[x, low:stop], self.v[x, low:stop]
        query = self.q[x, :, start:stop].to(self.wide).mul(scale).reshape(shape[0], -1, key.shape[-1])

        scores, slope = query @ key.mT, None
        if self.softcap:
            # c tanh(s / c), whose derivative by s / c is c - c tanh^2.
            scores.tanh_()
            if self.grad is not None:
                slope = torch.addcmul(scores.new_tensor(self.softcap), scores, scores, value=-self.softcap)
            scores.mul_(self.softcap)
        self._mask(scores.view(shape), x, low, start)
        weights = torch.softmax(scores, -1)
        entropy = _entropy(scores, weights).view(shape[:3])
        if self.pad is not None:
            weights.mul_(scores.amax(-1, keepdim=True) > MASKED / 2)  # a row without any key
        scored, dots = None, None
        if self.grad is not None and self.grads is not None:
            dq, dk, dv = self.grads
            upstream = self.grad[x, :, start:stop].to(self.wide).reshape(shape[0], -1, value.shape[-1])
            dv[x, low:stop].baddbmm_(weights.mT, upstream)
            scored = torch.matmul(upstream, value.mT, out=scores).mul_(weights)
            total = scored.sum(-1, keepdim=True)  # D_i from the weights, not from an output rounded to bfloat16
            scored.addcmul_(weights, total, value=-1)
            inner = scored if slope is None else slope.mul_(scored)
            dq[x, :, start:stop] = (inner @ key).mul_(scale).view(*shape[:3], -1)
            dk[x, low:stop].baddbmm_(inner.mT, query)
            scored, dots = scored.view(shape), total.view(shape[:3])
        valid = self.found.valid(x, start, stop)
        part = self._candidates(weights.view(shape), scored, dots, entropy, x, low, start, tile, valid)
        self.found.add(x, start, valid, part)

    def _mask(self, scores: Tensor, x: slice, low: int, start: int) -> None:
        """Mask a block in place; only its last R columns hold keys in a row's future."""
        rows, keys = scores.shape[-2:]
        future = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., keys - rows :].masked_fill_(future, MASKED)
        if self.window is not None:
            i = torch.arange(start, start + rows, device=scores.device)[:, None]
            scores.masked_fill_(i - torch.arange(low, low + keys, device=scores.device) >= self.window, MASKED)
        if self.pad is not None:
            scores.masked_fill_(~self.found.pad_of(x)[:, None, None, low : low + keys], MASKED)

    def _split(self, block: Tensor, low: int, start: int, tile: int) -> tuple[_Tile, Tensor, Tensor]:
        """Sums over a block (x, r, R, n) by column near key 0 and by distance elsewhere.

        Returns the tile of columns j < `tile`, where sinks begin, and for the other columns near, far (edges, x, r, R):
        sums over i - j < edge and i - j >= edge. Shifting row r left by r columns (a stride of n + 1) aligns equal
        distances, so a segment between two edges is a plain sum; the tile, at least R columns wide, holds every
        key that this view does not reach. No sum is ever obtained by subtracting two large ones.
        """
        shape, columns = block.shape[:3], max(0, tile - low)
        leading = _Tile(block[..., :columns].double())
        block[..., :columns] = 0
        rows, keys = block.shape[-2:]
        span = keys - rows  # the greatest distance that the shifted view reaches
        skewed = block.as_strided(
            (*shape, span + 1), (shape[1] * rows * keys, rows * keys, keys + 1, 1), block.storage_offset()
        )
        empty = max(0, columns - rows + 1)  # shifted columns that lie in the tile for every row
        segments = torch.zeros((len(self.edges) + 1, *shape), dtype=torch.float64, device=block.device)
        for n, (begin, end) in enumerate(zip(self.edges, [*self.edges[1:], span + 1], strict=True)):
            left, right = max(empty, span + 1 - end), span + 1 - begin
            if left < right:
                segments[n + 1] = skewed[..., left:right].sum(-1)
        far = segments[1:].flip(0).cumsum(0).flip(0)
        return leading, segments[:-1].cumsum(0), far

    def _candidates(
        self,
        weights: Tensor,
        scored: Tensor | None,
        dots: Tensor | None,
        entropy: Tensor,
        x: slice,
        low: int,
        start: int,
        tile: int,
        valid: Tensor,
    ) -> Part:
        """What every candidate keeps and drops of a block's weights and score gradients, both (x, r, R, n)."""
        # Splitting a block below clears its leading columns.
        plain, at_key, squares, moved = None, None, None, None
        if "delta" in self.found.sums:
            plain = Block(weights.clone(), self.v[x, low : low + weights.shape[3]], low, start)
        if low == 0:
            at_key = (weights[..., :SINK_KEYS] * valid[..., None]).sum(2)
        rows = torch.arange(start, start + weights.shape[2], device=weights.device)
        leading, near, far = self._split(weights, low, start, tile)
        cuts = (rows[:, None] - self.distances + 1).clamp(0, leading.columns)  # (R, edges): first near column
        beyond = leading.below(cuts).permute(3, 0, 1, 2) + far
        sinks = self.sinks.clamp(max=leading.columns)
        cuts = torch.maximum(cuts[:, self.found.at_window][:, None], sinks[:, None])  # (R, S, W)
        kept, dropped = self._kept(leading, near, far, sinks, cuts)
        if plain is not None:
            factor = None if self.factor is None else self.factor[x]
            squares = moved_squares(plain, self.grid, kept, dropped, kept < TINY_MASS, factor)
        if scored is not None and dots is not None and "t2" in self.found.sums:
            sides = self._kept(*self._split(scored, low, start, tile), sinks, cuts)
            moved = Moved(*sides, dots.double())
        return Part(kept, dropped, beyond[self.found.at_bucket], entropy, at_key, moved, squares)

    def _kept(self, leading: _Tile, near: Tensor, far: Tensor, sinks: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the keys that every candidate keeps, and over those that it drops, (x, r, R, S, W)."""
        near, far = near[self.found.at_window], far[self.found.at_window]
        return leading.kept(sinks, cuts) + _last(near), leading.dropped(sinks, cuts) + _last(far)

    def finish(self) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """Add the pass to the observation; the gradients in the shapes and dtypes of the inputs."""
        self.found.finish()
        if self.grads is None:
            return None, None, None
        dq, dk, dv = self.grads
        dq = dq.reshape(self.batch, self.heads, self.length, -1)
        dk, dv = (g.reshape(self.batch, self.kv_heads, self.length, -1) for g in (dk, dv))
        return dq.to(self.dtypes[0]), dk.to(self.dtypes[1]), dv.to(self.dtypes[2])


def _entropy(scores: Tensor, weights: Tensor) -> Tensor:
    """log sum exp(s) - sum A s, float64; the logarithm comes from the largest entry, where s - log A is most exact."""
    log_sum = scores.amax(-1).double() - weights.amax(-1).double().log()
    return log_sum - (weights * scores).sum(-1).double()


class _Tile:
    """Sums over the leading columns of a block: `block` float64 (x, r, R, T), from the left and from the right."""

    def __init__(self, block: Tensor) -> None:
        self.columns = block.shape[-1]
        self.prefix = F.pad(block.cumsum(-1), (1, 0))
        self.suffix = F.pad(block.flip(-1).cumsum(-1).flip(-1), (0, 1))

    def below(self, cuts: Tensor) -> Tensor:
        """Sums over columns < cuts; cuts (R, n) -> (x, r, R, n)."""
        return self._at(self.prefix, cuts)

    def kept(self, sinks: Tensor, cuts: Tensor) -> Tensor:
        """Sums over j < sink or j >= cut; sinks (S,), cuts (R, S, W) with cut >= sink -> (x, r, R, S, W)."""
        return self.prefix[..., sinks, None] + self._at(self.suffix, cuts.flatten(1)).unflatten(-1, cuts.shape[1:])

    def dropped(self, sinks: Tensor, cuts: Tensor) -> Tensor:
        """Sums over sink <= j < cut, otherwise as `kept`; exactly 0 where there is none."""
        return self._at(self.prefix, cuts.flatten(1)).unflatten(-1, cuts.shape[1:]) - self.prefix[..., sinks, None]

    @staticmethod
    def _at(sums: Tensor, index: Tensor) -> Tensor:
        return sums.gather(-1, index.expand(*sums.shape[:2], *index.shape))


def _last(by_window: Tensor) -> Tensor:
    """(W, x, r, R) -> (x, r, R, 1, W)."""
    return by_window.permute(1, 2, 3, 0)[..., None, :]
