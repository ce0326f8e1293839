"""The Triton target's step of a ragged cache: attend the slots and the new tokens, add up, then write what is kept.

The grid is a flat list of equal chunks of slots (decode_list.py) times tiles of query rows, a row being a token and a
query head of the KV head; the first chunk of a KV head attends the new tokens as well. Which token a slot holds follows
from the number of tokens alone, so that no positions are stored or read; the rest of the arithmetic is that of
triton_decode.py. One kernel serves one token, a few, and a chunk of a prompt. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import CacheStep
from attnopt.codegen.triton_cache_host import aot, launch, launcher
from attnopt.codegen.triton_cache_write import write_kernel
from attnopt.codegen.triton_decode import masked_block, merge_loop, whole_blocks
from attnopt.codegen.triton_text import check, dim_mask, load_text, mask_argument, need_triton, padded_dim
from attnopt.registry import TARGETS


def _header(spec: CacheStep) -> str:
    block, warps, stages = launch(spec)
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}.
Emitted by attnopt; edits are overwritten.

KV head g has table[g] = (start, capacity, sink, window): capacity slots from start on, of which the first `sink` hold
the first tokens and the others are a ring. A window wider than that ring says that slot p holds token p. Query head h
at position i keeps the token at position p where ``p <= i and (p < spans[h, 0] or i - p < spans[h, 1])``.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.cache_prefill import prefill
from attnopt.codegen.decode_list import cache_list

# Query heads of a KV head.
SHARE = {spec.share}
# Warps of a tile by its rows, of a head and a token each.
WARPS = {warps}
LAUNCH = {{"BLOCK_N": {block}, "num_stages": {stages}}}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory, which three stages of 128 features take alone.
    LAUNCH["num_stages"] = 2
'''


def _attend_start(spec: CacheStep) -> str:
    groups, share = spec.kv_heads, spec.share
    q_load = load_text(
        "q + q_row[:, None] + dims[None, :]", "inside[:, None]", dim_mask(spec.head_dim, "dims[None, :]")
    )
    return f'''

@triton.jit(do_not_specialize=["batch", "tiles", "partials"])
def attend(
    q,
    new_k,
    new_v,
    k,
    v,
    out,
    partial,
    partial_lse,
    lengths,
    ranks,
    table,
    spans,
    items,
    parts,
    batch,
    tiles,
    tokens,
    chunk,
    partials,
    scale_log2,
    q_batch,
    q_head,
    q_token,
    new_k_batch,
    new_k_head,
    new_k_token,
    new_v_batch,
    new_v_head,
    new_v_token,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
    ranks_batch,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of the slots of one KV head, and with its first the new tokens, for a tile of rows.

    ranks (B, T), if PADDED: how many tokens are real up to and with each one, 0 for those that are not.
    """
    # Which chunk: chunk * {groups} KV heads + KV head, longest first over the grid.
    item = tl.load(items + tl.program_id(0) // (batch * tiles))
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % (batch * tiles) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = item % {groups}
    index = item // {groups}
    segment = tl.load(table + group * 4)
    capacity = tl.load(table + group * 4 + 1)
    seen = tl.load(lengths + entry)
    begin = index * chunk
    end = tl.minimum(begin + chunk, tl.minimum(seen, capacity))
    if (begin >= end) & (index > 0):
        # Not filled yet: `merge` knows and reads no result of this chunk.
        return

    # Slots up to the newest token's hold its lap of the ring, those behind it the lap before.
    held_sink = tl.load(table + group * 4 + 2)
    ring = capacity - held_sink
    if tl.load(table + group * 4 + 3) > ring:
        # A head that holds every token does not wrap.
        ring = {1 << 30}
    past = tl.maximum(seen - 1 - held_sink, 0)
    lap = past - past % ring
    newest = held_sink + past % ring

    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // {share}
    head = group * {share} + row % {share}
    inside = token < tokens
    # Positions of queries, counted from the first new token; -1 for one that is not real, which keeps nothing.
    place = token
    if PADDED:
        place = tl.load(ranks + entry * ranks_batch + token, mask=inside, other=0).to(tl.int32) - 1
    real = inside & (place >= 0)
    sink = tl.where(real, tl.load(spans + head * 2, mask=inside, other=0), 0)
    window = tl.where(real, tl.load(spans + head * 2 + 1, mask=inside, other=0), 0)
    first_place = tl.min(tl.where(real, place, {1 << 30}), 0)
    last_place = tl.max(tl.where(real, place, -1), 0)
    narrow = tl.min(tl.where(inside, window, {1 << 30}), 0)
    wide = tl.max(window, 0)
    deep = tl.max(sink, 0)

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {padded_dim(spec.head_dim)})
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    q_row = entry * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    k += entry * k_batch + segment.to(tl.int64) * k_slot
    v += entry * v_batch + segment.to(tl.int64) * v_slot
    k_tile = local[None, :] * k_slot + dims[:, None]
    v_tile = local[:, None] * v_slot + dims_v[None, :]
    queries = {q_load}

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, {padded_dim(spec.head_dim_v)}], tl.float32)
'''


def _old_loops(spec: CacheStep) -> str:
    keep = """        at = tl.where(cols < held_sink, cols, cols + lap - tl.where(cols > newest, ring, 0))
        back = seen + place[:, None] - at[None, :]
        span = (at[None, :] < sink[:, None]) | (back < window[:, None])
        keep = span & (cols[None, :] < end)"""
    return f"""
    if first_place - wide >= -1:
        # Every window begins behind the newest slot: what is left are sinks.
        end = tl.minimum(end, deep)
    # The oldest token of the chunk. If no window of a row ends before it, no key has to be tested.
    oldest = begin + lap
    if end - 1 > newest:
        oldest = tl.maximum(begin, newest + 1) + lap - ring
    if begin < held_sink:
        oldest = begin
{whole_blocks(spec, "tl.where(seen + last_place - oldest < narrow, tl.maximum(end - begin, 0) // BLOCK_N, 0)")}
    # The other blocks, masked.
    rest = begin + blocks * BLOCK_N
    for n in range(0, tl.cdiv(tl.maximum(end - rest, 0), BLOCK_N)):
        start = rest + n * BLOCK_N
{masked_block(spec, keep)}"""


def _new_loop(spec: CacheStep) -> str:
    keep = """        back = place[:, None] - at[None, :]
        span = (seen + at[None, :] < sink[:, None]) | (back < window[:, None])
        keep = span & (back >= 0) & live[None, :]"""
    return f"""
    # The new tokens, up to the last of the tile's own, from the first that a window keeps, or else the first sink.
    first = tl.maximum(first_place - wide + 1, 0) // BLOCK_T * BLOCK_T
    first = tl.where(deep > seen, 0, first)
    until = tl.minimum(tokens, (tile * ROWS + ROWS - 1) // {spec.share} + 1)
    if index > 0:
        until = 0
    local = tl.arange(0, BLOCK_T)
    k = new_k + entry * new_k_batch + group.to(tl.int64) * new_k_head
    v = new_v + entry * new_v_batch + group.to(tl.int64) * new_v_head
    k_tile = local[None, :] * new_k_token + dims[:, None]
    v_tile = local[:, None] * new_v_token + dims_v[None, :]
    for n in range(0, tl.cdiv(tl.maximum(until - first, 0), BLOCK_T)):
        start = first + n * BLOCK_T
        at = start + local
        live = at < until
        if PADDED:
            at = tl.load(ranks + entry * ranks_batch + at, mask=live, other=0).to(tl.int32) - 1
            # What is not real may be NaN, which no weight of 0 undoes.
            live = live & (at >= 0)
{masked_block(spec, keep, "live{}", "new_k_token", "new_v_token")}"""


def _attend_end(spec: CacheStep) -> str:
    dim_v, share = spec.head_dim_v, spec.share
    mask = mask_argument("inside[:, None]", dim_mask(dim_v, "dims_v[None, :]"))
    return f"""
    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    part = tl.load(parts + group)
    if part < 0:
        # Tokens first: (B, T, {spec.heads}, {dim_v}).
        places = (entry * tokens + token) * {spec.heads} + head
        places = places[:, None] * {dim_v} + dims_v[None, :]
        tl.store(out + places, acc.to(out.dtype.element_ty){mask})
    else:
        rows = (entry * partials + part + index) * (tokens * {share}) + row
        places = rows[:, None] * {dim_v} + dims_v[None, :]
        tl.store(partial + places, acc{mask})
        tl.store(partial_lse + rows, top + tl.log2(total), mask=inside)
"""


def _merge(spec: CacheStep) -> str:
    share, heads, dim_v = spec.share, spec.heads, spec.head_dim_v
    return f'''

