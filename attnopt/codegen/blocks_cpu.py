"""A prefill over lists of blocks on the CPU: the compiled kernel, blocks.cpp, or torch's operators where it is not.

Without the kernel (native.py says where), blocks of rows that list equally many blocks of keys are one product of
matrices, whatever heads and batch entries they are of. Their keys are copied, and every score is made before a bound
hides it: right, and not made to be fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native

# Scores, and copied elements of keys, that are held at once.
MOST_HELD = 2**22


def prefill(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, counts: Tensor, blocks: Tensor, bounds: Tensor, scale: float,
    pad: Tensor | None, window: int, block: int, out: Tensor, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The contract of attnopt/codegen/reference_blocks.py. ValueError where heads or lists name what is not there."""
    if not counts.numel():
        return torch.zeros_like(counts)
    if not (scale > 0 and native.takes(q.dtype, q.shape[3], v.shape[3], "blocks")):
        _refuse(q, k, heads, counts, blocks, block)
        return _gathered(q, k, v, heads, counts, blocks, bounds, scale, pad, window, block, out, lse)
    # The kernel writes features one after the other.
    own = out if out.stride(3) == 1 else out.contiguous()
    sums = lse if lse is None or lse.is_contiguous() else torch.empty_like(lse, memory_format=torch.contiguous_format)
    skipped = native.blocks(q, k, v, heads, counts, blocks, bounds, scale, pad, window, block, own, sums)
    if skipped is None:
        _refuse(q, k, heads, counts, blocks, block)
        raise AssertionError("the kernel refused lists that are sound")
    if own is not out:
        out.copy_(own)
    if lse is not None and sums is not None and sums is not lse:
        lse.copy_(sums)
    return skipped


def _refuse(q: Tensor, k: Tensor, heads: Tensor, counts: Tensor, blocks: Tensor, block: int) -> None:
    """ValueError unless heads, counts and the blocks that are listed are there, and lists ascend."""
    columns, most = -(-k.shape[2] // block), blocks.shape[3]
    if int(heads.min()) < 0 or int(heads.max()) >= q.shape[1]:
        raise ValueError(f"heads are {heads.tolist()}, of {q.shape[1]}")
    if int(counts.min()) < 0 or int(counts.max()) > most:
        raise ValueError(f"counts are {int(counts.min())} to {int(counts.max())}, of lists of {most}")
    listed = torch.arange(most) < counts[..., None]
    outside = listed & ((blocks < 0) | (blocks >= columns))
    if bool(outside.any()):
        raise ValueError(f"block {int(blocks[outside][0])} is listed, of {columns}")
    if bool((listed[..., 1:] & (blocks[..., 1:] <= blocks[..., :-1])).any()):
        raise ValueError("a list does not ascend")


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, counts: Tensor, blocks: Tensor, bounds: Tensor, scale: float,
    pad: Tensor | None, window: int, block: int, out: Tensor, lse: Tensor | None,
) -> Tensor:  # fmt: skip
    """All in float32, or float64 for float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (batch, total, length, _), (_, groups, keys, width) = q.shape, v.shape
    rows, offset, inside = counts.shape[2], keys - length, torch.arange(block)
    queries, keyed, valued = (
        F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block)) for x in (q[:, heads.long()], k, v)
    )
    real = torch.arange(keyed.shape[2] * block) < keys
    kept = F.pad(pad, (0, len(real) - keys)) if pad is not None else real.expand(batch, -1)
    mixed = queries.new_zeros((batch, len(heads), rows, block, width), dtype=wide)
    sums = queries.new_full((batch, len(heads), rows, block), -torch.inf, dtype=wide)
    skipped = torch.zeros_like(counts)
    for size, b, n, r in _alike(counts, block * max(block, q.shape[3], width)):
        listed, group = blocks[b, n, r, :size].long(), heads[n].long() // (total // groups)
        columns = (listed[..., None] * block + inside).flatten(1)
        at = (r[:, None] * block + inside)[..., None]
        apart = at + offset - columns[:, None]
        # Rows past the last keep nothing: no bound waits for them.
        keep = (apart >= 0) & (at < length) & kept[b[:, None], columns][:, None]
        if window:
            keep &= apart < window
        seen, values = (x[b[:, None], group[:, None], listed].flatten(1, 2).to(wide) for x in (keyed, valued))
        scores = queries[b, n, r].to(wide) @ seen.mT
        scores = (scores * scale).masked_fill_(~keep, -torch.inf)
        skipped[b, n, r] = _skip(scores.unflatten(2, (size, block)), bounds[n].to(wide))
        lse_here = scores.logsumexp(-1)
        weights = torch.exp(scores - lse_here.masked_fill(lse_here == -torch.inf, 0.0)[..., None])
        mixed[b, n, r], sums[b, n, r] = weights @ values, lse_here
    out[:, heads.long()] = mixed.flatten(2, 3)[:, :, :length].to(out.dtype)
    if lse is not None:
        lse.copy_(sums.flatten(2)[..., :length])
    return skipped


def _alike(counts: Tensor, each: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Blocks of rows that list equally many, but none, as indices of counts; of `each` elements for every block listed,
    no more at once than MOST_HELD."""
    for size in filter(None, counts.unique().tolist()):
        most = max(1, MOST_HELD // (size * each))
        parts = (where.split(most) for where in torch.where(counts == size))
        yield from ((size, b, n, r) for b, n, r in zip(*parts, strict=True))


def _skip(scores: Tensor, bounds: Tensor) -> Tensor:
    """scores (S, block, listed, block), of which those of skipped blocks become -inf; bounds (S,) -> how many, (S,)."""
    skipped = torch.zeros(len(scores), dtype=torch.int32)
    if bool((bounds == -torch.inf).all()):
        return skipped
    largest = scores.amax(-1)
    most = torch.full_like(largest[..., 0], -torch.inf)
    for at in (0, *range(largest.shape[2] - 1, 0, -1)):
        here = largest[..., at]
        below = ((here < most + bounds[:, None]) | (here == -torch.inf)).all(1)
        skipped += below & (here > -torch.inf).any(1)
        scores[:, :, at].masked_fill_(below[:, None, None], -torch.inf)
        most = torch.where(below[:, None], most, torch.maximum(most, here))
    return skipped
