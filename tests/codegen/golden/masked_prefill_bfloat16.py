"""Masked prefill for triton: 32/8 heads, dim 128/128, bfloat16. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of batch entry b and head h where ``j <= i and (i - j < 20 or j <= 3)``. The soft-max has one
more column, the sink: a logit of each head, and no value.
"""

import torch
import triton
import triton.language as tl

LAUNCHES = {
    "sm_90": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "sm_80": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    "hip": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
# Scores are in base 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["queries", "keys", "tiles"])
def masked_prefill(
    q,
    k,
    v,
    out,
    sink,
    queries,
    keys,
    tiles,
    scale,
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
    """One tile of BLOCK_M query rows of one head, against blocks of BLOCK_N keys."""
    # Later tiles keep more keys: the last of every head come first, so that none is left over.
    pairs = tl.num_programs(0) // tiles
    tile = tiles - 1 - tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    h = (pair % 32).to(tl.int64)
    b = (pair // 32).to(tl.int64)
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, queries) - 1

    inner = tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    rows = first + inner
    i = rows[:, None]
    q += b * q_batch + h * q_head + first.to(tl.int64) * q_row
    k += b * k_batch + h // 4 * k_head
    v += b * v_batch + h // 4 * v_head
    out += b * out_batch + h * out_head + first.to(tl.int64) * out_row
    k_tile = local[None, :] * k_row + dims[:, None]
    v_tile = local[:, None] * v_row + dims_v[None, :]
    q_tile = inner[:, None] * q_row + dims[None, :]
    q_block = tl.load(q + q_tile, mask=rows[:, None] < queries, other=0.0)

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    # The sink is there from the start: a weight without a value.
    logit = tl.load(sink + h).to(tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOG2E * logit
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, 128], tl.float32)

    # Keys that some row may keep, as blocks.
    live_first = 0
    live_end = tl.minimum(tl.maximum(last + 1, 0), keys)
    live_end = tl.maximum(tl.cdiv(live_end, BLOCK_N), live_first)
    # Of those the ones that every row keeps whole.
    whole_first = tl.minimum(tl.maximum(last - 19, 0), keys)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(whole_first, BLOCK_N), live_first), live_end)
    whole_end = tl.minimum(tl.maximum(first + 1, 0), keys)
    whole_end = tl.maximum(tl.minimum(whole_end // BLOCK_N, live_end), whole_first)
    # Between the first keys and the last that are kept lies a gap.
    gap_first = tl.minimum(4, keys)
    gap_first = tl.minimum(tl.maximum(tl.cdiv(gap_first, BLOCK_N), live_first), whole_first)
    gap_end = tl.minimum(tl.maximum(first - 19, 0), keys)
    gap_end = tl.maximum(tl.minimum(gap_end // BLOCK_N, whole_first), gap_first)

    # Kept whole by every row: no mask.
    for n in range(whole_first, whole_end):
        start = n * BLOCK_N
        k_start = k + start.to(tl.int64) * k_row
        k_block = tl.load(k_start + k_tile)
        scores = tl.dot(q_block, k_block)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v_start = v + start.to(tl.int64) * v_row
        v_block = tl.load(v_start + v_tile)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc)
        top = new_top

    # The edges, masked.
    for n in range(0, live_end - live_first - (whole_end - whole_first) - (gap_end - gap_first)):
        block = live_first + n
        block += tl.where(block >= gap_first, gap_end - gap_first, 0)
        block += tl.where(block >= whole_first, whole_end - whole_first, 0)
        start = block * BLOCK_N
        cols = start + local
        j = cols[None, :]
        k_start = k + start.to(tl.int64) * k_row
        k_block = tl.load(k_start + k_tile, mask=cols[None, :] < keys, other=0.0)
        scores = tl.dot(q_block, k_block)
        scores = scores * scale
        keep = j < keys
        keep &= j <= i
        keep &= (i - j < 20) | (j <= 3)
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v_start = v + start.to(tl.int64) * v_row
        v_block = tl.load(v_start + v_tile, mask=cols[:, None] < keys, other=0.0)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc)
        top = new_top

    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_tile = inner[:, None] * out_row + dims_v[None, :]
    out_mask = rows[:, None] < queries
    tl.store(out + out_tile, acc.to(out.dtype.element_ty), mask=out_mask)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(masked_prefill, triton.JITFunction)
DTYPES = ()


def _check(q, k, v, tensors, sizes):
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, 32, queries, 128), (batch, 8, keys, 128), (batch, 8, keys, 128)
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")
    if tuple(t.dtype for t in tensors) != DTYPES or len(sizes) != 0:
        raise ValueError(f"this kernel reads tensors of {DTYPES} and 0 sizes")


def _config(q):
    if torch.version.hip:
        return LAUNCHES["hip"]
    # Consumer cards of later generations have the shared memory of sm_86.
    return LAUNCHES["sm_90" if INTERPRETED or 9 <= torch.cuda.get_device_capability(q.device)[0] < 12 else "sm_80"]


def _data(tensor):
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    # Triton's interpreter reads no bfloat16.
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def attend(q, k, v, tensors, sizes, sink, scale):
    """q (B, 32, Sq, 128), k (B, 8, Sk, 128), v (B, 8, Sk, 128).

    All bfloat16; tensors and sizes as the predicate names them; sink (H,).
    Returns (B, 32, Sq, 128), laid out as (B, Sq, 32, 128).
    """
    _check(q, k, v, tensors, sizes)
    batch, queries, dtype = q.shape[0], q.shape[2], q.dtype
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, queries, 32, 128), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not out.numel():
        return out.to(dtype)
    sink = _data(sink.contiguous())
    config = _config(q)
    tiles = triton.cdiv(queries, config["BLOCK_M"])
    strides = [step for t in (q, k, v, out) for step in t.stride()[:3]]
    with torch.cuda.device_of(q):
        masked_prefill[(batch * 32 * tiles,)](
            q,
            k,
            v,
            out,
            sink,
            queries,
            k.shape[2],
            tiles,
            scale * 1.4426950408889634,
            *strides,
            **config,
            enable_fp_fusion=True,
        )
    return out.to(dtype)


