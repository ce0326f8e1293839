"""The Triton target: a fused prefill in which every head keeps its own sinks and window, in one or two launches.

Loads go through pointers, not tensor descriptors: one kernel then serves every GPU and layout without spilling on sm_90
(tests/codegen/test_triton_prefill_aot.py). Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanPrefill
from attnopt.codegen.triton_text import (
    TRITON_DTYPES,
    check,
    dim_mask,
    load_text,
    mask_argument,
    need_triton,
    padded_dim,
)
from attnopt.registry import TARGETS

# (query rows, keys per block, warps, pipeline stages), long tiles first.
Launch = tuple[int, int, int, int]
LAUNCHES_HALF: tuple[Launch, ...] = ((128, 64, 8, 3), (64, 64, 4, 2))
# Larger tiles spill at head dimension 256. float32 goes without tensor cores, which would round to tf32, and so needs
# small tiles.
LAUNCHES_HALF_256: tuple[Launch, ...] = ((64, 32, 4, 2),)
LAUNCHES_FLOAT: tuple[Launch, ...] = ((32, 32, 8, 1),)
LAUNCHES_FLOAT_128: tuple[Launch, ...] = ((32, 16, 8, 1),)


def launches(spec: SpanPrefill) -> tuple[Launch, ...]:
    """The shipped launch configurations of `spec`; tests compile each ahead of time and check its spills."""
    dim = padded_dim(max(spec.head_dim, spec.head_dim_v))
    if spec.dtype == "float32":
        return LAUNCHES_FLOAT if dim <= 64 else LAUNCHES_FLOAT_128
    return LAUNCHES_HALF if dim <= 128 else LAUNCHES_HALF_256


def _header(spec: SpanPrefill) -> str:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    rows = ["{" + ", ".join(f'"{n}": {x}' for n, x in zip(names, row, strict=True)) + "}" for row in launches(spec)]
    configs = "".join(f"\n    {row}," for row in rows) + "\n" if len(rows) > 1 else f"{rows[0]},"
    helpers = "side_stream, work_lists" if len(rows) > 1 else "work_lists"
    padding = " and\n``pad[b, j]``" if spec.padded else ""
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])``{padding}.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.work_list import {helpers}

# One launch per tile class, long tiles first; heads with short spans take the last.
LAUNCHES = ({configs})
TILES = tuple((config["BLOCK_M"], config["BLOCK_N"]) for config in LAUNCHES)
'''


def _kernel_start(spec: SpanPrefill) -> str:
    pad_pointer = "\n    pad," if spec.padded else ""
    q_mask = "rows[:, None] < length", dim_mask(spec.head_dim, "dims[None, :]")
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
):
    """One tile of BLOCK_M query rows of one head, against blocks of BLOCK_N keys. BLOCK_N divides BLOCK_M.

    lse: float32 (batch, {spec.heads}, length), contiguous, or None where it is not wanted.
    """
    # Which tile: ((batch * {spec.heads} heads) + head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_M
    head = item // tiles % {spec.heads}
    kv_head = head // {spec.heads // spec.kv_heads}
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (item // tiles // {spec.heads}).to(tl.int64)
    sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)

    inner = tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {padded_dim(spec.head_dim)})
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    rows = first + inner
    q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    out += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    k_tile = local[None, :] * k_row + dims[:, None]
    v_tile = local[:, None] * v_row + dims_v[None, :]
    q_tile = inner[:, None] * q_row + dims[None, :]
    queries = {load_text("q + q_tile", *q_mask)}

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, {padded_dim(spec.head_dim_v)}], tl.float32)
'''


def _dots(spec: SpanPrefill) -> tuple[str, str]:
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    return f"tl.dot(queries, keys{exact})", f"tl.dot(weights.to(values.dtype), values, acc{exact})"


def _full_loop(spec: SpanPrefill) -> str:
    k_load = load_text("k_block + k_tile", dim_mask(spec.head_dim, "dims[:, None]"))
    v_load = load_text("v_block + v_tile", dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    score_dot, value_dot = _dots(spec)
    return f"""
    # Every row of the tile keeps every key in [0, full_sink) and in [full_left, first); these ranges do not overlap.
    # The rest are edges: [full_sink, part_sink) where the sinks end inside a block, [left, full_left) where the window
    # begins, and the diagonal from first on.
    full_left = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, first)
    full_sink = tl.minimum(sink // BLOCK_N * BLOCK_N, full_left)
    part_sink = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, full_left)
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    left = tl.minimum(tl.maximum(left, part_sink), full_left)

    # Fully live blocks: no mask, and every score is finite.
    sink_blocks = full_sink // BLOCK_N
    full_blocks = sink_blocks + (first - full_left) // BLOCK_N
    for n in range(0, full_blocks):
        start = n * BLOCK_N + tl.where(n < sink_blocks, 0, full_left - full_sink)
        k_block = k + start.to(tl.int64) * k_row
        v_block = v + start.to(tl.int64) * v_row
        keys = {k_load}
        scores = {score_dot}
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = {v_load}
        acc = {value_dot}
        top = new_top

    # Edge blocks, masked.
    sink_edge = (part_sink - full_sink) // BLOCK_N
    left_edge = sink_edge + (full_left - left) // BLOCK_N
    live_blocks = left_edge + tl.cdiv(tl.minimum(first + BLOCK_M, length) - first, BLOCK_N)
    for n in range(0, live_blocks):
        jump = tl.where(n < left_edge, left - sink_edge * BLOCK_N, first - left_edge * BLOCK_N)
        start = n * BLOCK_N + tl.where(n < sink_edge, full_sink, jump)
