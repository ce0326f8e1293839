"""Linear attention to far keys, those between a head's sinks and its window: what a span leaves out, in place of it.

attnopt::linear_far            output and logsumexp of a causal prefill; `attnopt.ops.merge` joins them with a span's
attnopt::linear_far_backward   its gradients at q, k and v; the maps, fitted offline, get none
attnopt::linear_state          the state after a prompt
attnopt::linear_decode         one new token: what leaves the window is added to the state, which is then read

The weight of key j in row i is exp(shift_i) f_i . g_j with the features of attnopt/feature_maps.py.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.emit import load
from attnopt.codegen.spec import LinearBackward, LinearDecode, LinearPrefill
from attnopt.errors import PlanError
from attnopt.feature_maps import KINDS, FeatureMap, shapes
from attnopt.ops.span import empty_tokens_first, launches, no_second, on_device, spans_at, tokens_first

MAPS = "Tensor wq, Tensor bq, Tensor cq, Tensor wk, Tensor bk, Tensor ck, Tensor u, Tensor u0"


def maps_of(kind: str, tensors: tuple[Tensor, ...], served: int, dim: int) -> FeatureMap:
    """The maps of `served` query heads of `dim` features, from wq, bq, cq, wk, bk, ck, u, u0. PlanError where one is
    not what the heads and the others ask for.
    """
    if kind not in KINDS:
        raise PlanError(f"There is no map of kind {kind!r}.", f"Kinds are {' and '.join(KINDS)}.")
    rank = tensors[0].shape[1] if tensors[0].ndim == 3 else 0
    for (name, shape), x in zip(shapes(served, rank, dim).items(), tensors, strict=True):
        if not rank or tuple(x.shape) != shape or x.dtype != torch.float32:
            found = f"{name} of a map is {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            asked = f"float32 {shape}" if rank else f"float32 ({served}, features, {dim})"
            raise PlanError(f"{found}, expected {asked}.", "Fit the maps anew for this model, with attnopt distill.")
    return FeatureMap(kind, *tensors)


def kernel(
    family: type[LinearPrefill | LinearBackward], q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, maps: FeatureMap
) -> ModuleType:
    """The emitted module of a family for these inputs and the current target, about to be called."""
    spec = family(
        target=settings.target(q.device.type),
        dtype=str(q.dtype).removeprefix("torch."),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        served=maps.wq.shape[0],
        kind=maps.kind,
        rank=maps.wq.shape[1],
        padded=pad is not None,
    )
    module = load(spec)
    launches[spec.key()] += 1
    return module


def tables_at(
    length: int, heads: Tensor, sinks: Tensor, alphas: Tensor, betas: Tensor, min_length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """heads, and the sinks and windows of these at `length` keys, int32 (h,) each, on `device`."""
    sinks, windows = spans_at(length, sinks, alphas, betas, 0, min_length)
    tables = heads, sinks[heads.long()], windows[heads.long()]
    if device.type == "cpu":
        return tables
    moved = on_device(tuple(tables[1].tolist()), tuple(tables[2].tolist()), device)
    return on_device(tuple(heads.tolist()), (), device)[0], *moved


@torch.library.custom_op("attnopt::linear_far", mutates_args=())
def linear_far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    wq: Tensor,
    bq: Tensor,
    cq: Tensor,
    wk: Tensor,
    bk: Tensor,
    ck: Tensor,
    u: Tensor,
    u0: Tensor,
    kind: str,
    min_length: int,
) -> tuple[Tensor, Tensor]:
    """Linear attention of each query to the keys that a span leaves out, sink <= j <= i - window.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv); heads int32 (h,), ascending, on the CPU: the query heads served;
    sinks, alphas int32 (H,) and betas float64 (H,) on the CPU and min_length: the site's own, as span_attention takes
    them; pad bool (B, N) true where a key counts; maps in float32: wq, wk (h, R, D), bq, bk (h, R), cq, ck, u0 (h,),
    u (h, D). Returns out (B, h, N, Dv), physically (B, N, h, Dv), and lse (B, h, N), the logarithm of the sum of a
    row's weights, in float32 (float64 for float64 inputs): -inf, beside an out of 0, where there is no far key.
    """
    maps = maps_of(kind, (wq, bq, cq, wk, bk, ck, u, u0), heads.shape[0], q.shape[3])
    tables = tables_at(q.shape[2], heads, sinks, alphas, betas, min_length, q.device)
    out, lse = kernel(LinearPrefill, q, k, v, pad, maps).prefill(q, k, v, *tables, maps, pad)
    return tokens_first(out), lse.contiguous()


@linear_far.register_fake
def _(q, k, v, heads, sinks, alphas, betas, pad, wq, bq, cq, wk, bk, ck, u, u0, kind, min_length):  # type: ignore[no-untyped-def]
    served = heads.shape[0]
    maps_of(kind, (wq, bq, cq, wk, bk, ck, u, u0), served, q.shape[3])
    lse = q.new_empty(q.shape[0], served, q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty(v.shape[0], v.shape[2], served, v.shape[3]).transpose(1, 2), lse


@torch.library.custom_op("attnopt::linear_far_backward", mutates_args=())
def linear_far_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: Tensor,
    sinks: Tensor,
    alphas: Tensor,
    betas: Tensor,
    pad: Tensor | None,
    wq: Tensor,
    bq: Tensor,
    cq: Tensor,
    wk: Tensor,
    bk: Tensor,
    ck: Tensor,
    u: Tensor,
    u0: Tensor,
    kind: str,
    min_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at q, k and v of `linear_far`, whose results were out and lse, for dout and dlse at these."""
    maps = maps_of(kind, (wq, bq, cq, wk, bk, ck, u, u0), heads.shape[0], q.shape[3])
    tables = tables_at(q.shape[2], heads, sinks, alphas, betas, min_length, q.device)
    module = kernel(LinearBackward, q, k, v, pad, maps)
    dq, dk, dv = (tokens_first(x) for x in module.backward(dout, dlse, q, k, v, out, lse, *tables, maps, pad))
    return dq, dk, dv


