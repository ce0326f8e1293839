"""The Triton target's gradients of a span prefill, in three launches and without atomics.

    row_sums   delta = dout . out of every row, and its logsumexp in base 2
    span_dq    a tile of query rows of one head, over the keys that the forward kernel visits for it
    span_dkv   a tile of keys of one KV head, over the query rows of all its heads that see them

Nothing here has been timed on a GPU. Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanBackward
from attnopt.codegen.triton_backward_host import aot, launcher
from attnopt.codegen.triton_text import (
    check,
    dim_mask,
    load_text,
    mask_argument,
    need_triton,
    padded_dim,
)
from attnopt.registry import TARGETS

# (query rows, keys, warps, pipeline stages) of span_dq, whose keys divide its rows, and of span_dkv, whose rows divide
# its keys.
Launch = tuple[int, int, int, int]
Pair = tuple[Launch, Launch]


def launches(spec: SpanBackward) -> dict[str, Pair]:
    """The shipped launches of `span_dq` and `span_dkv` by target; tests compile them ahead of time and check spills.

    Each row of a tile has a row of every gradient in registers, so tiles are shorter the wider the heads are: these are
    the largest tried that spill nothing or, where the test says so, little. float32 goes without tensor cores, which
    would round to tf32, and so needs small tiles.
    """
    dim = padded_dim(max(spec.head_dim, spec.head_dim_v))
    if spec.dtype == "float32":
        rows = (32, 32, 8, 1) if dim <= 64 else (32, 16, 8, 1)
        return {"sm_90": (rows, (16, 32, 8, 1)), "sm_80": (rows, (16, 32, 8, 1)), "hip": (rows, (16, 32, 4, 1))}
    if dim <= 64:
        recent, older = ((128, 64, 8, 2), (64, 128, 8, 2)), ((128, 32, 8, 2), (32, 128, 8, 2))
    elif dim <= 128:
        recent, older = ((64, 64, 4, 2), (32, 128, 8, 2)), ((64, 64, 8, 2), (64, 64, 8, 2))
    else:
        recent = older = (32, 32, 8, 1), (32, 32, 8, 1)
    amd = ((64, 32, 4, 1), (32, 64, 4, 1)) if dim <= 128 else ((32, 32, 4, 1), (16, 32, 4, 1))
    return {"sm_90": recent, "sm_80": older, "hip": amd}


def _header(spec: SpanBackward) -> str:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")

    def shown(launch: Launch) -> str:
        return "{" + ", ".join(f'"{n}": {x}' for n, x in zip(names, launch, strict=True)) + "}"

    rows = "".join(
        f'\n    "{target}": {{\n        "dq": {shown(dq)},\n        "dkv": {shown(dkv)},\n    }},'
        for target, (dq, dkv) in launches(spec).items()
    )
    padding = " and\n``pad[b, j]``" if spec.padded else ""
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}. Emitted by attnopt; edits are overwritten.

Key j is kept by query i of head h where ``j <= i and (j < sinks[h] or i - j < windows[h])``{padding}.
With the weights P = exp(scores - lse) of the kept keys and delta_i = dout_i . out_i - dlse_i:

    dscores = P * (dout v^T - delta)    dq = scale dscores k    dk = scale dscores^T q    dv = P^T dout
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.work_list import work_lists
from attnopt.codegen.work_list_backward import key_list

LAUNCHES = {{{rows}
}}
# Rows of a program of row_sums.
SUMMED = 64
# Said, because the default of Triton's versions differs.
FUSED = {{"enable_fp_fusion": True}}


def launches(device):
    """The launches of a device: of the largest of LAUNCHES' compute capabilities that it has."""
    if torch.version.hip:
        return LAUNCHES["hip"]
    recent = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return LAUNCHES["sm_90" if recent else "sm_80"]
