"""`attnopt::attend_update`: new tokens against a ragged cache and into it, one call for each layer.

Registered with `torch.library.Library` like `attnopt::span_decode`, and for the same reason: it is called once for each
layer and token. It writes to the cache it is given, and inductor leaves that write in place; a bare AOT graph would
copy the cache on every step. It has no gradient and says so.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TypeAlias

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
    module, key = check(q, k, v, keys, values, n, valid, table, spans)
    launches[key] += 1
    out: Tensor = module.step(q, k, v, keys, values, n, valid, table, spans, scale, fresh)
    return out


def check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    spans: Tensor,
) -> tuple[ModuleType, str]:  # fmt: skip
    """The kernel for these arguments, and its key; an error where they do not fit."""
    refuse_gradient(q, k, v, keys, values)
    # One look-up for all checks that need no values: they took a third of a call.
    tensors = (
        (q, k, v, keys, values, n, table, spans) if valid is None else (q, k, v, keys, values, n, table, spans, valid)
    )
    given = [(x.shape, x.dtype, x.device) for x in tensors]
    module, key = _kernel(settings.target(q.device.type), *given)
    if not (n.is_contiguous() and table.is_contiguous() and spans.is_contiguous()):
        raise ValueError("n, table and spans must be contiguous: kernels read and write them as they lie")
    return module, key


def refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("attnopt::attend_update has no gradient: decode under torch.no_grad()")


Given: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


@lru_cache(maxsize=1024)
def _kernel(
    target: str, q: Given, k: Given, v: Given, keys: Given, values: Given, n: Given, table: Given, spans: Given,
    valid: Given | None = None,
) -> tuple[ModuleType, str]:  # fmt: skip
    """The emitted module and its key. ValueError unless shapes, dtypes and devices belong together."""
    named = dict(q=q, k=k, v=v, keys=keys, values=values, n=n, table=table, spans=spans)
    named |= {} if valid is None else dict(valid=valid)
    sizes = _sizes({name: tuple(x[0]) for name, x in named.items()})
    if len({x[1] for x in (q, k, v, keys, values)}) > 1:
        found = ", ".join(str(x[1]).removeprefix("torch.") for x in (q, k, v, keys, values))
        raise ValueError(f"q, k, v, keys and values are {found}, expected one dtype")
    if not n[1] == table[1] == spans[1] == torch.int32:
        raise ValueError(f"n, table and spans are {n[1]}, {table[1]} and {spans[1]}, expected torch.int32")
    if valid is not None and valid[1] != torch.bool:
        raise ValueError(f"valid is {valid[1]}, expected torch.bool")
    if len({x[2] for x in named.values()}) > 1:
        raise ValueError("the cache, its tables and the new tokens lie on several devices, expected one")
    spec = CacheStep(target, str(q[1]).removeprefix("torch."), *sizes)
    return load(spec), spec.key()


def _sizes(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """H, G, D and Dv of the operator's arguments, or ValueError."""
    q, k, v, keys = (shapes[name] for name in ("q", "k", "v", "keys"))
    if (len(q), len(k), len(v), len(keys)) == (4, 4, 4, 3) and k[1] and q[1] % k[1] == 0:
        (batch, heads, tokens, dim), groups, width, slots = q, k[1], v[3], keys[1]
        wanted = dict(
            q=q, k=(batch, groups, tokens, dim), v=(batch, groups, tokens, width), keys=(batch, slots, dim),
            values=(batch, slots, width), n=(batch,), table=(groups, 4), spans=(heads, 2), valid=(batch, tokens),
        )  # fmt: skip
        if all(shape == wanted[name] for name, shape in shapes.items()):
            return heads, groups, dim, width
    raise ValueError(
        "expected q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), keys (B, S, D), values (B, S, Dv), n (B,), "
        f"table (G, 4), spans (H, 2) and valid (B, T), found {', '.join(f'{n} {x}' for n, x in shapes.items())}"
    )


def _fake(q, k, v, keys, values, n, valid, table, spans, scale, fresh):  # type: ignore[no-untyped-def]
    refuse_gradient(q, k, v, keys, values)
    return empty_tokens_first(q, v.shape[3])


_library.impl("attend_update", attend_update, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::attend_update", _fake, lib=_library)
