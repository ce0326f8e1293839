"""The Triton target's linear attention to far keys: one pass over q, k and v, features made in the kernel.

    key_states      what the keys of each segment but the last amount to, where there are several
    add_up          their sums, so that every segment knows what lies before it
    linear_prefill  a segment of keys and the rows beside it, block by block, its state in registers

Heads times batch that keep the device busy by themselves are one segment each, and the first two are left out: chunked
linear attention as in Lightning Attention-2 (arXiv:2401.04658), fused. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import LinearPrefill
from attnopt.codegen.triton_linear_host import Launch, aot, checks, header, states_launcher, strides, upcast
from attnopt.codegen.triton_linear_text import (
    LN_2,
    check_linear,
    dot,
    features,
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
    states_text,
    value_block,
)
from attnopt.codegen.triton_text import dim_mask, mask_argument, need_triton, padded_dim
from attnopt.registry import TARGETS


def launches(spec: LinearPrefill) -> dict[str, dict[str, Launch]]:
    """The shipped launches by target; tests compile them ahead of time and check what they spill."""
    names = ("key_states", "linear_prefill")
    wide, many = padded_dim(max(spec.head_dim, spec.head_dim_v)) > 128, padded_features(spec) > 64
    launch: dict[str, Launch]
    if spec.dtype == "float32" or wide:
        # Off the tensor cores, which would round to tf32, float32 spills 1.7 kB at D = 128.
        launch = {"sm_90": (16, 8, 1, False), "sm_80": (16, 8, 1, False), "hip": (16, 8, 1, True)}
    elif many or spec.dtype == "float16":
        older: Launch = (16, 8, 1, True) if many else (32, 8, 1, False)
        launch = {"sm_90": (32, 8, 1, False), "sm_80": older, "hip": (16, 4, 1, True)}
    else:
        # Two programs of four warps share an SM of sm_90.
        launch = {"sm_90": (32, 4, 2, False), "sm_80": (32, 8, 2, False), "hip": (32, 4, 1, True)}
    found = {target: dict.fromkeys(names, values) for target, values in launch.items()}
    if many and not wide and spec.dtype == "bfloat16":
        # It has one map to keep, which fits.
        found["sm_80"]["key_states"] = (32, 8, 1, False)
    return found


def _kernel(spec: LinearPrefill) -> str:
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    pointers = "".join(f"\n    {name}," for name in maps_of(spec))
    steps = strides("q", "k", "v", "out")
    no_mask = mask_argument("rows[:, None] < none", dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    out_mask = mask_argument(held(spec.head_dim_v, "dims_v"))
    near = dot(spec, narrow(spec, "of_queries"), f"tl.trans({narrow(spec, 'of_keys')})")
    far = dot(spec, narrow(spec, "of_queries"), narrow(spec, "state"))
    update = dot(spec, f"tl.trans({narrow(spec, 'of_keys')})", operand(spec, "values"), "state")
    return f'''

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
    heads,{pad_pointer(spec.padded)}{pointers}
    length,
    segments,
    segment,{steps}
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """One segment of `segment` keys of one served head and the rows beside it, in blocks of BLOCK.

    lse: float32 (batch, {spec.served}, length), contiguous. RELOAD: maps are loaded for every block.
    """
{place_text(spec, "segments")}
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
    out += batch * out_batch + slot.to(tl.int64) * out_head
    lse += (batch * {spec.served} + slot) * length

    # Rows before the first key's have none that is far; the programs of a head share them out.
    none = tl.where(first < last, first + window, length)
    for start in range(part * BLOCK, none, segments * BLOCK):
        rows = start + local
        nothing = tl.zeros([BLOCK, {dim_v}], tl.float32).to(out.dtype.element_ty)
        out_rows = out + rows[:, None].to(tl.int64) * out_row
        tl.store(out_rows + dims_v[None, :], nothing{no_mask})
        tl.store(lse + rows, tl.full([BLOCK], float("-inf"), tl.float32), mask=rows < none)

    q += batch * q_batch + head.to(tl.int64) * q_head
{key_pointers(spec.padded)}
{load_query_map(spec)}
{load_key_map(spec)}
{first_states(spec)}
{loop(spec)}
{query_block(spec)}
        weight = tl.sum(of_queries * total[None, :], 1)
{key_block(spec, spec.padded)}
        total += tl.sum(of_keys, 0)
{value_block(spec)}
        near = {near}
        near = tl.where(cols[:, None] >= cols[None, :], near, 0.0)
        weight += tl.sum(near, 1)
        acc = {far}
        acc = {dot(spec, narrow(spec, "near"), operand(spec, "values"), "acc")}
        state = {update}

        # A row whose far keys are all padding is 0, and its logarithm -inf.
        acc = (acc / tl.where(weight > 0.0, weight, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row * out_row + dims_v[None, :], acc{out_mask})
        # From base 2 to the natural logarithm.
        sums = (shift + tl.log2(tl.where(weight > 0.0, weight, 1.0))) * {LN_2}
        sums = tl.where(weight > 0.0, sums, float("-inf"))
        tl.store(lse + cols + window, sums, mask=cols < last)
'''


def _launcher(spec: LinearPrefill) -> str:
    heads, groups, served, dim, dim_v = spec.heads, spec.kv_heads, spec.served, spec.head_dim, spec.head_dim_v
    width = features(spec)
    pad_doc = "bool (B, N)" if spec.padded else "None"
    return f'''{checks(spec, "linear_prefill")}{states_launcher(spec)}

def prefill(q, k, v, heads, sinks, windows, maps, pad=None):
    """q (B, {heads}, N, {dim}), k (B, {groups}, N, {dim}), v (B, {groups}, N, {dim_v})
    -> out (B, {served}, N, {dim_v}), lse (B, {served}, N).

    All {spec.dtype}, but lse float32: the natural logarithm of a row's sum of weights, -inf where no key is far.
    heads, sinks, windows: int ({served},), best on the CPU; maps: the FeatureMap of these heads; pad {pad_doc}.
    out is laid out as (B, N, {served}, {dim_v}).
    """
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype
    far, tables = _far(heads, sinks, windows, pad, length, q.device)
    maps = _maps(maps, q.device){upcast(spec, "q, k, v")}
    q, k, v = _rows(q, k, v)
    out = torch.empty((batch, length, {served}, {dim_v}), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, {served}, length), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out.to(dtype), lse
    with torch.cuda.device_of(q):
        launch = launches(q.device)
        cut = segments(tables.keys, batch * {served}, _blocks(launch), q.device)
        states = _before(k, v, far, maps, length, cut, launch)
        linear_prefill[(batch * {served} * cut[0],)](
            *(q, k, v, out, lse, *states, *far, *maps.values(), length, *cut, *_steps(q, k, v, out)),
            **launch["linear_prefill"],
            **FUSED,
        )
    return out.to(dtype), lse


def state(k, v, heads, query_heads, sinks, windows, maps, pad=None):
    """What decoding goes on from: the sum of f_j (v_j, 1) over the far keys of the last row, with their features f_j.

    float32 (B, {served}, {width}, {dim_v} + 1); the arguments are those of prefill, query_heads {heads}.
    """
    _check(k[:, :1].expand(-1, query_heads, -1, -1), k, v, pad)
    far, tables = _far(heads, sinks, windows, pad, k.shape[2], k.device)
    maps = _maps(maps, k.device){upcast(spec, "k, v")}
    k, v = _rows(k, v)
    if not k.numel():
        return torch.zeros((k.shape[0], {served}, {width}, {dim_v} + 1), dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        launch = launches(k.device)
        cut = segments(tables.keys, k.shape[0] * {served}, _blocks(launch), k.device)
        states, totals = _sums(k, v, far, maps, k.shape[2], cut, cut[0], launch)
        return torch.cat((states.sum(2)[..., :{dim_v}], totals.sum(2)[..., None]), -1)[..., :{width}, :]


def _blocks(launch):
    """Keys that segments are a multiple of."""
    return max(launch[name]["BLOCK"] for name in ("key_states", "linear_prefill"))
'''


ABOUT = """Query i of a served head weighs by exp(shift_i) f(q_i) . f(k_j) all keys sink <= j <= i - window{real}:
out is the mean of their values, and lse the logarithm of the sum of these weights."""
IMPORTS = "from attnopt.codegen.linear_tables import far_tables, segments\n"


def source(spec: LinearPrefill) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check_linear(spec)
    about = ABOUT.format(real=" with pad[b, j]" if spec.padded else "")
    kernels = map_text(spec) + states_text(spec, spec.padded) + _kernel(spec)
    told = aot(spec, "q k v out", "key_states add_up linear_prefill")
    last = footer(spec, "self_check_linear", "prefill, state")
    return header(spec, about, IMPORTS, launches(spec)) + kernels + _launcher(spec) + told + last


@TARGETS.register("triton linear_prefill")
class Triton:
    @staticmethod
    def emit(spec: LinearPrefill) -> str:
        need_triton()
        return source(spec)