'''


def _row_sums(spec: SpanBackward) -> str:
    mask = "rows[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    return f'''

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

    exp2(score - inf) is 0: such rows weigh nothing. All are float32 (batch, {spec.heads}, length), contiguous.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    item = tl.program_id(0)
    rows = item % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = item // tiles % {spec.heads}
    batch = (item // tiles // {spec.heads}).to(tl.int64)
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    wide = rows[:, None].to(tl.int64)
    dout += batch * dout_batch + head.to(tl.int64) * dout_head
    out += batch * out_batch + head.to(tl.int64) * out_head
    dout_tile = wide * dout_row + dims_v[None, :]
    out_tile = wide * out_row + dims_v[None, :]
    douts = {load_text("dout + dout_tile", *mask)}
    outs = {load_text("out + out_tile", *mask)}
    at = (batch * {spec.heads} + head) * length + rows
    tl.store(delta + at, tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1), mask=rows < length)
    sums = tl.load(lse + at, mask=rows < length, other=0.0)
    sums = tl.where(sums == float("-inf"), float("inf"), sums * 1.4426950408889634)
    tl.store(bound + at, sums, mask=rows < length)
'''


def _signature(spec: SpanBackward, name: str, results: str) -> str:
    pad = "\n    pad," if spec.padded else ""
    strides = "".join(f"\n    {x}_{s}," for x in ("dout", "q", "k", "v") for s in ("batch", "head", "row"))
    targets = "".join(f"\n    {x}," for x in results.split())
    return f"""

@triton.jit(do_not_specialize=["length", "tiles"])
def {name}(
    dout,
    q,
    k,
    v,
    delta,
    bound,{targets}
    sinks,
    windows,{pad}
    work,
    length,
    tiles,
    scale,
    scale_log2,{strides}
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
"""


def _exact(spec: SpanBackward) -> str:
    return ', input_precision="ieee"' if spec.dtype == "float32" else ""


def _dq_block(spec: SpanBackward, masked: bool) -> str:
    """What one block of keys, from `start` on, adds to dq."""
    edge = "cols[None, :] < length" if masked else ""
    keys = load_text("k_block + k_tile", edge, dim_mask(spec.head_dim, "dims[:, None]"))
    values = load_text("v_block + v_tile", edge, dim_mask(spec.head_dim_v, "dims_v[:, None]"))
    exact, lines = _exact(spec), []
    if masked:
        lines.append("cols = start + local")
    lines += [
        "k_block = k + start.to(tl.int64) * k_row",
        "v_block = v + start.to(tl.int64) * v_row",
        f"keys = {keys}",
        f"values = {values}",
        f"scores = tl.dot(queries, keys{exact})",
        "weights = tl.exp2(scores * scale_log2 - bounds[:, None])",
    ]
    if masked:
        lines += [
            "span = (cols[None, :] < sink) | (rows[:, None] - cols[None, :] < window)",
            "keep = span & (cols[None, :] <= rows[:, None])",
        ]
        if spec.padded:
            lines.append("keep = keep & (tl.load(pad + cols, mask=cols < length, other=0) != 0)[None, :]")
        lines.append("weights = tl.where(keep, weights, 0.0)")
    lines += [
        f"dscores = weights * (tl.dot(douts, values{exact}) - deltas[:, None])",
        f"acc = tl.dot(dscores.to(keys.dtype), tl.trans(keys), acc{exact})",
    ]
    return "".join(f"        {line}\n" for line in lines)


def _dq_ranges(spec: SpanBackward) -> str:
    if spec.padded:
        return f"""
    # Padding may drop any key, so every live block is masked: those of [0, sink_end), then those from left on.
    left = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    sink_end = tl.minimum(tl.cdiv(sink, BLOCK_N) * BLOCK_N, left)
    sink_blocks = sink_end // BLOCK_N
    live_blocks = sink_blocks + tl.cdiv(tl.minimum(first + BLOCK_M, length) - left, BLOCK_N)
    pad += batch * length
    for n in range(0, live_blocks):
        start = n * BLOCK_N + tl.where(n < sink_blocks, 0, left - sink_end)
{_dq_block(spec, True)}"""
    return f"""
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
{_dq_block(spec, False)}
    # Edge blocks, masked.
    sink_edge = (part_sink - full_sink) // BLOCK_N
    left_edge = sink_edge + (full_left - left) // BLOCK_N
    live_blocks = left_edge + tl.cdiv(tl.minimum(first + BLOCK_M, length) - first, BLOCK_N)
    for n in range(0, live_blocks):
        jump = tl.where(n < left_edge, left - sink_edge * BLOCK_N, first - left_edge * BLOCK_N)
        start = n * BLOCK_N + tl.where(n < sink_edge, full_sink, jump)
{_dq_block(spec, True)}"""


def _dq(spec: SpanBackward) -> str:
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    q_mask = "rows[:, None] < length", dim_mask(spec.head_dim, "dims[None, :]")
    dout_mask = "rows[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    signature = _signature(spec, "span_dq", "dq")
    return f'''{signature}    """dq of BLOCK_M query rows of one head, from blocks of BLOCK_N keys.

    BLOCK_N divides BLOCK_M. dq: (batch, length, {spec.heads}, {spec.head_dim}), contiguous.
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

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
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
    queries = {load_text("q + q_tile", *q_mask)}
    douts = {load_text("dout + dout_tile", *dout_mask)}
    of_rows = (batch * {spec.heads} + head) * length + rows
    deltas = tl.load(delta + of_rows, mask=rows < length, other=0.0)
    # Rows past the end weigh nothing: exp2(score - inf) is 0.
    bounds = tl.load(bound + of_rows, mask=rows < length, other=float("inf"))
    acc = tl.zeros([BLOCK_M, {dim}], tl.float32)
{_dq_ranges(spec)}
    dq_tile = ((batch * length + wide) * {spec.heads} + head) * {spec.head_dim} + dims[None, :]
    acc = acc * scale
    tl.store(dq + dq_tile, acc.to(dq.dtype.element_ty){mask_argument(*q_mask)})
'''


def _dkv_block(spec: SpanBackward, masked: bool) -> str:
    """What one block of query rows, from `start` on, adds to dk and dv: scores are transposed, keys by rows."""
    edge = ("rows[None, :] < length", "rows[:, None] < length") if masked else ("", "")
    queries = load_text("q_block + q_tile", edge[0], dim_mask(spec.head_dim, "dims[:, None]"))
    douts = load_text("dout_block + dout_tile", edge[1], dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    tail, exact = ("rows < length" if masked else ""), _exact(spec)
    past = ', mask=rows < length, other=float("inf")' if masked else ""
    lines = [
        "rows = start + inner",
        "q_block = of_q + start.to(tl.int64) * q_row",
        "dout_block = of_dout + start.to(tl.int64) * dout_row",
        f"queries = {queries}",
        f"douts = {douts}",
        f"bounds = tl.load(bound + of_head + rows{past})",
        f"deltas = {load_text('delta + of_head + rows', tail)}",
        f"scores = tl.dot(keys, queries{exact})",
        "weights = tl.exp2(scores * scale_log2 - bounds[None, :])",
    ]
    if masked:
        lines += [
            "span = (cols[:, None] < sink) | (rows[None, :] - cols[:, None] < window)",
            "weights = tl.where(span & (cols[:, None] <= rows[None, :]), weights, 0.0)",
        ]
    lines += [
        f"dv_acc = tl.dot(weights.to(douts.dtype), douts, dv_acc{exact})",
        f"dscores = weights * (tl.dot(values, tl.trans(douts){exact}) - deltas[None, :])",
        f"dk_acc = tl.dot(dscores.to(queries.dtype), tl.trans(queries), dk_acc{exact})",
    ]
    return "".join(f"            {line}\n" for line in lines)


def _dkv(spec: SpanBackward) -> str:
    dim, dim_v, share = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v), spec.heads // spec.kv_heads
    k_mask = "cols[:, None] < length", dim_mask(spec.head_dim, "dims[None, :]")
    v_mask = "cols[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    hidden = ""
    if spec.padded:
        hidden = """
    # A padded key changes its own row of dk and dv only.
    real = (tl.load(pad + batch * length + cols, mask=cols < length, other=0) != 0)[:, None]
    dk_acc = tl.where(real, dk_acc, 0.0)
    dv_acc = tl.where(real, dv_acc, 0.0)"""
    signature = _signature(spec, "span_dkv", "dk dv")
    return f'''{signature}    """dk and dv of BLOCK_N keys of one KV head, by blocks of BLOCK_M query rows.

    BLOCK_M divides BLOCK_N. dk, dv: (batch, length, {spec.kv_heads}, {spec.head_dim} | {spec.head_dim_v}), contiguous.
    """
    # Which tile: ((batch * {spec.kv_heads} KV heads) + KV head) * tiles + tile, longest first over the grid.
    item = tl.load(work + tl.program_id(0))
    first = item % tiles * BLOCK_N
    kv_head = item // tiles % {spec.kv_heads}
    batch = (item // tiles // {spec.kv_heads}).to(tl.int64)

    inner = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
    cols = first + tl.arange(0, BLOCK_N)
    wide = cols[:, None].to(tl.int64)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    k_tile = wide * k_row + dims[None, :]
    v_tile = wide * v_row + dims_v[None, :]
    q_tile = inner[None, :] * q_row + dims[:, None]
    dout_tile = inner[:, None] * dout_row + dims_v[None, :]
    keys = {load_text("k + k_tile", *k_mask)}
    values = {load_text("v + v_tile", *v_mask)}
    dk_acc = tl.zeros([BLOCK_N, {dim}], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, {dim_v}], tl.float32)

    for member in range(0, {share}):
        head = kv_head * {share} + member
        sink = tl.minimum(tl.maximum(tl.load(sinks + head), 0), length)
        window = tl.minimum(tl.maximum(tl.load(windows + head), 0), length)
        of_q = q + batch * q_batch + head.to(tl.int64) * q_head
        of_dout = dout + batch * dout_batch + head.to(tl.int64) * dout_head
        of_head = (batch * {spec.heads} + head) * length

        # Rows [first, end) see a key of the tile: all later ones if it holds a sink. Rows from first + BLOCK_N up to
        # full_end keep all its keys.
        end = tl.where(first < sink, length, tl.minimum(first + BLOCK_N - 1 + window, length))
        full_end = tl.where(first + BLOCK_N <= sink, length, tl.minimum(first + window, length))
        diagonal = BLOCK_N // BLOCK_M
        full_blocks = tl.maximum(full_end - first - BLOCK_N, 0) // BLOCK_M
        for n in range(0, full_blocks):
            start = first + (diagonal + n) * BLOCK_M
{_dkv_block(spec, False)}
        # The diagonal, the end of the window and the end of the sequence, masked.
        for n in range(0, tl.cdiv(end - first, BLOCK_M) - full_blocks):
            start = first + (n + tl.where(n < diagonal, 0, full_blocks)) * BLOCK_M
{_dkv_block(spec, True)}{hidden}
    at = (batch * length + wide) * {spec.kv_heads} + kv_head
    dk_tile = at * {spec.head_dim} + dims[None, :]
    dv_tile = at * {spec.head_dim_v} + dims_v[None, :]
    dk_acc = dk_acc * scale
    tl.store(dk + dk_tile, dk_acc.to(dk.dtype.element_ty){mask_argument(*k_mask)})
    tl.store(dv + dv_tile, dv_acc.to(dv.dtype.element_ty){mask_argument(*v_mask)})
'''


def source(spec: SpanBackward) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    kernels = _row_sums(spec) + _dq(spec) + _dkv(spec)
    return _header(spec) + kernels + launcher(spec) + aot(spec) + footer(spec, "self_check_backward", "backward")


@TARGETS.register("triton span_backward")
class Triton:
    @staticmethod
    def emit(spec: SpanBackward) -> str:
        need_triton()
        return source(spec)
