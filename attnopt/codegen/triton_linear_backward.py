"""The Triton target's gradients of linear attention to far keys, at q, k and v, without atomics.

    row_sums      of every row what all gradients need: delta = dout . out - dlse, and lse in base 2
    linear_dq     a segment of keys and the rows beside it, first to last, with the states of what lies before
    query_states  what the rows beside each segment of keys amount to
    linear_dkv    a segment of keys of one KV head, last to first, with the states of the rows behind, head by head

Nothing here has been timed on a GPU. Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import LinearBackward
from attnopt.codegen.triton_linear_backward_host import launcher
from attnopt.codegen.triton_linear_host import Launch, aot, header, strides
from attnopt.codegen.triton_linear_text import (
    LN_2,
    LOG2_E,
    check_linear,
    dot,
    first_states,
    held,
    key_block,
    key_pointers,
    load_key_map,
    load_query_map,
    loop,
    map_text,
    maps_of,
    narrow,
    operand,
    pad_pointer,
    padded_features,
    place_text,
    query_block,
    state_place,
    states_text,
    value_block,
)
from attnopt.codegen.triton_text import dim_mask, load_text, mask_argument, need_triton, padded_dim
from attnopt.registry import TARGETS

KERNELS = ("key_states", "linear_dq", "query_states", "linear_dkv")


def launches(spec: LinearBackward) -> dict[str, dict[str, Launch]]:
    """The shipped launches by target; tests compile them ahead of time and check what they spill."""
    wide, many = padded_dim(max(spec.head_dim, spec.head_dim_v)) > 128, padded_features(spec) > 64
    most = 16 if spec.dtype == "float32" or wide or many else 32
    launch: dict[str, Launch] = {"sm_90": (most, 8, 1, False), "sm_80": (most, 8, 1, many), "hip": (16, 4, 1, True)}
    return {target: dict.fromkeys(KERNELS, values) for target, values in launch.items()}


def _row_sums(spec: LinearBackward) -> str:
    mask = "rows[:, None] < length", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    return f'''

@triton.jit(do_not_specialize=["length"])
def row_sums(
    dout,
    out,
    dlse,
    lse,
    delta,
    bound,
    length,{strides("dout", "out")}
    BLOCK: tl.constexpr,
):
    """delta = dout . out - dlse and bound = lse in base 2 of BLOCK rows of one head; +inf where no key is far.

    exp2(shift - inf) is 0: no gradient comes from such rows. All float32 (batch, {spec.served}, length), contiguous.
    """
    tiles = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    rows = program % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = program // tiles % {spec.served}
    batch = (program // tiles // {spec.served}).to(tl.int64)
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    wide = rows[:, None].to(tl.int64)
    dout += batch * dout_batch + slot.to(tl.int64) * dout_head
    out += batch * out_batch + slot.to(tl.int64) * out_head
    dout += wide * dout_row + dims_v[None, :]
    out += wide * out_row + dims_v[None, :]
    douts = {load_text("dout", *mask)}
    outs = {load_text("out", *mask)}
    at = (batch * {spec.served} + slot) * length + rows
    sums = tl.load(lse + at, mask=rows < length, other=0.0)
    there = sums != float("-inf")
    change = tl.load(dlse + at, mask=rows < length, other=0.0)
    change = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1) - change
    tl.store(delta + at, tl.where(there, change, 0.0), mask=rows < length)
    tl.store(bound + at, tl.where(there, sums * {LOG2_E}, float("inf")), mask=rows < length)
'''


def _map_gradients(spec: LinearBackward) -> str:
    """`from_features`: the gradient at x from that at its features, by the map alone."""
    if spec.kind == "exp":
        return f'''

@triton.jit
def from_features(d, f, x, weight, rest, b, slot):
    """The gradient at x (rows, {padded_dim(spec.head_dim)}) where that at its features f is d, but for |x|^2."""
    change = {dot(spec, _as(spec, "(d * f)", "x"), f"tl.trans({_wide(spec, 'weight')})")}
    # The map is one of exponents of 2.
    return change * {LN_2}
'''
    left, right = (
        dot(spec, _as(spec, f"(d * {other} * root[None, :])", "x"), f"tl.trans({_as(spec, side, 'x')})")
        for side, other in (("left", "second"), ("right", "first"))
    )
    return f'''

@triton.jit
def from_features(d, f, x, weight, rest, b, slot):
    """The gradient at x (rows, {padded_dim(spec.head_dim)}) where that at its features f is d."""
    y = project(x, weight, rest, b, slot)
    left, right, one, other, root = places()
    first = factor(y, left, one, x.dtype)
    second = factor(y, right, other, x.dtype)
    change = {left}
    change += {right}
    return {dot(spec, _as(spec, "change", "x"), f"tl.trans({_wide(spec, 'weight')})")}
'''


def _as(spec: LinearBackward, name: str, like: str) -> str:
    return f"{name}.to({like}.dtype)" if spec.dtype == "bfloat16" else name


def _wide(spec: LinearBackward, name: str) -> str:
    return f"{name}.to(tl.float32)" if spec.dtype == "float16" else name


def _row_gradients(spec: LinearBackward) -> str:
    """Lines in the loop that load dout of the rows beside the keys and divide it by the rows' sums of weights."""
    douts = load_text("dout + row * dout_row + dims_v[None, :]", held(spec.head_dim_v, "dims_v"))
    return f"""        douts = {douts}
        of_rows = (batch * {spec.served} + slot) * length + window + cols
        bounds = tl.load(bound + of_rows, mask=cols < last, other=float("inf"))
        inverse = tl.exp2(shift - bounds)
        deltas = tl.load(delta + of_rows, mask=cols < last, other=0.0) * inverse
        gradient = douts.to(tl.float32) * inverse[:, None]"""


