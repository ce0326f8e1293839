"""The compiled CPU kernels of linear far parts, linear.cpp: float32 and bfloat16, where those of spans are to be had.

Elsewhere torch's operators do the same (linear_cpu.py).
"""

from __future__ import annotations

import ctypes
import logging
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen import native
from attnopt.errors import first_line

log = logging.getLogger(__name__)
# Compiled as one text, in this order.
SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("guarded", "linear", "linear_prefill", "linear_decode")
)
# What they unpack: addresses, strides, sizes. In one piece: a token is decoded with a call for every layer.
_PREFILL, _DECODE = struct.Struct("38q").pack, struct.Struct("31q").pack


def unusable(dtype: torch.dtype) -> str:
    """Why the kernels cannot be used for a dtype in this process, or "". The first call compiles them."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they have no {str(dtype).removeprefix('torch.')}"
    # They use a matrix unit where there is one and need none, as those of spans do for bfloat16.
    return _reason() if settings.native() else native.unusable()


@cache
def _reason() -> str:
    return native.unusable() or _loaded()[1]


def prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: Tensor, sinks: Tensor, windows: Tensor,
    maps: tuple[Tensor | None, ...], kind: str, pad: Tensor | None,
) -> None:  # fmt: skip
    """The far parts of the query heads `heads` int (h,), of sinks and windows int (h,), into out (B, h, N, Dv) and lse
    float32 (B, h, N), contiguous.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), out: of one dtype, or ValueError. maps: wq (h, D, R), bq (h, R), cq
    (h,), wk (h, R, D), bk (h, R), ck (h,), u (h, D) or None, u0 (h,) or None: of kind "exp" without the last two, which
    are part of wq and bq there. pad bool (B, N).
    """
    _one_dtype(q, k, v, out)
    q, k, v = map(_readable, (q, k, v))
    assert lse.is_contiguous() and out.stride(-1) == 1
    batch, count, length, dim = q.shape
    # Named, so that what a conversion makes is there until the call ends.
    tables = [*map(_table, (heads, sinks, windows)), None if pad is None else pad.contiguous()]
    maps = tuple(None if x is None else x.contiguous() for x in maps)
    assert maps[3] is not None
    sizes = batch, count, k.shape[1], length, dim, v.shape[3], heads.shape[0], maps[3].shape[1], kind == "taylor"
    held = q, k, v, out
    strides = (step for x in held for step in x.stride()[:3])
    _entry("prefill", q.dtype)(_PREFILL(*map(_address, (*held, lse, *tables, *maps)), *strides, *sizes))


def decode(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, heads: Tensor, state: Tensor, maps: tuple[Tensor, ...], kind: str
) -> tuple[Tensor, Tensor]:
    """The contract of attnopt.codegen.reference_linear.decode, for a contiguous state in float32; maps: wq, bq, cq, wk,
    bk, ck, u, u0. ValueError where a slot is not one of k.
    """
    _one_dtype(q, k, v)
    q, k, v = map(_readable, (q, k, v))
    assert state.is_contiguous() and state.dtype == torch.float32
    batch, count, _, dim = q.shape
    served, width = heads.shape[0], v.shape[2]
    out = q.new_empty((batch, served, 1, width))
    lse = q.new_empty((batch, served, 1), dtype=torch.float32)
    tables, maps = (_table(slots), _table(heads)), tuple(x.contiguous() for x in maps)
    wrong = _entry("decode", q.dtype)(
        _DECODE(
            *map(_address, (q, k, v, out, lse, *tables, state, *maps)),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            batch, count, 1, k.shape[1], dim, width, served, maps[1].shape[1], kind == "taylor",
        )
    )  # fmt: skip
    if wrong:
        raise ValueError(f"slots reach {int(slots.max())}, and the cache has {k.shape[1]}")
    return out, lse


def _one_dtype(*held: Tensor) -> None:
    if len({x.dtype for x in held}) > 1:
        raise ValueError(f"q, k and v are {', '.join(str(x.dtype) for x in held)}, expected one dtype")


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _entry(name: str, dtype: torch.dtype) -> Any:
    """The function of the library for a dtype."""
    return getattr(_loaded()[0], f"{name}_{str(dtype).removeprefix('torch.')}")


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    try:
        # Private to inductor, and may move: then this is what the reason says.
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load("".join(path.read_text(encoding="utf-8") for path in SOURCES))
        library.failure.restype = ctypes.c_char_p
        for name in ("prefill", "decode"):
            for dtype in ("float32", "bfloat16"):
                native.answering(library, f"{name}_{dtype}", ctypes.c_char_p)
        return library, ""
    except Exception as error:
        said = first_line(error)[:200]
        log.warning("Linear far parts run out of torch's operators on this CPU, which are slower: %s", said)
        return None, f"not compiled: {said}"
