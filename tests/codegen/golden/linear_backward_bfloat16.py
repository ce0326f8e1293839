"""Linear backward for triton: 32/8 heads, dim 128/128, bfloat16, 12 exp/64.
Emitted by attnopt; edits are overwritten.

Gradients where query i weighs by exp(shift_i) f(q_i) . f(k_j) all keys sink <= j <= i - window.
With the sums of weights exp(lse_i) and delta_i = dout_i . out_i - dlse_i, the gradient at f(q_i) . f(k_j) is
(dout_i . v_j - delta_i) exp(shift_i - lse_i).
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.linear_tables import far_tables, segments

# Rows of a program of row_sums.
SUMMED = 64
LAUNCHES = {
    "sm_90": {
        "key_states": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "linear_dq": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "query_states": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "linear_dkv": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
    },
    "sm_80": {
        "key_states": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "linear_dq": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "query_states": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
        "linear_dkv": {"BLOCK": 32, "num_warps": 8, "num_stages": 1, "RELOAD": False},
    },
    "hip": {
        "key_states": {"BLOCK": 16, "num_warps": 4, "num_stages": 1, "RELOAD": True},
        "linear_dq": {"BLOCK": 16, "num_warps": 4, "num_stages": 1, "RELOAD": True},
        "query_states": {"BLOCK": 16, "num_warps": 4, "num_stages": 1, "RELOAD": True},
        "linear_dkv": {"BLOCK": 16, "num_warps": 4, "num_stages": 1, "RELOAD": True},
    },
}
# Said, because the default of Triton's versions differs.
FUSED = {"enable_fp_fusion": True}


def launches(device):
    """The launches of a device: of the largest of LAUNCHES' compute capabilities that it has."""
    if torch.version.hip:
        return LAUNCHES["hip"]
    recent = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return LAUNCHES["sm_90" if recent else "sm_80"]


@triton.jit
def load_map(w, slot, x_type: tl.constexpr):
    """A served head's map (128, 64), and what x_type leaves of it, of exponents of 2."""
    at = tl.arange(0, 64)
    dims = tl.arange(0, 128)
    places = w + slot * 8192 + at[None, :] * 128 + dims[:, None]
    weight = tl.load(places) * 1.4426950408889634
    return weight.to(x_type), (weight - weight.to(x_type).to(tl.float32)).to(x_type)


@triton.jit
def project(x, weight, rest, b, slot):
    """x (rows, 128) times a map in two parts: one alone would cost as much as rounding x again."""
    at = tl.arange(0, 64)
    # Loaded where it is added, as it would take registers all the time.
    bias = tl.load(b + slot * 64 + at[None, :]) * 1.4426950408889634
    return tl.dot(x, weight, tl.dot(x, rest)) + bias


