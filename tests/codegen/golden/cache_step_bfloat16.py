"""Cache step for triton: 32/8 heads, dim 128/128, bfloat16.
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
SHARE = 4
# Warps of a tile by its rows, of a head and a token each.
WARPS = {16: 4, 32: 4, 64: 4}
LAUNCH = {"BLOCK_N": 64, "num_stages": 3}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory, which three stages of 128 features take alone.
    LAUNCH["num_stages"] = 2


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
    # Which chunk: chunk * 8 KV heads + KV head, longest first over the grid.
    item = tl.load(items + tl.program_id(0) // (batch * tiles))
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % (batch * tiles) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = item % 8
    index = item // 8
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
        ring = 1073741824
    past = tl.maximum(seen - 1 - held_sink, 0)
    lap = past - past % ring
    newest = held_sink + past % ring

    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // 4
    head = group * 4 + row % 4
    inside = token < tokens
    # Positions of queries, counted from the first new token; -1 for one that is not real, which keeps nothing.
    place = token
    if PADDED:
        place = tl.load(ranks + entry * ranks_batch + token, mask=inside, other=0).to(tl.int32) - 1
    real = inside & (place >= 0)
    sink = tl.where(real, tl.load(spans + head * 2, mask=inside, other=0), 0)
    window = tl.where(real, tl.load(spans + head * 2 + 1, mask=inside, other=0), 0)
    first_place = tl.min(tl.where(real, place, 1073741824), 0)
    last_place = tl.max(tl.where(real, place, -1), 0)
    narrow = tl.min(tl.where(inside, window, 1073741824), 0)
    wide = tl.max(window, 0)
    deep = tl.max(sink, 0)

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    q_row = entry * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    k += entry * k_batch + segment.to(tl.int64) * k_slot
    v += entry * v_batch + segment.to(tl.int64) * v_slot
    k_tile = local[None, :] * k_slot + dims[:, None]
    v_tile = local[:, None] * v_slot + dims_v[None, :]
    queries = tl.load(q + q_row[:, None] + dims[None, :], mask=inside[:, None], other=0.0)

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, 128], tl.float32)

    if first_place - wide >= -1:
        # Every window begins behind the newest slot: what is left are sinks.
        end = tl.minimum(end, deep)
    # The oldest token of the chunk. If no window of a row ends before it, no key has to be tested.
    oldest = begin + lap
    if end - 1 > newest:
        oldest = tl.maximum(begin, newest + 1) + lap - ring
    if begin < held_sink:
        oldest = begin

    # Whole blocks: no mask, and every score is finite.
    blocks = tl.where(seen + last_place - oldest < narrow, tl.maximum(end - begin, 0) // BLOCK_N, 0)
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

    # The other blocks, masked.
    rest = begin + blocks * BLOCK_N
    for n in range(0, tl.cdiv(tl.maximum(end - rest, 0), BLOCK_N)):
        start = rest + n * BLOCK_N
        cols = start + local
        k_block = k + start.to(tl.int64) * k_slot
        v_block = v + start.to(tl.int64) * v_slot
        keys = tl.load(k_block + k_tile, mask=cols[None, :] < end, other=0.0)
        scores = tl.dot(queries, keys)
        at = tl.where(cols < held_sink, cols, cols + lap - tl.where(cols > newest, ring, 0))
        back = seen + place[:, None] - at[None, :]
        span = (at[None, :] < sink[:, None]) | (back < window[:, None])
        keep = span & (cols[None, :] < end)
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

    # The new tokens, up to the last of the tile's own, from the first that a window keeps, or else the first sink.
    first = tl.maximum(first_place - wide + 1, 0) // BLOCK_T * BLOCK_T
    first = tl.where(deep > seen, 0, first)
    until = tl.minimum(tokens, (tile * ROWS + ROWS - 1) // 4 + 1)
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
        cols = start + local
        k_block = k + start.to(tl.int64) * new_k_token
        v_block = v + start.to(tl.int64) * new_v_token
        keys = tl.load(k_block + k_tile, mask=live[None, :], other=0.0)
        scores = tl.dot(queries, keys)
        back = place[:, None] - at[None, :]
        span = (seen + at[None, :] < sink[:, None]) | (back < window[:, None])
        keep = span & (back >= 0) & live[None, :]
        scores = tl.where(keep, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = tl.load(v_block + v_tile, mask=live[:, None], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top

    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    part = tl.load(parts + group)
    if part < 0:
        # Tokens first: (B, T, 32, 128).
        places = (entry * tokens + token) * 32 + head
        places = places[:, None] * 128 + dims_v[None, :]
        tl.store(out + places, acc.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        rows = (entry * partials + part + index) * (tokens * 4) + row
        places = rows[:, None] * 128 + dims_v[None, :]
        tl.store(partial + places, acc, mask=inside[:, None])
        tl.store(partial_lse + rows, top + tl.log2(total), mask=inside)


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
    rows = tokens * 4
    group = tl.load(split + item // rows)
    row = item % rows
    used = tl.minimum(tl.load(lengths + entry), tl.load(table + group * 4 + 1))
    # The first chunk has the new tokens, whatever is filled.
    chunks = tl.maximum(tl.cdiv(used, chunk), 1)
    first = (entry * partials + tl.load(parts + group)) * rows + row
    dims_v = tl.arange(0, 128)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([128], tl.float32)
    for start in range(0, chunks, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        live = index < chunks
        place = first + index * rows
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
    place = (entry * tokens + row // 4) * 32 + group * 4 + row % 4
    out += place * 128
    tl.store(out + dims_v, acc.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles"])
def write(
    new_k,
    new_v,
    k,
    v,
    lengths,
    ranks,
    counts,
    table,
    tiles,
    tokens,
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
    ADVANCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of rows, a KV head and a new token each: those that later tokens will not have overwritten, into their
    slots. A token that a full head has no slot for is dropped; the lengths count it, and so says that it was.

    counts (B,), if PADDED and not ADVANCE: real tokens. ADVANCE: this program has all rows of its sequence, and adds
    them to the length itself.
    """
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    group = row // tokens
    token = row % tokens
    inside = group < 8
    seen = tl.load(lengths + entry)
    rank = token + 1
    count = tokens
    if PADDED:
        rank = tl.load(ranks + entry * ranks_batch + token, mask=inside, other=0).to(tl.int32)
        if ADVANCE:
            count = tl.max(rank, 0)
        else:
            count = tl.load(counts + entry)
    capacity = tl.load(table + group * 4 + 1, mask=inside, other=1)
    sink = tl.load(table + group * 4 + 2, mask=inside, other=0)
    ring = capacity - sink
    ring = tl.where(tl.load(table + group * 4 + 3, mask=inside, other=0) > ring, 1073741824, ring)
    position = seen + rank - 1
    past = tl.maximum(position - sink, 0)
    slot = tl.where(position < sink, position, sink + past % ring)
    lasts = (position < sink) | (position >= seen + count - ring)
    kept = inside & (rank > 0) & lasts & (slot < capacity)
    slot += tl.load(table + group * 4, mask=inside, other=0)
    dims = tl.arange(0, 128)
    from_k = entry * new_k_batch + group.to(tl.int64) * new_k_head + token.to(tl.int64) * new_k_token
    to_k = entry * k_batch + slot.to(tl.int64) * k_slot
    moved = tl.load(new_k + from_k[:, None] + dims[None, :], mask=kept[:, None], other=0.0)
    tl.store(k + to_k[:, None] + dims[None, :], moved, mask=kept[:, None])
    dims_v = tl.arange(0, 128)
    from_v = entry * new_v_batch + group.to(tl.int64) * new_v_head + token.to(tl.int64) * new_v_token
    to_v = entry * v_batch + slot.to(tl.int64) * v_slot
    moved = tl.load(new_v + from_v[:, None] + dims_v[None, :], mask=kept[:, None], other=0.0)
    tl.store(v + to_v[:, None] + dims_v[None, :], moved, mask=kept[:, None])
    if ADVANCE:
        # Every thread has read it by then.
        tl.debug_barrier()
        tl.store(lengths + entry, seen + count)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(attend, triton.JITFunction)


