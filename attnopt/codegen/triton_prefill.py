"""The Triton target: a fused prefill in which every head keeps its own sinks and window, in one or two launches.

One kernel text loads its tiles in two ways: by tensor descriptors made on the host, on Hopper and Blackwell where
strides and addresses are aligned, and by pointers anywhere else. tests/codegen/test_triton_prefill_aot.py measures what
each compiles to. It has two loops, because on sm_90 at D = 128 a warp issues 362 instructions for a block without a
mask and 509 for one with. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanPrefill
from attnopt.codegen.triton_prefill_host import host_text
from attnopt.codegen.triton_text import (
    check,
    dim_mask,
    fetch_text,
    load_text,
    mask_argument,
    need_triton,
    padded_dim,
)
from attnopt.registry import TARGETS

# (query rows, keys per block, warps, pipeline stages), long tiles first.
Launch = tuple[int, int, int, int]
LAUNCHES_HALF: dict[str, tuple[Launch, ...]] = {
    # 187 and 186 registers at D = 128; two of the short tiles share an SM.
    "descriptors": ((128, 64, 8, 3), (64, 64, 4, 2)),
    # Blocks of 64 keys take the short tile to 255 registers on sm_90, and spill on sm_80.
    "pointers": ((128, 64, 8, 3), (64, 32, 4, 3)),
    # On gfx942 211 and 168 vector registers, so that two and three waves share a SIMD; blocks of 64 keys need 272.
    "hip": ((128, 32, 4, 1), (64, 32, 4, 1)),
}
LAUNCHES_HALF_256: dict[str, tuple[Launch, ...]] = {
    "descriptors": ((128, 64, 8, 2), (64, 32, 4, 2)),
    # With four warps it spills 24 bytes, and with 128 rows 240.
    "pointers": ((64, 32, 8, 2),),
    "hip": ((64, 32, 4, 1),),
}
# float32 goes without tensor cores, which would round to tf32, and so needs small tiles and no descriptors.
LAUNCHES_FLOAT: dict[str, tuple[Launch, ...]] = {"pointers": ((32, 32, 8, 1),), "hip": ((32, 32, 8, 1),)}
LAUNCHES_FLOAT_128: dict[str, tuple[Launch, ...]] = {"pointers": ((32, 16, 8, 1),), "hip": ((32, 16, 8, 1),)}


def launches(spec: SpanPrefill) -> dict[str, tuple[Launch, ...]]:
    """The shipped launch configurations of `spec`, by how tiles are loaded; tests compile each ahead of time."""
    dim = padded_dim(max(spec.head_dim, spec.head_dim_v))
    if spec.dtype == "float32":
        return LAUNCHES_FLOAT if dim <= 64 else LAUNCHES_FLOAT_128
    return LAUNCHES_HALF if dim <= 128 else LAUNCHES_HALF_256


def tile_classes(spec: SpanPrefill) -> int:
    return max(map(len, launches(spec).values()))


def _configs(spec: SpanPrefill) -> str:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    text = ""
    for loads, rows in launches(spec).items():
        configs = ["{" + ", ".join(f'"{n}": {x}' for n, x in zip(names, row, strict=True)) + "}" for row in rows]
        inner = "".join(f"\n        {config}," for config in configs) + "\n    " if len(rows) > 1 else f"{configs[0]},"
        text += f'\n    "{loads}": ({inner}),'
    return text


def _header(spec: SpanPrefill) -> str:
    two = tile_classes(spec) > 1
    helpers = "side_stream, work_lists" if two else "work_lists"
    padding = " and\n``pad[b, j]``" if spec.padded else ""
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])``{padding}.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton_descriptors import descriptor, descriptors_serve
from attnopt.codegen.work_list import {helpers}

# By how tiles are loaded, one launch per tile class, long tiles first; heads with short spans take the last.
LAUNCHES = {{{_configs(spec)}
}}
'''


def _kernel_start(spec: SpanPrefill) -> str:
    pad_pointer = "\n    pad,\n    runs," if spec.padded else ""
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    q_load = load_text("q + q_tile", "rows[:, None] < length", dim_mask(spec.head_dim, "dims[None, :]"))
    return f'''

@triton.jit(do_not_specialize=["length", "tiles"])
def span_prefill(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    windows,{pad_pointer}
    work,
    length,
    tiles,
    scale_log2,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head, against blocks of BLOCK_N keys. BLOCK_N divides BLOCK_M.

    q, k, v: tensor descriptors if DESCRIPTORS, else pointers.
    lse: float32 (batch, {spec.heads}, length), contiguous, or None where it is not wanted.
    """
    # Which tile: ((entry of the batch * {spec.heads} heads) + head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_M
    head = item // tiles % {spec.heads}
    kv_head = head // {spec.heads // spec.kv_heads}
    entry = item // tiles // {spec.heads}
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = entry.to(tl.int64)
    sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)

    inner = tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
    rows = first + inner
    if DESCRIPTORS:
        # What lies past the last row or dim is read as zero.
        queries = q.load([entry, head, first, 0]).reshape([BLOCK_M, {dim}])
    else:
        q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
        k += batch * k_batch + kv_head.to(tl.int64) * k_head
        v += batch * v_batch + kv_head.to(tl.int64) * v_head
        q_tile = inner[:, None] * q_row + dims[None, :]
        k_tile = local[None, :] * k_row + dims[:, None]
        v_tile = local[:, None] * v_row + dims_v[None, :]
        queries = {q_load}

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, {dim_v}], tl.float32)
'''


def _keys(spec: SpanPrefill, *mask: str) -> str:
    tile = f"k.load([entry, kv_head, start, 0]).reshape([BLOCK_N, {padded_dim(spec.head_dim)}]).T"
    pointers = load_text("k_block + k_tile", *mask, dim_mask(spec.head_dim, "dims[:, None]"))
    return fetch_text("keys", tile, "k_block = k + tl.cast(start, tl.int64) * k_row", pointers)


def _values(spec: SpanPrefill, *mask: str) -> str:
    tile = f"v.load([entry, kv_head, start, 0]).reshape([BLOCK_N, {padded_dim(spec.head_dim_v)}])"
    pointers = load_text("v_block + v_tile", *mask, dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    return fetch_text("values", tile, "v_block = v + tl.cast(start, tl.int64) * v_row", pointers)


def _dots(spec: SpanPrefill) -> tuple[str, str]:
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    return f"tl.dot(queries, keys{exact})", f"tl.dot(weights.to(values.dtype), values, acc{exact})"


def _full_loop(spec: SpanPrefill) -> str:
    score_dot, value_dot = _dots(spec)
    return f"""
    # Every row keeps all of these: no mask, and every score is finite.
    for start in range(full_left, full_end, BLOCK_N):
{_keys(spec)}
        scores = {score_dot}
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
{_values(spec)}
        acc = {value_dot}
        top = new_top
"""


def _ranges(spec: SpanPrefill) -> str:
    if not spec.padded:
        return """
    # From full_left to the tile's first row, every row of the tile keeps every key.
    full_left = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, first)
    full_end = first
    # The other live blocks: sinks in [0, sink_end), the window's edge in [left, full_left), the diagonal from first on.
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, left)
    sink_start = 0
    last_start = first
    last_end = tl.minimum(first + BLOCK_M, length)
"""
    return """
    # Keys in [begin, end) are real, and none before begin or from stop on.
    begin = tl.load(runs + 3 * entry)
    end = tl.load(runs + 3 * entry + 1)
    stop = tl.load(runs + 3 * entry + 2)
    # From full_left to full_end, every row of the tile keeps every key.
    full_left = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, begin), BLOCK_N) * BLOCK_N, first)
    full_end = tl.maximum(tl.minimum(end // BLOCK_N * BLOCK_N, first), full_left)
    # The other live blocks: sinks in [sink_start, sink_end), the window's edge in [left, full_left), and in
    # [last_start, last_end) what follows the run, and the diagonal.
    left = tl.minimum(tl.maximum(first - window + 1, begin) // BLOCK_N * BLOCK_N, first)
    sink_end = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, left)
    sink_start = tl.minimum(begin // BLOCK_N * BLOCK_N, sink_end)
    last_start = tl.maximum(full_end, begin // BLOCK_N * BLOCK_N)
    last_end = tl.maximum(tl.minimum(tl.minimum(first + BLOCK_M, length), stop), last_start)
"""


def _runs_kernel(spec: SpanPrefill) -> str:
    if not spec.padded:
        return ""
    return '''

