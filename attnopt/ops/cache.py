"""`attnopt::attend_update`: new tokens against a ragged cache and into it, one call for each layer.

Registered with `torch.library.Library` like `attnopt::span_decode`, and for the same reason: it is called once for each
layer and token. It writes to the cache it is given, and inductor leaves that write in place; a bare AOT graph would
copy the cache on every step. It has no gradient and says so.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.emit import load
from attnopt.codegen.spec import CacheStep
from attnopt.ops.span import empty_tokens_first, launches

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "attend_update(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) n, Tensor? valid, "
    "Tensor table, Tensor spans, float scale, bool fresh) -> Tensor"
)


@lru_cache(maxsize=256)
def _kernel(target: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> tuple[ModuleType, str]:
    """The emitted module and its key."""
    spec = CacheStep(target, str(dtype).removeprefix("torch."), *sizes)
    return load(spec), spec.key()


def attend_update(
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

    keys (B, S, D), values (B, S, Dv): all slots of the layer's cache; n int32 (B,): the tokens each row has seen. These
    three are written: what a later token may ask for of k and v, and n plus the tokens that count. valid bool (B, T) is
    true for those, None for all of them: padding is neither attended to nor stored. table int32 (G, 4): start,
    capacity, sink and window of each KV head; spans int32 (H, 2): sink and window of each query head; both of
    `attnopt.cache.Layout`, on the device of q. fresh: the caller knows that n is 0 everywhere.

    A token's position is the number of counting tokens before it in its row. Query head h at position i keeps the key
    at p, old or new, where ``p <= i and (p < sink or i - p < window)``; rows that keep nothing are 0. Which slot a
    token has: attnopt/codegen/slots.py.

    CacheFull, with nothing written, where a KV head that holds every token has no slot left; on a GPU, which would
    have to be waited for, such tokens are not written. ValueError for sizes, dtypes or devices that do not fit.
    """
    _refuse_gradient(q, k, v, keys, values)
    _check(q, k, v, keys, values, n, valid, table, spans)
    target = settings.target(q.device.type)
    module, key = _kernel(target, q.dtype, (q.shape[1], k.shape[1], q.shape[3], v.shape[3]))
    launches[key] += 1
    out: Tensor = module.step(q, k, v, keys, values, n, valid, table, spans, scale, fresh)
    return out


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("attnopt::attend_update has no gradient: decode under torch.no_grad()")


def _check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError unless sizes, dtypes and devices belong together."""
    (batch, heads, tokens, dim), (groups, width), slots = q.shape, v.shape[1::2], keys.shape[1]
    fits = k.shape == (batch, groups, tokens, dim) and v.shape == (batch, groups, tokens, width)
    fits = fits and keys.shape == (batch, slots, dim) and values.shape == (batch, slots, width) and n.shape == (batch,)
    fits = fits and table.shape == (groups, 4) and spans.shape == (heads, 2) and heads % groups == 0
    if not fits or (valid is not None and valid.shape != (batch, tokens)):
        named = dict(q=q, k=k, v=v, keys=keys, values=values, n=n, valid=valid, table=table, spans=spans)
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items() if x is not None)
        raise ValueError(
            "expected q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), keys (B, S, D), values (B, S, Dv), n (B,), "
            f"valid (B, T), table (G, 4) and spans (H, 2), found {found}"
        )
    if not q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v, keys, values))
        raise ValueError(f"q, k, v, keys and values are {found}, expected one dtype")
    if not n.dtype == table.dtype == spans.dtype == torch.int32:
        raise ValueError(f"n, table and spans are {n.dtype}, {table.dtype} and {spans.dtype}, expected torch.int32")
    if not (n.is_contiguous() and table.is_contiguous() and spans.is_contiguous()):
        raise ValueError("n, table and spans must be contiguous: kernels read and write them as they lie")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}, expected torch.bool")
    if any(x.device != q.device for x in (k, v, keys, values, n, table, spans, *(() if valid is None else (valid,)))):
        raise ValueError("the cache, its tables and the new tokens lie on several devices, expected one")


def _fake(q, k, v, keys, values, n, valid, table, spans, scale, fresh):  # type: ignore[no-untyped-def]
    _refuse_gradient(q, k, v, keys, values)
    return empty_tokens_first(q, v.shape[3])


_library.impl("attend_update", attend_update, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::attend_update", _fake, lib=_library)
