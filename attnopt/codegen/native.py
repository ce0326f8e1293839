"""The CPU's own kernels, guarded.cpp to dispatch.cpp: compiled once by inductor's C++ machinery, kept in its cache.

They serve float32 on CPUs with AVX-512, and bfloat16 on those with a matrix unit for it; blocks.cpp, bfloat16 on those
with products of it in vectors too. Where they cannot be had, no
compiler above all, attention runs out of torch's own operators (span_cpu.py, decode_cpu.py): slower, the same within
rounding, and `unusable` says why.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen.decode_list import capacities_of
from attnopt.codegen.slots import refuse_overflow
from attnopt.errors import first_line

log = logging.getLogger(__name__)
# Compiled as one text, in this order.
SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("guarded", "spans", "rows", "decode", "cache", "live", "blocks", "tokens", "dispatch")
)
# What the kernel's vector loops step by.
FEATURES = 32


def unusable(dtype: torch.dtype = torch.float32, kernel: str = "") -> str:
    """Why the kernels cannot be used for a dtype in this process, or "". The first call compiles them.

    kernel: "blocks" for `blocks`, which asks less of the CPU than the others do; "tokens" for `pick`, and for `step`
    without queries, which ask nothing more.
    """
    return _cannot(dtype, kernel) if settings.native() else "ATTNOPT_NATIVE is 0"


# Kept: asked before every call, and from a cold cache the answer took as long as reading half a megabyte.
@cache
def _cannot(dtype: torch.dtype, kernel: str) -> str:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they have no {str(dtype).removeprefix('torch.')}"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "this CPU has no AVX-512"
    library, reason = _loaded()
    if library is None or dtype != torch.bfloat16 or kernel == "tokens":
        return reason
    if kernel == "blocks":
        return "" if library.multiplies_pairs() else "this CPU does not multiply bfloat16"
    return "" if library.has_matrix_unit() else "this CPU has no matrix unit for bfloat16"


def told() -> dict[str, str]:
    """For people: dtype -> "compiled", or why torch's operators are used in its place."""
    return {str(d).removeprefix("torch."): unusable(d) or "compiled" for d in (torch.float32, torch.bfloat16)}