@triton.jit(do_not_specialize=["length"])
def find_runs(pad, runs, length, BLOCK: tl.constexpr):
    """Per entry of the batch: its first real token, the end of the run that begins there, the end of its last run.

    pad: uint8 (batch, length). runs: int32 (batch, 3); (length, length, 0) for an entry without a real token.
    """
    pad += tl.program_id(0).to(tl.int64) * length
    begin = length
    end = length
    stop = 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        real = tl.load(pad + at, mask=inside, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(real, at, length), 0))
        end = tl.minimum(end, tl.min(tl.where(inside & (at > begin) & (real == 0), at, length), 0))
        stop = tl.maximum(stop, tl.max(tl.where(real, at + 1, 0), 0))
    runs += tl.program_id(0) * 3
    tl.store(runs, begin)
    tl.store(runs + 1, end)
    tl.store(runs + 2, stop)
'''


def _masked_loop(spec: SpanPrefill) -> str:
    score_dot, value_dot = _dots(spec)
    pad_rows = pad_line = ""
    if spec.padded:
        pad_rows = "    pad += batch * length\n"
        pad_line = "\n        limit = tl.where(tl.load(pad + cols, mask=cols < length, other=0) != 0, limit, 0)"
    out_mask = "rows[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    return f"""
    # The others.
{pad_rows}    sink_blocks = (sink_end - sink_start) // BLOCK_N
    edge_blocks = sink_blocks + (full_left - left) // BLOCK_N
    live_blocks = edge_blocks + tl.cdiv(last_end - last_start, BLOCK_N)
    for n in range(0, live_blocks):
        jump = tl.where(n < edge_blocks, left - sink_blocks * BLOCK_N, last_start - edge_blocks * BLOCK_N)
        start = n * BLOCK_N + tl.where(n < sink_blocks, sink_start, jump)
        cols = start + local
{_keys(spec, "cols[None, :] < length")}
        scores = {score_dot}
        # Key j is kept where 0 <= i - j < limit: one comparison, as a negative number without its sign is a large one.
        limit = tl.where(cols < sink, 2147483647, window){pad_line}
        keep = (rows[:, None] - cols[None, :]).to(tl.uint32) < limit.to(tl.uint32)[None, :]
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
{_values(spec, "cols[:, None] < length")}
        acc = {value_dot}
        top = new_top

    # A row without a kept key is 0, and its logarithm -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if lse is not None:
        # From base 2 to the natural logarithm.
        lse += (batch * {spec.heads} + head) * length
        tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < length)
    out += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    out_tile = inner[:, None] * out_row + dims_v[None, :]
    tl.store(out + out_tile, acc.to(out.dtype.element_ty){mask_argument(*out_mask)})
"""


def source(spec: SpanPrefill) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    kernel = _runs_kernel(spec) + _kernel_start(spec) + _ranges(spec) + _full_loop(spec) + _masked_loop(spec)
    last = footer(spec, "self_check_prefill", "prefill, prefill_lse")
    return _header(spec) + kernel + host_text(spec, tile_classes(spec)) + last


@TARGETS.register("triton span_prefill")
class Triton:
    @staticmethod
    def emit(spec: SpanPrefill) -> str:
        need_triton()
        return source(spec)