def aot_signature(target):
    """What triton.compile needs, as the JIT would have it for aligned tensors; target: one of LAUNCHES."""
    signature = {
        "q": "*bf16",
        "k": "*bf16",
        "v": "*bf16",
        "out": "*bf16",
        "sink": "*fp32",
        "queries": "i32",
        "keys": "i32",
        "tiles": "i32",
        "scale": "fp32",
        "q_batch": "i32",
        "q_head": "i32",
        "q_row": "i32",
        "k_batch": "i32",
        "k_head": "i32",
        "k_row": "i32",
        "v_batch": "i32",
        "v_head": "i32",
        "v_row": "i32",
        "out_batch": "i32",
        "out_head": "i32",
        "out_row": "i32",
        "BLOCK_M": "constexpr",
        "BLOCK_N": "constexpr",
    }
    aligned = (
        "q",
        "k",
        "v",
        "out",
        "sink",
        "q_batch",
        "q_head",
        "q_row",
        "k_batch",
        "k_head",
        "k_row",
        "v_batch",
        "v_head",
        "v_row",
        "out_batch",
        "out_head",
        "out_row",
    )
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    config = LAUNCHES[target]
    constexprs = {"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"]}
    options = {name: config[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    return {"signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}


# What is kept and added, as attnopt/masks/kernel_form.py writes it.
FORM = (
    '{"added": [], "keep": [[["ge", [0, [1, "i"], [-1, "j"]]]], [["ge", [19, [-1, "i"], [1, "j"]]], ['
    '"ge", [3, [-1, "j"]]]]], "sink": "h", "softcap": 0.0}'
)


if __name__ == "__main__":
    from attnopt.codegen.self_check_masked import check
    from attnopt.codegen.spec import MaskedPrefill

    check(MaskedPrefill("triton", "bfloat16", 32, 8, 128, 128, FORM), attend)
