"""A prefill over lists of blocks on the CPU: the compiled kernel, blocks.cpp, or torch's operators where it is not.

Without the kernel (native.py says where), blocks of rows that list equally many blocks of keys are one product of
matrices, whatever heads and batch entries they are of. Their keys are copied, and every score is made before a bound
hides it: a fifth to a third of the kernel's speed, and a threshold saves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import native

# Scores, and copied elements of keys, that are held at once. 4 over 2 heads of 64 features, 4096 keys, a quarter and an
# eighth of the blocks of 64: times as fast as causal SDPA on one thread of an EPYC, 2**18, 2**20, 2**22:
#     float32     1.05 1.81     1.33 2.65     1.44 2.44
#     bfloat16    1.48 2.43     1.48 2.40     1.58 2.69
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
    if pad is not None:
        # A weight of 0 does not hide what is no number.
        v = v.masked_fill(~pad[:, None, :, None], 0.0)
    queries, keyed, valued = (
        F.pad(x.to(wide), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block)) for x in (q[:, heads.long()], k, v)
    )
    real = torch.arange(keyed.shape[2] * block) < keys
    bounds = bounds.to(wide).expand(batch, -1)
    kept = F.pad(pad, (0, len(real) - keys)) if pad is not None else real.expand(batch, -1)
    mixed = queries.new_zeros((batch, len(heads), rows, block, width))
    sums = queries.new_full((batch, len(heads), rows, block), -torch.inf)
    skipped = torch.zeros_like(counts)
    for size, b, n, r in _alike(counts, block * max(block, q.shape[3], width)):
        listed, group = blocks[b, n, r, :size].long(), heads[n].long() // (total // groups)
        at = r[:, None] * block + inside
        seen, values = (x[b[:, None], group[:, None], listed].flatten(1, 2) for x in (keyed, valued))
        scores = (queries[b, n, r] @ seen.mT).mul_(scale)
        # Of so many in front, no row hides a key.
        whole = 0
        if pad is None and not window:
            whole = int(((listed + 1) * block <= at[:, :1] + offset + 1).sum(-1).min())
        columns = (listed[:, whole:, None] * block + inside).flatten(1)
        apart = (at + offset)[..., None] - columns[:, None]
        keep = (apart >= 0) & kept[b[:, None], columns][:, None]
        if window:
            keep &= apart < window
        scores[..., whole * block :].masked_fill_(~keep, -torch.inf)
        skipped[b, n, r] = _skip(scores.unflatten(2, (size, block)), bounds[b, n], at < length)
        most = scores.amax(-1, keepdim=True)
        most.masked_fill_(most == -torch.inf, 0.0)
        weights = scores.sub_(most).exp_()
        weight = weights.sum(-1, keepdim=True)
        mixed[b, n, r] = (weights @ values).div_(weight.clamp(min=torch.finfo(wide).tiny))
        sums[b, n, r] = (weight.log() + most)[..., 0]
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


def _skip(scores: Tensor, bounds: Tensor, real: Tensor) -> Tensor:
    """How many blocks are skipped, int32 (S,). scores (S, block, listed, block), of which theirs become -inf; bounds
    (S,); real bool (S, block): the rows that there are."""
    skipped = torch.zeros(len(scores), dtype=torch.int32)
    if bool((bounds == -torch.inf).all()):
        return skipped
    largest = scores.amax(-1).masked_fill_(~real[..., None], -torch.inf)
    most = torch.full_like(largest[..., 0], -torch.inf)
    for at in (0, *range(largest.shape[2] - 1, 0, -1)):
        here = largest[..., at]
        below = ((here < most + bounds[:, None]) | (here == -torch.inf)).all(1)
        skipped += below & (here > -torch.inf).any(1)
        scores[:, :, at].masked_fill_(below[:, None, None], -torch.inf)
        most = torch.where(below[:, None], most, torch.maximum(most, here))
    return skipped
