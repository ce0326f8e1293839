"""The far keys of each row as one token: their mean key, their mean value, and the weight of as many keys.

attnopt::mean_far            the output and the logsumexp of every row over its far keys
attnopt::mean_far_backward   the gradient of both, at q, k and v; it has none itself

Row i of a head with sink s and window w has the far keys F_i = {j : s <= j <= i - w}. With the means k' and v' over F_i

    sum over F_i of e^{scale q_i.k_j} v_j  ~  |F_i| e^{scale q_i.k'} v'

which is the compensation token of RazorAttention (Tang et al., arXiv:2407.15891), kept up row by row. By Jensen's
inequality its weight is never larger than the far keys' own. Sums over keys are in float32 (float64 for float64),
`BLOCK` rows at a time and carried on, so that no more than a block is held in that width. Plain torch on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.span import empty_tokens_first, no_second, spans_at, tokens_first

# Rows of one block: on the CPU such that it stays in the cache, elsewhere such that few kernels are launched. CHUNK:
# rows of the triangles of ones that sum within it. ms of 1 and 2 heads of 64 at 8192 keys on one thread of a Xeon,
# torch 2.13, chunks of 16, 32, 64: float32 4.4 5.0 5.4 and 10.1 10.3 11.3; bfloat16 4.6 4.9 5.2 and 9.0 9.5 10.2.
BLOCK = {"cpu": 1024}
BLOCK_ELSEWHERE = 1 << 16
CHUNK = 16


@dataclass(frozen=True)
class Alike:
    """Heads of equal span that read one KV head, all as slices, which copy nothing: their places among the heads
    served, the query heads, and the KV head."""

    sink: int
    window: int
    places: slice
    heads: slice
    kv_head: slice


def alike(heads: Tensor, sinks: Tensor, windows: Tensor, share: int) -> Iterator[Alike]:
    """The query heads `heads` (h,), whose spans are those of the tables (H,), by equal span and KV head."""
    groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for place, head in enumerate(heads.tolist()):
        groups.setdefault((int(sinks[head]), int(windows[head]), head // share), []).append((place, head))
    for (sink, window, kv_head), members in sorted(groups.items()):
        regular = len({(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(members)}) <= 1
        for part in [members] if regular else [[member] for member in members]:
            places, of = (_steps(numbers) for numbers in zip(*part, strict=True))
            yield Alike(sink, window, places, of, slice(kv_head, kv_head + 1))


def _steps(numbers: Sequence[int]) -> slice:
    """Numbers of equal steps, as a slice."""
    return slice(numbers[0], numbers[-1] + 1, numbers[1] - numbers[0] if len(numbers) > 1 else 1)


def blocks(group: Alike, q: Tensor) -> list[tuple[slice, slice]]:
    """(rows, columns) of each block: the last far key of row i is column i - window, the first is the sink's end."""
    length, size = q.shape[2], BLOCK.get(q.device.type, BLOCK_ELSEWHERE)
    rows = [(at, min(at + size, length)) for at in range(group.sink + group.window, length, size)]
    return [(slice(a, b), slice(a - group.window, b - group.window)) for a, b in rows]


def running(x: Tensor, before: Tensor) -> Tensor:
    """Sums of x (B, h, R, D) over the rows up to each, on top of `before` (B, h, 1, D).

    As products with a triangle of ones and sums of their last rows: 68 us for 1024 rows of 64, where a running sum over
    that dimension takes 148 (one thread of a Xeon, torch 2.13).
    """
    rows = x.shape[2]
    if rows % CHUNK:
        x = F.pad(x, (0, 0, 0, -rows % CHUNK))
    inside = torch.ones(CHUNK, CHUNK, dtype=x.dtype, device=x.device).tril() @ x.unflatten(2, (-1, CHUNK))
    ends = torch.cat((before, inside[:, :, :-1, -1]), 2).cumsum(2)
    return inside.add_(ends[:, :, :, None]).flatten(2, 3)[:, :, :rows]


class Sums:
    """Sums of the far keys and values of a group's rows, block after block; wide, (B, 1, rows, ·)."""

    def __init__(self, k: Tensor, v: Tensor, pad: Tensor | None, group: Alike) -> None:
        self.operands, self.pad, self.sink = [x[:, group.kv_head] for x in (k, v)], pad, group.sink
        self.wide, self.device = torch.promote_types(k.dtype, torch.float32), k.device
        # Far keys of the row that column j of the padding is the last one of.
        self.counts = None if pad is None else pad[:, group.sink :].cumsum(1)
        self.carried = [x.new_zeros(x.shape[0], 1, 1, x.shape[3], dtype=self.wide) for x in (k, v)]

    def after(self, columns: slice) -> list[Tensor]:
        """Sums of keys and of values of the rows whose last far keys are `columns`."""
        taken = [x[:, :, columns].to(self.wide) for x in self.operands]
        if self.pad is not None:
            # Filled and not multiplied: what stands at padding may be no number.
            taken = [x.masked_fill(~self.pad[:, None, columns, None], 0.0) for x in taken]
        sums = [running(x, before) for x, before in zip(taken, self.carried, strict=True)]
        self.carried = [x[:, :, -1:].clone() for x in sums]
        return sums

    def count(self, columns: slice) -> Tensor:
        """How many far keys the rows have whose last ones are `columns`, (B | 1, 1, columns, 1)."""
        first, last = columns.start - self.sink, columns.stop - self.sink
        if self.counts is not None:
            return self.counts[:, None, first:last, None].to(self.wide)
        return torch.arange(first + 1, last + 1, dtype=self.wide, device=self.device)[None, None, :, None]


