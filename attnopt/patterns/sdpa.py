"""``scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale, enable_gqa)``, called whole."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns import MaskTerm, Match, argument, number, unrepeated_pair, value
from attnopt.registry import PATTERNS

aten = torch.ops.aten


@PATTERNS.register("sdpa", priority=10)
class Sdpa:
    anchors = (aten.scaled_dot_product_attention.default,)

    @staticmethod
    def match(node: Node) -> Match | Miss | None:
        q, k, v = node.args[:3]
        held = [t for t in map(value, (q, k, v)) if t is not None]
        if len(held) != 3 or any(t.ndim != 4 for t in held):
            return Miss("an SDPA call whose operands do not have 4 dimensions")
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            return Miss("dropout is active")
        scale = argument(node, 6, "scale")
        head_dim = held[0].shape[-1]
        if scale is None and not isinstance(head_dim, int):
            return Miss("a head dimension that is symbolic")
        factor = 1 / math.sqrt(head_dim) if scale is None else number(scale)
        if factor is None:
            return Miss("a scale that is not a constant")
        mask = argument(node, 3, "attn_mask")
        terms: tuple[MaskTerm, ...] = ()
        if mask is not None:
            held_mask = value(mask)
            if held_mask is None:
                return Miss("a mask that is not a tensor")
            terms = (MaskTerm("keep" if held_mask.dtype == torch.bool else "add", mask),)
        if not argument(node, 7, "enable_gqa", False):
            k, v = unrepeated_pair(k, v)
        return Match("sdpa", node, node, q, k, v, factor, bool(argument(node, 5, "is_causal", False)), terms)
