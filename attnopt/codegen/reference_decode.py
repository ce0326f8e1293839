"""Decoding in plain PyTorch: what every other target is tested against. One batch entry and KV head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanDecode
from attnopt.registry import TARGETS


def kept(positions: Tensor, at: Tensor, tokens: int, sinks: Tensor, windows: Tensor) -> Tensor:
    """Which slots queries keep: positions int (slots,), at int (), sinks and windows int (heads,) of one KV head ->
    bool (heads, tokens, slots), ``p <= i and (p < sinks or i - p < windows)`` for a query at i and a key at p."""
    back = (at + torch.arange(tokens, device=at.device))[:, None] - positions[None, :]
    return (back >= 0) & ((positions < sinks[:, None, None]) | (back < windows[:, None, None]))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    filled: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    windows: Tensor | None = None,
    positions: Tensor | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k (B, C, D), v (B, C, Dv), starts int (G + 1,), filled int (B, G) -> (B, H, T, Dv).

    KV head g has the slots starts[g] up to starts[g + 1] of C, of which the first filled[b, g] hold a key; a count
    beyond the segment is the segment. Without positions every query keeps all of them. With positions int (B, C) or
    (C,), which then come with sinks and windows int (H,) and at int (B,), the position of the first of T queries,
    `kept` says which. Scores and soft-max in float32, or in float64 for float64 inputs. A row that keeps nothing is 0.
    """
    batch, heads, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(batch, heads, tokens, v.shape[2], dtype=wide, device=q.device)
    share = heads // filled.shape[1]
    segments = starts.tolist()
    for entry, counts in enumerate(filled.tolist()):
        for group, count in enumerate(counts):
            count = max(0, min(count, segments[group + 1] - segments[group]))
            slots = slice(segments[group], segments[group] + count)
            own = slice(group * share, (group + 1) * share)
            keep = torch.ones(1, 1, count, dtype=torch.bool, device=q.device)
            if positions is not None:
                assert sinks is not None and windows is not None and at is not None
                held = positions.expand(batch, -1)[entry, slots]
                keep = kept(held, at[entry], tokens, sinks[own], windows[own])
            scores = q[entry, own].to(wide) @ k[entry, slots].to(wide).T * scale
            scores = scores.masked_fill(~keep, float("-inf"))
            weights = torch.softmax(scores, -1).masked_fill(~keep.any(-1, keepdim=True), 0.0)
            out[entry, own] = weights @ v[entry, slots].to(wide)
    return out.to(q.dtype)


@TARGETS.register("reference span_decode")
class Reference:
    @staticmethod
    def emit(spec: SpanDecode) -> str:
        text = f'"""{spec}."""\n\nfrom attnopt.codegen.reference_decode import decode\n\n__all__ = ["decode"]\n'
        return text + footer(spec, "self_check_decode", "decode")