@linear_far_backward.register_fake
def _(dout, dlse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return tuple(empty_tokens_first(x, x.shape[3]) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *rest[:-2])
    ctx.rest = rest[-2:]


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.attnopt.linear_far_backward(dout, dlse, *ctx.saved_tensors, *ctx.rest)
    return *found, *(None for _ in range(15))


linear_far.register_autograd(_gradients, setup_context=_save)
linear_far_backward.register_autograd(no_second("linear_far"))

# Decoding is called once for each layer and token: low-level, as attnopt::span_decode, for what a call costs.
_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "linear_state(Tensor k, Tensor v, Tensor heads, int query_heads, Tensor sinks, Tensor windows, Tensor? pad, "
    f"{MAPS}, str kind) -> Tensor"
)
_library.define(
    f"linear_decode(Tensor q, Tensor k, Tensor v, Tensor slots, Tensor heads, Tensor(a!) state, {MAPS}, str kind) "
    "-> (Tensor, Tensor)"
)


@lru_cache(maxsize=256)
def _decoding(target: str, dtype: torch.dtype, sizes: tuple[int, ...], kind: str) -> tuple[ModuleType, str, list[int]]:
    """The emitted module, its key, and how many entries each tensor of the maps has. sizes: query heads, dim of q and
    k, dim of v, heads served, rank."""
    heads, dim, dim_v, served, rank = sizes
    spec = LinearDecode(target, str(dtype).removeprefix("torch."), heads, 1, dim, dim_v, served, kind, rank)
    return load(spec), spec.key(), [prod(shape) for shape in shapes(served, rank, dim).values()]