def takes(dtype: torch.dtype, dim: int, dim_v: int, kernel: str = "") -> bool:
    """Whether the kernels serve CPU tensors of a dtype, with `dim` features in q and k and `dim_v` in v."""
    return dim % FEATURES == 0 and dim_v % FEATURES == 0 and not unusable(dtype, kernel)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, sinks: Tensor, windows: Tensor,
    pad: Tensor | None, heads: list[int], scale: float,
) -> None:  # fmt: skip
    """The query heads `heads` of a span prefill, into out (B, H, N, Dv) and, if given, lse float32 (B, H, N).

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), out: of one dtype, or ValueError; sinks, windows int (H,); pad bool
    (B, N). scale is positive.
    """
    if not q.dtype == k.dtype == v.dtype == out.dtype:
        raise ValueError(f"q, k, v and out are {q.dtype}, {k.dtype}, {v.dtype} and {out.dtype}, expected one dtype")
    q, k, v = map(_readable, (q, k, v))
    batch, count, length, dim = q.shape
    held = (q, k, v, out)
    sizes = (batch, k.shape[1], count // k.shape[1], length, dim, v.shape[3])
    strides = [step for t in held for step in t.stride()[:3]]
    tables = [t.to(torch.int32).contiguous() for t in (sinks, windows)]
    pad = None if pad is None else pad.contiguous()
    assert lse is None or lse.is_contiguous()
    library, _ = _loaded()
    assert library is not None
    getattr(library, f"prefill_{str(q.dtype)[6:]}")(
        (ctypes.c_void_p * 4)(*(t.data_ptr() for t in held)), (ctypes.c_int64 * 12)(*strides), _pointer(lse),
        *map(_pointer, tables), _pointer(pad), (ctypes.c_int64 * len(heads))(*heads), ctypes.c_int64(len(heads)),
        (ctypes.c_int64 * 6)(*sizes), ctypes.c_float(scale),
    )  # fmt: skip


# Query heads of a KV head times new tokens: rows that one piece of work holds.
MOST_ROWS = 64
# Tokens from which on a prompt into an empty cache is `prefill`'s, and not a step's (cache.cpp has the figures).
PROMPT = 1024
# What decode.cpp unpacks: ten addresses, ten strides, one more, seven sizes. Packed at once: a call is made for every
# layer and token, and eleven ctypes objects took longer than reading two hundred slots.
_PACKED = struct.Struct("28q").pack
# What cache.cpp unpacks: ten addresses, seventeen strides, seven sizes; live.cpp: five, fourteen, what the mask is,
# seven; and blocks.cpp: eleven, twelve, eleven.
_STEP, _LOOK, _LISTS = struct.Struct("34q").pack, struct.Struct("27q").pack, struct.Struct("34q").pack
# And tokens.cpp: fifteen, nine, eight.
_PICK = struct.Struct("32q").pack


def decode(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, filled: Tensor, scale: float, sinks: Tensor | None = None,
    windows: Tensor | None = None, positions: Tensor | None = None, at: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The contract of attnopt/codegen/reference_decode.py, for a positive scale: q (B, H, T, D), k (B, C, D),
    v (B, C, Dv) -> (B, H, T, Dv). At most MOST_ROWS rows for a KV head. ValueError where segments are not those of k.
    """
    dtype = q.dtype
    if not dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected one dtype")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, dim = q.shape
    groups, width, slots = filled.shape[1], v.shape[2], k.shape[1]
    # Of the two ways the shorter where it will do: every line of code is cold as well.
    same = width == dim and q.is_contiguous()
    out = torch.empty_like(q) if same else q.new_empty((batch, heads, tokens, width))
    starts, filled = _table(starts), _table(filled)
    addresses, apart = [x.data_ptr() for x in (q, k, v, out, starts, filled)], 0
    if positions is None:
        addresses += (0, 0, 0, 0)
    else:
        assert at is not None and sinks is not None and windows is not None
        apart = 0 if positions.ndim == 1 or positions.shape[0] == 1 else slots
        # Named, so that what a conversion makes is there until the call ends.
        tables = [_table(x) for x in (positions, at, sinks, windows)]
        addresses += [x.data_ptr() for x in tables]
    call = _PACKED(
        *addresses, *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *out.stride()[:3], apart,
        batch, groups, heads // groups, tokens, dim, width, slots,
    )  # fmt: skip
    wrong = _entry("decode", dtype)(call, scale)
    if wrong:
        table = tuple(starts.tolist())
        capacities_of(table)
        raise ValueError(f"starts ends at {table[-1]}, and the cache has {slots} slots")
    return out


def step(
    q: Tensor | None, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None,
    table: Tensor, spans: Tensor, scale: float,
) -> Tensor | None:  # fmt: skip
    """The contract of attnopt/codegen/reference_cache.py, for a positive scale; without q what is new is only written.

    q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), keys (B, S, D), values (B, S, Dv) -> (B, H, T, Dv) laid out as
    (B, T, H, Dv). keys, values: each slot contiguous; n, table, spans int32 and contiguous. CacheFull where a row would
    hold too many tokens, ValueError where the table is not that of the cache or n is negative; then nothing has been
    written.
    """
    dtype = k.dtype
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, groups, tokens, dim = k.shape
    width, heads, out = v.shape[3], spans.shape[0], None
    read, written = (0, 0, 0, 0), (0, 0, 0, 0)
    if q is not None:
        q = q if q.stride(-1) == 1 else q.contiguous()
        out = q.new_empty((batch, tokens, heads, width))
        read = (q.data_ptr(), *q.stride()[:3])
        written = (out.data_ptr(), tokens * heads * width, width, heads * width)
    valid = valid if valid is None or valid.stride(-1) == 1 else valid.contiguous()
    marked = (0, 0) if valid is None else (valid.data_ptr(), valid.stride(0))
    call = _STEP(
        read[0], k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), written[0], n.data_ptr(), marked[0],
        table.data_ptr(), spans.data_ptr(), *read[1:], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:2],
        *values.stride()[:2], *written[1:], marked[1], batch, heads, groups, tokens, keys.shape[1], dim, width,
    )  # fmt: skip
    if _entry("step", dtype)(call, scale):
        refuse_overflow(tokens, keys.shape[1], n, valid, table)
        raise ValueError(f"the table does not divide {keys.shape[1]} slots among {groups} KV heads: {table.tolist()}")
    return None if out is None else out.transpose(1, 2)


def live(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """The contract of attnopt/codegen/reference_live.py, for a positive scale and a dtype and sizes that `takes` has.

    q (B, H, T, D), k (B, G, C, D), v (B, G, C, Dv), mask bool, float32 or of q's dtype (B | 1, 1, T | 1, C) or None ->
    (B, H, T, Dv) laid out as (B, T, H, Dv). None where the mask is of another dtype, a floating one that leaves a query
    nothing, or one that keeps very many short runs of columns.
    """
    dtype, kind = q.dtype, 0
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, tokens, dim), (_, groups, columns, width) = q.shape, v.shape
    rows = (0, 0, 0)
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, dtype):
            return None
        kind = 1 if mask.dtype is torch.bool else 2 if mask.dtype is torch.float32 else 3
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        rows = (mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2) if mask.shape[2] > 1 else 0)
    out = q.new_empty((batch, tokens, heads, width))
    call = _LOOK(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), rows[0], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], tokens * heads * width, width, heads * width, *rows[1:], kind, batch, groups, heads // groups,
        tokens, columns, dim, width,
    )  # fmt: skip
    return None if _entry("look", dtype)(call, scale) else out.transpose(1, 2)


def blocks(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, counts: Tensor, lists: Tensor, bounds: Tensor, scale: float,
    pad: Tensor | None, window: int, block: int, out: Tensor, lse: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The contract of attnopt/codegen/reference_blocks.py, for a positive scale and what `takes` has for "blocks".

    q, k, v and out of one dtype, or ValueError; out with its features one after the other, lse contiguous. None, with
    nothing written, where heads or lists name what is not there.
    """
    if not q.dtype == k.dtype == v.dtype == out.dtype:
        raise ValueError(f"q, k, v and out are {q.dtype}, {k.dtype}, {v.dtype} and {out.dtype}, expected one dtype")
    if lse is not None and lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype}, expected torch.float32")
    q, k, v = map(_readable, (q, k, v))
    # Named, so that what a conversion makes is there until the call ends.
    tables = heads, counts, lists = _table(heads), _table(counts), _table(lists)
    skipped, pad = torch.empty_like(counts), None if pad is None else pad.contiguous()
    (batch, count, length, dim), (_, groups, keys, width) = q.shape, v.shape
    bounds = bounds.to(torch.float32).expand(batch, len(heads)).contiguous()
    held = (q, k, v, out, lse, *tables, bounds, pad, skipped)
    call = _LISTS(
        *(0 if x is None else x.data_ptr() for x in held), *(step for x in held[:4] for step in x.stride()[:3]),
        batch, groups, count // groups, length, keys, dim, width, len(heads), block, lists.shape[3], window,
    )  # fmt: skip
    return None if _entry("blocks", q.dtype)(call, scale) else skipped


