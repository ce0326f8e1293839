"""The host's side of an emitted Triton decoding: what is launched, how, and what a compiler is told of it."""

from __future__ import annotations

from attnopt.codegen.decode_list import BLOCK
from attnopt.codegen.spec import KernelSpec, SpanDecode
from attnopt.codegen.triton_text import TRITON_DTYPES, padded_dim

# Partial results that `merge` reads at a time.
BLOCK_P = 16


def rows_of(spec: SpanDecode) -> int:
    return spec.share * spec.tokens


def launch(spec: KernelSpec) -> tuple[int, int, int]:
    """(slots per block, warps, pipeline stages); tests compile them ahead of time and check what they spill.

    float32 stays off the tensor cores, which would round to tf32, and so wants small blocks and many warps: at D=128
    four warps spill 508 bytes with blocks of 32, and 60 with 16 in triton 3.6.
    """
    dim = padded_dim(max(spec.head_dim, spec.head_dim_v))
    if spec.dtype == "float32":
        return BLOCK // 4, 8, 2
    return (BLOCK, 4, 3) if dim <= 128 else (BLOCK // 2, 4, 3)


def launcher(spec: SpanDecode) -> str:
    heads, groups, tokens, dim, dim_v = spec.heads, spec.kv_heads, spec.tokens, spec.head_dim, spec.head_dim_v
    more = ", sinks, windows, positions, at" if spec.positioned else ""
    upcast = (
        """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()"""
        if spec.dtype == "bfloat16"
        else ""
    )
    tables = f"(starts, filled{more})"
    spans_doc = (
        f"""
    sinks, windows int32 ({heads},); positions int32 (B, C) or (C,); at int32 (B,), the position of the first token."""
        if spec.positioned
        else ""
    )
    position_lines = (
        """
    positions = positions.expand(batch, -1)
    spans = (sinks, windows, positions, at)"""
        if spec.positioned
        else ""
    )
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_decode, triton.JITFunction)


def _check(q, k, v, tables):
    batch, slots = q.shape[0], k.shape[1]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(tables[0].shape), tuple(tables[1].shape)
    caches = (batch, slots, {dim}), (batch, slots, {dim_v})
    wanted = (batch, {heads}, {tokens}, {dim}), *caches, ({groups + 1},), (batch, {groups})
    if shapes != wanted:
        raise ValueError(f"q, k, v, starts, filled have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    if any(table.dtype != torch.int32 or table.stride(-1) != 1 for table in tables):
        raise ValueError("the tables of a cache are int32 and contiguous")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")


def decode(q, k, v, starts, filled, scale{more}):
    """q (B, {heads}, {tokens}, {dim}), k (B, C, {dim}), v (B, C, {dim_v}) -> (B, {heads}, {tokens}, {dim_v}), all {
        spec.dtype
    }.

    starts int32 ({groups + 1},), filled int32 (B, {groups}).{spans_doc}
    """
    _check(q, k, v, {tables})
    batch, dtype = q.shape[0], q.dtype{upcast}
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    q = q if q.stride(-1) == 1 else q.contiguous()
    filled = filled.contiguous(){position_lines}
    out = torch.empty((batch, {heads}, {tokens}, {dim_v}), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out.to(dtype)
    with torch.cuda.device_of(q):
        work = decode_list(starts, batch)
        if work.slots != k.shape[1]:
            raise ValueError(f"starts ends at {{work.slots}}, and the cache has {{k.shape[1]}} slots")
        partial = torch.empty((batch, work.partials, ROWS, {dim_v}), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((batch, work.partials, ROWS), dtype=torch.float32, device=q.device)
        span_decode[(work.items.numel() * batch,)](
            q,
            k,
            v,
            out,
            partial,
            partial_lse,
            starts,
            filled,{
        """
            *spans,"""
        if spec.positioned
        else ""
    }
            work.items,
            work.parts,
            batch,
            work.chunk,
            work.partials,
            scale * 1.4426950408889634,
            *q.stride()[:3],
            *k.stride()[:2],
            *v.stride()[:2],{
        """
            positions.stride(0),"""
        if spec.positioned
        else ""
    }
            **LAUNCH,
            enable_fp_fusion=True,
        )
        if work.partials:
            merge[(work.split.numel() * ROWS * batch,)](
                out,
                partial,
                partial_lse,
                starts,
                filled,
                work.split,
                work.parts,
                batch,
                work.chunk,
                work.partials,
                BLOCK_P={BLOCK_P},
                num_warps={merge_warps(spec)},
            )
    return out.to(dtype)
'''


def merge_warps(spec: KernelSpec) -> int:
    """Warps of `merge`: a tile of BLOCK_P x dim float32 is 16 registers a thread or fewer."""
    return max(1, padded_dim(spec.head_dim_v) * BLOCK_P // (32 * 16))


def aot(spec: SpanDecode) -> str:
    element = TRITON_DTYPES[spec.dtype]
    spans = '"sinks", "windows", "positions", "at", ' if spec.positioned else ""
    stride = ', "positions_batch"' if spec.positioned else ""
    return f'''

def aot_signatures():
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    tables = dict.fromkeys(("starts", "filled", {spans}"items", "parts"), "*i32")
    strides = ("q_batch", "q_head", "q_token", "k_batch", "k_slot", "v_batch", "v_slot"{stride})
    signature = {{
        **dict.fromkeys(("q", "k", "v", "out"), "*{element}"),
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **tables,
        **dict.fromkeys(("batch", "chunk", "partials"), "i32"),
        "scale_log2": "fp32",
        **dict.fromkeys(strides, "i32"),
        "BLOCK_N": "constexpr",
    }}
    unaligned = ("batch", "partials", "scale_log2", "BLOCK_N", "BLOCK_P")
    yield _aot(span_decode, signature, unaligned, LAUNCH)
    signature = {{
        "out": "*{element}",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("starts", "filled", "split", "parts"), "*i32"),
        **dict.fromkeys(("batch", "chunk", "partials"), "i32"),
        "BLOCK_P": "constexpr",
    }}
    yield _aot(merge, signature, unaligned, {{"BLOCK_P": {BLOCK_P}, "num_warps": {merge_warps(spec)}}})


def _aot(kernel, signature, unaligned, config):
    attrs = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}}
    constexprs = {{name: value for name, value in config.items() if name in signature}}
    options = {{**{{k: v for k, v in config.items() if k not in signature}}, "enable_fp_fusion": True}}
    return {{
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "options": options,
    }}
'''