@triton.jit
def row_factor(x, square, linear, constant):
    """linear . x - square |x|^2 + constant of every row, float32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * (linear[None, :] - square * wide), 1) + constant


@triton.jit
def query_features(x, weight, rest, b, slot, square, linear, constant):
    """f (rows, 64), at most 1, and (rows,): log2 of the factor that they still lack."""
    e = project(x, weight, rest, b, slot)
    top = tl.max(e, 1)
    return tl.exp2(e - top[:, None]), top + row_factor(x, square, linear, constant) * 1.4426950408889634


@triton.jit
def key_features(x, weight, rest, b, slot, square):
    """f (rows, 64), at most e^40."""
    wide = x.to(tl.float32)
    norm = tl.sum(wide * wide, 1) * (square * 1.4426950408889634)
    return tl.exp2(tl.minimum(project(x, weight, rest, b, slot) - norm[:, None], 57.70780163555853))


@triton.jit(do_not_specialize=["length", "segments", "parts"])
def key_states(
    k,
    v,
    states,
    totals,
    sinks,
    windows,
    heads,
    wk,
    bk,
    ck,
    length,
    segments,
    parts,
    segment,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """The sums of f_j v_j^T and of f_j over the far keys of one segment of `segment` keys, for one served head.

    states: float32 (batch, 12, segments, 64, 128), totals: the same without its last axis; of the
    segments the first `parts` are written.
    """
    # Which segment: (batch * segments + segment) * 12 + head; heads of a KV head share L2.
    program = tl.program_id(0)
    slot = program % 12
    part = program // 12 % parts
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // 12 // parts).to(tl.int64)
    head = tl.load(heads + slot)
    kv_head = head // 4
    sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
    # Keys from the sink up to `last` are far from some row.
    last = tl.where(sink < length - window, length - window, 0)
    first = sink // BLOCK * BLOCK
    begin = tl.maximum(part * segment, first)
    end = tl.minimum((part + 1) * segment, last)
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    if not RELOAD:
        k_map, k_rest = load_map(wk, slot, k.dtype.element_ty)
    k_square = tl.load(ck + slot)
    state = tl.zeros([64, 128], tl.float32)
    total = tl.zeros([64], tl.float32)
    for start in tl.range(begin, end, BLOCK, disable_licm=True):
        cols = start + local
        held = cols[:, None] < last
        wide = cols[:, None].to(tl.int64)
        keys = tl.load(k + wide * k_row + dims[None, :], mask=held, other=0.0)
        if RELOAD:
            k_map, k_rest = load_map(wk, slot, keys.dtype)
        far = (cols >= sink) & (cols < last)
        of_keys = tl.where(far[:, None], key_features(keys, k_map, k_rest, bk, slot, k_square), 0.0)
        values = tl.load(v + wide * v_row + dims_v[None, :], mask=held, other=0.0)
        state = tl.dot(tl.trans(of_keys.to(values.dtype)), values, state)
        total += tl.sum(of_keys, 0)
    place = (batch * 12 + slot) * segments + part
    at = tl.arange(0, 64)
    in_state = at[:, None] * 128 + dims_v[None, :]
    tl.store(states + place * 8192 + in_state, state)
    tl.store(totals + place * 64 + at, total)


@triton.jit(do_not_specialize=["segments"])
def add_up(states, totals, segments, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """In the place of the sums of every segment the sum of all before it, or if REVERSE of all behind it."""
    program = tl.program_id(0).to(tl.int64)
    size = 8192
    at = program % (size // BLOCK + 1) * BLOCK + tl.arange(0, BLOCK)
    row = program // (size // BLOCK + 1) * segments
    is_state = at < size
    is_total = (at >= size) & (at < size + 64)
    sums = tl.zeros([BLOCK], tl.float32)
    for n in range(0, segments - 1):
        place = row + (segments - 1 - n if REVERSE else n)
        state = tl.load(states + place * size + at, mask=is_state, other=0.0)
        total = tl.load(totals + place * 64 + at - size, mask=is_total, other=0.0)
        tl.store(states + place * size + at, sums, mask=is_state)
        tl.store(totals + place * 64 + at - size, sums, mask=is_total)
        sums += state + total
    place = row + (0 if REVERSE else segments - 1)
    tl.store(states + place * size + at, sums, mask=is_state)
    tl.store(totals + place * 64 + at - size, sums, mask=is_total)


@triton.jit
def from_features(d, f, x, weight, rest, b, slot):
    """The gradient at x (rows, 128) where that at its features f is d, but for |x|^2."""
    change = tl.dot((d * f).to(x.dtype), tl.trans(weight))
    # The map is one of exponents of 2.
    return change * 0.6931471805599453


@triton.jit(do_not_specialize=["length"])
def row_sums(
    dout,
    out,
    dlse,
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
    BLOCK: tl.constexpr,
):
    """delta = dout . out - dlse and bound = lse in base 2 of BLOCK rows of one head; +inf where no key is far.

    exp2(shift - inf) is 0: no gradient comes from such rows. All float32 (batch, 12, length), contiguous.
    """
    tiles = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    rows = program % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = program // tiles % 12
    batch = (program // tiles // 12).to(tl.int64)
    dims_v = tl.arange(0, 128)
    wide = rows[:, None].to(tl.int64)
    dout += batch * dout_batch + slot.to(tl.int64) * dout_head
    out += batch * out_batch + slot.to(tl.int64) * out_head
    dout += wide * dout_row + dims_v[None, :]
    out += wide * out_row + dims_v[None, :]
    douts = tl.load(dout, mask=rows[:, None] < length, other=0.0)
    outs = tl.load(out, mask=rows[:, None] < length, other=0.0)
    at = (batch * 12 + slot) * length + rows
    sums = tl.load(lse + at, mask=rows < length, other=0.0)
    there = sums != float("-inf")
    change = tl.load(dlse + at, mask=rows < length, other=0.0)
    change = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1) - change
    tl.store(delta + at, tl.where(there, change, 0.0), mask=rows < length)
    tl.store(bound + at, tl.where(there, sums * 1.4426950408889634, float("inf")), mask=rows < length)


@triton.jit(do_not_specialize=["length", "segments"])
def linear_dq(
    dout,
    q,
    k,
    v,
    dlse,
    delta,
    bound,
    dq,
    states,
    totals,
    sinks,
    windows,
    heads,
    wq,
    bq,
    cq,
    wk,
    bk,
    ck,
    u,
    u0,
    length,
    segments,
    segment,
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
    dq_batch,
    dq_head,
    dq_row,
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """dq of the rows beside one segment of `segment` keys, for one served head; other rows are 0 already."""
    # Which segment: (batch * segments + segment) * 12 + head; heads of a KV head share L2.
    program = tl.program_id(0)
    slot = program % 12
    part = program // 12 % segments
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // 12 // segments).to(tl.int64)
    head = tl.load(heads + slot)
    kv_head = head // 4
    sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
    # Keys from the sink up to `last` are far from some row.
    last = tl.where(sink < length - window, length - window, 0)
    first = sink // BLOCK * BLOCK
    begin = tl.maximum(part * segment, first)
    end = tl.minimum((part + 1) * segment, last)
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    q += batch * q_batch + head.to(tl.int64) * q_head
    dout += batch * dout_batch + slot.to(tl.int64) * dout_head
    dq += batch * dq_batch + head.to(tl.int64) * dq_head
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    if not RELOAD:
        q_map, q_rest = load_map(wq, slot, q.dtype.element_ty)
    q_linear = tl.load(u + slot * 128 + dims)
    q_constant = tl.load(u0 + slot)
    q_square = tl.load(cq + slot)
    if not RELOAD:
        k_map, k_rest = load_map(wk, slot, k.dtype.element_ty)
    k_square = tl.load(ck + slot)
    state = tl.zeros([64, 128], tl.float32)
    total = tl.zeros([64], tl.float32)
    if segments > 1:
        place = (batch * 12 + slot) * segments + part
        at = tl.arange(0, 64)
        in_state = at[:, None] * 128 + dims_v[None, :]
        state = tl.load(states + place * 8192 + in_state)
        total = tl.load(totals + place * 64 + at)
    for start in tl.range(begin, end, BLOCK, disable_licm=True):
        cols = start + local
        held = cols[:, None] < last
        # The rows whose windows end there, start + window and on.
        row = (cols + window)[:, None].to(tl.int64)
        queries = tl.load(q + row * q_row + dims[None, :], mask=held, other=0.0)
        if RELOAD:
            q_map, q_rest = load_map(wq, slot, queries.dtype)
        of_queries, shift = query_features(queries, q_map, q_rest, bq, slot, q_square, q_linear, q_constant)
        wide = cols[:, None].to(tl.int64)
        keys = tl.load(k + wide * k_row + dims[None, :], mask=held, other=0.0)
        if RELOAD:
            k_map, k_rest = load_map(wk, slot, keys.dtype)
        far = (cols >= sink) & (cols < last)
        of_keys = tl.where(far[:, None], key_features(keys, k_map, k_rest, bk, slot, k_square), 0.0)
        values = tl.load(v + wide * v_row + dims_v[None, :], mask=held, other=0.0)
        douts = tl.load(dout + row * dout_row + dims_v[None, :], mask=held, other=0.0)
        of_rows = (batch * 12 + slot) * length + window + cols
        bounds = tl.load(bound + of_rows, mask=cols < last, other=float("inf"))
        inverse = tl.exp2(shift - bounds)
        deltas = tl.load(delta + of_rows, mask=cols < last, other=0.0) * inverse
        gradient = douts.to(tl.float32) * inverse[:, None]
        dnear = tl.dot(gradient.to(values.dtype), tl.trans(values)) - deltas[:, None]
        dnear = tl.where(cols[:, None] >= cols[None, :], dnear, 0.0)
        change = tl.dot(dnear.to(values.dtype), of_keys.to(values.dtype))
        change = tl.dot(gradient.to(values.dtype), tl.trans(state.to(values.dtype)), change)
        change -= deltas[:, None] * total[None, :]
        state = tl.dot(tl.trans(of_keys.to(values.dtype)), values, state)
        total += tl.sum(of_keys, 0)

        dlses = tl.load(dlse + of_rows, mask=(cols < last) & (bounds != float("inf")), other=0.0)
        change = from_features(change, of_queries, queries, q_map, q_rest, bq, slot)
        change += dlses[:, None] * (q_linear[None, :] - 2.0 * q_square * queries.to(tl.float32))
        tl.store(dq + row * dq_row + dims[None, :], change.to(dq.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["length", "segments", "parts"])
def query_states(
    dout,
    q,
    v,
    delta,
    bound,
    states,
    totals,
    sinks,
    windows,
    heads,
    wq,
    bq,
    cq,
    u,
    u0,
    length,
    segments,
    parts,
    segment,
    dout_batch,
    dout_head,
    dout_row,
    q_batch,
    q_head,
    q_row,
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """The sums of f_i g_i^T and of f_i delta_i / sum_i over the rows beside each segment of keys but the first.

    g is dout over the row's sum of weights. states, totals: as key_states leaves them.
    """
    # Which segment: (batch * segments + segment) * 12 + head; heads of a KV head share L2.
    program = tl.program_id(0)
    slot = program % 12
    part = program // 12 % parts + 1
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // 12 // parts).to(tl.int64)
    head = tl.load(heads + slot)
    sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
    # Keys from the sink up to `last` are far from some row.
    last = tl.where(sink < length - window, length - window, 0)
    first = sink // BLOCK * BLOCK
    begin = tl.maximum(part * segment, first)
    end = tl.minimum((part + 1) * segment, last)
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    q += batch * q_batch + head.to(tl.int64) * q_head
    dout += batch * dout_batch + slot.to(tl.int64) * dout_head
    if not RELOAD:
        q_map, q_rest = load_map(wq, slot, q.dtype.element_ty)
    q_linear = tl.load(u + slot * 128 + dims)
    q_constant = tl.load(u0 + slot)
    q_square = tl.load(cq + slot)
    state = tl.zeros([64, 128], tl.float32)
    total = tl.zeros([64], tl.float32)
    for start in tl.range(begin, end, BLOCK, disable_licm=True):
        cols = start + local
        held = cols[:, None] < last
        # The rows whose windows end there, start + window and on.
        row = (cols + window)[:, None].to(tl.int64)
        queries = tl.load(q + row * q_row + dims[None, :], mask=held, other=0.0)
        if RELOAD:
            q_map, q_rest = load_map(wq, slot, queries.dtype)
        of_queries, shift = query_features(queries, q_map, q_rest, bq, slot, q_square, q_linear, q_constant)
        douts = tl.load(dout + row * dout_row + dims_v[None, :], mask=held, other=0.0)
        of_rows = (batch * 12 + slot) * length + window + cols
        bounds = tl.load(bound + of_rows, mask=cols < last, other=float("inf"))
        inverse = tl.exp2(shift - bounds)
        deltas = tl.load(delta + of_rows, mask=cols < last, other=0.0) * inverse
        gradient = douts.to(tl.float32) * inverse[:, None]
        state = tl.dot(tl.trans(of_queries.to(douts.dtype)), gradient.to(douts.dtype), state)
        total += tl.sum(of_queries * deltas[:, None], 0)
    place = (batch * 12 + slot) * segments + part
    at = tl.arange(0, 64)
    in_state = at[:, None] * 128 + dims_v[None, :]
    tl.store(states + place * 8192 + in_state, state)
    tl.store(totals + place * 64 + at, total)


@triton.jit(do_not_specialize=["length", "segments"])
def linear_dkv(
    dout,
    q,
    k,
    v,
    delta,
    bound,
    dk,
    dv,
    states,
    totals,
    sinks,
    windows,
    heads,
    groups,
    wq,
    bq,
    cq,
    wk,
    bk,
    ck,
    u,
    u0,
    length,
    segments,
    segment,
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
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """dk and dv of one segment of `segment` keys of one KV head: what each of its served heads adds to them.

    dk, dv: float32 (batch, length, 8, 128 | 128), contiguous, 0 before the launch.
    """
    # Which segment: (batch * segments + segment) * 8 KV heads + KV head.
    program = tl.program_id(0)
    kv_head = program % 8
    part = program // 8 % segments
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // 8 // segments).to(tl.int64)
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    dk += (batch * length * 8 + kv_head) * 128
    dv += (batch * length * 8 + kv_head) * 128
    q_start = q
    dout_start = dout
    for slot in range(tl.load(groups + kv_head), tl.load(groups + kv_head + 1)):
        head = tl.load(heads + slot)
        sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
        window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
        # Keys from the sink up to `last` are far from some row.
        last = tl.where(sink < length - window, length - window, 0)
        begin = tl.maximum(part * segment, sink // BLOCK * BLOCK)
        end = tl.minimum((part + 1) * segment, last)
        q = q_start + batch * q_batch + head.to(tl.int64) * q_head
        dout = dout_start + batch * dout_batch + tl.cast(slot, tl.int64) * dout_head
        if not RELOAD:
            q_map, q_rest = load_map(wq, slot, q.dtype.element_ty)
        q_linear = tl.load(u + slot * 128 + dims)
        q_constant = tl.load(u0 + slot)
        q_square = tl.load(cq + slot)
        if not RELOAD:
            k_map, k_rest = load_map(wk, slot, k.dtype.element_ty)
        k_square = tl.load(ck + slot)
        state = tl.zeros([64, 128], tl.float32)
        total = tl.zeros([64], tl.float32)
        if segments > 1:
            place = (batch * 12 + slot) * segments + part
            at = tl.arange(0, 64)
            in_state = at[:, None] * 128 + dims_v[None, :]
            state = tl.load(states + place * 8192 + in_state)
            total = tl.load(totals + place * 64 + at)
        blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
        for n in tl.range(0, blocks, disable_licm=True):
            cols = begin + (blocks - 1 - n) * BLOCK + local
            held = cols[:, None] < last
            # The rows whose windows end there, start + window and on.
            row = (cols + window)[:, None].to(tl.int64)
            queries = tl.load(q + row * q_row + dims[None, :], mask=held, other=0.0)
            if RELOAD:
                q_map, q_rest = load_map(wq, slot, queries.dtype)
            of_queries, shift = query_features(queries, q_map, q_rest, bq, slot, q_square, q_linear, q_constant)
            wide = cols[:, None].to(tl.int64)
            keys = tl.load(k + wide * k_row + dims[None, :], mask=held, other=0.0)
            if RELOAD:
                k_map, k_rest = load_map(wk, slot, keys.dtype)
            far = (cols >= sink) & (cols < last)
            of_keys = tl.where(far[:, None], key_features(keys, k_map, k_rest, bk, slot, k_square), 0.0)
            values = tl.load(v + wide * v_row + dims_v[None, :], mask=held, other=0.0)
            douts = tl.load(dout + row * dout_row + dims_v[None, :], mask=held, other=0.0)
            of_rows = (batch * 12 + slot) * length + window + cols
            bounds = tl.load(bound + of_rows, mask=cols < last, other=float("inf"))
            inverse = tl.exp2(shift - bounds)
            deltas = tl.load(delta + of_rows, mask=cols < last, other=0.0) * inverse
            gradient = douts.to(tl.float32) * inverse[:, None]
            dnear = tl.dot(gradient.to(values.dtype), tl.trans(values)) - deltas[:, None]
            dnear = tl.where(cols[:, None] >= cols[None, :], dnear, 0.0)
            near = tl.dot(of_queries.to(values.dtype), tl.trans(of_keys.to(values.dtype)))
            near = tl.where(cols[:, None] >= cols[None, :], near, 0.0)
            dk_rows = dk + wide * 1024
            dv_rows = dv + wide * 1024
            of_values = tl.load(dv_rows + dims_v[None, :], mask=held, other=0.0)
            of_values = tl.dot(of_keys.to(values.dtype), state.to(values.dtype), of_values)
            of_values = tl.dot(tl.trans(near.to(values.dtype)), gradient.to(values.dtype), of_values)
            change = tl.dot(values, tl.trans(state.to(values.dtype))) - total[None, :]
            change = tl.dot(tl.trans(dnear.to(values.dtype)), of_queries.to(values.dtype), change)
            change = tl.where(of_keys < 2.3538e17, change, 0.0)
            norms = tl.sum(change * of_keys, 1) * (2.0 * k_square)
            change = from_features(change, of_keys, keys, k_map, k_rest, bk, slot)
            change -= norms[:, None] * keys.to(tl.float32)
            change += tl.load(dk_rows + dims[None, :], mask=held, other=0.0)
            tl.store(dk_rows + dims[None, :], change, mask=held)
            tl.store(dv_rows + dims_v[None, :], of_values, mask=held)
            state = tl.dot(tl.trans(of_queries.to(douts.dtype)), gradient.to(douts.dtype), state)
            total += tl.sum(of_queries * deltas[:, None], 0)
        # The next head adds to what this one has stored, maybe from other threads.
        tl.debug_barrier()


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(linear_dq, triton.JITFunction)


def _check(q, k, v, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, 32, length, 128), (batch, 8, length, 128), (batch, 8, length, 128)
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")
    if pad is not None:
        raise ValueError("this kernel was emitted for unpadded inputs; pass no pad")


MAPS = ("wq", "bq", "cq", "wk", "bk", "ck", "u", "u0")


def _maps(maps, device):
    """The tensors of a FeatureMap by name, contiguous on `device`."""
    if (maps.kind, maps.heads, maps.rank) != ("exp", 12, 64):
        found = f"{maps.heads} maps {maps.kind}/{maps.rank}"
        raise ValueError(f"{found} are given; this kernel wants 12 maps exp/64")
    if maps.wq.dtype != torch.float32 or maps.wq.shape[2] != 128:
        raise ValueError(f"maps of {maps.wq.shape[2]} {maps.wq.dtype}; this kernel wants 128 float32")
    return {name: getattr(maps, name).to(device).contiguous() for name in MAPS}


def _steps(*tensors):
    return [step for t in tensors for step in t.stride()[:3]]


def _rows(*tensors):
    """Tensors whose last axis is contiguous."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _far(heads, sinks, windows, pad, length, device):
    """What every kernel is told of far keys, and the tables it is part of."""
    tables = far_tables(heads, sinks, windows, 32, 8, length, device)
    if len(tables.heads) != 12:
        raise ValueError(f"{len(tables.heads)} heads are served; this kernel wants 12")
    return (tables.sinks, tables.windows, tables.heads), tables


