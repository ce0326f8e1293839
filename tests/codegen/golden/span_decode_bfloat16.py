"""Span decode for triton: 32/8 heads, dim 128/128, bfloat16.
Emitted by attnopt; edits are overwritten.

KV head g has the slots starts[g] up to starts[g + 1], of which the first filled[b, g] hold a key.
Every query head reads those slots.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.decode_list import decode_list

# 4 query heads a KV head × 1 token, in a tile of at least 16 rows.
ROWS = 4
LAUNCH = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory, which three stages of 128 features take alone.
    LAUNCH["num_stages"] = 2


@triton.jit(do_not_specialize=["batch", "partials"])
def span_decode(
    q,
    k,
    v,
    out,
    partial,
    partial_lse,
    starts,
    filled,
    items,
    parts,
    batch,
    chunk,
    partials,
    scale_log2,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
    BLOCK_N: tl.constexpr,
):
    """One chunk of the slots of one KV head, for the rows of its query heads."""
    # Which chunk: chunk * 8 KV heads + KV head, longest first over the grid.
    item = tl.load(items + tl.program_id(0) // batch)
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % batch).to(tl.int64)
    group = item % 8
    segment = tl.load(starts + group)
    used = tl.minimum(tl.load(filled + entry * 8 + group), tl.load(starts + group + 1) - segment)
    part = tl.load(parts + group)
    begin = item // 8 * chunk
    end = tl.minimum(begin + chunk, used)
    if (begin >= end) & (part >= 0):
        # Not filled yet. `merge` knows and reads no result of this chunk; a head without parts writes its zeros.
        return

    row = tl.arange(0, 16)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    head = group * 4 + row
    q_row = entry * q_batch + head.to(tl.int64) * q_head
    k += entry * k_batch + segment.to(tl.int64) * k_slot
    v += entry * v_batch + segment.to(tl.int64) * v_slot
    k_tile = local[None, :] * k_slot + dims[:, None]
    v_tile = local[:, None] * v_slot + dims_v[None, :]
    queries = tl.load(q + q_row[:, None] + dims[None, :], mask=row[:, None] < 4, other=0.0)

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, 128], tl.float32)

    # Whole blocks: no mask, and every score is finite.
    blocks = tl.maximum(end - begin, 0) // BLOCK_N
    for n in range(0, blocks):
        start = begin + n * BLOCK_N
        k_block = k + start.to(tl.int64) * k_slot
        v_block = v + start.to(tl.int64) * v_slot
        keys = tl.load(k_block + k_tile)
        scores = tl.dot(queries, keys)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = tl.load(v_block + v_tile)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # What is left of the chunk, masked.
    rest = begin + blocks * BLOCK_N
    for n in range(0, tl.cdiv(tl.maximum(end - rest, 0), BLOCK_N)):
        start = rest + n * BLOCK_N
        cols = start + local
        k_block = k + start.to(tl.int64) * k_slot
        v_block = v + start.to(tl.int64) * v_slot
        keys = tl.load(k_block + k_tile, mask=cols[None, :] < end, other=0.0)
        scores = tl.dot(queries, keys)
        keep = cols[None, :] < end
        scores = tl.where(keep, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = tl.load(v_block + v_tile, mask=cols[:, None] < end, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if part < 0:
        # Query heads and tokens of a KV head are 4 consecutive rows of out.
        first = (entry * 8 + group) * 4
        places = (first + row)[:, None] * 128 + dims_v[None, :]
        tl.store(out + places, acc.to(out.dtype.element_ty), mask=row[:, None] < 4)
    else:
        first = (entry * partials + part + item // 8) * 4
        places = (first + row)[:, None] * 128 + dims_v[None, :]
        tl.store(partial + places, acc, mask=row[:, None] < 4)
        tl.store(partial_lse + first + row, top + tl.log2(total), mask=row < 4)


@triton.jit(do_not_specialize=["batch", "partials"])
def merge(
    out,
    partial,
    partial_lse,
    starts,
    filled,
    split,
    parts,
    batch,
    chunk,
    partials,
    BLOCK_P: tl.constexpr,
):
    """One row of a KV head that was divided: the sum of its partial results, weighted by their sums of weights."""
    item = tl.program_id(0) // batch
    entry = (tl.program_id(0) % batch).to(tl.int64)
    group = tl.load(split + item // 4)
    row = item % 4
    capacity = tl.load(starts + group + 1) - tl.load(starts + group)
    used = tl.minimum(tl.load(filled + entry * 8 + group), capacity)
    chunks = tl.cdiv(tl.maximum(used, 0), chunk)
    first = (entry * partials + tl.load(parts + group)) * 4 + row
    dims_v = tl.arange(0, 128)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([128], tl.float32)
    for start in range(0, chunks, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        live = index < chunks
        place = first + index * 4
        lse = tl.load(partial_lse + place, mask=live, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        places = place[:, None] * 128 + dims_v[None, :]
        part = tl.load(partial + places, mask=live[:, None], other=0.0)
        acc = acc * shrink + tl.sum(weights[:, None] * part, 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    out += ((entry * 8 + group) * 4 + row) * 128
    tl.store(out + dims_v, acc.to(out.dtype.element_ty))


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_decode, triton.JITFunction)


def _check(q, k, v, tables):
    batch, slots = q.shape[0], k.shape[1]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(tables[0].shape), tuple(tables[1].shape)
    caches = (batch, slots, 128), (batch, slots, 128)
    wanted = (batch, 32, 1, 128), *caches, (9,), (batch, 8)
    if shapes != wanted:
        raise ValueError(f"q, k, v, starts, filled have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    if any(table.dtype != torch.int32 or table.stride(-1) != 1 for table in tables):
        raise ValueError("the tables of a cache are int32 and contiguous")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")


def decode(q, k, v, starts, filled, scale):
    """q (B, 32, 1, 128), k (B, C, 128), v (B, C, 128) -> (B, 32, 1, 128), all bfloat16.

    starts int32 (9,), filled int32 (B, 8).
    """
    _check(q, k, v, (starts, filled))
    batch, dtype = q.shape[0], q.dtype
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    q = q if q.stride(-1) == 1 else q.contiguous()
    filled = filled.contiguous()
    out = torch.empty((batch, 32, 1, 128), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out.to(dtype)
    with torch.cuda.device_of(q):
        work = decode_list(starts, batch)
        if work.slots != k.shape[1]:
            raise ValueError(f"starts ends at {work.slots}, and the cache has {k.shape[1]} slots")
        partial = torch.empty((batch, work.partials, ROWS, 128), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((batch, work.partials, ROWS), dtype=torch.float32, device=q.device)
        span_decode[(work.items.numel() * batch,)](
            q,
            k,
            v,
            out,
            partial,
            partial_lse,
            starts,
            filled,
            work.items,
            work.parts,
            batch,
            work.chunk,
            work.partials,
            scale * 1.4426950408889634,
            *q.stride()[:3],
            *k.stride()[:2],
            *v.stride()[:2],
            **LAUNCH,
            enable_fp_fusion=True,
        )
        if work.partials:
            merge[(work.split.numel() * ROWS * batch,)](
                out,
                partial,
                partial_lse,
                starts,
                filled,
                work.split,
                work.parts,
                batch,
                work.chunk,
                work.partials,
                BLOCK_P=16,
                num_warps=4,
            )
    return out.to(dtype)


def aot_signatures():
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    tables = dict.fromkeys(("starts", "filled", "items", "parts"), "*i32")
    strides = ("q_batch", "q_head", "q_token", "k_batch", "k_slot", "v_batch", "v_slot")
    signature = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **tables,
        **dict.fromkeys(("batch", "chunk", "partials"), "i32"),
        "scale_log2": "fp32",
        **dict.fromkeys(strides, "i32"),
        "BLOCK_N": "constexpr",
    }
    unaligned = ("batch", "partials", "scale_log2", "BLOCK_N", "BLOCK_P")
    yield _aot(span_decode, signature, unaligned, LAUNCH)
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("starts", "filled", "split", "parts"), "*i32"),
        **dict.fromkeys(("batch", "chunk", "partials"), "i32"),
        "BLOCK_P": "constexpr",
    }
    yield _aot(merge, signature, unaligned, {"BLOCK_P": 16, "num_warps": 4})


def _aot(kernel, signature, unaligned, config):
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}
    constexprs = {name: value for name, value in config.items() if name in signature}
    options = {**{k: v for k, v in config.items() if k not in signature}, "enable_fp_fusion": True}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": options,
    }


if __name__ == "__main__":
    from attnopt.codegen.self_check_decode import check
    from attnopt.codegen.spec import SpanDecode

    check(SpanDecode("triton", "bfloat16", 32, 8, 128, 128, 1, False), decode)
