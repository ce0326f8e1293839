"""A step of the ragged cache on the CPU: the compiled kernel, cache.cpp, or torch's operators where it does not serve.

A token, a chunk of a prompt, a prompt that is not long: one call of the kernel, which attends and writes. A long prompt
into an empty cache has no use for the cache: its span prefill keeps to itself, and what stays is written.

Without the kernel (native.py says where), one token is written first and then decodes the cache as it stands: the slot
that it takes over has left every window. More tokens than one are attended to a KV head at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen import decode_cpu, native
from attnopt.codegen.cache_chunk import chunk, kept_old, masked
from attnopt.codegen.cache_prefill import prefill
from attnopt.codegen.cache_write import write
from attnopt.codegen.slots import held, refuse_overflow


def step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> (B, H, T, Dv), laid out as (B, T, H, Dv).

    The contract of attnopt/codegen/reference_cache.py. CacheFull, with nothing written, where a head that holds every
    token has no slot left; ValueError where n is negative, RuntimeError for a cache of inference tensors outside of
    inference mode.
    """
    _refuse_inference(keys, values, n)
    batch, heads, tokens, dim = q.shape
    width = v.shape[3]
    if not (batch and tokens and dim and width):
        return q.new_zeros((batch, tokens, heads, width)).transpose(1, 2)
    ours = scale > 0 and native.takes(q.dtype, dim, width) and keys.stride(2) == values.stride(2) == 1
    if not ours:
        refuse_overflow(tokens, keys.shape[1], n, valid, table)
    if fresh and tokens >= (native.PROMPT if ours else 2):
        # First what can be refused.
        if ours:
            native.step(None, k, v, keys, values, n, valid, table, spans, scale)
        else:
            write(k, v, keys, values, n, valid, table)
        return prefill("cpu", q, k, v, valid, spans, scale)
    if ours:
        return native.step(q, k, v, keys, values, n, valid, table, spans, scale)  # type: ignore[return-value]
    if tokens == 1:
        return _token(q, k, v, keys, values, n, valid, table, spans, scale)
    out = chunk(q, k, v, keys, values, n, valid, table, spans, scale)
    write(k, v, keys, values, n, valid, table)
    return out


def store(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor, spans: Tensor
) -> None:
    """The new tokens of `step` are written, and nobody attends; errors as there."""
    _refuse_inference(keys, values, n)
    if native.takes(k.dtype, k.shape[3], v.shape[3], "tokens") and keys.stride(2) == values.stride(2) == 1:
        native.step(None, k, v, keys, values, n, valid, table, spans, 1.0)
    else:
        refuse_overflow(k.shape[2], keys.shape[1], n, valid, table)
        write(k, v, keys, values, n, valid, table)


def _refuse_inference(keys: Tensor, values: Tensor, n: Tensor) -> None:
    if not torch.is_inference_mode_enabled() and (keys.is_inference() or values.is_inference() or n.is_inference()):
        # As torch says it. Its own operators would say so at n, when keys and values had been written.
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed: the cache was made under "
            "torch.inference_mode(), and is continued under it alone."
        )


def _token(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """One new token of each row, written and then attended to where it lies."""
    # A row whose token is not valid asks from before the first.
    at = n.clone() if valid is None else torch.where(valid[:, 0], n, -1)
    write(k, v, keys, values, n, valid, table)
    rows, most = table.tolist(), int(n.max())
    starts = torch.cat((table[:, 0], table[-1:, 0] + table[-1:, 1]))
    filled = torch.minimum(n[:, None], table[:, 1])
    sinks, windows = spans.unbind(1)
    # KV heads all of whose queries keep every token: no positions, no mask, which take longer than the keys.
    plain = windows.view(len(rows), -1).amin(1) >= most
    if not bool(plain.any()):
        positions = torch.cat([held(n, capacity, sink) for _, capacity, sink, _ in rows], 1).int()
        return decode_cpu.decode(q, keys, values, starts, filled, scale, sinks, windows, positions, at)
    out = decode_cpu.decode(q, keys, values, starts, filled * plain, scale)
    if valid is not None:
        out = out.masked_fill_(~valid[:, None, :, None], 0.0)
    if scale <= 0:  # SDPA hides keys before it scales
        q, scale = q * scale, 1.0
    share = len(windows) // len(rows)
    for group, (start, capacity, sink, _) in enumerate(rows):
        if not plain[group]:
            own, slots = slice(group * share, (group + 1) * share), slice(start, start + min(most, capacity))
            place = held(n, capacity, sink, slots.stop - start)
            keep = kept_old(place, at, 1, spans[own])
            out[:, own] = masked(q[:, own], keys[:, slots], values[:, slots], keep, scale)[0]
    return out
