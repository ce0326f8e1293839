"""A step of the ragged cache on the CPU: the compiled kernel, cache.cpp, or torch's operators where it does not serve.

A prompt into an empty cache has no use for the cache: its span prefill keeps to itself, and what stays is written. All
else, a token or a chunk of a prompt, is one call of the kernel, which attends and writes.

Without the kernel (native.py says where), one token is written first and then decodes the cache as it stands: the slot
that it takes over has left every window. More tokens than one are attended to a KV head at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import decode_cpu, native, span_cpu
from attnopt.codegen.reference_decode import kept
from attnopt.codegen.slots import held, slots, survives
from attnopt.errors import CacheFull


def step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> (B, H, T, Dv), laid out as (B, T, H, Dv).

    The contract of attnopt/codegen/reference_cache.py. CacheFull, with nothing written, where a head that holds every
    token has no slot left.
    """
    batch, heads, tokens, dim = q.shape
    width = v.shape[3]
    if not (batch and tokens and dim and width):
        return q.new_zeros((batch, tokens, heads, width)).transpose(1, 2)
    ours = scale > 0 and native.takes(q.dtype, dim, width) and keys.stride(2) == values.stride(2) == 1
    if fresh and heads // k.shape[1] * tokens > native.MOST_ROWS:
        # First what can be refused.
        (native.step if ours else _write)(None, k, v, keys, values, n, valid, table, spans, scale)
        return _prompt(q, k, v, valid, spans, scale)
    if ours:
        return native.step(q, k, v, keys, values, n, valid, table, spans, scale)  # type: ignore[return-value]
    if tokens == 1:
        return _token(q, k, v, keys, values, n, valid, table, spans, scale)
    out = _chunk(q, k, v, keys, values, n, valid, table, spans, scale)
    _write(None, k, v, keys, values, n, valid, table, spans, scale)
    return out


def _prompt(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, spans: Tensor, scale: float) -> Tensor:
    """Attention of new tokens to each other, of which those that are valid count."""
    sinks, windows = spans.unbind(1)
    if valid is None or bool(valid.all()):
        return span_cpu.prefill(q, k, v, sinks, windows, scale)
    # Valid tokens first: a span is counted in these, and no query then sees one that is not.
    longest = int(valid.sum(1).max())
    order = valid.int().argsort(dim=1, descending=True, stable=True)[:, :longest]

    def gathered(x: Tensor) -> Tensor:
        return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    found = span_cpu.prefill(gathered(q), gathered(k), gathered(v), sinks, windows, scale)
    out = q.new_zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    found = found.transpose(1, 2).masked_fill(~valid.gather(1, order)[:, :, None, None], 0.0)
    return out.scatter_(1, order[:, :, None, None].expand_as(found), found).transpose(1, 2)


def _token(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """One new token of each row, written and then attended to where it lies."""
    # A row whose token is not valid asks from before the first.
    at = n.clone() if valid is None else torch.where(valid[:, 0], n, -1)
    _write(None, k, v, keys, values, n, valid, table, spans, scale)
    rows = table.tolist()
    positions = torch.cat([held(n, capacity, sink) for _, capacity, sink, _ in rows], 1).int()
    starts = torch.cat((table[:, 0], table[-1:, 0] + table[-1:, 1]))
    filled = torch.minimum(n[:, None], table[:, 1])
    sinks, windows = spans.unbind(1)
    out = decode_cpu.decode(q, keys, values, starts, filled, scale, sinks, windows, positions, at)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """New tokens against the cache and each other; nothing is written."""
    batch, heads, tokens, _ = q.shape
    out = q.new_zeros((batch, tokens, heads, v.shape[3])).transpose(1, 2)
    share = heads // k.shape[1]
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    for entry, seen in enumerate(n.tolist()):
        new = torch.arange(tokens) if valid is None else valid[entry].nonzero()[:, 0]
        at = seen + torch.arange(len(new))
        for group, (start, capacity, sink, window) in enumerate(table.tolist()):
            own, old = slice(group * share, (group + 1) * share), held(seen, capacity, sink)
            there = ((old >= 0) & ((old < sink) | (old > seen - window))).nonzero()[:, 0]
            read, given = (
                torch.cat((cache[entry, start + there], fed[entry, group, new]))[None, None]
                for cache, fed in ((keys, k), (values, v))
            )
            keep = kept(torch.cat((old[there], at)), torch.tensor(seen), len(new), *spans[own].unbind(1))
            found = F.scaled_dot_product_attention(
                q[entry, own][None, :, new], read, given, keep[None], scale=scale, enable_gqa=True
            )
            out[entry, own, new] = found[0].masked_fill(~keep.any(-1, keepdim=True), 0.0)
    return out


def _write(
    q: None, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float,
) -> None:  # fmt: skip
    """As native.step without q: what of the new tokens stays, and n."""
    tokens, rows = k.shape[2], table.tolist()
    after = n + tokens if valid is None else n + valid.sum(1, dtype=n.dtype)
    room = min((capacity for _, capacity, sink, window in rows if window > capacity - sink), default=None)
    if room is not None and int(after.max()) > room:
        raise CacheFull(
            f"The cache holds {room} tokens of a row, and this would be {int(after.max())}.",
            "Make it with a larger max_length.",
        )
    for entry, (seen, end) in enumerate(zip(n.tolist(), after.tolist(), strict=True)):
        new = torch.arange(tokens) if valid is None else valid[entry].nonzero()[:, 0]
        at = seen + torch.arange(len(new))
        for group, (start, capacity, sink, _) in enumerate(rows):
            stays = survives(at, end, capacity, sink)
            place = start + slots(at[stays], capacity, sink)
            keys[entry, place], values[entry, place] = k[entry, group, new[stays]], v[entry, group, new[stays]]
    n.copy_(after)