def _check(q, k, v, keys, values, n, valid, table, spans):
    batch, tokens, slots = q.shape[0], q.shape[2], keys.shape[1]
    shapes = [tuple(x.shape) for x in (q, k, v, keys, values, n, table, spans)]
    new = (batch, 8, tokens, 128), (batch, 8, tokens, 128)
    caches = (batch, slots, 128), (batch, slots, 128)
    wanted = [(batch, 32, tokens, 128), *new, *caches, (batch,), (8, 4), (32, 2)]
    if shapes != wanted or (valid is not None and valid.shape != (batch, tokens)):
        raise ValueError(f"q, k, v, keys, values, n, table, spans have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype == torch.bfloat16:
        raise ValueError(f"q is {q.dtype} and the cache {keys.dtype}; this kernel wants bfloat16 throughout")
    if any(x.dtype != torch.int32 or not x.is_contiguous() for x in (n, table, spans)):
        raise ValueError("n and the tables of a cache are int32 and contiguous")
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")


def _ranks(valid):
    """(B, T): how many tokens are real up to and with each one, 0 for those that are not; None if all are."""
    if valid is None:
        return None
    if valid.shape[1] == 1:
        return valid.view(torch.int8)
    return valid.cumsum(1, dtype=torch.int32).mul_(valid)


def step(q, k, v, keys, values, n, valid, table, spans, scale, fresh):
    """q (B, 32, T, 128), k (B, 8, T, 128), v (B, 8, T, 128) -> (B, 32, T, 128), laid out tokens first.

    keys (B, S, 128), values (B, S, 128) and n int32 (B,) are attended, then written; valid bool (B, T) or None;
    table int32 (8, 4), spans int32 (32, 2). fresh: n is 0, and a prompt of more rows than a tile takes the
    kernel of a prefill. No value of a tensor is read here, but those of table and spans, once.
    """
    _check(q, k, v, keys, values, n, valid, table, spans)
    batch, tokens, dtype = q.shape[0], q.shape[2], q.dtype
    kept = keys, values
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v, keys, values = (x.float() for x in (q, k, v, keys, values))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, tokens, 32, 128), dtype=q.dtype, device=q.device).transpose(1, 2)
    if batch and tokens:
        ranks = _ranks(valid)
        with torch.cuda.device_of(q):
            if fresh and SHARE * tokens > max(WARPS):
                out = prefill("triton", q, k, v, valid, spans, scale)
            else:
                _attend(q, k, v, keys, values, n, ranks, table, spans, scale, out)
            _write(k, v, keys, values, n, ranks, table)
    if INTERPRETED:
        for cache, wide in zip(kept, (keys, values), strict=True):
            cache.copy_(wide)
    return out.to(dtype)


