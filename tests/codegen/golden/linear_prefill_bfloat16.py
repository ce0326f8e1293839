"""Linear prefill for triton: 32/8 heads, dim 128/128, bfloat16, 12 exp/64.
Emitted by attnopt; edits are overwritten.

Query i of a served head weighs by exp(shift_i) f(q_i) . f(k_j) all keys sink <= j <= i - window:
out is the mean of their values, and lse the logarithm of the sum of these weights.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.linear_tables import far_tables, segments

LAUNCHES = {
    "sm_90": {
        "key_states": {"BLOCK": 32, "num_warps": 4, "num_stages": 2, "RELOAD": False},
        "linear_prefill": {"BLOCK": 32, "num_warps": 4, "num_stages": 2, "RELOAD": False},
    },
    "sm_80": {
        "key_states": {"BLOCK": 32, "num_warps": 8, "num_stages": 2, "RELOAD": False},
        "linear_prefill": {"BLOCK": 32, "num_warps": 8, "num_stages": 2, "RELOAD": False},
    },
    "hip": {
        "key_states": {"BLOCK": 32, "num_warps": 4, "num_stages": 1, "RELOAD": True},
        "linear_prefill": {"BLOCK": 32, "num_warps": 4, "num_stages": 1, "RELOAD": True},
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


@triton.jit(do_not_specialize=["length", "segments"])
def linear_prefill(
    q,
    k,
    v,
    out,
    lse,
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
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """One segment of `segment` keys of one served head and the rows beside it, in blocks of BLOCK.

    lse: float32 (batch, 12, length), contiguous. RELOAD: maps are loaded for every block.
    """
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
    out += batch * out_batch + slot.to(tl.int64) * out_head
    lse += (batch * 12 + slot) * length

    # Rows before the first key's have none that is far; the programs of a head share them out.
    none = tl.where(first < last, first + window, length)
    for start in range(part * BLOCK, none, segments * BLOCK):
        rows = start + local
        nothing = tl.zeros([BLOCK, 128], tl.float32).to(out.dtype.element_ty)
        out_rows = out + rows[:, None].to(tl.int64) * out_row
        tl.store(out_rows + dims_v[None, :], nothing, mask=rows[:, None] < none)
        tl.store(lse + rows, tl.full([BLOCK], float("-inf"), tl.float32), mask=rows < none)

    q += batch * q_batch + head.to(tl.int64) * q_head
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
        weight = tl.sum(of_queries * total[None, :], 1)
        wide = cols[:, None].to(tl.int64)
        keys = tl.load(k + wide * k_row + dims[None, :], mask=held, other=0.0)
        if RELOAD:
            k_map, k_rest = load_map(wk, slot, keys.dtype)
        far = (cols >= sink) & (cols < last)
        of_keys = tl.where(far[:, None], key_features(keys, k_map, k_rest, bk, slot, k_square), 0.0)
        total += tl.sum(of_keys, 0)
        values = tl.load(v + wide * v_row + dims_v[None, :], mask=held, other=0.0)
        near = tl.dot(of_queries.to(values.dtype), tl.trans(of_keys.to(values.dtype)))
        near = tl.where(cols[:, None] >= cols[None, :], near, 0.0)
        weight += tl.sum(near, 1)
        acc = tl.dot(of_queries.to(values.dtype), state.to(values.dtype))
        acc = tl.dot(near.to(values.dtype), values, acc)
        state = tl.dot(tl.trans(of_keys.to(values.dtype)), values, state)

        # A row whose far keys are all padding is 0, and its logarithm -inf.
        acc = (acc / tl.where(weight > 0.0, weight, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row * out_row + dims_v[None, :], acc, mask=held)
        # From base 2 to the natural logarithm.
        sums = (shift + tl.log2(tl.where(weight > 0.0, weight, 1.0))) * 0.6931471805599453
        sums = tl.where(weight > 0.0, sums, float("-inf"))
        tl.store(lse + cols + window, sums, mask=cols < last)


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(linear_prefill, triton.JITFunction)


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


def prefill(q, k, v, heads, sinks, windows, maps, pad=None):
    """q (B, 32, N, 128), k (B, 8, N, 128), v (B, 8, N, 128)
    -> out (B, 12, N, 128), lse (B, 12, N).

    All bfloat16, but lse float32: the natural logarithm of a row's sum of weights, -inf where no key is far.
    heads, sinks, windows: int (12,), best on the CPU; maps: the FeatureMap of these heads; pad None.
    out is laid out as (B, N, 12, 128).
    """
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    far, tables = _far(heads, sinks, windows, pad, length, q.device)
    maps = _maps(maps, q.device)
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = (t.float() for t in (q, k, v))
    q, k, v = _rows(q, k, v)
    out = torch.empty((batch, length, 12, 128), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, 12, length), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out.to(dtype), lse
    with torch.cuda.device_of(q):
        launch = launches(q.device)
        cut = segments(tables.keys, batch * 12, _blocks(launch), q.device)
        states = _before(k, v, far, maps, length, cut, launch)
        linear_prefill[(batch * 12 * cut[0],)](
            *(q, k, v, out, lse, *states, *far, *maps.values(), length, *cut, *_steps(q, k, v, out)),
            **launch["linear_prefill"],
            **FUSED,
        )
    return out.to(dtype), lse


def state(k, v, heads, query_heads, sinks, windows, maps, pad=None):
    """What decoding goes on from: the sum of f_j (v_j, 1) over the far keys of the last row, with their features f_j.

    float32 (B, 12, 64, 128 + 1); the arguments are those of prefill, query_heads 32.
    """
    _check(k[:, :1].expand(-1, query_heads, -1, -1), k, v, pad)
    far, tables = _far(heads, sinks, windows, pad, k.shape[2], k.device)
    maps = _maps(maps, k.device)
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        k, v = (t.float() for t in (k, v))
    k, v = _rows(k, v)
    if not k.numel():
        return torch.zeros((k.shape[0], 12, 64, 128 + 1), dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        launch = launches(k.device)
        cut = segments(tables.keys, k.shape[0] * 12, _blocks(launch), k.device)
        states, totals = _sums(k, v, far, maps, k.shape[2], cut, cut[0], launch)
        return torch.cat((states.sum(2)[..., :128], totals.sum(2)[..., None]), -1)[..., :64, :]


def _blocks(launch):
    """Keys that segments are a multiple of."""
    return max(launch[name]["BLOCK"] for name in ("key_states", "linear_prefill"))


def aot_signatures(target="sm_90"):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    plain = dict.fromkeys(("length", "segments", "parts", "segment"), "i32")
    kinds = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        **dict.fromkeys(("sinks", "windows", "heads", "groups", "slots"), "*i32"),
        "pad": "*u8",
        **dict.fromkeys(("BLOCK", "REVERSE", "RELOAD"), "constexpr"),
        **plain,
    }
    unaligned = ("length", "segments", "parts", "BLOCK", "REVERSE", "RELOAD")
    for kernel in (
        key_states,
        add_up,
        linear_prefill,
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
    from attnopt.codegen.spec import LinearPrefill

    check(LinearPrefill("triton", "bfloat16", 32, 8, 128, 128, 12, "exp", 64, False), prefill, state)
