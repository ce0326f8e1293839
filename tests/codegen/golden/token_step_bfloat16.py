"""Token step for triton: 32/8 heads, dim 128/128, bfloat16.
Emitted by attnopt; edits are overwritten.

A query head attends to its first and last keys and to those that it selected, or that an earlier layer did. Rows of
rules: keys that are selected, sink, recent keys, steps that a selection serves, features of the scores, source.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.decode_list import cache_list
from attnopt.codegen.token_lists import token_lists

LAUNCH = {
    "decide": {"num_warps": 1},
    "scan": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "pick": {"BLOCK": 4096, "num_warps": 8},
    "gather": {"BLOCK_N": 32, "num_warps": 4},
    "merge": {"num_warps": 4},
}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory.
    LAUNCH["scan"]["num_stages"] = 2


@triton.jit(do_not_specialize=["features"])
def decide(
    q,
    k,
    n,
    valid,
    table,
    rules,
    similar,
    asked,
    age,
    chosen,
    labels,
    due,
    features,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    labels_batch,
    labels_row,
    valid_batch,
    FEATURES: tl.constexpr,
):
    """Whether a query head selects, and the features of the newest key of its KV head; in one warp, as what is read
    here is written here too."""
    entry = (tl.program_id(0) // 32).to(tl.int64)
    head = tl.program_id(0) % 32
    place = entry * 32 + head
    counts = 1
    if valid is not None:
        counts = tl.load(valid + entry * valid_batch).to(tl.int32)
    own = (tl.load(rules + head * 6 + 0) > 0) & (tl.load(rules + head * 6 + 5) < 0)
    since = tl.load(age + place)
    limit = tl.load(similar + head)
    dims = tl.arange(0, 128)
    query = tl.load(q + entry * q_batch + head * q_head + dims)
    now = query.to(tl.float32)
    then = tl.load(asked + place * 128 + dims).to(tl.float32)
    near = limit * tl.sqrt(tl.sum(now * now, 0)) * tl.sqrt(tl.sum(then * then, 0))
    apart = (limit > 0) & (tl.sum(now * then, 0) < near)
    over = (since < 0) | (since + 1 >= tl.load(rules + head * 6 + 3)) | apart
    selects = own & (counts != 0) & over
    tl.store(due + place, selects.to(tl.int32))
    tl.store(age + place, tl.where(selects, 0, since + counts), mask=own)
    tl.store(asked + place * 128 + dims, query, mask=dims < tl.where(selects, 128, 0))
    if FEATURES > 0:
        group = head // 4
        slot = tl.load(n + entry) - 1
        fits = (slot >= 0) & (slot < tl.load(table + group * 4 + 1))
        if (head % 4 == 0) & (counts != 0) & fits:
            newest = (tl.load(table + group * 4) + slot).to(tl.int64)
            feature = tl.arange(0, FEATURES)
            live = feature < features
            index = tl.load(chosen + (entry * 8 + group) * features + feature, mask=live, other=0)
            key = tl.load(k + entry * k_batch + newest * k_slot + index, mask=live)
            tl.store(labels + entry * labels_batch + feature.to(tl.int64) * labels_row + newest, key, mask=live)


@triton.jit(do_not_specialize=["batch", "served", "features"])
def scan(
    q,
    k,
    labels,
    chosen,
    n,
    table,
    rules,
    due,
    places,
    scores,
    items,
    batch,
    served,
    chunk,
    features,
    room,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    labels_batch,
    labels_row,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores of one chunk of the keys of one KV head, for those of its query heads that select now."""
    # Which chunk: chunk * 8 KV heads + KV head.
    item = tl.load(items + tl.program_id(0) // batch)
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % batch).to(tl.int64)
    group = item % 8
    row = tl.arange(0, 16)
    head = group * 4 + row
    selects = tl.load(due + entry * 32 + head, mask=row < 4, other=0)
    if tl.max(selects, 0) == 0:
        # No key is read.
        return

    length = tl.minimum(tl.load(n + entry), tl.load(table + group * 4 + 1))
    begin = item // 8 * chunk
    end = tl.minimum(begin + chunk, length)
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    # A head that selects as many keys as there are takes them all.
    needed = (selects != 0) & (tl.load(rules + head * 6 + 0, mask=row < 4) < length)
    narrow = needed & (tl.load(rules + head * 6 + 4, mask=row < 4) > 0)
    full = needed & (narrow == 0)
    segment = tl.load(table + group * 4).to(tl.int64)
    q_row = entry * q_batch + head.to(tl.int64) * q_head
    local = tl.arange(0, BLOCK_N)
    written = (entry * served + tl.load(places + head, mask=row < 4)) * room
    written = scores + written[:, None] + local[None, :]
    if tl.max(full.to(tl.int32), 0) > 0:
        dims = tl.arange(0, 128)
        queries = tl.load(q + q_row[:, None] + dims[None, :], mask=full[:, None], other=0.0)
        k += entry * k_batch + segment * k_slot
        k_tile = local[None, :] * k_slot + dims[:, None]
        for block in range(0, blocks):
            start = begin + block * BLOCK_N
            live = start + local < end
            k_block = k + start.to(tl.int64) * k_slot
            keys = tl.load(k_block + k_tile, mask=live[None, :], other=0.0)
            found = tl.dot(queries, keys)
            tl.store(written + start, found, mask=full[:, None] & live[None, :])
    if FEATURES > 0:
        feature = tl.arange(0, FEATURES)
        real = feature < features
        if tl.max(narrow.to(tl.int32), 0) > 0:
            index = tl.load(chosen + (entry * 8 + group) * features + feature, mask=real, other=0)
            # A head that asks for fewer features has 0 at the others.
            asks = feature[None, :] < tl.load(rules + head * 6 + 4, mask=row < 4)[:, None]
            queries = tl.load(q + q_row[:, None] + index[None, :], mask=narrow[:, None] & asks, other=0.0)
            labels += entry * labels_batch + segment
            tile = feature.to(tl.int64)[:, None] * labels_row + local[None, :]
            for block in range(0, blocks):
                start = begin + block * BLOCK_N
                live = start + local < end
                keys = tl.load(labels + tile + start, mask=real[:, None] & live[None, :], other=0.0)
                found = tl.dot(queries, keys)
                tl.store(written + start, found, mask=narrow[:, None] & live[None, :])


