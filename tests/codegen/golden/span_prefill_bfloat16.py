"""Span prefill for triton: 32/8 heads, dim 128/128, bfloat16. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])``.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton_descriptors import descriptor, descriptors_serve
from attnopt.codegen.work_list import side_stream, work_lists

# By how tiles are loaded, one launch per tile class, long tiles first; heads with short spans take the last.
LAUNCHES = {
    "descriptors": (
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    ),
    "pointers": (
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    ),
    "hip": (
        {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    ),
}


@triton.jit(do_not_specialize=["length", "tiles"])
def span_prefill(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    windows,
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
    lse: float32 (batch, 32, length), contiguous, or None where it is not wanted.
    """
    # Which tile: ((entry of the batch * 32 heads) + head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_M
    head = item // tiles % 32
    kv_head = head // 4
    entry = item // tiles // 32
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = entry.to(tl.int64)
    sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)

    inner = tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    rows = first + inner
    if DESCRIPTORS:
        # What lies past the last row or dim is read as zero.
        queries = q.load([entry, head, first, 0]).reshape([BLOCK_M, 128])
    else:
        q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
        k += batch * k_batch + kv_head.to(tl.int64) * k_head
        v += batch * v_batch + kv_head.to(tl.int64) * v_head
        q_tile = inner[:, None] * q_row + dims[None, :]
        k_tile = local[None, :] * k_row + dims[:, None]
        v_tile = local[:, None] * v_row + dims_v[None, :]
        queries = tl.load(q + q_tile, mask=rows[:, None] < length, other=0.0)

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 128], tl.float32)

    # From full_left to the tile's first row, every row of the tile keeps every key.
    full_left = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, first)
    full_end = first
    # The other live blocks: sinks in [0, sink_end), the window's edge in [left, full_left), the diagonal from first on.
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, left)
    sink_start = 0
    last_start = first
    last_end = tl.minimum(first + BLOCK_M, length)

    # Every row keeps all of these: no mask, and every score is finite.
    for start in range(full_left, full_end, BLOCK_N):
        if DESCRIPTORS:
            keys = k.load([entry, kv_head, start, 0]).reshape([BLOCK_N, 128]).T
        else:
            k_block = k + tl.cast(start, tl.int64) * k_row
            keys = tl.load(k_block + k_tile)
        scores = tl.dot(queries, keys)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if DESCRIPTORS:
            values = v.load([entry, kv_head, start, 0]).reshape([BLOCK_N, 128])
        else:
            v_block = v + tl.cast(start, tl.int64) * v_row
            values = tl.load(v_block + v_tile)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # The others.
    sink_blocks = (sink_end - sink_start) // BLOCK_N
    edge_blocks = sink_blocks + (full_left - left) // BLOCK_N
    live_blocks = edge_blocks + tl.cdiv(last_end - last_start, BLOCK_N)
    for n in range(0, live_blocks):
        jump = tl.where(n < edge_blocks, left - sink_blocks * BLOCK_N, last_start - edge_blocks * BLOCK_N)
        start = n * BLOCK_N + tl.where(n < sink_blocks, sink_start, jump)
        cols = start + local
        if DESCRIPTORS:
            keys = k.load([entry, kv_head, start, 0]).reshape([BLOCK_N, 128]).T
        else:
            k_block = k + tl.cast(start, tl.int64) * k_row
            keys = tl.load(k_block + k_tile, mask=cols[None, :] < length, other=0.0)
        scores = tl.dot(queries, keys)
        # Key j is kept where 0 <= i - j < limit: one comparison, as a negative number without its sign is a large one.
        limit = tl.where(cols < sink, 2147483647, window)
        keep = (rows[:, None] - cols[None, :]).to(tl.uint32) < limit.to(tl.uint32)[None, :]
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if DESCRIPTORS:
            values = v.load([entry, kv_head, start, 0]).reshape([BLOCK_N, 128])
        else:
            v_block = v + tl.cast(start, tl.int64) * v_row
            values = tl.load(v_block + v_tile, mask=cols[:, None] < length, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # A row without a kept key is 0, and its logarithm -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if lse is not None:
        # From base 2 to the natural logarithm.
        lse += (batch * 32 + head) * length
        tl.store(lse + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < length)
    out += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    out_tile = inner[:, None] * out_row + dims_v[None, :]
    tl.store(out + out_tile, acc.to(out.dtype.element_ty), mask=rows[:, None] < length)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_prefill, triton.JITFunction)