def _empty_states(batch, count, device):
    of = (batch, 12, count, 64)
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((*of, 128), of)]


def _add_up(states, count, reverse):
    programs = states[1].shape[0] * 12 * 9
    add_up[(programs,)](*states, count, REVERSE=reverse, BLOCK=1024, **FUSED)


def _sums(k, v, far, maps, length, cut, parts, launch):
    """The states and totals of the first `parts` of the segments that the keys are cut into."""
    count, size = cut
    states = _empty_states(k.shape[0], count, k.device)
    if parts:
        of_keys = [maps[name] for name in ("wk", "bk", "ck")]
        key_states[(k.shape[0] * 12 * parts,)](
            k, v, *states, *far, *of_keys, length, count, parts, size, *_steps(k, v), **launch["key_states"], **FUSED
        )
    return states


def _before(k, v, far, maps, length, cut, launch):
    """What lies before each segment."""
    states = _sums(k, v, far, maps, length, cut, cut[0] - 1, launch)
    if cut[0] > 1:
        _add_up(states, cut[0], False)
    return states


def _behind(dout, q, v, delta, bound, far, maps, length, cut, launch):
    """What the rows behind those of each segment amount to."""
    count, size = cut
    states = _empty_states(q.shape[0], count, q.device)
    if count > 1:
        of_queries = [maps[name] for name in ("wq", "bq", "cq", "u", "u0")]
        query_states[(q.shape[0] * 12 * (count - 1),)](
            *(dout, q, v, delta, bound, *states, *far[:3], *of_queries, length, count, count - 1, size),
            *_steps(dout, q),
            **launch["query_states"],
            **FUSED,
        )
        _add_up(states, count, True)
    return states