def _row_pointers() -> str:
    return """    q += batch * q_batch + head.to(tl.int64) * q_head
    dout += batch * dout_batch + slot.to(tl.int64) * dout_head"""


def _arguments(spec: LinearBackward, *names: str) -> str:
    return "".join(f"\n    {name}," for name in names)


def _tables(spec: LinearBackward) -> str:
    return f"\n    sinks,\n    windows,\n    heads,{pad_pointer(spec.padded)}"


def _numbers(*names: str) -> str:
    numbers = "\n    length,\n    segments,\n    segment,"
    return f"{numbers}{strides(*names)}\n    BLOCK: tl.constexpr,\n    RELOAD: tl.constexpr,"


def _near(spec: LinearBackward) -> str:
    """Lines that set `dnear`, the gradient at the products of a block's features with those of the rows beside it."""
    of_values = dot(spec, narrow(spec, "gradient"), f"tl.trans({operand(spec, 'values')})")
    return f"""        dnear = {of_values} - deltas[:, None]
        dnear = tl.where(cols[:, None] >= cols[None, :], dnear, 0.0)"""


def _dq(spec: LinearBackward) -> str:
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    mask = mask_argument(held(spec.head_dim, "dims"))
    square = " - 2.0 * q_square * queries.to(tl.float32)" if spec.kind == "exp" else ""
    return f'''

@triton.jit(do_not_specialize=["length", "segments"])
def linear_dq({_arguments(spec, "dout", "q", "k", "v", "dlse", "delta", "bound", "dq", "states", "totals")}{
        _tables(spec)
    }{_arguments(spec, *maps_of(spec))}{_numbers("dout", "q", "k", "v", "dq")}
):
    """dq of the rows beside one segment of `segment` keys, for one served head; other rows are 0 already."""
{place_text(spec, "segments")}
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
{_row_pointers()}
    dq += batch * dq_batch + head.to(tl.int64) * dq_head
{key_pointers(spec.padded)}
{load_query_map(spec)}
{load_key_map(spec)}
{first_states(spec)}
{loop(spec)}
{query_block(spec)}
{key_block(spec, spec.padded)}
{value_block(spec)}
{_row_gradients(spec)}
{_near(spec)}
        change = {dot(spec, narrow(spec, "dnear"), narrow(spec, "of_keys"))}
        change = {dot(spec, narrow(spec, "gradient"), f"tl.trans({narrow(spec, 'state')})", "change")}
        change -= deltas[:, None] * total[None, :]
        state = {dot(spec, f"tl.trans({narrow(spec, 'of_keys')})", operand(spec, "values"), "state")}
        total += tl.sum(of_keys, 0)

        dlses = tl.load(dlse + of_rows, mask=(cols < last) & (bounds != float("inf")), other=0.0)
        change = from_features(change, of_queries, queries, q_map, q_rest, bq, slot)
        change += dlses[:, None] * (q_linear[None, :]{square})
        tl.store(dq + row * dq_row + dims[None, :], change.to(dq.dtype.element_ty){mask})
'''


