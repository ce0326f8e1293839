"""The Triton target for decoding: a flat list of equal chunks of a ragged cache, and one kernel that merges them.

A program holds one chunk of the slots of one KV head and the rows of all its query heads. A head whose segment is one
chunk is written at once; the others leave a partial result and the logarithm of its sum, which `merge` adds up. Nothing
here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import KernelSpec, SpanDecode
from attnopt.codegen.triton_decode_host import aot, launch, launcher, rows_of
from attnopt.codegen.triton_text import (
    check,
    dim_mask,
    load_text,
    mask_argument,
    need_triton,
    padded_dim,
)
from attnopt.registry import TARGETS

# The most rows of a tile: query heads of a KV head times tokens. More rows want a prefill's tiles; 64 rows of 128
# float32 spill 1616 bytes on sm_90.
MAX_ROWS, MAX_ROWS_FLOAT = 64, 32


def check_spec(spec: SpanDecode) -> None:
    check(spec)
    most = MAX_ROWS_FLOAT if spec.dtype == "float32" else MAX_ROWS
    if rows_of(spec) > most:
        raise ValueError(f"{spec.share} query heads × {spec.tokens} tokens a KV head exceed {most} rows of a tile")


def _header(spec: SpanDecode) -> str:
    block, warps, stages = launch(spec)
    kept = (
        "keeps the key at position p where\n``p <= i and (p < sinks[h] or i - p < windows[h])``, of those slots"
        if spec.positioned
        else "reads those slots"
    )
    who = "Query head h at position i" if spec.positioned else "Every query head"
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}.
Emitted by attnopt; edits are overwritten.

KV head g has the slots starts[g] up to starts[g + 1], of which the first filled[b, g] hold a key.
{who} {kept}.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.decode_list import decode_list

# {spec.share} query heads a KV head × {spec.tokens} token{"s" * (spec.tokens != 1)}, in a tile of at least 16 rows.
ROWS = {rows_of(spec)}
LAUNCH = {{"BLOCK_N": {block}, "num_warps": {warps}, "num_stages": {stages}}}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory, which three stages of 128 features take alone.
    LAUNCH["num_stages"] = 2
'''


def _head_of_row(spec: SpanDecode, row: str) -> str:
    """Text of the query head, counted within its KV head, of a row."""
    return row if spec.tokens == 1 else f"{row} // {spec.tokens}"


def _token_of_row(spec: SpanDecode, row: str) -> str:
    return "0" if spec.tokens == 1 else f"{row} % {spec.tokens}"


def _kernel_start(spec: SpanDecode) -> str:
    rows, groups = rows_of(spec), spec.kv_heads
    tile = padded_dim(rows)
    span_pointers = "\n    sinks,\n    windows,\n    positions,\n    at," if spec.positioned else ""
    position_stride = "\n    positions_batch," if spec.positioned else ""
    token = "" if spec.tokens == 1 else f" + row % {spec.tokens} * q_token"
    row_mask = "" if rows == tile else f"row[:, None] < {rows}"
    q_load = load_text("q + q_row[:, None] + dims[None, :]", row_mask, dim_mask(spec.head_dim, "dims[None, :]"))
    return f'''

@triton.jit(do_not_specialize=["batch", "partials"])
def span_decode(
    q,
    k,
    v,
    out,
    partial,
    partial_lse,
    starts,
    filled,{span_pointers}
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
    v_slot,{position_stride}
    BLOCK_N: tl.constexpr,
):
    """One chunk of the slots of one KV head, for the rows of its query heads."""
    # Which chunk: chunk * {groups} KV heads + KV head, longest first over the grid.
    item = tl.load(items + tl.program_id(0) // batch)
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % batch).to(tl.int64)
    group = item % {groups}
    segment = tl.load(starts + group)
    used = tl.minimum(tl.load(filled + entry * {groups} + group), tl.load(starts + group + 1) - segment)
    part = tl.load(parts + group)
    begin = item // {groups} * chunk
    end = tl.minimum(begin + chunk, used)
    if (begin >= end) & (part >= 0):
        # Not filled yet. `merge` knows and reads no result of this chunk; a head without parts writes its zeros.
        return

    row = tl.arange(0, {tile})
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {padded_dim(spec.head_dim)})
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    head = group * {spec.share} + {_head_of_row(spec, "row")}
    q_row = entry * q_batch + head.to(tl.int64) * q_head{token}
    k += entry * k_batch + segment.to(tl.int64) * k_slot
    v += entry * v_batch + segment.to(tl.int64) * v_slot
    k_tile = local[None, :] * k_slot + dims[:, None]
    v_tile = local[:, None] * v_slot + dims_v[None, :]
    queries = {q_load}

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([{tile}], float("-inf"), tl.float32)
    total = tl.zeros([{tile}], tl.float32)
    acc = tl.zeros([{tile}, {padded_dim(spec.head_dim_v)}], tl.float32)
'''


def _dots(spec: KernelSpec) -> tuple[str, str]:
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    return f"tl.dot(queries, keys{exact})", f"tl.dot(weights.to(values.dtype), values, acc{exact})"


def whole_blocks(spec: KernelSpec, blocks: str) -> str:
    """Text of a loop over the first blocks of a chunk, none of whose keys is tested. blocks: text of how many."""
    k_load = load_text("k_block + k_tile", dim_mask(spec.head_dim, "dims[:, None]"))
    v_load = load_text("v_block + v_tile", dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    score_dot, value_dot = _dots(spec)
    return f"""
    # Whole blocks: no mask, and every score is finite.
    blocks = {blocks}
    for n in range(0, blocks):
        start = begin + n * BLOCK_N
        k_block = k + start.to(tl.int64) * k_slot
        v_block = v + start.to(tl.int64) * v_slot
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
"""


def _full_loop(spec: SpanDecode) -> str:
    return f"""{whole_blocks(spec, "tl.maximum(end - begin, 0) // BLOCK_N")}
    # What is left of the chunk, masked.
    rest = begin + blocks * BLOCK_N
    for n in range(0, tl.cdiv(tl.maximum(end - rest, 0), BLOCK_N)):
        start = rest + n * BLOCK_N
