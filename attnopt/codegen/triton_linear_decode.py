"""The Triton target's step of linear attention: one launch adds what leaves a window to the state and reads it.

A program has one served head of one sequence: its state, and the maps, which sequences share, are read once. All of it
is float32 and none of it a product of tiles. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import LinearDecode
from attnopt.codegen.triton_linear_host import Launch, aot, header, maps_text, upcast
from attnopt.codegen.triton_linear_text import LN_2, LOG2_E, check_linear, features, maps_of, padded_features
from attnopt.codegen.triton_text import dim_mask, load_text, mask_argument, need_triton, padded_dim
from attnopt.registry import TARGETS


def launches(spec: LinearDecode) -> dict[str, dict[str, Launch]]:
    """By target the one launch; a thread has 64 numbers of a state, and as many of a map, at a time."""
    tile = padded_features(spec) * padded_dim(max(spec.head_dim, spec.head_dim_v))
    warps = min(16, max(1, tile // (32 * 64)))
    # A wavefront of AMD is 64 threads.
    launch: dict[str, Launch] = {"sm_90": (1, warps, 1, False), "sm_80": (1, warps, 1, False)}
    launch["hip"] = (1, max(1, warps // 2), 1, False)
    return {target: {"linear_decode": values} for target, values in launch.items()}


def _map(spec: LinearDecode, side: str, x: str) -> str:
    rank, tile, dim = spec.rank, padded_dim(spec.rank), spec.head_dim
    where = "" if rank == tile else f"row < {rank}"
    weight = load_text(f"w{side} + slot * {rank * dim} + in_map", "inside" if rank != tile or dim_mask(dim, "") else "")
    empty = 'float("-inf")' if spec.kind == "exp" else "0.0"
    bias = f"tl.load(b{side} + slot * {rank} + row{f', mask={where}, other={empty}' if where else ''})"
    return f"    {x}_map = {weight}\n    {x}_bias = {bias}"


def _made(spec: LinearDecode) -> str:
    """Lines that make `of_key` and `of_query` (F,), and `shift` in base 2."""
    if spec.kind == "exp":
        return f"""    e = tl.sum(key_map * key[None, :], 1) + key_bias - tl.load(ck + slot) * tl.sum(key * key, 0)
    of_key = tl.exp2(tl.minimum(e, 40.0) * {LOG2_E})
    e = tl.sum(query_map * query[None, :], 1) + query_bias
    top = tl.max(e, 0)
    of_query = tl.exp2((e - top) * {LOG2_E})
    shift = top + tl.sum(query * (linear - tl.load(cq + slot) * query), 0) + tl.load(u0 + slot)"""
    return """    y = tl.sum(key_map * key[None, :], 1) + key_bias
    of_key = second_order(y)
    y = tl.sum(query_map * query[None, :], 1) + query_bias
    of_query = second_order(y)
    shift = tl.sum(query * linear, 0) + tl.load(u0 + slot)"""


def _second_order(spec: LinearDecode) -> str:
    if spec.kind == "exp":
        return ""
    rank, tile, size = spec.rank, padded_dim(spec.rank), padded_features(spec)
    return f'''

@triton.jit
def second_order(y):
    """f ({size},): 1, y and all y_a y_b / sqrt 2 of y ({tile},); two of them make 1 + s + s^2 / 2 of s = y . y'."""
    row = tl.arange(0, {tile})[:, None]
    at = tl.arange(0, {size})
    pair = at - {1 + rank}
    is_pair = (pair >= 0) & (pair < {rank * rank})
    of_left = tl.where(is_pair, pair // {rank}, tl.where((at >= 1) & (at <= {rank}), at - 1, -1))
    of_right = tl.where(is_pair, pair % {rank}, -1)
    left = tl.sum(tl.where(row == of_left[None, :], y[:, None], 0.0), 0) + tl.where(at == 0, 1.0, 0.0)
    right = tl.sum(tl.where(row == of_right[None, :], y[:, None], 0.0), 0) + tl.where(is_pair, 0.0, 1.0)
    return left * right * tl.where(is_pair, {2**-0.5}, 1.0)
'''


def _kernel(spec: LinearDecode) -> str:
    dim, dim_v, size = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v), padded_features(spec)
    wide, width = spec.head_dim_v + 1, features(spec)
    pointers = "".join(f"\n    {name}," for name in maps_of(spec))
    in_dims, in_dims_v = (dim_mask(d, name) for d, name in ((spec.head_dim, "dims"), (spec.head_dim_v, "dims_v")))
    conditions = (
        "" if spec.rank == padded_dim(spec.rank) else f"row[:, None] < {spec.rank}",
        dim_mask(spec.head_dim, "dims[None, :]"),
    )
    inside = mask_argument(*conditions).replace(", mask=", "\n    inside = ")
    there = "" if width == size else f"at < {width}"
    there_rows = "" if width == size else f"at[:, None] < {width}"
    state_mask = there_rows, dim_mask(spec.head_dim_v, "dims_v[None, :]")
    return f'''{_second_order(spec)}

@triton.jit
def linear_decode(
    q,
    k,
    v,
    out,
    lse,
    state,
    slots,
    heads,{pointers}
    q_batch,
    q_head,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
):
    """One token of one served head of one sequence.

    state: float32 (batch, {spec.served}, {width}, {wide}), contiguous, read and written: sums of f_j (v_j, 1).
    """
    program = tl.program_id(0)
    slot = program % {spec.served}
    # 64 bits: a cache has more elements than 32 bits count.
    batch = (program // {spec.served}).to(tl.int64)
    head = tl.load(heads + slot)
    leaving = tl.load(slots + program)
    row = tl.arange(0, {padded_dim(spec.rank)})
    at = tl.arange(0, {size})
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})

    # A slot that nobody has written may hold anything; it is not read.
    k += batch * k_batch + tl.maximum(leaving, 0).to(tl.int64) * k_slot
    v += batch * v_batch + tl.maximum(leaving, 0).to(tl.int64) * v_slot
    key = {load_text("k + dims", f"tl.where(dims < {spec.head_dim}, leaving, -1) >= 0")}.to(tl.float32)
    value = {load_text("v + dims_v", f"tl.where(dims_v < {spec.head_dim_v}, leaving, -1) >= 0")}.to(tl.float32)
    q += batch * q_batch + head.to(tl.int64) * q_head
    query = {load_text("q + dims", in_dims)}.to(tl.float32)
    in_map = row[:, None] * {spec.head_dim} + dims[None, :]{inside}
{_map(spec, "k", "key")}
{_map(spec, "q", "query")}
    linear = {load_text(f"u + slot * {spec.head_dim} + dims", in_dims)}
{_made(spec)}
    of_key = tl.where(leaving >= 0, of_key, 0.0)

    state += program.to(tl.int64) * {width * wide}
    cells = at[:, None] * {wide} + dims_v[None, :]
    sums = {load_text("state + cells", *state_mask)}
    sums += of_key[:, None] * value[None, :]
    total = {load_text(f"state + at * {wide} + {spec.head_dim_v}", there)} + of_key
    tl.store(state + cells, sums{mask_argument(*state_mask)})
    tl.store(state + at * {wide} + {spec.head_dim_v}, total{mask_argument(there)})

    weight = tl.sum(of_query * total, 0)
    acc = tl.sum(of_query[:, None] * sums, 0) / tl.where(weight > 0.0, weight, 1.0)
    acc = tl.where(weight > 0.0, acc, 0.0)
    out += program.to(tl.int64) * {spec.head_dim_v}
    tl.store(out + dims_v, acc.to(out.dtype.element_ty){mask_argument(in_dims_v)})
    # From base 2 to the natural logarithm.
    sums = shift + tl.log2(tl.where(weight > 0.0, weight, 1.0)) * {LN_2}
    tl.store(lse + program, tl.where(weight > 0.0, sums, float("-inf")))