def _query_states(spec: LinearBackward) -> str:
    dim, dim_v, size = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v), padded_features(spec)
    return f'''

@triton.jit(do_not_specialize=["length", "segments", "parts"])
def query_states({_arguments(spec, "dout", "q", "v", "delta", "bound", "states", "totals")}
    sinks,
    windows,
    heads,{_arguments(spec, *maps_of(spec, "q"))}
    length,
    segments,
    parts,
    segment,{strides("dout", "q")}
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """The sums of f_i g_i^T and of f_i delta_i / sum_i over the rows beside each segment of keys but the first.

    g is dout over the row's sum of weights. states, totals: as key_states leaves them.
    """
{place_text(spec, "parts", False).replace("% parts", "% parts + 1")}
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
{_row_pointers()}
{load_query_map(spec)}
    state = tl.zeros([{size}, {dim_v}], tl.float32)
    total = tl.zeros([{size}], tl.float32)
{loop(spec)}
{query_block(spec)}
{_row_gradients(spec)}
        state = {_onto(spec)}
        total += tl.sum(of_queries * deltas[:, None], 0)
{state_place(spec)}
    tl.store(states + place * {size * dim_v} + in_state, state)
    tl.store(totals + place * {size} + at, total)
'''


def _onto(spec: LinearBackward) -> str:
    to = (lambda name: f"{name}.to(douts.dtype)") if spec.dtype == "bfloat16" else str
    return dot(spec, f"tl.trans({to('of_queries')})", to("gradient"), "state")


def _dkv(spec: LinearBackward) -> str:
    dim, dim_v, groups = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v), spec.kv_heads
    k_mask, v_mask = held(spec.head_dim, "dims"), held(spec.head_dim_v, "dims_v")
    # In a loop over the heads of a KV head all lines of a head stand four spaces further in.
    inner = "\n".join(
        (
            _of_head(spec),
            load_query_map(spec),
            load_key_map(spec),
            first_states(spec),
            "    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)",
            "    for n in tl.range(0, blocks, disable_licm=True):",
            "        cols = begin + (blocks - 1 - n) * BLOCK + local",
            "        held = cols[:, None] < last",
            query_block(spec),
            key_block(spec, spec.padded),
            value_block(spec),
            _row_gradients(spec),
            _near(spec),
            _gradients(
                spec, load_text("dk_rows + dims[None, :]", k_mask), load_text("dv_rows + dims_v[None, :]", v_mask)
            ),
            f"        tl.store(dk_rows + dims[None, :], change{mask_argument(k_mask)})",
            f"        tl.store(dv_rows + dims_v[None, :], of_values{mask_argument(v_mask)})",
            f"        state = {_onto(spec)}",
            "        total += tl.sum(of_queries * deltas[:, None], 0)",
            "    # The next head adds to what this one has stored, maybe from other threads.",
            "    tl.debug_barrier()",
        )
    )
    inner = "\n".join("    " + line if line else line for line in inner.split("\n"))
    pad = "\n    pad += batch * length" if spec.padded else ""
    return f'''

@triton.jit(do_not_specialize=["length", "segments"])
def linear_dkv({_arguments(spec, "dout", "q", "k", "v", "delta", "bound", "dk", "dv", "states", "totals")}{
        _tables(spec)
    }
    groups,{_arguments(spec, *maps_of(spec))}{_numbers("dout", "q", "k", "v")}
):
    """dk and dv of one segment of `segment` keys of one KV head: what each of its served heads adds to them.

    dk, dv: float32 (batch, length, {groups}, {spec.head_dim} | {spec.head_dim_v}), contiguous, 0 before the launch.
    """
    # Which segment: (batch * segments + segment) * {groups} KV heads + KV head.
    program = tl.program_id(0)
    kv_head = program % {groups}
    part = program // {groups} % segments
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // {groups} // segments).to(tl.int64)
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    dk += (batch * length * {groups} + kv_head) * {spec.head_dim}
    dv += (batch * length * {groups} + kv_head) * {spec.head_dim_v}{pad}
    q_start = q
    dout_start = dout
    for slot in range(tl.load(groups + kv_head), tl.load(groups + kv_head + 1)):
{inner}
'''


