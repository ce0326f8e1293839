"""Span backward for triton: 32/8 heads, dim 128/128, bfloat16. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])``.
With the weights P = exp(scores - lse) of the kept keys and delta_i = dout_i . out_i - dlse_i:

    dscores = P * (dout v^T - delta)    dq = scale dscores k    dk = scale dscores^T q    dv = P^T dout
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.work_list import work_lists
from attnopt.codegen.work_list_backward import key_list

LAUNCHES = {
    "sm_90": {
        "dq": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "dkv": {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    },
    "sm_80": {
        "dq": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        "dkv": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    },
    "hip": {
        "dq": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        "dkv": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
}
# Rows of a program of row_sums.
SUMMED = 64
# Said, because the default of Triton's versions differs.
FUSED = {"enable_fp_fusion": True}


def launches(device):
    """The launches of a device: of the largest of LAUNCHES' compute capabilities that it has."""
    if torch.version.hip:
        return LAUNCHES["hip"]
    recent = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return LAUNCHES["sm_90" if recent else "sm_80"]


@triton.jit(do_not_specialize=["length"])
def row_sums(
    dout,
    out,
    lse,
    delta,
    bound,
    length,
    dout_batch,
    dout_head,
    dout_row,
    out_batch,
    out_head,
    out_row,
    BLOCK_M: tl.constexpr,
):
    """delta = dout . out and bound = lse in base 2 of BLOCK_M rows of one head; +inf where a row keeps no key.

    exp2(score - inf) is 0: such rows weigh nothing. All are float32 (batch, 32, length), contiguous.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    item = tl.program_id(0)
    rows = item % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = item // tiles % 32
    batch = (item // tiles // 32).to(tl.int64)
    dims_v = tl.arange(0, 128)
    wide = rows[:, None].to(tl.int64)
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    out += batch * out_batch + head.to(tl.int64) * out_head
    dout_tile = wide * dout_row + dims_v[None, :]
    out_tile = wide * out_row + dims_v[None, :]
    douts = tl.load(dout + dout_tile, mask=rows[:, None] < length, other=0.0)
    outs = tl.load(out + out_tile, mask=rows[:, None] < length, other=0.0)
    at = (batch * 32 + head) * length + rows
    tl.store(delta + at, tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1), mask=rows < length)
    sums = tl.load(lse + at, mask=rows < length, other=0.0)
    sums = tl.where(sums == float("-inf"), float("inf"), sums * 1.4426950408889634)
    tl.store(bound + at, sums, mask=rows < length)


@triton.jit(do_not_specialize=["length", "tiles"])
def span_dq(
    dout,
    q,
    k,
    v,
    delta,
    bound,
    dq,
    sinks,
    windows,
    work,
    length,
    tiles,
    scale,
    scale_log2,
    dout_batch,
    dout_head,
    dout_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of BLOCK_M query rows of one head, from blocks of BLOCK_N keys.

    BLOCK_N divides BLOCK_M. dq: (batch, length, 32, 128), contiguous.
    """
    # Which tile: ((batch * 32 heads) + head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_M
    head = item // tiles % 32
    kv_head = head // 4
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (item // tiles // 32).to(tl.int64)
    sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    rows = first + tl.arange(0, BLOCK_M)
    wide = rows[:, None].to(tl.int64)
    q += batch * q_batch + head.to(tl.int64) * q_head
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    k_tile = local[None, :] * k_row + dims[:, None]
    v_tile = local[None, :] * v_row + dims_v[:, None]
    q_tile = wide * q_row + dims[None, :]
    dout_tile = wide * dout_row + dims_v[None, :]
    queries = tl.load(q + q_tile, mask=rows[:, None] < length, other=0.0)
    douts = tl.load(dout + dout_tile, mask=rows[:, None] < length, other=0.0)
    of_rows = (batch * 32 + head) * length + rows
    deltas = tl.load(delta + of_rows, mask=rows < length, other=0.0)
    # Rows past the end weigh nothing: exp2(score - inf) is 0.
    bounds = tl.load(bound + of_rows, mask=rows < length, other=float("inf"))
    acc = tl.zeros([BLOCK_M, 128], tl.float32)

    # Every row of the tile keeps every key in [0, full_sink) and in [full_left, first); these ranges do not overlap.
    # The rest are edges: [full_sink, part_sink) where the sinks end inside a block, [left, full_left) where the window
    # begins, and the diagonal from first on.
    full_left = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, first)
    full_sink = tl.minimum(sink // BLOCK_N * BLOCK_N, full_left)
    part_sink = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, full_left)
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    left = tl.minimum(tl.maximum(left, part_sink), full_left)

    # Fully live blocks: no mask.
    sink_blocks = full_sink // BLOCK_N
    full_blocks = sink_blocks + (first - full_left) // BLOCK_N
    for n in range(0, full_blocks):
        start = n * BLOCK_N + tl.where(n < sink_blocks, 0, full_left - full_sink)
        k_block = k + start.to(tl.int64) * k_row
        v_block = v + start.to(tl.int64) * v_row
        keys = tl.load(k_block + k_tile)
        values = tl.load(v_block + v_tile)
        scores = tl.dot(queries, keys)
        weights = tl.exp2(scores * scale_log2 - bounds[:, None])
        dscores = weights * (tl.dot(douts, values) - deltas[:, None])
        acc = tl.dot(dscores.to(keys.dtype), tl.trans(keys), acc)

    # Edge blocks, masked.
    sink_edge = (part_sink - full_sink) // BLOCK_N
    left_edge = sink_edge + (full_left - left) // BLOCK_N
    live_blocks = left_edge + tl.cdiv(tl.minimum(first + BLOCK_M, length) - first, BLOCK_N)
    for n in range(0, live_blocks):
        jump = tl.where(n < left_edge, left - sink_edge * BLOCK_N, first - left_edge * BLOCK_N)
        start = n * BLOCK_N + tl.where(n < sink_edge, full_sink, jump)
        cols = start + local
        k_block = k + start.to(tl.int64) * k_row
        v_block = v + start.to(tl.int64) * v_row
        keys = tl.load(k_block + k_tile, mask=cols[None, :] < length, other=0.0)
        values = tl.load(v_block + v_tile, mask=cols[None, :] < length, other=0.0)
        scores = tl.dot(queries, keys)
        weights = tl.exp2(scores * scale_log2 - bounds[:, None])
        span = (cols[None, :] < sink) | (rows[:, None] - cols[None, :] < window)
        keep = span & (cols[None, :] <= rows[:, None])
        weights = tl.where(keep, weights, 0.0)
        dscores = weights * (tl.dot(douts, values) - deltas[:, None])
        acc = tl.dot(dscores.to(keys.dtype), tl.trans(keys), acc)

    dq_tile = ((batch * length + wide) * 32 + head) * 128 + dims[None, :]
    acc = acc * scale
    tl.store(dq + dq_tile, acc.to(dq.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit(do_not_specialize=["length", "tiles"])
def span_dkv(
    dout,
    q,
    k,
    v,
    delta,
    bound,
    dk,
    dv,
    sinks,
    windows,
    work,
    length,
    tiles,
    scale,
    scale_log2,
    dout_batch,
    dout_head,
    dout_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one KV head, by blocks of BLOCK_M query rows.

    BLOCK_M divides BLOCK_N. dk, dv: (batch, length, 8, 128 | 128), contiguous.
    """
    # Which tile: ((batch * 8 KV heads) + KV head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_N
    kv_head = item // tiles % 8
    batch = (item // tiles // 8).to(tl.int64)

    inner = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    cols = first + tl.arange(0, BLOCK_N)
    wide = cols[:, None].to(tl.int64)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    k_tile = wide * k_row + dims[None, :]
    v_tile = wide * v_row + dims_v[None, :]
    q_tile = inner[None, :] * q_row + dims[:, None]
    dout_tile = inner[:, None] * dout_row + dims_v[None, :]
    keys = tl.load(k + k_tile, mask=cols[:, None] < length, other=0.0)
    values = tl.load(v + v_tile, mask=cols[:, None] < length, other=0.0)
    dk_acc = tl.zeros([BLOCK_N, 128], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, 128], tl.float32)

    for member in range(0, 4):
        head = kv_head * 4 + member
        sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
        window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)
        of_q = q + batch * q_batch + head.to(tl.int64) * q_head
        of_dout = dout + batch * dout_batch + head.to(tl.int64) * dout_head
        of_head = (batch * 32 + head) * length

        # Rows [first, end) see a key of the tile: all later ones if it holds a sink. Rows from first + BLOCK_N up to
        # full_end keep all its keys.
        end = tl.where(first < sink, length, tl.minimum(first + BLOCK_N - 1 + window, length))
        full_end = tl.where(first + BLOCK_N <= sink, length, tl.minimum(first + window, length))
        diagonal = BLOCK_N // BLOCK_M
        full_blocks = tl.maximum(full_end - first - BLOCK_N, 0) // BLOCK_M
        for n in range(0, full_blocks):
            start = first + (diagonal + n) * BLOCK_M
            rows = start + inner
            q_block = of_q + start.to(tl.int64) * q_row
            dout_block = of_dout + start.to(tl.int64) * dout_row
            queries = tl.load(q_block + q_tile)
            douts = tl.load(dout_block + dout_tile)
            bounds = tl.load(bound + of_head + rows)
            deltas = tl.load(delta + of_head + rows)
            scores = tl.dot(keys, queries)
            weights = tl.exp2(scores * scale_log2 - bounds[None, :])
            dv_acc = tl.dot(weights.to(douts.dtype), douts, dv_acc)
            dscores = weights * (tl.dot(values, tl.trans(douts)) - deltas[None, :])
            dk_acc = tl.dot(dscores.to(queries.dtype), tl.trans(queries), dk_acc)

        # The diagonal, the end of the window and the end of the sequence, masked.
        for n in range(0, tl.cdiv(end - first, BLOCK_M) - full_blocks):
            start = first + (n + tl.where(n < diagonal, 0, full_blocks)) * BLOCK_M
            rows = start + inner
            q_block = of_q + start.to(tl.int64) * q_row
            dout_block = of_dout + start.to(tl.int64) * dout_row
            queries = tl.load(q_block + q_tile, mask=rows[None, :] < length, other=0.0)
            douts = tl.load(dout_block + dout_tile, mask=rows[:, None] < length, other=0.0)
            bounds = tl.load(bound + of_head + rows, mask=rows < length, other=float("inf"))
            deltas = tl.load(delta + of_head + rows, mask=rows < length, other=0.0)
            scores = tl.dot(keys, queries)
            weights = tl.exp2(scores * scale_log2 - bounds[None, :])
            span = (cols[:, None] < sink) | (rows[None, :] - cols[:, None] < window)
            weights = tl.where(span & (cols[:, None] <= rows[None, :]), weights, 0.0)
            dv_acc = tl.dot(weights.to(douts.dtype), douts, dv_acc)
            dscores = weights * (tl.dot(values, tl.trans(douts)) - deltas[None, :])
            dk_acc = tl.dot(dscores.to(queries.dtype), tl.trans(queries), dk_acc)

    at = (batch * length + wide) * 8 + kv_head
    dk_tile = at * 128 + dims[None, :]
    dv_tile = at * 128 + dims_v[None, :]
    dk_acc = dk_acc * scale
    tl.store(dk + dk_tile, dk_acc.to(dk.dtype.element_ty), mask=cols[:, None] < length)
    tl.store(dv + dv_tile, dv_acc.to(dv.dtype.element_ty), mask=cols[:, None] < length)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_dq, triton.JITFunction)


def _check(dout, q, k, v, out, lse, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(tuple(t.shape) for t in (dout, q, k, v, out, lse))
    of_rows = (batch, 32, length)
    wanted = (
        (*of_rows, 128),
        (*of_rows, 128),
        (batch, 8, length, 128),
        (batch, 8, length, 128),
        (*of_rows, 128),
        of_rows,
    )
    if shapes != wanted:
        raise ValueError(f"dout, q, k, v, out, lse have shapes {shapes}; this kernel wants {wanted}")
    dtypes = {t.dtype for t in (dout, q, k, v, out)}
    if dtypes != {torch.bfloat16} or lse.dtype != torch.float32:
        raise ValueError(f"dtypes {dtypes} and lse {lse.dtype}; this kernel wants bfloat16 and lse float32")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")
    if pad is not None:
        raise ValueError("this kernel was emitted for unpadded inputs; pass no pad")


def backward(dout, q, k, v, out, lse, sinks, windows, scale, pad=None, dlse=None):
    """Gradients at q (B, 32, N, 128), k (B, 8, N, 128) and v (B, 8, N, 128).

    Those of a prefill whose output out has the gradient dout, both (B, 32, N, 128), and whose rows have the
    logsumexp lse, float32 (B, 32, N), natural, -inf without a kept key, and dlse as its gradient, None for none.
    All else bfloat16; sinks, windows int32 (32,); pad None. Results are laid out as (B, N, heads, dim).
    """
    _check(dout, q, k, v, out, lse, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))
    dout, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty((batch, length, *t.shape[1::2]), dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta, bound = (torch.empty((batch, 32, length), dtype=torch.float32, device=q.device) for _ in range(2))
    launch = launches(q.device)
    strides = [step for t in (dout, q, k, v) for step in t.stride()[:3]]
    if q.numel():
        with torch.cuda.device_of(q):
            tiles = triton.cdiv(length, SUMMED)
            row_sums[(batch * 32 * tiles,)](
                dout, out, lse.contiguous(), delta, bound, length, *dout.stride()[:3], *out.stride()[:3], BLOCK_M=SUMMED
            )
            if dlse is not None:
                delta -= dlse
            of_rows = (dout, q, k, v, delta, bound)
            tables = (sinks, windows)
            scales = (scale, scale * 1.4426950408889634)
            tile = (launch["dq"]["BLOCK_M"], launch["dq"]["BLOCK_N"])
            for work in work_lists(sinks, windows, 8, length, batch, (tile,)):
                span_dq[(work.items.numel(),)](
                    *of_rows, dq, *tables, work.items, length, work.tiles, *scales, *strides, **launch["dq"], **FUSED
                )
            tile = (launch["dkv"]["BLOCK_M"], launch["dkv"]["BLOCK_N"])
            work = key_list(sinks, windows, 8, length, batch, tile)
            span_dkv[(work.items.numel(),)](
                *of_rows, dk, dv, *tables, work.items, length, work.tiles, *scales, *strides, **launch["dkv"], **FUSED
            )
    return tuple(t.to(dtype).transpose(1, 2) for t in (dq, dk, dv))


def aot_signatures(target="sm_90"):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    for name, results in (("dq", ("dq",)), ("dkv", ("dk", "dv"))):
        signature = {
            **dict.fromkeys(("dout", "q", "k", "v"), "*bf16"),
            **dict.fromkeys(("delta", "bound"), "*fp32"),
            **dict.fromkeys(results, "*bf16"),
            **dict.fromkeys(("sinks", "windows"), "*i32"),
            "work": "*i32",
            **dict.fromkeys(("length", "tiles"), "i32"),
            **dict.fromkeys(("scale", "scale_log2"), "fp32"),
            **{f"{t}_{step}": "i32" for t in ("dout", "q", "k", "v") for step in ("batch", "head", "row")},
            **dict.fromkeys(("BLOCK_M", "BLOCK_N"), "constexpr"),
        }
        unaligned = ("length", "tiles", "scale", "scale_log2", "BLOCK_M", "BLOCK_N")
        config = LAUNCHES[target][name]
        yield {
            "kernel": {"dq": span_dq, "dkv": span_dkv}[name],
            "signature": signature,
            "constexprs": {block: config[block] for block in ("BLOCK_M", "BLOCK_N")},
            "attrs": {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n not in unaligned},
            "options": {"enable_fp_fusion": True, **{n: config[n] for n in ("num_warps", "num_stages")}},
        }


if __name__ == "__main__":
    from attnopt.codegen.self_check_backward import check
    from attnopt.codegen.spec import SpanBackward

    check(SpanBackward("triton", "bfloat16", 32, 8, 128, 128, False), backward)
