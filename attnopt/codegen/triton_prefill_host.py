"""The host's half of the emitted Triton prefill: choice of launch, launcher, signatures for compiling ahead of time."""

from __future__ import annotations

from attnopt.codegen.spec import SpanPrefill
from attnopt.codegen.triton_text import TRITON_DTYPES, padded_dim


def host_text(spec: SpanPrefill, classes: int) -> str:
    """All that follows the kernel `span_prefill`; `classes`: how many tile classes, and so launches, there are."""
    return _launcher(spec, classes) + _aot(spec)


def _choice(spec: SpanPrefill) -> str:
    """How the emitted file chooses among its launches, and hands the kernel its tensors."""
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    return f'''

def _loads(q, k, v):
    """The key of LAUNCHES for these tensors."""
    if torch.version.hip:
        return "hip"
    return "descriptors" if "descriptors" in LAUNCHES and descriptors_serve(q, k, v) else "pointers"


def _inputs(q, k, v, config, loads):
    """q, k, v as the kernel takes them, and their strides, which descriptors know."""
    if loads != "descriptors":
        return (q, k, v), [step for t in (q, k, v) for step in t.stride()[:3]]
    rows, keys = config["BLOCK_M"], config["BLOCK_N"]
    return (descriptor(q, rows, {dim}), descriptor(k, keys, {dim}), descriptor(v, keys, {dim_v})), [0] * 9
'''


def _launcher(spec: SpanPrefill, classes: int) -> str:
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    wanted, pad_argument, pad_doc = (
        ("padded inputs; pass pad", ", pad, runs", "bool (B, N)")
        if spec.padded
        else ("unpadded inputs; pass no pad", "", "None")
    )
    runs = (
        """
    pad = pad.contiguous().view(torch.uint8)
    runs = torch.empty((batch, 3), dtype=torch.int32, device=q.device)"""
        if spec.padded
        else ""
    )
    find_runs = (
        "        if works:\n            find_runs[(batch,)](pad, runs, length, BLOCK=4096, enable_fp_fusion=True)\n"
        if spec.padded
        else ""
    )
    upcast = """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()"""
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(span_prefill, triton.JITFunction)


def _check(q, k, v, pad):
    batch, length = q.shape[0], q.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, {heads}, length, {dim}), (batch, {kv_heads}, length, {dim}), (batch, {kv_heads}, length, {dim_v})
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
    if pad is {"None" if spec.padded else "not None"}:
        raise ValueError("this kernel was emitted for {wanted}")
{_choice(spec)}

def _launch(work, loads, inputs, tensors, length, scale_log2):
    config = LAUNCHES[loads][work.tile_class]
    inputs, strides = _inputs(*inputs, config, loads)
    span_prefill[(work.items.numel(),)](
        *inputs,
        *tensors,
        work.items,
        length,
        work.tiles,
        scale_log2,
        *strides,
        *tensors[0].stride()[:3],
        **config,
        DESCRIPTORS=loads == "descriptors",
        enable_fp_fusion=True,
    )


def prefill(q, k, v, sinks, windows, scale, pad=None):
    """q (B, {heads}, N, {dim}), k (B, {kv_heads}, N, {dim}), v (B, {kv_heads}, N, {dim_v}) -> (B, {heads}, N, {dim_v}).

    All {spec.dtype}; sinks, windows int32 ({heads},); pad {pad_doc}.
    The result is laid out as (B, N, {heads}, {dim_v}).
    """
    return _prefill(q, k, v, sinks, windows, scale, pad, None)


def prefill_lse(q, k, v, sinks, windows, scale, pad=None):
    """As prefill -> (out, lse): the natural logarithm of each row's soft-max sum, float32 (B, {heads}, N).

    A row without a kept key has -inf.
    """
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _prefill(q, k, v, sinks, windows, scale, pad, lse), lse


def _prefill(q, k, v, sinks, windows, scale, pad, lse):
    _check(q, k, v, pad)
    batch, length, dtype = q.shape[0], q.shape[2], q.dtype{upcast if spec.dtype == "bfloat16" else ""}{runs}
    # The kernel takes each row's largest score before it scales, and so wants a positive scale.
    if abs(scale) < 1e-37:
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, length, {heads}, {dim_v}), dtype=q.dtype, device=q.device).transpose(1, 2)
    tensors = (out, lse, sinks, windows{pad_argument})
    with torch.cuda.device_of(q):
        loads = _loads(q, k, v)
        rest = (loads, (q, k, v), tensors, length, scale * 1.4426950408889634)
        tiles = tuple((config["BLOCK_M"], config["BLOCK_N"]) for config in LAUNCHES[loads])
        works = work_lists(sinks, windows, {kv_heads}, length, batch, tiles)
{find_runs}{_launches(classes)}    return out.to(dtype)
'''


def _launches(classes: int) -> str:
    if classes == 1:
        return """        for work in works:
            _launch(work, *rest)
"""
    return """        if len(works) == 2 and q.is_cuda:
            # Side by side, so that short tiles fill the SMs that the last long tiles leave idle.
            main, side = torch.cuda.current_stream(), side_stream(q.device)
            side.wait_stream(main)
            _launch(works[0], *rest)
            with torch.cuda.stream(side):
                _launch(works[1], *rest)
            main.wait_stream(side)
        else:
            for work in works:
                _launch(work, *rest)
"""


def _aot(spec: SpanPrefill) -> str:
    dtype, dim, dim_v = TRITON_DTYPES[spec.dtype], padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    pad_line = '\n            "pad": "*u8",\n            "runs": "*i32",' if spec.padded else ""
    return f'''

def aot_signatures(loads, lse=False):
    """Per launch of LAUNCHES[loads] what triton.compile needs, as the JIT would have it for aligned tensors."""
    steps = [f"{{tensor}}_{{step}}" for tensor in ("q", "k", "v", "out") for step in ("batch", "head", "row")]
    for config in LAUNCHES[loads]:
        signature = {{
            **dict.fromkeys(("q", "k", "v", "out"), "*{dtype}"),
            "lse": "*fp32" if lse else "constexpr",
            **dict.fromkeys(("sinks", "windows"), "*i32"),{pad_line}
            "work": "*i32",
            **dict.fromkeys(("length", "tiles"), "i32"),
            "scale_log2": "fp32",
            **dict.fromkeys(steps, "i32"),
            **dict.fromkeys(("BLOCK_M", "BLOCK_N", "DESCRIPTORS"), "constexpr"),
        }}
        if loads == "descriptors":
            rows, keys = config["BLOCK_M"], config["BLOCK_N"]
            for name, block in ("q", (rows, {dim})), ("k", (keys, {dim})), ("v", (keys, {dim_v})):
                signature[name] = f"tensordesc<{dtype}[1, 1, {{block[0]}}, {{block[1]}}]>"
        unaligned = ("length", "tiles")
        aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name not in unaligned]
        constexprs = {{"DESCRIPTORS": loads == "descriptors", **({{}} if lse else {{"lse": None}})}}
        yield {{
            "signature": signature,
            "constexprs": constexprs | {{name: config[name] for name in ("BLOCK_M", "BLOCK_N")}},
            "attrs": {{(i,): [["tt.divisibility", 16]] for i in aligned}},
            "options": {{name: config[name] for name in ("num_warps", "num_stages")}} | {{"enable_fp_fusion": True}},
        }}
'''