def _of_head(spec: LinearBackward) -> str:
    return """    head = tl.load(heads + slot)
    sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
    # Keys from the sink up to `last` are far from some row.
    last = tl.where(sink < length - window, length - window, 0)
    begin = tl.maximum(part * segment, sink // BLOCK * BLOCK)
    end = tl.minimum((part + 1) * segment, last)
    q = q_start + batch * q_batch + head.to(tl.int64) * q_head
    dout = dout_start + batch * dout_batch + tl.cast(slot, tl.int64) * dout_head"""


def _gradients(spec: LinearBackward, old_dk: str, old_dv: str) -> str:
    near = dot(spec, narrow(spec, "of_queries"), f"tl.trans({narrow(spec, 'of_keys')})")
    onto_values = dot(spec, f"tl.trans({narrow(spec, 'near')})", narrow(spec, "gradient"), "of_values")
    from_state = dot(spec, operand(spec, "values"), f"tl.trans({narrow(spec, 'state')})")
    from_near = dot(spec, f"tl.trans({narrow(spec, 'dnear')})", narrow(spec, "of_queries"), "change")
    if spec.kind == "exp":
        # Where the exponent was cut at 40 the feature does not change with the key.
        tail = """        change = tl.where(of_keys < 2.3538e17, change, 0.0)
        norms = tl.sum(change * of_keys, 1) * (2.0 * k_square)
        change = from_features(change, of_keys, keys, k_map, k_rest, bk, slot)
        change -= norms[:, None] * keys.to(tl.float32)"""
    else:
        tail = """        change = tl.where(far[:, None], change, 0.0)
        change = from_features(change, of_keys, keys, k_map, k_rest, bk, slot)"""
    return f"""        near = {near}
        near = tl.where(cols[:, None] >= cols[None, :], near, 0.0)
        dk_rows = dk + wide * {spec.kv_heads * spec.head_dim}
        dv_rows = dv + wide * {spec.kv_heads * spec.head_dim_v}
        of_values = {old_dv}
        of_values = {dot(spec, narrow(spec, "of_keys"), narrow(spec, "state"), "of_values")}
        of_values = {onto_values}
        change = {from_state} - total[None, :]
        change = {from_near}
{tail}
        change += {old_dk}"""


ABOUT = """Gradients where query i weighs by exp(shift_i) f(q_i) . f(k_j) all keys sink <= j <= i - window{real}.
With the sums of weights exp(lse_i) and delta_i = dout_i . out_i - dlse_i, the gradient at f(q_i) . f(k_j) is
(dout_i . v_j - delta_i) exp(shift_i - lse_i)."""
IMPORTS = """from attnopt.codegen.linear_tables import far_tables, segments

# Rows of a program of row_sums.
SUMMED = 64"""


def source(spec: LinearBackward) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check_linear(spec)
    about = ABOUT.format(real=" and pad[b, j]" if spec.padded else "")
    kernels = map_text(spec) + states_text(spec, spec.padded) + _map_gradients(spec) + _row_sums(spec)
    kernels += _dq(spec) + _query_states(spec) + _dkv(spec)
    told = aot(spec, "dout q k v out dq", "key_states add_up linear_dq query_states linear_dkv")
    last = footer(spec, "self_check_linear", "backward")
    return header(spec, about, IMPORTS, launches(spec)) + kernels + launcher(spec) + told + last


@TARGETS.register("triton linear_backward")
class Triton:
    @staticmethod
    def emit(spec: LinearBackward) -> str:
        need_triton()
        return source(spec)
