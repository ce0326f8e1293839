"""What stands around the kernels of an emitted Triton backward: checks, launches, and what a compiler is told."""

from __future__ import annotations

from attnopt.codegen.spec import SpanBackward
from attnopt.codegen.triton_text import TRITON_DTYPES


def launcher(spec: SpanBackward) -> str:
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    wanted, pad_doc = (
        ("padded inputs; pass pad", "bool (B, N)") if spec.padded else ("unpadded inputs; pass no pad", "None")
    )
    pad_view = "\n    pad = pad.contiguous().view(torch.uint8)" if spec.padded else ""
    pad_argument = ", pad" if spec.padded else ""
    upcast = ""
    if spec.dtype == "bfloat16":
        upcast = """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))"""
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_dq, triton.JITFunction)


def _check(dout, q, k, v, out, lse, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(tuple(t.shape) for t in (dout, q, k, v, out, lse))
    of_rows = (batch, {heads}, length)
    wanted = (
        (*of_rows, {dim_v}),
        (*of_rows, {dim}),
        (batch, {kv_heads}, length, {dim}),
        (batch, {kv_heads}, length, {dim_v}),
        (*of_rows, {dim_v}),
        of_rows,
    )
    if shapes != wanted:
        raise ValueError(f"dout, q, k, v, out, lse have shapes {{shapes}}; this kernel wants {{wanted}}")
    dtypes = {{t.dtype for t in (dout, q, k, v, out)}}
    if dtypes != {{torch.{spec.dtype}}} or lse.dtype != torch.float32:
        raise ValueError(f"dtypes {{dtypes}} and lse {{lse.dtype}}; this kernel wants {spec.dtype} and lse float32")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
    if pad is {"None" if spec.padded else "not None"}:
        raise ValueError("this kernel was emitted for {wanted}")


def backward(dout, q, k, v, out, lse, sinks, windows, scale, pad=None, dlse=None):
    """Gradients at q (B, {heads}, N, {dim}), k (B, {kv_heads}, N, {dim}) and v (B, {kv_heads}, N, {dim_v}).

    Those of a prefill whose output out has the gradient dout, both (B, {heads}, N, {dim_v}), and whose rows have the
    logsumexp lse, float32 (B, {heads}, N), natural, -inf without a kept key, and dlse as its gradient, None for none.
    All else {spec.dtype}; sinks, windows int32 ({heads},); pad {pad_doc}. Results are laid out as (B, N, heads, dim).
    """
    _check(dout, q, k, v, out, lse, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype{upcast}{pad_view}
    dout, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty((batch, length, *t.shape[1::2]), dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta, bound = (torch.empty((batch, {heads}, length), dtype=torch.float32, device=q.device) for _ in range(2))
    launch = launches(q.device)
    strides = [step for t in (dout, q, k, v) for step in t.stride()[:3]]
    if q.numel():
        with torch.cuda.device_of(q):
            tiles = triton.cdiv(length, SUMMED)
            row_sums[(batch * {heads} * tiles,)](
                dout, out, lse.contiguous(), delta, bound, length, *dout.stride()[:3], *out.stride()[:3], BLOCK_M=SUMMED
            )
            if dlse is not None:
                delta -= dlse
            of_rows = (dout, q, k, v, delta, bound)
            tables = (sinks, windows{pad_argument})
            scales = (scale, scale * 1.4426950408889634)
            tile = (launch["dq"]["BLOCK_M"], launch["dq"]["BLOCK_N"])
            for work in work_lists(sinks, windows, {kv_heads}, length, batch, (tile,)):
                span_dq[(work.items.numel(),)](
                    *of_rows, dq, *tables, work.items, length, work.tiles, *scales, *strides, **launch["dq"], **FUSED
                )
            tile = (launch["dkv"]["BLOCK_M"], launch["dkv"]["BLOCK_N"])
            work = key_list(sinks, windows, {kv_heads}, length, batch, tile)
            span_dkv[(work.items.numel(),)](
                *of_rows, dk, dv, *tables, work.items, length, work.tiles, *scales, *strides, **launch["dkv"], **FUSED
            )
    return tuple(t.to(dtype).transpose(1, 2) for t in (dq, dk, dv))
'''


def aot(spec: SpanBackward) -> str:
    pad_line = '\n            "pad": "*u8",' if spec.padded else ""
    pointer = TRITON_DTYPES[spec.dtype]
    return f'''

def aot_signatures(target="sm_90"):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    for name, results in (("dq", ("dq",)), ("dkv", ("dk", "dv"))):
        signature = {{
            **dict.fromkeys(("dout", "q", "k", "v"), "*{pointer}"),
            **dict.fromkeys(("delta", "bound"), "*fp32"),
            **dict.fromkeys(results, "*{pointer}"),
            **dict.fromkeys(("sinks", "windows"), "*i32"),{pad_line}
            "work": "*i32",
            **dict.fromkeys(("length", "tiles"), "i32"),
            **dict.fromkeys(("scale", "scale_log2"), "fp32"),
            **{{f"{{t}}_{{step}}": "i32" for t in ("dout", "q", "k", "v") for step in ("batch", "head", "row")}},
            **dict.fromkeys(("BLOCK_M", "BLOCK_N"), "constexpr"),
        }}
        unaligned = ("length", "tiles", "scale", "scale_log2", "BLOCK_M", "BLOCK_N")
        config = LAUNCHES[target][name]
        yield {{
            "kernel": {{"dq": span_dq, "dkv": span_dkv}}[name],
            "signature": signature,
            "constexprs": {{block: config[block] for block in ("BLOCK_M", "BLOCK_N")}},
            "attrs": {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n not in unaligned}},
            "options": {{"enable_fp_fusion": True, **{{n: config[n] for n in ("num_warps", "num_stages")}}}},
        }}
'''