@triton.jit
def _ordered(at, live):
    """Scores as unsigned integers in the same order; both zeros are the same."""
    score = tl.load(at, mask=live, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["batch", "served"])
def pick(
    scores,
    picked,
    n,
    table,
    rules,
    due,
    heads,
    batch,
    served,
    room,
    picked_batch,
    picked_head,
    BLOCK: tl.constexpr,
):
    """What one query head selects: positions ascending, and -1 behind them where there are fewer."""
    place = tl.program_id(0) // batch
    entry = (tl.program_id(0) % batch).to(tl.int64)
    head = tl.load(heads + place)
    if tl.load(due + entry * 32 + head) == 0:
        return

    length = tl.minimum(tl.load(n + entry), tl.load(table + head // 4 * 4 + 1))
    count = tl.load(rules + head * 6 + 0)
    scores += (entry * served + place) * room
    picked += entry * picked_batch + head * picked_head
    local = tl.arange(0, BLOCK)
    if length <= count:
        for start in range(0, count, BLOCK):
            at = start + local
            tl.store(picked + at, tl.where(at < length, at, -1), mask=at < count)
        return

    # How many of the scores that share all digits so far are kept.
    left = count

    # How many scores with the digits so far have each digit, of 11 bits.
    seen = tl.zeros([2048], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        seen += tl.histogram((score >> 21 & 2047).to(tl.int32), 2048, mask=live)
    larger = tl.sum(seen, 0) - tl.cumsum(seen, 0)
    here = (larger < left) & (larger + seen >= left)
    digit = tl.sum(tl.where(here, tl.arange(0, 2048), 0), 0).to(tl.uint32)
    left -= tl.sum(tl.where(here, larger, 0), 0)
    least = digit

    # How many scores with the digits so far have each digit, of 11 bits.
    seen = tl.zeros([2048], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        seen += tl.histogram((score >> 10 & 2047).to(tl.int32), 2048, mask=live & (score >> 21 == least))
    larger = tl.sum(seen, 0) - tl.cumsum(seen, 0)
    here = (larger < left) & (larger + seen >= left)
    digit = tl.sum(tl.where(here, tl.arange(0, 2048), 0), 0).to(tl.uint32)
    left -= tl.sum(tl.where(here, larger, 0), 0)
    least = least << 11 | digit

    # How many scores with the digits so far have each digit, of 10 bits.
    seen = tl.zeros([1024], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        seen += tl.histogram((score & 1023).to(tl.int32), 1024, mask=live & (score >> 10 == least))
    larger = tl.sum(seen, 0) - tl.cumsum(seen, 0)
    here = (larger < left) & (larger + seen >= left)
    digit = tl.sum(tl.where(here, tl.arange(0, 1024), 0), 0).to(tl.uint32)
    left -= tl.sum(tl.where(here, larger, 0), 0)
    least = least << 10 | digit

    # All larger ones, and of those that are as large the first.
    taken = 0
    met = 0
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        equal = (live & (score == least)).to(tl.int32)
        keep = live & (score > least) | ((equal != 0) & (met + tl.cumsum(equal, 0) <= left))
        place_of = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(picked + place_of, at, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        met += tl.sum(equal, 0)


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
    head = tl.load(heads + which)
    group = head // 4
    length = tl.minimum(tl.load(n + entry), tl.load(table + group * 4 + 1))
    if valid is not None:
        length = tl.where(tl.load(valid + entry * valid_batch) != 0, length, 0)
    count = tl.load(rules + head * 6 + 0)
    sink = tl.minimum(tl.load(rules + head * 6 + 1), length)
    recent = tl.minimum(tl.load(rules + head * 6 + 2), length)
    size = tl.where(length > 0, sink + count + recent, 0)
    begin = part * chunk
    end = tl.minimum(begin + chunk, size)
    if (begin >= end) & (parts > 1):
        # `merge` knows and reads no result of this part.
        return

    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    segment = tl.load(table + group * 4).to(tl.int64)
    query = tl.load(q + entry * q_batch + head * q_head + dims).to(tl.float32)
    k += entry * k_batch + segment * k_slot
    v += entry * v_batch + segment * v_slot
    picked += entry * picked_batch + head * picked_head
    # Per row of a tile: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, 128], tl.float32)
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
        keys = tl.load(k_block + dims[None, :], mask=live[:, None], other=0.0)
        values = tl.load(v_block + dims_v[None, :], mask=live[:, None], other=0.0)
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
        tl.store(partial + row * 128 + dims_v, result)
        tl.store(partial_lse + row, peak + tl.log2(whole))
    else:
        out += entry * out_batch + head * out_head
        tl.store(out + dims_v, result.to(out.dtype.element_ty))


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
    head = tl.load(heads + which)
    group = head // 4
    length = tl.minimum(tl.load(n + entry), tl.load(table + group * 4 + 1))
    if valid is not None:
        length = tl.where(tl.load(valid + entry * valid_batch) != 0, length, 0)
    count = tl.load(rules + head * 6 + 0)
    sink = tl.minimum(tl.load(rules + head * 6 + 1), length)
    recent = tl.minimum(tl.load(rules + head * 6 + 2), length)
    size = tl.where(length > 0, sink + count + recent, 0)
    chunks = tl.cdiv(size, chunk)
    dims_v = tl.arange(0, 128)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([128], tl.float32)
    for start in range(0, chunks, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        live = index < chunks
        place = first + index * lists
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
    out += entry * out_batch + head * out_head
    tl.store(out + dims_v, acc.to(out.dtype.element_ty))


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(gather, triton.JITFunction)


def _check(q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, out):
    batch, slots, features = q.shape[0], keys.shape[1], chosen.shape[2]
    shapes = [tuple(x.shape) for x in (q, keys, values, n, table, rules, similar, asked, age, chosen, labels, out)]
    wanted = [(batch, 32, 1, 128), (batch, slots, 128), (batch, slots, 128), (batch,), (8, 4)]
    wanted += [(32, 6), (32,), (batch, 32, 128), (batch, 32), (batch, 8, features)]
    wanted += [(batch, features, slots), (batch, 32, 1, 128)]
    if shapes != wanted or (valid is not None and valid.shape != (batch, 1)):
        raise ValueError(f"the tensors of a step have shapes {shapes}; this kernel wants {wanted}")
    if any(x.shape[:2] != (batch, 32) or x.dtype != torch.int32 for x in (picked, *sources)):
        raise ValueError("lists of tokens are int32 (batch, 32, tokens)")
    if any(x.dtype != torch.bfloat16 for x in (q, keys, values, asked, labels, out)):
        raise ValueError(f"q is {q.dtype} and the cache {keys.dtype}; this kernel wants bfloat16 throughout")
    if any(x.dtype != torch.int32 for x in (n, table, rules, age)) or chosen.dtype != torch.int64:
        raise ValueError("n, age and the tables of a cache are int32, the features chosen int64")
    if not all(x.is_contiguous() for x in (n, table, rules, similar, asked, age, chosen)):
        raise ValueError("n, the tables and the state of a step are contiguous")
    if any(x.stride(-1) != 1 for x in (keys, values, picked, *sources, labels, out) if x.shape[-1] > 1):
        raise ValueError("a slot of the cache, a list and a row of the result are contiguous: none is copied")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")


def step(
    q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, scale, out
):  # fmt: skip
    """q (B, 32, 1, 128), keys (B, S, 128), values (B, S, 128); the rest as in attnopt/codegen/reference_token_step.py.

    Written are picked, asked, age and labels, and the heads of out (B, 32, 1, 128) that select. No value of a
    tensor is read here, but those of table and rules, once.
    """
    _check(q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, out)
    batch = q.shape[0]
    if not batch:
        return
    kept = asked, labels, out
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, keys, values, asked, labels, out = (x.float() for x in (q, keys, values, asked, labels, out))
    q = q if q.stride(-1) == 1 else q.contiguous()
    valid = None if valid is None else valid.view(torch.int8)
    with torch.cuda.device_of(q):
        work = token_lists(rules, table, batch)
        if len(sources) + 1 < len(work.readers):
            raise ValueError(f"heads read {len(work.readers) - 1} sources, and {len(sources)} are given")
        if work.heads.numel():
            state = rules, similar, picked, asked, age, chosen, labels
            _select(work, q, keys, n, valid, table, *state)
        for lists, readers in zip((picked, *sources), work.readers, strict=False):
            if readers is not None:
                _attend(readers, q, keys, values, n, valid, table, rules, lists, scale, out)
    if INTERPRETED:
        for narrow, wide in zip(kept, (asked, labels, out), strict=True):
            narrow.copy_(wide)


def _select(work, q, keys, n, valid, table, rules, similar, picked, asked, age, chosen, labels):
    batch, served, features = q.shape[0], work.heads.numel(), chosen.shape[2]
    due = torch.empty((batch, 32), dtype=torch.int32, device=q.device)
    scores = torch.empty((batch, served, work.room), dtype=torch.float32, device=q.device)
    lanes = max(16, triton.next_power_of_2(features)) if features else 0
    decide[(batch * 32,)](
        *(q, keys, n, valid, table, rules, similar, asked, age, chosen, labels, due, features),
        *(*q.stride()[:2], *keys.stride()[:2], *labels.stride()[:2], 0 if valid is None else valid.stride(0)),
        FEATURES=lanes,
        **LAUNCH["decide"],
    )
    chunks = cache_list(table, batch, 1)
    if chunks.slots != keys.shape[1]:
        raise ValueError(f"the table ends at slot {chunks.slots}, and the cache has {keys.shape[1]}")
    scan[(chunks.items.numel() * batch,)](
        *(q, keys, labels, chosen, n, table, rules, due, work.places, scores, chunks.items),
        *(batch, served, chunks.chunk, features, work.room),
        *(*q.stride()[:2], *keys.stride()[:2], *labels.stride()[:2]),
        FEATURES=lanes,
        **LAUNCH["scan"],
    )
    pick[(served * batch,)](
        *(scores, picked, n, table, rules, due, work.heads, batch, served, work.room, *picked.stride()[:2]),
        **LAUNCH["pick"],
    )


def _attend(readers, q, keys, values, n, valid, table, rules, lists, scale, out):
    batch, heads = q.shape[0], readers.heads
    if lists.shape[2] < readers.most:
        raise ValueError(f"lists of {lists.shape[2]} tokens, and a head reads {readers.most}")
    split = readers.parts > 1
    partial = torch.empty((readers.parts * split, heads.numel() * batch, 128), device=q.device)
    partial_lse = torch.empty((readers.parts * split, heads.numel() * batch), device=q.device)
    valid_batch = 0 if valid is None else valid.stride(0)
    gather[(readers.parts * heads.numel() * batch,)](
        *(q, keys, values, out, partial, partial_lse, n, valid, table, rules, lists, heads),
        *(batch, readers.parts, readers.chunk, scale * 1.4426950408889634),
        *(*q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *out.stride()[:2], *lists.stride()[:2]),
        valid_batch,
        SPLIT=split,
        **LAUNCH["gather"],
        enable_fp_fusion=True,
    )
    if split:
        merge[(heads.numel() * batch,)](
            *(out, partial, partial_lse, n, valid, table, rules, heads, batch, readers.chunk, *out.stride()[:2]),
            valid_batch,
            BLOCK_P=16,
            **LAUNCH["merge"],
            enable_fp_fusion=True,
        )


def aot_signatures(features=0):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors and no padding."""
    lanes = max(16, triton.next_power_of_2(features)) if features else 0
    moved = dict.fromkeys(("k_batch", "k_slot"), "i32")
    label_steps = dict.fromkeys(("labels_batch", "labels_row"), "i32")
    asking = {"q": "*bf16", "k": "*bf16"}
    tables = dict.fromkeys(("table", "rules"), "*i32")
    wanted = {"q_batch": "i32", "q_head": "i32", **moved}
    yield _aot(
        decide,
        {**asking, "n": "*i32", "valid": "constexpr", **tables, "similar": "*fp32", "asked": "*bf16"}
        | {"age": "*i32", "chosen": "*i64", "labels": "*bf16", "due": "*i32", "features": "i32", **wanted}
        | {**label_steps, "valid_batch": "constexpr", "FEATURES": "constexpr"},
        {"valid": None, "valid_batch": 0, "FEATURES": lanes, **LAUNCH["decide"]},
    )
    yield _aot(
        scan,
        {**asking, "labels": "*bf16", "chosen": "*i64", "n": "*i32", **tables, "due": "*i32", "places": "*i32"}
        | {"scores": "*fp32", "items": "*i32"}
        | dict.fromkeys(("batch", "served", "chunk", "features", "room"), "i32")
        | {**wanted, **label_steps, "FEATURES": "constexpr", "BLOCK_N": "constexpr"},
        {"FEATURES": lanes, **LAUNCH["scan"]},
    )
    yield _aot(
        pick,
        {"scores": "*fp32", "picked": "*i32", "n": "*i32", **tables, "due": "*i32", "heads": "*i32"}
        | dict.fromkeys(("batch", "served", "room", "picked_batch", "picked_head"), "i32")
        | {"BLOCK": "constexpr"},
        LAUNCH["pick"],
    )
    written = {"out_batch": "i32", "out_head": "i32"}
    parts = dict.fromkeys(("partial", "partial_lse"), "*fp32")
    for split in (False, True):
        yield _aot(
            gather,
            {**asking, "v": "*bf16", "out": "*bf16", **parts, "n": "*i32", "valid": "constexpr", **tables}
            | {"picked": "*i32", "heads": "*i32", **dict.fromkeys(("batch", "parts", "chunk"), "i32")}
            | {"scale_log2": "fp32", **wanted, "v_batch": "i32", "v_slot": "i32", **written}
            | {"picked_batch": "i32", "picked_head": "i32"}
            | dict.fromkeys(("valid_batch", "SPLIT", "BLOCK_N"), "constexpr"),
            {"valid": None, "valid_batch": 0, "SPLIT": split, **LAUNCH["gather"]},
        )
    yield _aot(
        merge,
        {"out": "*bf16", **parts, "n": "*i32", "valid": "constexpr", **tables, "heads": "*i32", "batch": "i32"}
        | {"chunk": "i32", **written, **dict.fromkeys(("valid_batch", "BLOCK_P"), "constexpr")},
        {"valid": None, "valid_batch": 0, "BLOCK_P": 16, **LAUNCH["merge"]},
    )


def _aot(kernel, signature, config):
    unaligned = ("batch", "served", "features", "parts", "scale_log2")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unaligned
    }
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": {name: value for name, value in config.items() if signature.get(name) == "constexpr"},
        "attrs": attrs,
        "options": {k: v for k, v in config.items() if k not in signature} | {"enable_fp_fusion": True},
    }


if __name__ == "__main__":
    from attnopt.codegen.self_check_tokens import check
    from attnopt.codegen.spec import TokenStep

    check(TokenStep("triton", "bfloat16", 32, 8, 128, 128), step)