def backward(dout, dlse, q, k, v, out, lse, heads, sinks, windows, maps, pad=None):
    """Gradients at q (B, 32, N, 128), k (B, 8, N, 128) and v (B, 8, N, 128).

    Those of a prefill with the results out (B, 12, N, 128) and lse (B, 12, N) and the gradients dout
    and dlse at these; the rest as prefill has them. They are laid out as (B, N, heads, dim), and 0 for heads that are
    not served.
    """
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    if dout.shape != out.shape or out.shape != (batch, 12, length, 128) or lse.shape != out.shape[:3]:
        shapes = [tuple(x.shape) for x in (dout, out, lse)]
        raise ValueError(f"dout, out, lse have shapes {shapes}; this kernel serves 12 heads")
    far, tables = _far(heads, sinks, windows, pad, length, q.device)
    maps = _maps(maps, q.device)
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))
    dout, q, k, v, out = _rows(dout, q, k, v, out)
    dlse, lse = dlse.float().contiguous(), lse.contiguous()
    dq = torch.zeros((batch, length, 32, 128), dtype=q.dtype, device=q.device).transpose(1, 2)
    sizes = ((batch, length, 8, width) for width in (128, 128))
    dk, dv = (torch.zeros(size, dtype=torch.float32, device=q.device) for size in sizes)
    delta, bound = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        with torch.cuda.device_of(q):
            launch = launches(q.device)
            # All kernels cut the keys alike; a program of linear_dkv has all heads of a KV head.
            cut = segments(tables.keys, batch * 8, max(x["BLOCK"] for x in launch.values()), q.device)
            tiles = triton.cdiv(length, SUMMED)
            row_sums[(batch * 12 * tiles,)](
                dout, out, dlse, lse, delta, bound, length, *_steps(dout, out), BLOCK=SUMMED, **FUSED
            )
            states = _before(k, v, far, maps, length, cut, launch)
            linear_dq[(batch * 12 * cut[0],)](
                *(dout, q, k, v, dlse, delta, bound, dq, *states, *far, *maps.values(), length, *cut),
                *_steps(dout, q, k, v, dq),
                **launch["linear_dq"],
                **FUSED,
            )
            states = _behind(dout, q, v, delta, bound, far, maps, length, cut, launch)
            linear_dkv[(batch * 8 * cut[0],)](
                *(dout, q, k, v, delta, bound, dk, dv, *states, *far, tables.groups, *maps.values(), length, *cut),
                *_steps(dout, q, k, v),
                **launch["linear_dkv"],
                **FUSED,
            )
    return dq.to(dtype), dk.to(dtype).transpose(1, 2), dv.to(dtype).transpose(1, 2)