def linear_state(
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    query_heads: int,
    sinks: Tensor,
    windows: Tensor,
    pad: Tensor | None,
    wq: Tensor,
    bq: Tensor,
    cq: Tensor,
    wk: Tensor,
    bk: Tensor,
    ck: Tensor,
    u: Tensor,
    u0: Tensor,
    kind: str,
) -> Tensor:
    """The state (B, h, F, Dv + 1) in float32 that decoding goes on from after a prompt: the sum over the far keys of
    its last query of their features times their values, and, in the last column, times 1.

    k (B, G, N, D), v (B, G, N, Dv); heads int32 (h,) on the CPU: the served ones of `query_heads`; sinks and windows
    int32 (h,) of these, on the CPU; pad and maps as `linear_far` takes them.
    """
    maps = maps_of(kind, (wq, bq, cq, wk, bk, ck, u, u0), heads.shape[0], k.shape[3])
    sizes = query_heads, k.shape[3], v.shape[3], heads.shape[0], maps.rank
    module, key, _ = _decoding(settings.target(k.device.type), k.dtype, sizes, kind)
    launches[key] += 1
    return module.state(k, v, heads, query_heads, sinks, windows, maps, pad)


def linear_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    heads: Tensor,
    state: Tensor,
    wq: Tensor,
    bq: Tensor,
    cq: Tensor,
    wk: Tensor,
    bk: Tensor,
    ck: Tensor,
    u: Tensor,
    u0: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """One new query of each served head, after what leaves its window has been added to the state.

    q (B, H, 1, D); heads int32 (h,), ascending, on the CPU; state (B, h, F, Dv + 1) in float32, written; k (B, C, D),
    v (B, C, Dv) and slots int32 (B, h) beside q: the slot of the cache whose key leaves the window of each served head,
    position i - w for the query at position i, or a negative one where that lies among the sinks, before the first
    token or in padding. Gathered keys, (B, h, D), have the slots 0, 1, ... Maps as `linear_far` takes them. Returns out
    (B, h, 1, Dv) and lse (B, h, 1), as `linear_far` does.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or state.requires_grad):
        raise RuntimeError("attnopt::linear_decode has no gradient: decode under torch.no_grad()")
    tensors = wq, bq, cq, wk, bk, ck, u, u0
    served, dim, width = heads.shape[0], q.shape[3], v.shape[2]
    sizes = q.shape[1], dim, width, served, wq.shape[1] if wq.ndim == 3 else 0
    module, key, entries = _decoding(settings.target(q.device.type), q.dtype, sizes, kind)
    # Quickly, as this is called for every layer and token; what is wrong then says the slow way.
    if [x.numel() if x.dtype is torch.float32 else -1 for x in tensors] != entries:
        maps_of(kind, tensors, served, dim)
    maps = FeatureMap(kind, *tensors)
    if state.shape != (q.shape[0], served, maps.width, width + 1) or q.shape[2] != 1:
        wanted = (q.shape[0], served, maps.width, width + 1)
        raise ValueError(f"expected one token and a state {wanted}, found {q.shape[2]} and {tuple(state.shape)}")
    launches[key] += 1
    return module.decode(q, k, v, slots, heads, state, maps)


def _fake_state(k, v, heads, query_heads, sinks, windows, pad, wq, bq, cq, wk, bk, ck, u, u0, kind):  # type: ignore[no-untyped-def]
    maps = maps_of(kind, (wq, bq, cq, wk, bk, ck, u, u0), heads.shape[0], k.shape[3])
    wide = torch.promote_types(k.dtype, torch.float32)
    return k.new_empty(k.shape[0], heads.shape[0], maps.width, v.shape[3] + 1, dtype=wide)


def _fake_decode(q, k, v, slots, heads, state, wq, bq, cq, wk, bk, ck, u, u0, kind):  # type: ignore[no-untyped-def]
    batch, served = q.shape[0], heads.shape[0]
    return v.new_empty(batch, served, 1, v.shape[2]), state.new_empty(batch, served, 1)


_library.impl("linear_state", linear_state, "CompositeExplicitAutograd")
_library.impl("linear_decode", linear_decode, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::linear_state", _fake_state, lib=_library)
torch.library.register_fake("attnopt::linear_decode", _fake_decode, lib=_library)