def _check(q, k, v, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, 32, length, 128), (batch, 8, length, 128), (batch, 8, length, 128)
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")
    if pad is not None:
        raise ValueError("this kernel was emitted for unpadded inputs; pass no pad")


def _loads(q, k, v):
    """The key of LAUNCHES for these tensors."""
    if torch.version.hip:
        return "hip"
    return "descriptors" if "descriptors" in LAUNCHES and descriptors_serve(q, k, v) else "pointers"


def _inputs(q, k, v, config, loads):
    """q, k, v as the kernel takes them, and their strides, which descriptors know."""
    if loads != "descriptors":
        return (q, k, v), [step for t in (q, k, v) for step in t.stride()[:3]]
    rows, keys = config["BLOCK_M"], config["BLOCK_N"]
    return (descriptor(q, rows, 128), descriptor(k, keys, 128), descriptor(v, keys, 128)), [0] * 9


def _launch(work, loads, inputs, tensors, length, scale_log2):
    config = LAUNCHES[loads][work.tile_class]
    inputs, strides = _inputs(*inputs, config, loads)
    span_prefill[(work.items.numel(),)](
        *inputs,
        *tensors,
        work.items,
        length,
        work.tiles,
        scale_log2,
        *strides,
        *tensors[0].stride()[:3],
        **config,
        DESCRIPTORS=loads == "descriptors",
        enable_fp_fusion=True,
    )


def prefill(q, k, v, sinks, windows, scale, pad=None):
    """q (B, 32, N, 128), k (B, 8, N, 128), v (B, 8, N, 128) -> (B, 32, N, 128).

    All bfloat16; sinks, windows int32 (32,); pad None.
    The result is laid out as (B, N, 32, 128).
    """
    return _prefill(q, k, v, sinks, windows, scale, pad, None)


def prefill_lse(q, k, v, sinks, windows, scale, pad=None):
    """As prefill -> (out, lse): the natural logarithm of each row's soft-max sum, float32 (B, 32, N).

    A row without a kept key has -inf.
    """
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _prefill(q, k, v, sinks, windows, scale, pad, lse), lse


def _prefill(q, k, v, sinks, windows, scale, pad, lse):
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()
    # The kernel takes each row's largest score before it scales, and so wants a positive scale.
    if abs(scale) < 1e-37:
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, length, 32, 128), dtype=q.dtype, device=q.device).transpose(1, 2)
    tensors = (out, lse, sinks, windows)
    with torch.cuda.device_of(q):
        loads = _loads(q, k, v)
        rest = (loads, (q, k, v), tensors, length, scale * 1.4426950408889634)
        tiles = tuple((config["BLOCK_M"], config["BLOCK_N"]) for config in LAUNCHES[loads])
        works = work_lists(sinks, windows, 8, length, batch, tiles)
        if len(works) == 2 and q.is_cuda:
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
    return out.to(dtype)


def aot_signatures(loads, lse=False):
    """Per launch of LAUNCHES[loads] what triton.compile needs, as the JIT would have it for aligned tensors."""
    steps = [f"{tensor}_{step}" for tensor in ("q", "k", "v", "out") for step in ("batch", "head", "row")]
    for config in LAUNCHES[loads]:
        signature = {
            **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
            "lse": "*fp32" if lse else "constexpr",
            **dict.fromkeys(("sinks", "windows"), "*i32"),
            "work": "*i32",
            **dict.fromkeys(("length", "tiles"), "i32"),
            "scale_log2": "fp32",
            **dict.fromkeys(steps, "i32"),
            **dict.fromkeys(("BLOCK_M", "BLOCK_N", "DESCRIPTORS"), "constexpr"),
        }
        if loads == "descriptors":
            rows, keys = config["BLOCK_M"], config["BLOCK_N"]
            for name, block in ("q", (rows, 128)), ("k", (keys, 128)), ("v", (keys, 128)):
                signature[name] = f"tensordesc<bf16[1, 1, {block[0]}, {block[1]}]>"
        unaligned = ("length", "tiles")
        aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name not in unaligned]
        constexprs = {"DESCRIPTORS": loads == "descriptors", **({} if lse else {"lse": None})}
        yield {
            "signature": signature,
            "constexprs": constexprs | {name: config[name] for name in ("BLOCK_M", "BLOCK_N")},
            "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
            "options": {name: config[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True},
        }


if __name__ == "__main__":
    from attnopt.codegen.self_check_prefill import check
    from attnopt.codegen.spec import SpanPrefill

    check(SpanPrefill("triton", "bfloat16", 32, 8, 128, 128, False), prefill, prefill_lse)
