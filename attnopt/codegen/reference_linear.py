"""Linear attention to far keys in plain PyTorch: what every other target is tested against. Makes all weights.

Query i of a served head weighs key j of s <= j <= i - w, where its sink is s and its window w, by

    W_ij = exp(shift_i) f_i . g_j      f, shift = query_features(q_i)      g = key_features(k_j)

and its result is the mean of the values under these weights with the logarithm of their sum, which is what merges it
with the keys that the head keeps (LoLCATs, arXiv 2410.10254, equation 6; Hedgehog, arXiv 2402.04347, for the maps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.feature_gradients import at_keys, at_queries
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import Linear, LinearBackward, LinearDecode, LinearPrefill
from attnopt.feature_maps import FeatureMap, key_features, query_features
from attnopt.registry import TARGETS


def far_mask(length: int, sinks: Tensor, windows: Tensor) -> Tensor:
    """Mask (h, N, N) of far keys: ``s <= j <= i - w``, for sinks and windows int (h,)."""
    i = torch.arange(length, device=sinks.device)[:, None]
    j = torch.arange(length, device=sinks.device)[None, :]
    return (j >= sinks.view(-1, 1, 1)) & (i - j >= windows.clamp(min=0).view(-1, 1, 1))


def kv_heads_of(heads: Tensor, query_heads: int, kv_heads: int) -> Tensor:
    """The KV head that each query head reads."""
    return heads.long() // (query_heads // kv_heads)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), heads int (h,) the query heads served, their sinks, windows int
    (h,) and maps, pad bool (B, N) -> out (B, h, N, Dv) in the dtype of v and lse (B, h, N).

    lse is the natural logarithm of the sum of a row's weights, in float32, or in float64 for float64 inputs; where a
    row has no far key it is -inf and out is 0.
    """
    row = weights_of(q, k, v, heads, sinks, windows, maps, pad)
    total = row.weights.sum(-1)
    there = total > 0
    total = torch.where(there, total, 1.0)
    lse = torch.where(there, row.shift + total.log(), float("-inf"))
    return (row.weights @ row.values / total[..., None]).to(v.dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: Tensor,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q (B, H, N, D), k (B, G, N, D) and v (B, G, N, Dv) of a prefill that gave out and lse, for the
    gradients dout (B, h, N, Dv) and dlse (B, h, N) at these. Heads that are not served have a gradient of 0.

    With n_i the sum of f_i . g_j over the far keys and r_i = (dout_i, dlse_i - dout_i . out_i) / n_i, the gradient at
    f_i . g_j is r_i . (v_j, 1), and the one at v_j is the sum over i of f_i . g_j r_i without its last entry.
    """
    row = weights_of(q, k, v, heads, sinks, windows, maps, pad)
    wide, kv = row.values.dtype, kv_heads_of(heads, q.shape[1], k.shape[1])
    dout, out = dout.to(wide), out.to(wide)
    # A row without far keys has none to give a gradient to; exp(shift + inf) would be infinite there.
    there = lse > float("-inf")
    inverse = torch.where(there, (row.shift - lse.to(wide)).exp(), 0.0)[..., None]
    rest = (dlse.to(wide) - (dout * out).sum(-1))[..., None] * inverse
    dweights = (dout * inverse @ row.values.mT + rest).masked_fill(~row.mask, 0.0)
    dshift = torch.where(there, dlse.to(wide), 0.0)
    dq = at_queries(row.q, maps, row.f, dweights @ row.g, dshift)
    dk = at_keys(row.k, maps, row.g, dweights.mT @ row.f)
    dv = row.weights.mT @ (dout * inverse)
    found = ((dq, heads.long(), q), (dk, kv, k), (dv, kv, v))
    dq, dk, dv = (torch.zeros_like(like, dtype=wide).index_add_(1, to, x).to(like.dtype) for x, to, like in found)
    return dq, dk, dv


def state(
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    query_heads: int,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None = None,
) -> Tensor:
    """What decoding goes on from after a prompt of N tokens: the sum over the far keys of its last query, s <= j <
    N - w, of g_j (v_j, 1)ᵀ, (B, h, F, Dv + 1) in float32, or in float64 for float64 inputs. The last column is the
    normaliser.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    kv, length = kv_heads_of(heads, query_heads, k.shape[1]), k.shape[2]
    j = torch.arange(length, device=k.device)
    far = (j >= sinks[:, None]) & (j < length - windows.clamp(min=0)[:, None])
    if pad is not None:
        far = far & pad[:, None, :]
    g = key_features(k[:, kv], maps) * far[..., None].to(wide)
    return g.mT @ _with_one(v[:, kv].to(wide))


def decode(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, heads: Tensor, state: Tensor, maps: FeatureMap
) -> tuple[Tensor, Tensor]:
    """q (B, H, 1, D), k (B, C, D), v (B, C, Dv), slots int (B, h), heads int (h,), state (B, h, F, Dv + 1) -> out
    (B, h, 1, Dv) in the dtype of v and lse (B, h, 1), as those of `prefill`.

    slots says which key and value leave the window of each served head with this query, and are added to its state
    before that is read, in place; a negative one is none. They are rows of a cache, or gathered: k may be (B, h, D).
    """
    wide = torch.promote_types(q.dtype, state.dtype)
    rows = slots.long().clamp(min=0)[..., None]
    leaving = (slots >= 0)[..., None, None]
    keys, values = (x.gather(1, rows.expand(-1, -1, x.shape[2]))[:, :, None].to(wide) for x in (k, v))
    added = key_features(keys, maps).mT @ _with_one(values)
    # Not a product with 0: a slot that nobody has written may hold anything.
    state += torch.where(leaving, added, 0.0).to(state.dtype)
    f, shift = query_features(q[:, heads.long()].to(wide), maps)
    sums = f @ state.to(wide)
    total = sums[..., -1]
    there = total > 0
    total = torch.where(there, total, 1.0)
    lse = torch.where(there, shift + total.log(), float("-inf"))
    return (sums[..., :-1] * there[..., None] / total[..., None]).to(v.dtype), lse


def _with_one(values: Tensor) -> Tensor:
    """(..., N, Dv) -> (..., N, Dv + 1), the last column 1."""
    return torch.nn.functional.pad(values, (0, 1), value=1.0)


@dataclass(frozen=True)
class Weights:
    """Everything a row is made of, wide: weights (B, h, N, N) without their shift (B, h, N), 0 outside the mask
    (B or 1, h, N, N); values (B, h, N, Dv); features f, g (B, h, N, F) of q and k (B, h, N, D), here."""

    q: Tensor
    k: Tensor
    values: Tensor
    f: Tensor
    g: Tensor
    shift: Tensor
    mask: Tensor
    weights: Tensor


def weights_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    windows: Tensor,
    maps: FeatureMap,
    pad: Tensor | None,
) -> Weights:
    wide = torch.promote_types(q.dtype, torch.float32)
    kv = kv_heads_of(heads, q.shape[1], k.shape[1])
    q, k, values = (x.to(wide) for x in (q[:, heads.long()], k[:, kv], v[:, kv]))
    mask = far_mask(q.shape[2], sinks, windows)[None]
    if pad is not None:
        mask = mask & pad[:, None, None, :]
    (f, shift), g = query_features(q, maps), key_features(k, maps)
    return Weights(q, k, values, f, g, shift, mask, (f @ g.mT).masked_fill(~mask, 0.0))


@TARGETS.register("reference linear_prefill")
class Prefill:
    @staticmethod
    def emit(spec: LinearPrefill) -> str:
        return module_text(spec, "prefill, state")


@TARGETS.register("reference linear_backward")
class Backward:
    @staticmethod
    def emit(spec: LinearBackward) -> str:
        return module_text(spec, "backward")


@TARGETS.register("reference linear_decode")
class Decode:
    @staticmethod
    def emit(spec: LinearDecode) -> str:
        return module_text(spec, "decode, state")


def module_text(spec: Linear, names: str) -> str:
    listed = ", ".join(f'"{name}"' for name in names.split(", "))
    text = f'"""{spec}."""\n\nfrom attnopt.codegen.reference_linear import {names}\n\n__all__ = [{listed}]\n'
    return text + footer(spec, "self_check_linear", names)