"""


def _padded_loop() -> str:
    return """
    # Padding may drop any key, so every live block is masked: those of [0, sink_end), then those from left on.
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, left)
    sink_blocks = sink_end // BLOCK_N
    live_blocks = sink_blocks + tl.cdiv(tl.minimum(first + BLOCK_M, length) - left, BLOCK_N)
    pad += batch * length
    for n in range(0, live_blocks):
        start = n * BLOCK_N + tl.where(n < sink_blocks, 0, left - sink_end)
"""


def _masked_body(spec: SpanPrefill) -> str:
    k_mask = "cols[None, :] < length", dim_mask(spec.head_dim, "dims[:, None]")
    v_mask = "cols[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    score_dot, value_dot = _dots(spec)
    pad_line = ""
    if spec.padded:
        pad_line = "\n        keep = keep & (tl.load(pad + cols, mask=cols < length, other=0) != 0)[None, :]"
    out_mask = "rows[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    return f"""        cols = start + local
        k_block = k + start.to(tl.int64) * k_row
        v_block = v + start.to(tl.int64) * v_row
        keys = {load_text("k_block + k_tile", *k_mask)}
        scores = {score_dot}
        span = (cols[None, :] < sink) | (rows[:, None] - cols[None, :] < window)
        keep = span & (cols[None, :] <= rows[:, None]){pad_line}
        scores = tl.where(keep, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = {load_text("v_block + v_tile", *v_mask)}
        acc = {value_dot}
        top = new_top

    # A row without a kept key is 0, and its logarithm -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if lse is not None:
        # From base 2 to the natural logarithm.
        lse += (batch * {spec.heads} + head) * length
        tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < length)
    out_tile = inner[:, None] * out_row + dims_v[None, :]
    tl.store(out + out_tile, acc.to(out.dtype.element_ty){mask_argument(*out_mask)})
