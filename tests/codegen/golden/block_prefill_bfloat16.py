"""Block prefill for triton: 32/8 heads, dim 128/128, bfloat16, blocks of 64.
Emitted by attnopt; edits are overwritten.

Within a listed block the query at position p keeps key j where ``j <= p and p - j < window``.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton_descriptors import descriptor, descriptors_serve

# Query rows, and keys, of a block.
BLOCK = tl.constexpr(64)
# Scores are in base 2.
LOG2E = tl.constexpr(1.4426950408889634)
# By how tiles are loaded; of a tile, TILE query rows and keys.
LAUNCHES = {
    "descriptors": {"TILE": 64, "num_warps": 4, "num_stages": 3},
    "pointers": {"TILE": 64, "num_warps": 4, "num_stages": 2},
    "hip": {"TILE": 64, "num_warps": 4, "num_stages": 1},
}
# What changes from call to call makes no kernel of its own.
CHANGING = ["queries", "keys", "row_blocks", "served", "window"]
CHANGING += [f"{table}_{step}" for table in ("lse", "counts", "blocks") for step in ("batch", "head", "row")]


@triton.jit(do_not_specialize=CHANGING)
def block_prefill(
    q,
    k,
    v,
    out,
    lse,
    skipped,
    heads,
    counts,
    blocks,
    bounds,
    queries,
    keys,
    row_blocks,
    served,
    window,
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
    out_dim,
    lse_batch,
    lse_head,
    lse_row,
    counts_batch,
    counts_head,
    counts_row,
    blocks_batch,
    blocks_head,
    blocks_row,
    TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One block of query rows of one served head, against the blocks of keys that their list names.

    q, k, v: tensor descriptors if DESCRIPTORS, else pointers. window: at least 1. skipped: int32, contiguous.
    lse: float32 (batch, served, queries), or None where it is not wanted.
    """
    # The last rows first, whose lists are the longest as a rule; side by side heads, which share keys.
    pairs = tl.num_programs(0) // row_blocks
    row_block = row_blocks - 1 - tl.program_id(0) // pairs
    first = row_block * BLOCK
    pair = tl.program_id(0) % pairs
    place = pair % served
    entry = pair // served
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = entry.to(tl.int64)
    head = tl.load(heads + place)
    kv_head = head // 4
    count = tl.load(counts + batch * counts_batch + place.to(tl.int64) * counts_head + row_block * counts_row)
    listed = blocks + batch * blocks_batch + place.to(tl.int64) * blocks_head + row_block.to(tl.int64) * blocks_row
    bound = tl.load(bounds + pair) * LOG2E

    inner = tl.arange(0, TILE)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    rows = first + inner
    if DESCRIPTORS:
        # What lies past the last row or dim is read as zero.
        query_tile = q.load([entry, head, first, 0]).reshape([TILE, 128])
    else:
        q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
        k += batch * k_batch + kv_head.to(tl.int64) * k_head
        v += batch * v_batch + kv_head.to(tl.int64) * v_head
        q_tile = inner[:, None] * q_row + dims[None, :]
        k_tile = inner[None, :] * k_row + dims[:, None]
        v_tile = inner[:, None] * v_row + dims_v[None, :]
        query_tile = tl.load(q + q_tile, mask=rows[:, None] < queries, other=0.0)

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, 128], tl.float32)
    skips = 0

    # Every row keeps all of the keys of a tile that begins between these two.
    position = first + keys - queries
    whole_first = position + TILE - window
    whole_last = position - (TILE - 1)
    # The first of the list, then from its last down; `block` is read one visit ahead.
    block = tl.load(listed, mask=count > 0, other=0)
    unbounded = tl.where(bound == float("-inf"), count, 0)

    # A head without a bound visits all of its list.
    for visit in range(0, unbounded):
        start = block * BLOCK
        block = tl.load(listed + (count - 1 - visit))
        cols = start + inner
        if DESCRIPTORS:
            key_tile = k.load([entry, kv_head, start, 0]).reshape([TILE, 128]).T
        else:
            k_block = k + start.to(tl.int64) * k_row
            key_tile = tl.load(k_block + k_tile, mask=cols[None, :] < keys, other=0.0)
        scores = tl.dot(query_tile, key_tile)
        if (start < whole_first) | (start > whole_last):
            # Kept where 0 <= p - j < limit: one comparison, as without its sign a negative number is large.
            back = ((position + inner)[:, None] - cols[None, :]).to(tl.uint32)
            scores = tl.where(back < window.to(tl.uint32), scores, float("-inf"))
        here = tl.max(scores, 1) * scale_log2
        new_top = tl.maximum(top, here)
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if DESCRIPTORS:
            values = v.load([entry, kv_head, start, 0]).reshape([TILE, 128])
        else:
            v_block = v + start.to(tl.int64) * v_row
            values = tl.load(v_block + v_tile, mask=cols[:, None] < keys, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # The others skip a block that no row needs.
    for visit in range(unbounded, count):
        start = block * BLOCK
        block = tl.load(listed + (count - 1 - visit))
        cols = start + inner
        if DESCRIPTORS:
            key_tile = k.load([entry, kv_head, start, 0]).reshape([TILE, 128]).T
        else:
            k_block = k + start.to(tl.int64) * k_row
            key_tile = tl.load(k_block + k_tile, mask=cols[None, :] < keys, other=0.0)
        scores = tl.dot(query_tile, key_tile)
        if (start < whole_first) | (start > whole_last):
            # Kept where 0 <= p - j < limit: one comparison, as without its sign a negative number is large.
            back = ((position + inner)[:, None] - cols[None, :]).to(tl.uint32)
            scores = tl.where(back < window.to(tl.uint32), scores, float("-inf"))
        here = tl.max(scores, 1) * scale_log2
        # 0 where no row keeps any of the keys, 1 where all scores kept are below the bound, else 2.
        need = tl.where(here < top + bound, 1, 2)
        need = tl.max(tl.where((here == float("-inf")) | (rows >= queries), 0, need), 0)
        skips += (need == 1).to(tl.int32)
        if need == 2:
            new_top = tl.maximum(top, here)
            # A row that has met no kept key yet: -inf minus -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores * scale_log2 - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            if DESCRIPTORS:
                values = v.load([entry, kv_head, start, 0]).reshape([TILE, 128])
            else:
                v_block = v + start.to(tl.int64) * v_row
                values = tl.load(v_block + v_tile, mask=cols[:, None] < keys, other=0.0)
            acc = tl.dot(weights.to(values.dtype), values, acc)
            top = new_top

    tl.store(skipped + pair.to(tl.int64) * row_blocks + row_block, skips)
    # A row without a kept key is 0, and its logarithm -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if lse is not None:
        # From base 2 to the natural logarithm.
        lse += batch * lse_batch + place.to(tl.int64) * lse_head
        tl.store(lse + rows.to(tl.int64) * lse_row, (top + tl.log2(total)) / LOG2E, mask=rows < queries)
    out += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    out_tile = inner[:, None] * out_row + dims_v[None, :] * out_dim
    tl.store(out + out_tile, acc.to(out.dtype.element_ty), mask=rows[:, None] < queries)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(block_prefill, triton.JITFunction)


def _check(q, k, v, heads, counts, blocks, pad, out):
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(out.shape)
    wanted = (batch, 32, queries, 128), (batch, 8, keys, 128), (batch, 8, keys, 128)
    wanted += ((batch, 32, queries, 128),)
    if shapes != wanted or keys < queries:
        raise ValueError(f"q, k, v, out have shapes {shapes}; this kernel wants {wanted}, and M >= N")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    lists = (batch, heads.numel(), triton.cdiv(queries, 64))
    if tuple(counts.shape) != lists or tuple(blocks.shape[:3]) != lists:
        raise ValueError(f"counts {tuple(counts.shape)}, blocks {tuple(blocks.shape)}; expected {lists} lists")
    if pad is not None:
        raise ValueError("this kernel was emitted for unpadded inputs; pass no pad")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")


def _loads(q, k, v):
    """The key of LAUNCHES for these tensors."""
    if torch.version.hip:
        return "hip"
    return "descriptors" if "descriptors" in LAUNCHES and descriptors_serve(q, k, v) else "pointers"


def _inputs(q, k, v, tile, loads):
    """q, k, v as the kernel takes them, and their strides, which descriptors know."""
    if loads != "descriptors":
        return (q, k, v), [step for t in (q, k, v) for step in t.stride()[:3]]
    return (descriptor(q, tile, 128), descriptor(k, tile, 128), descriptor(v, tile, 128)), [0] * 9


def prefill(q, k, v, heads, counts, blocks, bounds, scale, pad, window, out, lse=None):
    """q (B, 32, N, 128), k (B, 8, M, 128), v (B, 8, M, 128), all bfloat16; M >= N.

    Writes the heads `heads`, int32 (h,), of out (B, 32, N, 128), and lse float32 (B, h, N) where it is given.
    counts int32 (B, h, R) and blocks int32 (B, h, R, L): the column blocks that each of R blocks of rows visits.
    bounds float32 (h,) or (B, h), at most 0: a block is skipped where every score is less than its row's largest so far
    plus the head's bound; -inf for none. pad None; window: of every head, 0 for
    none. Returns int32 (B, h, R), the blocks skipped. Nothing is read on the host.
    """
    _check(q, k, v, heads, counts, blocks, pad, out)
    (batch, served, row_blocks), queries, keys = counts.shape, q.shape[2], k.shape[2]
    skipped = torch.empty(counts.shape, dtype=torch.int32, device=q.device)
    if not skipped.numel():
        return skipped
    written = out
    if INTERPRETED and out.dtype == torch.bfloat16:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v, written = q.float(), k.float(), v.float(), out.float()
    # The kernel takes each row's largest score before it scales, and so wants a positive scale.
    if abs(scale) < 1e-37:
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    q, k, v, blocks = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, blocks))
    loads = _loads(q, k, v)
    config = LAUNCHES[loads]
    inputs, strides = _inputs(q, k, v, config["TILE"], loads)
    arguments = (
        *inputs,
        written,
        lse,
        skipped,
        heads.contiguous(),
        counts,
        blocks,
        bounds.expand(batch, served).contiguous(),
        queries,
        keys,
        row_blocks,
        served,
        window or 2**31 - 1,
        scale * LOG2E.value,
        *strides,
        *written.stride(),
        *((0, 0, 0) if lse is None else lse.stride()),
        *counts.stride(),
        *blocks.stride()[:3],
    )
    options = {**config, "DESCRIPTORS": loads == "descriptors", "enable_fp_fusion": True}
    grid = (batch * served * triton.cdiv(queries, config["TILE"]),)
    with torch.cuda.device_of(q):
        block_prefill[grid](*arguments, **options)
    if written is not out:
        out.copy_(written)
    return skipped


