"""The Triton kernels of `triton_pass`.

    weigh_rows     a tile of query rows against its keys: soft-max sums, D_i, entropy
    attend_rows    the same tile once more: dq, and the sums of A and of dS between two consecutive edges of distance
                   (and of sinks), of which rows.py makes every candidate's
    attend_keys    a tile of keys against the rows that see it: dk and dv

Products are of the inputs' own type, as in flash attention; sums are float32. float32 inputs stay off the tensor cores,
which would round them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnopt.statistics.records import SINK_KEYS

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MASKED: tl.constexpr = tl.constexpr(-1e30)  # finite, so that weight * score is 0 and not NaN where the weight is 0
LEAD: tl.constexpr = tl.constexpr(SINK_KEYS)
NEVER: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def tile_of(
    k, v, start, local, length, k_row, v_row, dims, dims_v, DIM: tl.constexpr, DIM_V: tl.constexpr, ALL: tl.constexpr
):
    """Keys (features, N) and values (features, N) from `start` on; ALL: none is beyond the length."""
    wide, wide_v = (dims < DIM)[:, None], (dims_v < DIM_V)[:, None]
    if not ALL:
        there = (start + local < length)[None, :]
        wide, wide_v = wide & there, wide_v & there
    # The first key's place in 64 bits, the others from there in 32.
    first = start.to(tl.int64)
    keys = tl.load(k + first * k_row + (local[None, :] * k_row + dims[:, None]), mask=wide, other=0.0)
    values = tl.load(v + first * v_row + (local[None, :] * v_row + dims_v[:, None]), mask=wide_v, other=0.0)
    return keys, values


@triton.jit
def scores_of(
    queries, keys, rows, cols, pad, length, scale, cap, window,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Scores (M, N) in base 2 of rows (M,) and cols (N,), MASKED where a key is not kept; the derivative of the cap.

    ALL: every row keeps every key, but for padding.
    """
    scores = tl.dot(queries, keys, input_precision="ieee") * scale
    slope = scores
    if CAPPED:
        bent = 1.0 - 2.0 / (tl.exp2(scores * (2 * LOG2E / cap)) + 1.0)  # tanh
        slope = 1.0 - bent * bent
        scores = bent * cap
    scores = scores * LOG2E
    if not ALL:
        keep = (cols[None, :] <= rows[:, None]) & (rows[:, None] - cols[None, :] < window) & (cols < length)[None, :]
        scores = tl.where(keep, scores, MASKED)
    if PADDED:
        kept = tl.load(pad + cols, mask=cols < length, other=0) != 0
        scores = tl.where(kept[None, :], scores, MASKED)
    return scores, slope


@triton.jit
def soft_max(scores, products, top, total, below, dot):
    """One tile more in the sums of a row, which are relative to its largest score `top`: of weights, of weights times
    how far below it their scores are, and of weights times `products`."""
    highest = tl.maximum(top, tl.max(scores, 1))
    lower = scores - highest[:, None]
    # Where nothing was kept so far, the largest score is itself masked.
    weights = tl.where(scores > MASKED / 2, tl.exp2(lower), 0.0)
    shrink = tl.exp2(top - highest)
    below = shrink * (below + (top - highest) * total) + tl.sum(weights * lower, 1)
    total = total * shrink + tl.sum(weights, 1)
    dot = dot * shrink + tl.sum(weights * products, 1)
    return highest, total, below, dot


