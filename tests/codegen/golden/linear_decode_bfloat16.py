"""Linear decode for triton: 32/1 heads, dim 128/128, bfloat16, 12 exp/64.
Emitted by attnopt; edits are overwritten.

A query weighs keys whose features are summed in `state` by exp(shift) f(q) . f(k_j): out is the mean of
their values under these weights, and lse the logarithm of their sum.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.emit import load
from attnopt.codegen.linear_tables import on_device
from attnopt.codegen.spec import LinearPrefill

LAUNCHES = {
    "sm_90": {
        "linear_decode": {"num_warps": 4, "num_stages": 1},
    },
    "sm_80": {
        "linear_decode": {"num_warps": 4, "num_stages": 1},
    },
    "hip": {
        "linear_decode": {"num_warps": 2, "num_stages": 1},
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
def linear_decode(
    q,
    k,
    v,
    out,
    lse,
    state,
    slots,
    heads,
    wq,
    bq,
    cq,
    wk,
    bk,
    ck,
    u,
    u0,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
):
    """One token of one served head of one sequence.

    state: float32 (batch, 12, 64, 129), contiguous, read and written: sums of f_j (v_j, 1).
    """
    program = tl.program_id(0)
    slot = program % 12
    # 64 bits: a cache has more elements than 32 bits count.
    batch = (program // 12).to(tl.int64)
    head = tl.load(heads + slot)
    leaving = tl.load(slots + program)
    row = tl.arange(0, 64)
    at = tl.arange(0, 64)
    dims = tl.arange(0, 128)
    dims_v = tl.arange(0, 128)

    # A slot that nobody has written may hold anything; it is not read.
    k += batch * k_batch + tl.maximum(leaving, 0).to(tl.int64) * k_slot
    v += batch * v_batch + tl.maximum(leaving, 0).to(tl.int64) * v_slot
    key = tl.load(k + dims, mask=tl.where(dims < 128, leaving, -1) >= 0, other=0.0).to(tl.float32)
    value = tl.load(v + dims_v, mask=tl.where(dims_v < 128, leaving, -1) >= 0, other=0.0).to(tl.float32)
    q += batch * q_batch + head.to(tl.int64) * q_head
    query = tl.load(q + dims).to(tl.float32)
    in_map = row[:, None] * 128 + dims[None, :]
    key_map = tl.load(wk + slot * 8192 + in_map)
    key_bias = tl.load(bk + slot * 64 + row)
    query_map = tl.load(wq + slot * 8192 + in_map)
    query_bias = tl.load(bq + slot * 64 + row)
    linear = tl.load(u + slot * 128 + dims)
    e = tl.sum(key_map * key[None, :], 1) + key_bias - tl.load(ck + slot) * tl.sum(key * key, 0)
    of_key = tl.exp2(tl.minimum(e, 40.0) * 1.4426950408889634)
    e = tl.sum(query_map * query[None, :], 1) + query_bias
    top = tl.max(e, 0)
    of_query = tl.exp2((e - top) * 1.4426950408889634)
    shift = top + tl.sum(query * (linear - tl.load(cq + slot) * query), 0) + tl.load(u0 + slot)
    of_key = tl.where(leaving >= 0, of_key, 0.0)

    state += program.to(tl.int64) * 8256
    cells = at[:, None] * 129 + dims_v[None, :]
    sums = tl.load(state + cells)
    sums += of_key[:, None] * value[None, :]
    total = tl.load(state + at * 129 + 128) + of_key
    tl.store(state + cells, sums)
    tl.store(state + at * 129 + 128, total)

    weight = tl.sum(of_query * total, 0)
    acc = tl.sum(of_query[:, None] * sums, 0) / tl.where(weight > 0.0, weight, 1.0)
    acc = tl.where(weight > 0.0, acc, 0.0)
    out += program.to(tl.int64) * 128
    tl.store(out + dims_v, acc.to(out.dtype.element_ty))
    # From base 2 to the natural logarithm.
    sums = shift + tl.log2(tl.where(weight > 0.0, weight, 1.0)) * 0.6931471805599453
    tl.store(lse + program, tl.where(weight > 0.0, sums, float("-inf")))


# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(linear_decode, triton.JITFunction)

MAPS = ("wq", "bq", "cq", "wk", "bk", "ck", "u", "u0")


def _maps(maps, device):
    """The tensors of a FeatureMap by name, contiguous on `device`."""
    if (maps.kind, maps.heads, maps.rank) != ("exp", 12, 64):
        found = f"{maps.heads} maps {maps.kind}/{maps.rank}"
        raise ValueError(f"{found} are given; this kernel wants 12 maps exp/64")
    if maps.wq.dtype != torch.float32 or maps.wq.shape[2] != 128:
        raise ValueError(f"maps of {maps.wq.shape[2]} {maps.wq.dtype}; this kernel wants 128 float32")
    return {name: getattr(maps, name).to(device).contiguous() for name in MAPS}


def _check(q, k, v, slots, state):
    batch, held = q.shape[0], k.shape[1]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(slots.shape), tuple(state.shape)
    states = (batch, 12, 64, 129)
    wanted = (batch, 32, 1, 128), (batch, held, 128), (batch, held, 128), (batch, 12), states
    if shapes != wanted:
        raise ValueError(f"q, k, v, slots, state have shapes {shapes}; this kernel wants {wanted}")
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; this kernel wants bfloat16")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError("a state is float32 and contiguous: it is written where it lies")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {q.device}; set ATTNOPT_TARGET to cpu or reference")


def decode(q, k, v, slots, heads, state, maps):
    """q (B, 32, 1, 128), k (B, C, 128), v (B, C, 128) -> out (B, 12, 1, 128),
    lse (B, 12, 1).

    All bfloat16, but lse float32: natural, -inf for an empty state. heads: int (12,), the served ones; maps:
    their FeatureMap. slots int32 (B, 12): where the key and value lie that leave the window of each, negative for
    none; they are added to state, float32 (B, 12, 64, 128 + 1), before it is read.
    """
    _check(q, k, v, slots, state)
    maps, batch, dtype = _maps(maps, q.device), q.shape[0], q.dtype
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = (t.float() for t in (q, k, v))
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((batch, 12, 1, 128), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, 12, 1), dtype=torch.float32, device=q.device)
    if batch:
        with torch.cuda.device_of(q):
            linear_decode[(batch * 12,)](
                *(q, k, v, out, lse, state, slots.to(torch.int32).contiguous(), on_device(heads, q.device)),
                *(*maps.values(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
                **launches(q.device)["linear_decode"],
                **FUSED,
            )
    return out.to(dtype), lse


def state(k, v, heads, query_heads, sinks, windows, maps, pad=None):
    """What decoding goes on from after a prompt: the state of its last row, (B, 12, 64, 128 + 1).

    k (B, G, N, 128), v (B, G, N, 128); sinks, windows int (12,); pad bool (B, N) or None.
    """
    sizes = query_heads, k.shape[1], 128, 128, 12, "exp", 64
    prefill = load(LinearPrefill("triton", "bfloat16", *sizes, pad is not None))
    return prefill.state(k, v, heads, query_heads, sinks, windows, maps, pad)


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
    for kernel in (linear_decode,):
        config = LAUNCHES[target].get(kernel.__name__, {})
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
    from attnopt.codegen.spec import LinearDecode

    check(LinearDecode("triton", "bfloat16", 32, 1, 128, 128, 12, "exp", 64), decode, state)
