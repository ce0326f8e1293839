"""A step of the ragged cache in plain PyTorch: what every other target is tested against.

One batch entry and KV head at a time, any number of new tokens, any padding among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.reference_decode import kept
from attnopt.codegen.self_check import footer
from attnopt.codegen.slots import held, refuse_overflow, slots, survives
from attnopt.codegen.spec import CacheStep
from attnopt.registry import TARGETS


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    n: Tensor,
    valid: Tensor | None,
    table: Tensor,
    spans: Tensor,
    scale: float,
    fresh: bool,
) -> Tensor:
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) of T new tokens -> (B, H, T, Dv), laid out as (B, T, H, Dv).

    keys (B, S, D), values (B, S, Dv): the cache, in which KV head g has the slots of row g of table int32 (G, 4):
    start, capacity, sink, window; n int32 (B,): the tokens seen; all three are written. Empty slots may hold anything.
    valid bool (B, T): which tokens count, None for all; a token's position is the number of those before it in its row,
    old and new. spans int32 (H, 2): sink and window of each query head, which at position i keeps the key at p where
    ``p <= i and (p < sink or i - p < window)``. fresh: the caller knows that n is 0 everywhere.

    Rows that do not count, or keep nothing, are 0. Scores and soft-max in float32, or in float64 for float64 inputs.
    A ring whose capacity is smaller than its sink and window is the caller's mistake.
    """
    batch, heads, tokens, _ = q.shape
    refuse_overflow(tokens, keys.shape[1], n, valid, table)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(batch, tokens, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    share, rows = heads // k.shape[1], table.tolist()
    for entry, seen in enumerate(n.tolist()):
        new = torch.arange(tokens, device=q.device) if valid is None else valid[entry].nonzero()[:, 0]
        at = seen + torch.arange(len(new), device=q.device)
        for group, (start, capacity, sink, _) in enumerate(rows):
            own, segment = slice(group * share, (group + 1) * share), slice(start, start + capacity)
            old = held(n[entry], capacity, sink)
            there, old = (old >= 0).nonzero()[:, 0], old[old >= 0]
            read, given = (
                torch.cat((cache[entry, segment][there], fed[entry, group, new])).to(wide)
                for cache, fed in ((keys, k), (values, v))
            )
            sinks, windows = spans[own].unbind(1)
            keep = kept(torch.cat((old, at)), n[entry], len(new), sinks, windows)
            scores = (q[entry, own][:, new].to(wide) @ read.T * scale).masked_fill(~keep, float("-inf"))
            weights = torch.softmax(scores, -1).masked_fill(~keep.any(-1, keepdim=True), 0.0)
            out[entry, own][:, new] = (weights @ given).to(q.dtype)
            kept_on = survives(at, seen + len(new), capacity, sink)
            place = start + slots(at[kept_on], capacity, sink)
            keys[entry, place], values[entry, place] = k[entry, group, new[kept_on]], v[entry, group, new[kept_on]]
    n += tokens if valid is None else valid.sum(1, dtype=n.dtype)
    return out


@TARGETS.register("reference cache_step")
class Reference:
    @staticmethod
    def emit(spec: CacheStep) -> str:
        text = f'"""{spec}."""\n\nfrom attnopt.codegen.reference_cache import step\n\n__all__ = ["step"]\n'
        return text + footer(spec, "self_check_cache", "step")