def aot_signature(loads, lse=False):
    """What triton.compile needs for LAUNCHES[loads], as the JIT would have it for aligned tensors."""
    steps = [f"{tensor}_{step}" for tensor in ("q", "k", "v", "out") for step in ("batch", "head", "row")]
    tile = LAUNCHES[loads]["TILE"]
    signature = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        "lse": "*fp32" if lse else "constexpr",
        **dict.fromkeys(("skipped", "heads", "counts", "blocks"), "*i32"),
        "bounds": "*fp32",
        **dict.fromkeys(("queries", "keys", "row_blocks", "served", "window"), "i32"),
        "scale_log2": "fp32",
        **dict.fromkeys(steps, "i32"),
        "out_dim": "constexpr",
        **dict.fromkeys(CHANGING[-9:], "i32"),
        **dict.fromkeys(("TILE", "DESCRIPTORS"), "constexpr"),
    }
    if loads == "descriptors":
        for name, width in ("q", 128), ("k", 128), ("v", 128):
            signature[name] = f"tensordesc<bf16[1, 1, {tile}, {width}]>"
    constexprs = {"TILE": tile, "DESCRIPTORS": loads == "descriptors", "out_dim": 1}
    constexprs |= {} if lse else {"lse": None}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name not in CHANGING]
    return {
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
        "options": {n: x for n, x in LAUNCHES[loads].items() if n != "TILE"} | {"enable_fp_fusion": True},
    }


if __name__ == "__main__":
    from attnopt.codegen.self_check_blocks import check
    from attnopt.codegen.spec import BlockPrefill

    check(BlockPrefill("triton", "bfloat16", 32, 8, 128, 128, 64, False), prefill)