"""


def _launcher(spec: SpanPrefill) -> str:
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    wanted, pad_argument, pad_doc = (
        ("padded inputs; pass pad", ", pad", "bool (B, N)")
        if spec.padded
        else ("unpadded inputs; pass no pad", "", "None")
    )
    pad_view = "\n    pad = pad.contiguous().view(torch.uint8)" if spec.padded else ""
    upcast = """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()"""
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_prefill, triton.JITFunction)


def _check(q, k, v, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, {heads}, length, {dim}), (batch, {kv_heads}, length, {dim}), (batch, {kv_heads}, length, {dim_v})
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
    if pad is {"None" if spec.padded else "not None"}:
        raise ValueError("this kernel was emitted for {wanted}")


def _launch(work, tensors, length, scale_log2, strides):
    span_prefill[(work.items.numel(),)](
        *tensors,
        work.items,
        length,
        work.tiles,
        scale_log2,
        *strides,
        **LAUNCHES[work.tile_class],
        enable_fp_fusion=True,
    )


def prefill(q, k, v, sinks, windows, scale, pad=None):
    """q (B, {heads}, N, {dim}), k (B, {kv_heads}, N, {dim}), v (B, {kv_heads}, N, {dim_v}) -> (B, {heads}, N, {dim_v}).

    All {spec.dtype}; sinks, windows int32 ({heads},); pad {pad_doc}.
    The result is laid out as (B, N, {heads}, {dim_v}).
    """
    return _prefill(q, k, v, sinks, windows, scale, pad, None)


def prefill_lse(q, k, v, sinks, windows, scale, pad=None):
    """As prefill -> (out, lse): the natural logarithm of each row's soft-max sum, float32 (B, {heads}, N).

    A row without a kept key has -inf.
    """
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _prefill(q, k, v, sinks, windows, scale, pad, lse), lse


def _prefill(q, k, v, sinks, windows, scale, pad, lse):
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype{upcast if spec.dtype == "bfloat16" else ""}{pad_view}
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, length, {heads}, {dim_v}), dtype=q.dtype, device=q.device).transpose(1, 2)
    tensors = (q, k, v, out, lse, sinks, windows{pad_argument})
    strides = [step for t in (q, k, v, out) for step in t.stride()[:3]]
    rest = (tensors, length, scale * 1.4426950408889634, strides)
    with torch.cuda.device_of(q):
        works = work_lists(sinks, windows, {kv_heads}, length, batch, TILES)
{_launches(spec)}    return out.to(dtype)
'''


def _launches(spec: SpanPrefill) -> str:
    if len(launches(spec)) == 1:
        return """        for work in works:
            _launch(work, *rest)
"""
    return """        if len(works) == 2 and q.is_cuda:
            # Side by side, so that short tiles fill the SMs that the last long tiles leave idle.
            main, side = torch.cuda.current_stream(), side_stream(q.device)
            side.wait_stream(main)
            _launch(works[0], *rest)
            with torch.cuda.stream(side):
                _launch(works[1], *rest)
            main.wait_stream(side)
        else:
            for work in works:
                _launch(work, *rest)
"""


def _aot(spec: SpanPrefill) -> str:
    pad_line = '\n        "pad": "*u8",' if spec.padded else ""
    return f'''

def aot_signatures():
    """Per launch what triton.compile needs, as the JIT would have it for aligned tensors, without LSE."""
    signature = {{
        **dict.fromkeys(("q", "k", "v", "out"), "*{TRITON_DTYPES[spec.dtype]}"),
        "lse": "constexpr",
        **dict.fromkeys(("sinks", "windows"), "*i32"),{pad_line}
        "work": "*i32",
        **dict.fromkeys(("length", "tiles"), "i32"),
        "scale_log2": "fp32",
        **{{f"{{tensor}}_{{step}}": "i32" for tensor in ("q", "k", "v", "out") for step in ("batch", "head", "row")}},
        **dict.fromkeys(("BLOCK_M", "BLOCK_N"), "constexpr"),
    }}
    unaligned = ("lse", "length", "tiles", "scale_log2", "BLOCK_M", "BLOCK_N")
    attrs = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}}
    for config in LAUNCHES:
        constexprs = {{"lse": None, **{{name: config[name] for name in ("BLOCK_M", "BLOCK_N")}}}}
        options = {{"num_warps": config["num_warps"], "num_stages": config["num_stages"], "enable_fp_fusion": True}}
        yield {{"signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}}
'''


def source(spec: SpanPrefill) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    loop = _padded_loop() if spec.padded else _full_loop(spec)
    kernel = _kernel_start(spec) + loop + _masked_body(spec)
    last = footer(spec, "self_check_prefill", "prefill, prefill_lse")
    return _header(spec) + kernel + _launcher(spec) + _aot(spec) + last


@TARGETS.register("triton span_prefill")
class Triton:
    @staticmethod
    def emit(spec: SpanPrefill) -> str:
        need_triton()
        return source(spec)
