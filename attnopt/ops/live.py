"""`attnopt::live_attention`: queries against the whole buffers of a cache, of which only a part is written.

Registered as `attnopt::span_decode` is, and for the same reason. It has no gradient and says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import settings
from attnopt.codegen import live_cpu, reference_live
from attnopt.ops.span import empty_tokens_first, tokens_first

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("live_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def _checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("attnopt::live_attention has no gradient: decode under torch.no_grad()")
    if mask is None:
        return
    if mask.ndim != 4 or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"the mask is {mask.dtype} {tuple(mask.shape)}, expected bool or floating (B | 1, 1, T | 1, C)"
        )
    # Written this way no guard comes of it where sizes are symbols.
    if type(k.shape[2]) is int and mask.shape[3] != k.shape[2]:
        raise ValueError(f"the mask has {mask.shape[3]} columns, the cache {k.shape[2]}")


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether sizes, dtypes and devices belong together; asked where sizes are numbers."""
    (batch, heads, tokens, dim), (rows, groups, slots, width) = q.shape, k.shape
    held = (rows, width) == (batch, dim) and v.shape[:3] == k.shape[:3]
    alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    shared = groups > 0 and heads % groups == 0
    if mask is None or not (held and alike and shared):
        return held and alike and shared
    b, h, t, c = mask.shape
    return b in (1, batch) and h == 1 and t in (1, tokens) and c == slots and mask.device == q.device


def live_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, H, T, D), k (B, G, C, D), v (B, G, C, Dv), mask (B | 1, 1, T | 1, C) -> (B, H, T, Dv), laid out as
    (B, T, H, Dv).

    mask: bool, true where a key is kept, or floating, added to the scores, minus infinity where a key is not kept; None
    keeps all. On the CPU the columns before the first and behind the last that a batch entry keeps are not read,
    nor, where the compiled kernel serves, those between that no row keeps. A GPU reads all of them: to know which count
    it would have to wait. KV heads are not repeated. A row that keeps nothing
    is 0.
    """
    _checked(q, k, v, mask)
    if not (q.ndim == k.ndim == v.ndim == 4 and _fits(q, k, v, mask)):
        given = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
        found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in given.items())
        raise ValueError(
            "expected q (B, H, T, D), k (B, G, C, D), v (B, G, C, Dv) of one dtype and a mask (B | 1, 1, T | 1, C), "
            f"all on one device, found {found}"
        )
    attend = {"cpu": live_cpu.attend, "reference": reference_live.attend}.get(settings.target(q.device.type), _whole)
    return tokens_first(attend(q, k, v, mask, scale))


def _whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Without a look at the mask's values: one SDPA call, the query heads of a KV head as rows of one head."""
    batch, heads, tokens, dim = q.shape
    share = heads // k.shape[1]
    rows = None
    if mask is not None:
        rows = reference_live.shown(mask).any(-1, keepdim=True)
        mask = mask if mask.dtype == torch.bool else reference_live.added(mask, q.dtype)
        mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, share, 1)
        mask = mask.expand(batch, k.shape[1], share * tokens, k.shape[2])
    packed = q.reshape(batch, k.shape[1], share * tokens, dim)
    out = F.scaled_dot_product_attention(packed, k, v, mask, scale=scale).reshape(batch, heads, tokens, v.shape[3])
    return out if rows is None else out.masked_fill(~rows, 0.0)


def _fake(q, k, v, mask, scale):  # type: ignore[no-untyped-def]
    _checked(q, k, v, mask)
    return empty_tokens_first(q, v.shape[3])


_library.impl("live_attention", live_attention, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::live_attention", _fake, lib=_library)