@triton.jit(do_not_specialize=["batch", "tokens", "partials"])
def merge(
    out,
    partial,
    partial_lse,
    lengths,
    table,
    split,
    parts,
    batch,
    tokens,
    chunk,
    partials,
    BLOCK_P: tl.constexpr,
):
    """One row of a KV head that was divided: the sum of its partial results, weighted by their sums of weights."""
    item = tl.program_id(0) // batch
    entry = (tl.program_id(0) % batch).to(tl.int64)
    rows = tokens * {share}
    group = tl.load(split + item // rows)
    row = item % rows
    used = tl.minimum(tl.load(lengths + entry), tl.load(table + group * 4 + 1))
    # The first chunk has the new tokens, whatever is filled.
    chunks = tl.maximum(tl.cdiv(used, chunk), 1)
    first = (entry * partials + tl.load(parts + group)) * rows + row
{merge_loop(spec, "rows")}    place = (entry * tokens + row // {share}) * {heads} + group * {share} + row % {share}
    out += place * {dim_v}
    tl.store(out + dims_v, acc.to(out.dtype.element_ty){mask_argument(dim_mask(dim_v, "dims_v"))})
'''


def source(spec: CacheStep) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    attend = _attend_start(spec) + _old_loops(spec) + _new_loop(spec) + _attend_end(spec)
    check_itself = footer(spec, "self_check_cache", "step")
    return _header(spec) + attend + _merge(spec) + write_kernel(spec) + launcher(spec) + aot(spec) + check_itself


@TARGETS.register("triton cache_step")
class Triton:
    @staticmethod
    def emit(spec: CacheStep) -> str:
        need_triton()
        return source(spec)