def _attend(q, k, v, keys, values, n, ranks, table, spans, scale, out):
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    batch, _, tokens, _ = q.shape
    rows = min(max(WARPS), max(16, triton.next_power_of_2(SHARE * tokens)))
    tiles = triton.cdiv(SHARE * tokens, rows)
    work = cache_list(table, batch, tiles)
    if work.slots != keys.shape[1]:
        raise ValueError(f"the table ends at slot {work.slots}, and the cache has {keys.shape[1]}")
    partial = torch.empty((batch, work.partials, SHARE * tokens, 128), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((batch, work.partials, SHARE * tokens), dtype=torch.float32, device=q.device)
    attend[(work.items.numel() * batch * tiles,)](
        *(q, k, v, keys, values, out, partial, partial_lse, n, n if ranks is None else ranks, table, spans),
        *(work.items, work.parts, batch, tiles, tokens, work.chunk, work.partials, scale * 1.4426950408889634),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:2], *values.stride()[:2]),
        0 if ranks is None else ranks.stride(0),
        PADDED=ranks is not None,
        ROWS=rows,
        BLOCK_T=min(LAUNCH["BLOCK_N"], max(16, triton.next_power_of_2(tokens))),
        num_warps=WARPS[rows],
        **LAUNCH,
        enable_fp_fusion=True,
    )
    if work.partials:
        merge[(work.split.numel() * SHARE * tokens * batch,)](
            *(out, partial, partial_lse, n, table, work.split, work.parts, batch, tokens, work.chunk, work.partials),
            BLOCK_P=16,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _write(k, v, keys, values, n, ranks, table):
    batch, _, tokens, _ = k.shape
    tiles = triton.cdiv(8 * tokens, 64)
    counts = n
    if ranks is not None and tiles > 1:
        counts = ranks.amax(1)
    write[(batch * tiles,)](
        *(k, v, keys, values, n, n if ranks is None else ranks, counts, table, tiles, tokens),
        *(*k.stride()[:3], *v.stride()[:3], *keys.stride()[:2], *values.stride()[:2]),
        0 if ranks is None else ranks.stride(0),
        PADDED=ranks is not None,
        ADVANCE=tiles == 1,
        ROWS=64 if tiles > 1 else triton.next_power_of_2(8 * tokens),
        enable_fp_fusion=True,
    )
    if tiles > 1:
        n.add_(tokens if ranks is None else counts)


def aot_signatures(tokens=1):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors, `tokens` new ones."""
    rows = min(max(WARPS), max(16, triton.next_power_of_2(SHARE * tokens)))
    new = ("new_k_batch", "new_k_head", "new_k_token", "new_v_batch", "new_v_head", "new_v_token")
    strides = (*new, "k_batch", "k_slot", "v_batch", "v_slot")
    moved = dict.fromkeys(("new_k", "new_v", "k", "v"), "*bf16")
    signature = {
        "q": "*bf16",
        **moved,
        "out": "*bf16",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("lengths", "ranks", "table", "spans", "items", "parts"), "*i32"),
        **dict.fromkeys(("batch", "tiles"), "i32"),
        "tokens": "constexpr" if tokens == 1 else "i32",
        **dict.fromkeys(("chunk", "partials"), "i32"),
        "scale_log2": "fp32",
        **dict.fromkeys(("q_batch", "q_head", "q_token", *strides), "i32"),
        **dict.fromkeys(("ranks_batch", "PADDED", "ROWS", "BLOCK_T", "BLOCK_N"), "constexpr"),
    }
    block = min(LAUNCH["BLOCK_N"], max(16, triton.next_power_of_2(tokens)))
    fixed = {"tokens": tokens, "ranks_batch": 0, "PADDED": False, "ROWS": rows, "BLOCK_T": block}
    yield _aot(attend, signature, {**fixed, **LAUNCH, "num_warps": WARPS[rows]})
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("lengths", "table", "split", "parts"), "*i32"),
        **dict.fromkeys(("batch", "tokens", "chunk", "partials"), "i32"),
        "BLOCK_P": "constexpr",
    }
    yield _aot(merge, signature, {"BLOCK_P": 16, "num_warps": 4})
    signature = {
        **moved,
        **dict.fromkeys(("lengths", "ranks", "counts", "table"), "*i32"),
        "tiles": "i32",
        "tokens": "constexpr",
        **dict.fromkeys(strides, "i32"),
        **dict.fromkeys(("ranks_batch", "PADDED", "ADVANCE", "ROWS"), "constexpr"),
    }
    fixed = {"tokens": 1, "ranks_batch": 0, "PADDED": False, "ADVANCE": True}
    yield _aot(write, signature, {**fixed, "ROWS": triton.next_power_of_2(8)})


def _aot(kernel, signature, config):
    unaligned = ("batch", "tiles", "tokens", "partials", "scale_log2")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unaligned
    }
    options = {**{k: v for k, v in config.items() if k not in signature}, "enable_fp_fusion": True}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": {name: value for name, value in config.items() if signature.get(name) == "constexpr"},
        "attrs": attrs,
        "options": options,
    }


if __name__ == "__main__":
    from attnopt.codegen.self_check_cache import check
    from attnopt.codegen.spec import CacheStep

    check(CacheStep("triton", "bfloat16", 32, 8, 128, 128), step)