@triton.jit(do_not_specialize=["length", "first", "stop"])
def weigh_rows(
    q, k, v, grad, pad, lse, dots, entropy, lead,
    length, first, stop, scale, cap, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Soft-max sums of one tile of query rows of one head; grid (tiles of the rows first <= i < stop, B * H).

    lse (in base 2), dots (D_i), entropy: (B * H, N); lead (B * H, tiles, LEAD): mass of the first keys, over the rows
    that count.
    """
    # Long tiles first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    item = tl.program_id(1)
    head, batch = item % HEADS, (item // HEADS).to(tl.int64)
    kv_head = head // REPEAT
    item = item.to(tl.int64)
    begin = first + tile * BLOCK_M
    inner, local = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = begin + inner
    dims, dims_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    there, wide, wide_v = rows < stop, dims < DIM, dims_v < DIM_V
    q += batch * q_batch + head * q_head + begin.to(tl.int64) * q_row
    grad += batch * grad_batch + head * grad_head + begin.to(tl.int64) * grad_row
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    pad += batch * length
    queries = tl.load(q + (inner[:, None] * q_row + dims[None, :]), mask=there[:, None] & wide[None, :], other=0.0)
    grads = tl.load(
        grad + (inner[:, None] * grad_row + dims_v[None, :]), mask=there[:, None] & wide_v[None, :], other=0.0
    )
    # Keys from left to right; of them, every row keeps those of [whole, before).
    left = tl.maximum(begin - window + 1, 0) // BLOCK_N * BLOCK_N
    right = tl.minimum(begin + BLOCK_M, stop)
    before = begin // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.cdiv(tl.maximum(begin + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, before)

    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    below = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, (before - whole) // BLOCK_N):
        start = whole + n * BLOCK_N
        cols = start + local
        keys, values = tile_of(k, v, start, local, length, k_row, v_row, dims, dims_v, DIM, DIM_V, True)
        scores, _ = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, True)
        products = tl.dot(grads, values, input_precision="ieee")
        top, total, below, dot = soft_max(scores, products, top, total, below, dot)
    edge_tiles = (whole - left) // BLOCK_N
    for n in range(0, edge_tiles + tl.cdiv(right - before, BLOCK_N)):
        start = tl.where(n < edge_tiles, left, before - edge_tiles * BLOCK_N) + n * BLOCK_N
        cols = start + local
        keys, values = tile_of(k, v, start, local, length, k_row, v_row, dims, dims_v, DIM, DIM_V, False)
        scores, _ = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, False)
        products = tl.dot(grads, values, input_precision="ieee")
        top, total, below, dot = soft_max(scores, products, top, total, below, dot)
    some = tl.where(total == 0.0, 1.0, total)
    # Of a row without a key every weight is then exp2(MASKED) = 0.
    log_sum = tl.where(total == 0.0, 0.0, top + tl.log2(some))
    dot = dot / some
    tl.store(lse + item * length + rows, log_sum, mask=there)
    tl.store(dots + item * length + rows, dot, mask=there)
    tl.store(entropy + item * length + rows, (tl.log2(some) - below / some) / LOG2E, mask=there)

    # The first keys one by one, over the rows that count.
    cols = tl.arange(0, LEAD)
    keys = tl.load(k + cols[None, :] * k_row + dims[:, None], mask=(cols < length)[None, :] & wide[:, None], other=0.0)
    scores, _ = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, False)
    if PADDED:
        there = there & (tl.load(pad + rows, mask=there, other=0) != 0)
    weights = tl.where(there[:, None], tl.exp2(scores - log_sum[:, None]), 0.0)
    tl.store(lead + (item * tl.num_programs(0) + tile) * LEAD + cols, tl.sum(weights, 0))


@triton.jit(do_not_specialize=["length", "first", "stop", "held"])
def attend_rows(
    q, k, v, grad, pad, lse, dots, edges, cuts, dq, mass, moved,
    length, first, stop, held, scale, cap, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, EDGES: tl.constexpr, CUTS: tl.constexpr,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and sums of A and of dS, of one tile of query rows; grid as that of `weigh_rows`, which comes before.

    edges, cuts: int32, ascending from 0 and filled with NEVER to a power of two and one more. Cell (a, e) of mass and
    moved, (B * H, CUTS * EDGES, held), holds keys from cuts[a] up to cuts[a + 1] at distances from edges[e] up to
    edges[e + 1].
    """
    # Long tiles first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    item = tl.program_id(1)
    head, batch = item % HEADS, (item // HEADS).to(tl.int64)
    kv_head = head // REPEAT
    item = item.to(tl.int64)
    begin = first + tile * BLOCK_M
    inner, local = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = begin + inner
    dims, dims_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    there, wide, wide_v = rows < stop, dims < DIM, dims_v < DIM_V
    q += batch * q_batch + head * q_head + begin.to(tl.int64) * q_row
    grad += batch * grad_batch + head * grad_head + begin.to(tl.int64) * grad_row
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    pad += batch * length
    queries = tl.load(q + (inner[:, None] * q_row + dims[None, :]), mask=there[:, None] & wide[None, :], other=0.0)
    grads = tl.load(
        grad + (inner[:, None] * grad_row + dims_v[None, :]), mask=there[:, None] & wide_v[None, :], other=0.0
    )
    # Keys from left to right; of them, every row keeps those of [whole, before).
    left = tl.maximum(begin - window + 1, 0) // BLOCK_N * BLOCK_N
    right = tl.minimum(begin + BLOCK_M, stop)
    before = begin // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.cdiv(tl.maximum(begin + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, before)
    log_sum = tl.load(lse + item * length + rows, mask=there, other=0.0)
    dot = tl.load(dots + item * length + rows, mask=there, other=0.0)

    ends, sinks = tl.load(edges + tl.arange(0, EDGES)), tl.load(cuts + tl.arange(0, CUTS))
    last_sink = tl.sum((sinks < NEVER).to(tl.int32)) - 1
    most = tl.load(cuts + last_sink)
    mass += item * (EDGES * CUTS) * held + (rows - first)
    moved += item * (EDGES * CUTS) * held + (rows - first)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    at = left
    # Far distances first. Tiles between two edges and beyond all sinks are one cell: their sums stay in registers. The
    # tiles before these, and after the last, meet several cells and are summed once for each.
    for n in range(0, EDGES + 1):
        edge = tl.maximum(EDGES - 1 - n, 0)
        from_key = tl.maximum(begin + BLOCK_M - tl.load(edges + edge + 1), most)
        opens = tl.maximum(tl.maximum(tl.cdiv(tl.maximum(from_key, 0), BLOCK_N) * BLOCK_N, whole), at)
        closes = tl.maximum(begin + 1 - tl.load(edges + edge), 0) // BLOCK_N * BLOCK_N
        within = closes > opens
        opens = tl.where(n == EDGES, right, tl.where(within, opens, at))
        closes = tl.where(within & (n < EDGES), closes, opens)
        for m in range(0, tl.cdiv(opens - at, BLOCK_N)):
            start = at + m * BLOCK_N
            cols = start + local
            keys, values = tile_of(k, v, start, local, length, k_row, v_row, dims, dims_v, DIM, DIM_V, False)
            scores, slope = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, False)
            weights = tl.exp2(scores - log_sum[:, None])
            changes = weights * (tl.dot(grads, values, input_precision="ieee") - dot[:, None])
            bent = changes * slope if CAPPED else changes
            acc = tl.dot(bent.to(keys.dtype), tl.trans(keys), acc, input_precision="ieee")
            distance = rows[:, None] - cols[None, :]
            near, far = tl.maximum(begin - start - BLOCK_N + 1, 0), begin + BLOCK_M - 1 - start
            near_edge, far_edge = tl.sum((ends <= near).to(tl.int32)) - 1, tl.sum((ends <= far).to(tl.int32)) - 1
            first_cut = tl.sum((sinks <= start).to(tl.int32)) - 1
            last_cut = tl.sum((sinks <= start + BLOCK_N - 1).to(tl.int32)) - 1
            for a in range(first_cut, last_cut + 1):
                of_cut = (cols >= tl.load(cuts + a)) & (cols < tl.load(cuts + a + 1))
                for e in range(near_edge, far_edge + 1):
                    inside = (distance >= tl.load(edges + e)) & (distance < tl.load(edges + e + 1)) & of_cut[None, :]
                    cell = (a * EDGES + e) * held
                    # Atomic, though no other program adds to these rows: a thread may hold a copy of another's.
                    tl.atomic_add(mass + cell, tl.sum(tl.where(inside, weights, 0.0), 1), mask=there, sem="relaxed")
                    tl.atomic_add(moved + cell, tl.sum(tl.where(inside, changes, 0.0), 1), mask=there, sem="relaxed")
        weight = tl.zeros([BLOCK_M], tl.float32)
        change = tl.zeros([BLOCK_M], tl.float32)
        for m in range(0, (closes - opens) // BLOCK_N):
            start = opens + m * BLOCK_N
            cols = start + local
            keys, values = tile_of(k, v, start, local, length, k_row, v_row, dims, dims_v, DIM, DIM_V, True)
            scores, slope = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, True)
            weights = tl.exp2(scores - log_sum[:, None])
            changes = weights * (tl.dot(grads, values, input_precision="ieee") - dot[:, None])
            bent = changes * slope if CAPPED else changes
            acc = tl.dot(bent.to(keys.dtype), tl.trans(keys), acc, input_precision="ieee")
            weight += tl.sum(weights, 1)
            change += tl.sum(changes, 1)
        if closes > opens:
            cell = (last_sink * EDGES + edge) * held
            tl.atomic_add(mass + cell, weight, mask=there, sem="relaxed")
            tl.atomic_add(moved + cell, change, mask=there, sem="relaxed")
        at = closes
    dq += (item * length + begin) * DIM
    tl.store(
        dq + (inner[:, None] * DIM + dims[None, :]), (acc * scale).to(dq.dtype.element_ty),
        mask=there[:, None] & wide[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def attend_keys(
    q, k, v, grad, pad, lse, dots, dk, dv,
    length, scale, cap, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    KV_HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one KV head, against the rows of all query heads that share it; grid (tiles, B * G)."""
    start = tl.program_id(0) * BLOCK_N
    item = tl.program_id(1)
    kv_head, batch = item % KV_HEADS, (item // KV_HEADS).to(tl.int64)
    item = item.to(tl.int64)
    local, inner = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    cols = start + local
    dims, dims_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    there, wide, wide_v = cols < length, dims < DIM, dims_v < DIM_V
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    pad += batch * length
    keys, values = tile_of(k, v, start, local, length, k_row, v_row, dims, dims_v, DIM, DIM_V, False)
    for_keys = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for_values = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    top = start // BLOCK_M
    tiles = tl.cdiv(tl.minimum(length, start + BLOCK_N - 1 + window), BLOCK_M) - top
    for n in range(0, tiles * REPEAT):
        head = kv_head * REPEAT + n // tiles
        begin = (top + n % tiles) * BLOCK_M
        rows = begin + inner
        live = rows < length
        q_block = q + batch * q_batch + head * q_head + begin.to(tl.int64) * q_row
        grad_block = grad + batch * grad_batch + head * grad_head + begin.to(tl.int64) * grad_row
        queries = tl.load(
            q_block + (inner[:, None] * q_row + dims[None, :]), mask=live[:, None] & wide[None, :], other=0.0
        )
        grads = tl.load(
            grad_block + (inner[:, None] * grad_row + dims_v[None, :]), mask=live[:, None] & wide_v[None, :], other=0.0
        )
        at = (batch * (KV_HEADS * REPEAT) + head) * length + rows
        log_sum = tl.load(lse + at, mask=live, other=0.0)
        dot = tl.load(dots + at, mask=live, other=0.0)
        # Rows beyond the last have neither a query nor a gradient: they add 0.
        scores, slope = scores_of(queries, keys, rows, cols, pad, length, scale, cap, window, CAPPED, PADDED, False)
        weights = tl.exp2(scores - log_sum[:, None])
        changes = weights * (tl.dot(grads, values, input_precision="ieee") - dot[:, None])
        if CAPPED:
            changes = changes * slope
        for_values = tl.dot(tl.trans(weights.to(grads.dtype)), grads, for_values, input_precision="ieee")
        for_keys = tl.dot(tl.trans(changes.to(queries.dtype)), queries, for_keys, input_precision="ieee")
    dk += item * length * DIM
    dv += item * length * DIM_V
    own = cols.to(tl.int64)[:, None]
    tl.store(
        dk + own * DIM + dims[None, :], (for_keys * scale).to(dk.dtype.element_ty), mask=there[:, None] & wide[None, :]
    )
    tl.store(
        dv + own * DIM_V + dims_v[None, :], for_values.to(dv.dtype.element_ty), mask=there[:, None] & wide_v[None, :]
    )