'''


def _launcher(spec: LinearDecode) -> str:
    heads, served, dim, dim_v, width = spec.heads, spec.served, spec.head_dim, spec.head_dim_v, features(spec)
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(linear_decode, triton.JITFunction){maps_text(spec)}

def _check(q, k, v, slots, state):
    batch, held = q.shape[0], k.shape[1]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(slots.shape), tuple(state.shape)
    states = (batch, {served}, {width}, {dim_v + 1})
    wanted = (batch, {heads}, 1, {dim}), (batch, held, {dim}), (batch, held, {dim_v}), (batch, {served}), states
    if shapes != wanted:
        raise ValueError(f"q, k, v, slots, state have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError("a state is float32 and contiguous: it is written where it lies")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")


def decode(q, k, v, slots, heads, state, maps):
    """q (B, {heads}, 1, {dim}), k (B, C, {dim}), v (B, C, {dim_v}) -> out (B, {served}, 1, {dim_v}),
    lse (B, {served}, 1).

    All {spec.dtype}, but lse float32: natural, -inf for an empty state. heads: int ({served},), the served ones; maps:
    their FeatureMap. slots int32 (B, {served}): where the key and value lie that leave the window of each, negative for
    none; they are added to state, float32 (B, {served}, {width}, {dim_v} + 1), before it is read.
    """
    _check(q, k, v, slots, state)
    maps, batch, dtype = _maps(maps, q.device), q.shape[0], q.dtype{upcast(spec, "q, k, v")}
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((batch, {served}, 1, {dim_v}), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, {served}, 1), dtype=torch.float32, device=q.device)
    if batch:
        with torch.cuda.device_of(q):
            linear_decode[(batch * {served},)](
                *(q, k, v, out, lse, state, slots.to(torch.int32).contiguous(), on_device(heads, q.device)),
                *(*maps.values(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
                **launches(q.device)["linear_decode"],
                **FUSED,
            )
    return out.to(dtype), lse


def state(k, v, heads, query_heads, sinks, windows, maps, pad=None):
    """What decoding goes on from after a prompt: the state of its last row, (B, {served}, {width}, {dim_v} + 1).

    k (B, G, N, {dim}), v (B, G, N, {dim_v}); sinks, windows int ({served},); pad bool (B, N) or None.
    """
    sizes = query_heads, k.shape[1], {dim}, {dim_v}, {served}, "{spec.kind}", {spec.rank}
    prefill = load(LinearPrefill("triton", "{spec.dtype}", *sizes, pad is not None))
    return prefill.state(k, v, heads, query_heads, sinks, windows, maps, pad)
'''


ABOUT = """A query weighs keys whose features are summed in `state` by exp(shift) f(q) . f(k_j): out is the mean of
their values under these weights, and lse the logarithm of their sum."""
IMPORTS = """from attnopt.codegen.emit import load
from attnopt.codegen.linear_tables import on_device
from attnopt.codegen.spec import LinearPrefill
"""


def source(spec: LinearDecode) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check_linear(spec)
    told = aot(spec, "q k v out", "linear_decode")
    last = footer(spec, "self_check_linear", "decode, state")
    return header(spec, ABOUT, IMPORTS, launches(spec)) + _kernel(spec) + _launcher(spec) + told + last


@TARGETS.register("triton linear_decode")
class Triton:
    @staticmethod
    def emit(spec: LinearDecode) -> str:
        need_triton()
        return source(spec)
