"""The kernels of an emitted Triton step that attend to lists of tokens: one query head's, or a part of a long one.

A list is what the head selected, and the keys at both ends; which key stands where in it is arithmetic, so that only
the former is ever written. Keys and values are read row by row as the list names them: query heads of a KV head share
none of it. Each row of a tile has sums of its own up to the end, so that no key waits for another.
"""

from __future__ import annotations

from attnopt.codegen.reference_token_step import COUNT, RECENT, SINK
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.triton_decode import merge_loop
from attnopt.codegen.triton_text import dim_mask, load_text, mask_argument, padded_dim
from attnopt.codegen.triton_token_host import WIDTH


def _list_text(spec: TokenStep) -> str:
    """Lines that set `head`, of `which` of the heads, `length`, and of its list `sink`, `count` and `size`."""
    return f"""    head = tl.load(heads + which)
    group = head // {spec.share}
    length = tl.minimum(tl.load(n + entry), tl.load(table + group * 4 + 1))
    if valid is not None:
        length = tl.where(tl.load(valid + entry * valid_batch) != 0, length, 0)
    count = tl.load(rules + head * {WIDTH} + {COUNT})
    sink = tl.minimum(tl.load(rules + head * {WIDTH} + {SINK}), length)
    recent = tl.minimum(tl.load(rules + head * {WIDTH} + {RECENT}), length)
    size = tl.where(length > 0, sink + count + recent, 0)
"""


def gather_kernel(spec: TokenStep) -> str:
    dim, dim_v = spec.head_dim, spec.head_dim_v
    q_load = load_text("q + entry * q_batch + head * q_head + dims", dim_mask(dim, "dims"))
    k_load = load_text("k_block + dims[None, :]", "live[:, None]", dim_mask(dim, "dims[None, :]"))
    v_load = load_text("v_block + dims_v[None, :]", "live[:, None]", dim_mask(dim_v, "dims_v[None, :]"))
    mask = mask_argument(dim_mask(dim_v, "dims_v"))
    return f'''

@triton.jit(do_not_specialize=["batch", "parts"])
def gather(
    q,
    k,
    v,
    out,
    partial,
    partial_lse,
    n,
    valid,
    table,
    rules,
    picked,
    heads,
    batch,
    parts,
    chunk,
    scale_log2,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
    out_batch,
    out_head,
    picked_batch,
    picked_head,
    valid_batch,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One part of the list of one query head: its sink, what was selected, its recent keys from the newest on."""
    part = tl.program_id(0) % parts
    first = tl.program_id(0) // parts
    which = first // batch
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (first % batch).to(tl.int64)
{_list_text(spec)}    begin = part * chunk
    end = tl.minimum(begin + chunk, size)
    if (begin >= end) & (parts > 1):
        # `merge` knows and reads no result of this part.
        return

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {padded_dim(dim)})
    dims_v = tl.arange(0, {padded_dim(dim_v)})
    segment = tl.load(table + group * 4).to(tl.int64)
    query = {q_load}.to(tl.float32)
    k += entry * k_batch + segment * k_slot
    v += entry * v_batch + segment * v_slot
    picked += entry * picked_batch + head * picked_head
    # Per row of a tile: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, {padded_dim(dim_v)}], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + local
        of = at - sink
        chosen = (of >= 0) & (of < count)
        token = tl.load(picked + of, mask=chosen & (at < end), other=-1)
        newest = length - 1 - (of - count)
        # What stands at an end already is not listed twice; -1 is no token.
        live = tl.where(chosen, (token >= sink) & (token < length - recent), (of < 0) | (newest >= sink)) & (at < end)
        slot = tl.where(chosen, token, tl.where(of < 0, at, newest)).to(tl.int64)
        k_block = k + slot[:, None] * k_slot
        v_block = v + slot[:, None] * v_slot
        keys = {k_load}
        values = {v_load}
        scores = tl.sum(query[None, :] * keys.to(tl.float32), 1) * scale_log2
        scores = tl.where(live, scores, float("-inf"))
        new_top = tl.maximum(top, scores)
        # A row that has met no key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + weights
        acc = acc * shrink[:, None] + weights[:, None] * values.to(tl.float32)
        top = new_top

    peak = tl.max(top, 0)
    weights = tl.exp2(top - tl.where(peak == float("-inf"), 0.0, peak))
    whole = tl.sum(total * weights, 0)
    # A list without a key is 0.
    result = tl.sum(acc * weights[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    if SPLIT:
        row = part.to(tl.int64) * (tl.num_programs(0) // parts) + first
        tl.store(partial + row * {dim_v} + dims_v, result{mask})
        tl.store(partial_lse + row, peak + tl.log2(whole))
    else:
        out += entry * out_batch + head * out_head
        tl.store(out + dims_v, result.to(out.dtype.element_ty){mask})
'''


def merge_kernel(spec: TokenStep) -> str:
    mask = mask_argument(dim_mask(spec.head_dim_v, "dims_v"))
    return f'''

@triton.jit(do_not_specialize=["batch"])
def merge(
    out,
    partial,
    partial_lse,
    n,
    valid,
    table,
    rules,
    heads,
    batch,
    chunk,
    out_batch,
    out_head,
    valid_batch,
    BLOCK_P: tl.constexpr,
):
    """One query head whose list was divided: the sum of its parts, weighted by their sums of weights."""
    first = tl.program_id(0)
    lists = tl.num_programs(0)
    which = first // batch
    entry = (first % batch).to(tl.int64)
{_list_text(spec)}    chunks = tl.cdiv(size, chunk)
{merge_loop(spec, "lists")}    out += entry * out_batch + head * out_head
    tl.store(out + dims_v, acc.to(out.dtype.element_ty){mask})
'''