def _inverse(count: Tensor) -> Tensor:
    """One over the counts, 0 where there is nothing."""
    return count.clamp(min=1).reciprocal().masked_fill(count == 0, 0.0)


def _served(
    q: Tensor, k: Tensor, heads: Tensor, sinks: Tensor, alphas: Tensor, betas: Tensor, min_length: int
) -> Iterator[Alike]:
    sinks, windows = spans_at(q.shape[2], sinks, alphas, betas, 0, min_length)
    return alike(heads, sinks, windows, q.shape[1] // k.shape[1])


@torch.library.custom_op("attnopt::mean_far", mutates_args=())
def mean_far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    scale: float,
    min_length: int,
) -> tuple[Tensor, Tensor]:
    """The mean far token of the query heads `heads`, int32 (h,) ascending, on the CPU as the tables are.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv); sinks and alphas int32 (H,), betas float64 (H,), pad bool (B, N)
    and min_length as in `span_attention`, whose near keys these are not. Returns the mean values (B, h, N, Dv),
    physically (B, N, h, Dv), and log |F_i| + scale q_i.k' (B, h, N) in float32 (float64 for float64 inputs); 0 and -inf
    in a row without a far key. Both have gradients at q, k and v.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, length, served = q.shape[0], q.shape[2], heads.shape[0]
    out = v.new_zeros(batch, length, served, v.shape[3]).transpose(1, 2)
    lse = q.new_full((batch, served, length), -torch.inf, dtype=wide)
    for group in _served(q, k, heads, sinks, alphas, betas, min_length):
        sums = Sums(k, v, pad, group)
        for rows, columns in blocks(group, q):
            keys, values = sums.after(columns)
            count = sums.count(columns)
            inverse = count.clamp(min=1).reciprocal()
            scores = (q[:, group.heads, rows] * keys).sum(-1)
            lse[:, group.places, rows] = scores.mul_(scale * inverse[..., 0]).add_(count[..., 0].log())
            out[:, group.places, rows] = values.mul_(inverse)
    return out, lse


@mean_far.register_fake
def _(q, k, v, heads, sinks, alphas, betas, pad, scale, min_length):  # type: ignore[no-untyped-def]
    served = heads.shape[0]
    lse = q.new_empty(q.shape[0], served, q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_tokens_first(q[:, :served], v.shape[3]), lse


@torch.library.custom_op("attnopt::mean_far_backward", mutates_args=())
def mean_far_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    scale: float,
    min_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, k and v of `mean_far`, whose results have the gradients dout (B, h, N, Dv) and dlse (B, h, N).

    With the counts n_i of far keys: dq_i = scale dlse_i k'_i; a key or value gathers from every later row that it is
    far from, dk_j = sum over i >= j + w of scale dlse_i q_i / n_i and dv_j = sum of dout_i / n_i: from the last row up.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for group in _served(q, k, heads, sinks, alphas, betas, min_length):
        sums, cut = Sums(k, v, pad, group), blocks(group, q)
        carried = [x.new_zeros(x.shape[0], 1, 1, x.shape[3]) for x in (dk, dv)]
        for rows, columns in cut:
            weight = scale * dlse[:, group.places, rows, None] * _inverse(sums.count(columns))
            dq[:, group.heads, rows] = weight * sums.after(columns)[0]
        for rows, columns in reversed(cut):
            inverse = _inverse(sums.count(columns))
            weight = scale * dlse[:, group.places, rows, None] * inverse
            found = [weight * q[:, group.heads, rows], dout[:, group.places, rows] * inverse]
            for at, (target, x) in enumerate(zip((dk, dv), found, strict=True)):
                x = running(x.sum(1, keepdim=True).flip(2), carried[at]).flip(2)
                carried[at] = x[:, :, :1].clone()
                if pad is not None:
                    x = x.masked_fill(~pad[:, None, columns, None], 0.0)
                target[:, group.kv_head, columns] += x
    return tuple(tokens_first(x.to(like.dtype)) for x, like in zip((dq, dk, dv), (q, k, v), strict=True))  # type: ignore[return-value]


@mean_far_backward.register_fake
def _(dout, dlse, q, k, v, heads, sinks, alphas, betas, pad, scale, min_length):  # type: ignore[no-untyped-def]
    return tuple(empty_tokens_first(x, x.shape[3]) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, heads, sinks, alphas, betas, pad, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, heads, sinks, alphas, betas, pad)


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.attnopt.mean_far_backward(dout, dlse, *ctx.saved_tensors, *ctx.numbers)
    return *found, *(None for _ in range(7))


mean_far.register_autograd(_gradients, setup_context=_save)
mean_far_backward.register_autograd(no_second("mean_far"))
