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
from typing import Any

import torch
from torch import Tensor

from attnopt.ops.span import empty_tokens_first, spans_at, tokens_first

# Rows of one block.
BLOCK = 1024


@dataclass(frozen=True)
class Alike:
    """Heads of equal span: their places among the heads served, the query heads, and the KV heads they read."""

    sink: int
    window: int
    places: Tensor
    heads: Tensor
    kv_heads: Tensor


def alike(heads: Tensor, sinks: Tensor, windows: Tensor, share: int, device: torch.device) -> Iterator[Alike]:
    """The query heads `heads` (h,), whose spans are those of the tables (H,), by equal span."""
    served = heads.tolist()
    spans = [(int(sinks[h]), int(windows[h])) for h in served]
    for sink, window in sorted(set(spans)):
        places = [at for at, span in enumerate(spans) if span == (sink, window)]
        of = [served[at] for at in places]
        lists = places, of, [h // share for h in of]
        yield Alike(sink, window, *(torch.tensor(x, device=device) for x in lists))


def blocks(group: Alike, length: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of each block: the last far key of row i is column i - window, the first is the sink's end."""
    starts = range(group.sink + group.window, length, BLOCK)
    rows = [(at, min(at + BLOCK, length)) for at in starts]
    return [(slice(a, b), slice(a - group.window, b - group.window)) for a, b in rows]


class Means:
    """Mean keys and values of a group's rows, block after block; wide, (B, heads of the group, rows, ·)."""

    def __init__(self, k: Tensor, v: Tensor, pad: Tensor | None, group: Alike) -> None:
        self.k, self.v, self.pad, self.group = k, v, pad, group
        self.wide = torch.promote_types(k.dtype, torch.float32)
        self.carried = [k.new_zeros((), dtype=self.wide) for _ in range(3)]

    def after(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(counts (B | 1, 1, rows, 1), mean keys, mean values) of the rows whose last far keys are `columns`."""
        there = self._there(columns)
        taken = [x[:, :, columns][:, self.group.kv_heads].to(self.wide) for x in (self.k, self.v)]
        if self.pad is not None:
            # Filled and not multiplied: what stands at padding may be no number.
            taken = [x.masked_fill(there == 0, 0.0) for x in taken]
        sums = [x.cumsum(2) + before for x, before in zip((there, *taken), self.carried, strict=True)]
        self.carried = [x[:, :, -1:] for x in sums]
        divisor = sums[0].clamp(min=1)
        return sums[0], sums[1] / divisor, sums[2] / divisor

    def _there(self, columns: slice) -> Tensor:
        """1 where a key counts, (B | 1, 1, columns, 1)."""
        if self.pad is None:
            return torch.ones(1, 1, columns.stop - columns.start, 1, dtype=self.wide, device=self.k.device)
        return self.pad[:, None, columns, None].to(self.wide)


def _served(
    q: Tensor, k: Tensor, heads: Tensor, sinks: Tensor, alphas: Tensor, betas: Tensor, min_length: int
) -> Iterator[Alike]:
    sinks, windows = spans_at(q.shape[2], sinks, alphas, betas, 0, min_length)
    return alike(heads, sinks, windows, q.shape[1] // k.shape[1], q.device)


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
        means = Means(k, v, pad, group)
        for rows, columns in blocks(group, length):
            count, keys, values = means.after(columns)
            scores = scale * (q[:, :, rows][:, group.heads].to(wide) * keys).sum(-1)
            lse[:, group.places, rows] = scores + count.squeeze(-1).log()
            out[:, group.places, rows] = values.to(v.dtype)
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
    length = q.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for group in _served(q, k, heads, sinks, alphas, betas, min_length):
        means, cut = Means(k, v, pad, group), blocks(group, length)
        counts: list[Tensor] = []
        for rows, columns in cut:
            count, keys, _ = means.after(columns)
            counts.append(count)
            weight = (scale * dlse[:, group.places, rows]).masked_fill(count.squeeze(-1) == 0, 0.0)
            dq[:, group.heads, rows] = weight[..., None] * keys
        carried: Sequence[Tensor] = [dq.new_zeros(()) for _ in range(2)]
        for (rows, columns), count in zip(reversed(cut), reversed(counts), strict=True):
            weight = (scale * dlse[:, group.places, rows, None] / count).masked_fill(count == 0, 0.0)
            given = (dout[:, group.places, rows].to(wide) / count).masked_fill(count == 0, 0.0)
            found = [weight * q[:, :, rows][:, group.heads].to(wide), given]
            found = [x.flip(2).cumsum(2).flip(2) + carry for x, carry in zip(found, carried, strict=True)]
            carried = [x[:, :, :1] for x in found]
            for target, x in zip((dk, dv), found, strict=True):
                if pad is not None:
                    x = x.masked_fill(~pad[:, None, columns, None], 0.0)
                target[:, :, columns].index_add_(1, group.kv_heads, x)
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


def _no_second(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "attnopt::mean_far has no second derivative. Differentiate twice through the model as it was, uncompiled."
    )


mean_far.register_autograd(_gradients, setup_context=_save)
mean_far_backward.register_autograd(_no_second)