def pick(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor, rules: Tensor,
    similar: Tensor, picked: Tensor, asked: Tensor, age: Tensor, sources: Sequence[Tensor], chosen: Tensor,
    labels: Tensor, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """The contract of attnopt/codegen/reference_token_step.py, for a positive scale and a dtype and sizes that `takes`
    has. Features of keys, values and out one after the other; all else that is written, and the sources, contiguous."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    valid = valid if valid is None or valid.stride(-1) == 1 else valid.contiguous()
    batch, heads, _, dim = q.shape
    # Named, so that what it holds is there until the call ends.
    places = (ctypes.c_int64 * (2 * len(sources)))(*(x for s in sources for x in (s.data_ptr(), s.shape[2])))
    addresses = (x.data_ptr() for x in (table, rules, similar, picked, age))
    call = _PICK(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), labels.data_ptr(), asked.data_ptr(),
        n.data_ptr(), 0 if valid is None else valid.data_ptr(), *addresses, ctypes.addressof(places),
        chosen.data_ptr(), *q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *out.stride()[:2],
        0 if valid is None else valid.stride(0), batch, heads, table.shape[0], keys.shape[1], dim, values.shape[2],
        picked.shape[2], chosen.shape[2],
    )  # fmt: skip
    if _entry("pick", q.dtype)(call, scale):
        raise ValueError(f"a head that selects has fewer slots than there are tokens: {n.tolist()}, {table.tolist()}")


def _table(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


@cache
def _entry(name: str, dtype: torch.dtype) -> Any:
    """The function of the library for a dtype."""
    return getattr(_loaded()[0], f"{name}_{str(dtype).removeprefix('torch.')}")


def answering(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Let the function `name` of a library that begins with guarded.cpp raise RuntimeError where it throws."""

    def answer(found: int, *_: Any) -> int:
        if found < 0:
            why = (library.failure() or b"").decode(errors="replace").partition("\n")[0]
            raise RuntimeError(
                f"{name} of attnopt's CPU kernels failed ({why}). ATTNOPT_NATIVE=0 uses torch's operators."
            )
        return found

    entry = getattr(library, name)
    entry.errcheck = answer
    if arguments:
        entry.argtypes = arguments


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _readable(x: Tensor) -> Tensor:
    """Features one after the other, and pairs of them at addresses of whole words."""
    even = all(step % 2 == 0 for step in x.stride()[:3]) and x.storage_offset() % 2 == 0 and x.data_ptr() % 4 == 0
    return x if x.stride(3) == 1 and even else x.contiguous()


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    try:
        # Private to inductor, and may move: then this is what the reason says.
        from torch._inductor.codecache import CppCodeCache

        texts = [path.read_text(encoding="utf-8") for path in SOURCES]
        try:
            library = CppCodeCache.load("".join(texts))
        except Exception as error:
            # The last one is built on more of torch than the kernels are. Without it calls go through Python.
            library = CppCodeCache.load("".join(texts[:-1]))
            log.info("Operators of caches run through Python: %s was not compiled (%s).", SOURCES[-1].name, error)
        library.failure.restype = ctypes.c_char_p
        for dtype in ("float32", "bfloat16"):
            answering(library, f"prefill_{dtype}")
            for entry in ("decode", "step", "look", "blocks", "pick"):
                answering(library, f"{entry}_{dtype}", ctypes.c_char_p, ctypes.c_float)
        if hasattr(library, "serve_operators"):
            answering(library, "serve_operators")
            library.serve_operators()
        return library, ""
    except Exception as error:
        said = first_line(error)[:200]
        log.warning(
            "Attention with spans runs out of torch's operators on this CPU, which are slower: its own "
            "kernels were not compiled (%s). Install a C++ compiler (g++ or clang++), or set ATTNOPT_NATIVE=0.", said,
        )  # fmt: skip
        return None, f"not compiled: {said}"
