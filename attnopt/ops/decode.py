"""`attnopt::span_decode`: new queries against a ragged cache, a segment of slots for every KV head.

Registered with `torch.library.Library` and not as a custom_op: it is called once for each layer and token, and costs
3 to 4 us more than the function itself, as a custom_op 14 to 18. It has no gradient and says so.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.emit import load
from attnopt.codegen.spec import SpanDecode
from attnopt.ops.span import launches

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "span_decode(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor filled, float scale, Tensor? sinks=None, "
    "Tensor? windows=None, Tensor? positions=None, Tensor? at=None) -> Tensor"
)


@lru_cache(maxsize=256)
def _kernel(target: str, dtype: torch.dtype, sizes: tuple[int, ...], positioned: bool) -> tuple[ModuleType, str]:
    """The emitted module and its key."""
    heads, kv_heads, dim, dim_v, tokens = sizes
    name = str(dtype).removeprefix("torch.")
    spec = SpanDecode(target, name, heads, kv_heads, dim, dim_v, tokens, positioned)
    return load(spec), spec.key()


def _refuse_gradient(q: Tensor, k: Tensor, v: Tensor) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("attnopt::span_decode has no gradient: decode under torch.no_grad()")


def span_decode(
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
    """q (B, H, T, D), k (B, C, D), v (B, C, Dv), starts int32 (G + 1,), filled int32 (B, G) -> (B, H, T, Dv).

    KV head g has the slots starts[g] up to starts[g + 1], of which the first filled[b, g] hold a key, in any order.
    All are kept by the queries of the group's heads, unless positions int32 (B, C) or (C,) come along, with sinks and
    windows int32 (H,) and at int32 (B,), the position of the first of T queries: then query head h at position i keeps
    the key at p where ``p <= i and (p < sinks[h] or i - p < windows[h])``. A row that keeps nothing is 0. All tables
    lie beside q, and `filled` is read while running, so that a captured CUDA graph serves a growing cache.
    """
    _refuse_gradient(q, k, v)
    given = [x is not None for x in (sinks, windows, positions, at)]
    if any(given) != all(given):
        raise ValueError("sinks, windows, positions and at come together or not at all")
    sizes = (q.shape[1], filled.shape[1], q.shape[3], v.shape[2], q.shape[2])
    target = settings.target(q.device.type)
    module, key = _kernel(target, q.dtype, sizes, all(given))
    launches[key] += 1
    return module.decode(q, k, v, starts, filled, scale, *((sinks, windows, positions, at) if all(given) else ()))


def _fake(q, k, v, starts, filled, scale, sinks=None, windows=None, positions=None, at=None):  # type: ignore[no-untyped-def]
    _refuse_gradient(q, k, v)
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[2])


_library.impl("span_decode", span_decode, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::span_decode", _fake, lib=_library)