"""


def _positioned_loop(spec: SpanDecode) -> str:
    rows, tile = rows_of(spec), padded_dim(rows_of(spec))
    mask = mask_argument("" if rows == tile else f"row < {rows}")
    other = ", other=0" if mask else ""
    token = "" if spec.tokens == 1 else f" + {_token_of_row(spec, 'row')}"
    return f"""
    # Each row keeps a span of positions, and slots are in any order: every block is masked.
    sink = tl.load(sinks + head{mask}{other})
    window = tl.load(windows + head{mask}{other})
    position = tl.load(at + entry){token}
    positions += entry * positions_batch + segment
    for n in range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)):
        start = begin + n * BLOCK_N
"""


def masked_block(
    spec: KernelSpec, keep: str, live: str = "cols{} < end", k_slot: str = "k_slot", v_slot: str = "v_slot"
) -> str:
    """Text of a loop's body: the block of keys from slot `start` on.

    keep: lines that set `keep`, bool (rows, keys), where `scores` count; live: what is read, of the keys `cols{}`;
    k_slot, v_slot: strides of a key and a value from k and v on.
    """
    k_mask = live.format("[None, :]"), dim_mask(spec.head_dim, "dims[:, None]")
    v_mask = live.format("[:, None]"), dim_mask(spec.head_dim_v, "dims_v[None, :]")
    score_dot, value_dot = _dots(spec)
    return f"""        cols = start + local
        k_block = k + start.to(tl.int64) * {k_slot}
        v_block = v + start.to(tl.int64) * {v_slot}
        keys = {load_text("k_block + k_tile", *k_mask)}
        scores = {score_dot}
{keep}
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
"""


def _masked_body(spec: SpanDecode) -> str:
    keep = "        keep = cols[None, :] < end"
    if spec.positioned:
        own = "position" if spec.tokens == 1 else "position[:, None]"
        keep = f"""        held = tl.load(positions + cols, mask=cols < end, other=0)
        back = {own} - held[None, :]
        span = (held[None, :] < sink[:, None]) | (back < window[:, None])
        keep = span & (back >= 0) & (cols[None, :] < end)"""
    return masked_block(spec, keep)


def _kernel_end(spec: SpanDecode) -> str:
    rows, tile, dim_v = rows_of(spec), padded_dim(rows_of(spec)), spec.head_dim_v
    row_mask = "" if rows == tile else f"row[:, None] < {rows}"
    mask = mask_argument(row_mask, dim_mask(dim_v, "dims_v[None, :]"))
    lse_mask = mask_argument("" if rows == tile else f"row < {rows}")
    return f"""
    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if part < 0:
        # Query heads and tokens of a KV head are {rows} consecutive rows of out.
        first = (entry * {spec.kv_heads} + group) * {rows}
        places = (first + row)[:, None] * {dim_v} + dims_v[None, :]
        tl.store(out + places, acc.to(out.dtype.element_ty){mask})
    else:
        first = (entry * partials + part + item // {spec.kv_heads}) * {rows}
        places = (first + row)[:, None] * {dim_v} + dims_v[None, :]
        tl.store(partial + places, acc{mask})
        tl.store(partial_lse + first + row, top + tl.log2(total){lse_mask})
"""


def merge_loop(spec: KernelSpec, rows: int | str) -> str:
    """Text that adds up `chunks` partial results from row `first` on, `rows` rows apart, in `acc` (dim,)."""
    dim_v = spec.head_dim_v
    part_mask = mask_argument("live[:, None]", dim_mask(dim_v, "dims_v[None, :]"))
    return f"""    dims_v = tl.arange(0, {padded_dim(dim_v)})
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([{padded_dim(dim_v)}], tl.float32)
    for start in range(0, chunks, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        live = index < chunks
        place = first + index * {rows}
        lse = tl.load(partial_lse + place, mask=live, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        places = place[:, None] * {dim_v} + dims_v[None, :]
        part = tl.load(partial + places{part_mask}, other=0.0)
        acc = acc * shrink + tl.sum(weights[:, None] * part, 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
"""


def _merge(spec: SpanDecode) -> str:
    rows, groups, dim_v = rows_of(spec), spec.kv_heads, spec.head_dim_v
    return f'''

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
    group = tl.load(split + item // {rows})
    row = item % {rows}
    capacity = tl.load(starts + group + 1) - tl.load(starts + group)
    used = tl.minimum(tl.load(filled + entry * {groups} + group), capacity)
    chunks = tl.cdiv(tl.maximum(used, 0), chunk)
    first = (entry * partials + tl.load(parts + group)) * {rows} + row
{merge_loop(spec, rows)}    out += ((entry * {groups} + group) * {rows} + row) * {dim_v}
    tl.store(out + dims_v, acc.to(out.dtype.element_ty){mask_argument(dim_mask(dim_v, "dims_v"))})
'''


def source(spec: SpanDecode) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check_spec(spec)
    loop = _positioned_loop(spec) if spec.positioned else _full_loop(spec)
    kernel = _kernel_start(spec) + loop + _masked_body(spec) + _kernel_end(spec)
    check_itself = footer(spec, "self_check_decode", "decode")
    return _header(spec) + kernel + _merge(spec) + launcher(spec) + aot(spec) + check_itself


@TARGETS.register("triton span_decode")
class Triton:
    @staticmethod
    def emit(spec: SpanDecode) -> str:
        need_triton()
        return source(spec)