def aot_signatures(target="sm_90"):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    plain = dict.fromkeys(("length", "segments", "parts", "segment"), "i32")
    kinds = {
        **dict.fromkeys(("dout", "q", "k", "v", "out", "dq"), "*bf16"),
        **dict.fromkeys(("sinks", "windows", "heads", "groups", "slots"), "*i32"),
        "pad": "*u8",
        **dict.fromkeys(("BLOCK", "REVERSE", "RELOAD"), "constexpr"),
        **plain,
    }
    unaligned = ("length", "segments", "parts", "BLOCK", "REVERSE", "RELOAD")
    for kernel in (
        key_states,
        add_up,
        linear_dq,
        query_states,
        linear_dkv,
    ):
        config = LAUNCHES[target].get(kernel.__name__, {"REVERSE": False, "BLOCK": 1024})
        steps = ("_batch", "_head", "_row", "_slot")
        signature = {n: kinds.get(n, "i32" if n.endswith(steps) else "*fp32") for n in kernel.arg_names}
        aligned = [i for i, n in enumerate(signature) if n not in unaligned]
        yield {
            "kernel": kernel,
            "signature": signature,
            "constexprs": {n: x for n, x in config.items() if n in signature},
            "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
            "options": {**{n: x for n, x in config.items() if n.startswith("num_")}, **FUSED},
        }


if __name__ == "__main__":
    from attnopt.codegen.self_check_linear import check
    from attnopt.codegen.spec import LinearBackward

    check(LinearBackward("triton", "bfloat16", 32, 8, 128, 128, 12, "exp", 64, False), backward)
