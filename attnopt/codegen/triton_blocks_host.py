"""The host's half of the emitted Triton prefill over lists of blocks: launcher, signatures for compiling ahead."""

from __future__ import annotations

from attnopt.codegen.spec import BlockPrefill
from attnopt.codegen.triton_text import TRITON_DTYPES, padded_dim


def host_text(spec: BlockPrefill, split: bool) -> str:
    """All that follows the kernel `block_prefill`; split: whether a block is larger than a tile in any launch."""
    return _checks(spec) + _launcher(spec, split) + _aot(spec, split)


def _checks(spec: BlockPrefill) -> str:
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    wanted = "padded inputs; pass pad" if spec.padded else "unpadded inputs; pass no pad"
    return f"""

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(block_prefill, triton.JITFunction)


def _check(q, k, v, heads, counts, blocks, pad, out):
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(out.shape)
    wanted = (batch, {heads}, queries, {dim}), (batch, {kv_heads}, keys, {dim}), (batch, {kv_heads}, keys, {dim_v})
    wanted += ((batch, {heads}, queries, {dim_v}),)
    if shapes != wanted or keys < queries:
        raise ValueError(f"q, k, v, out have shapes {{shapes}}; this kernel wants {{wanted}}, and M >= N")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    lists = (batch, heads.numel(), triton.cdiv(queries, {spec.block}))
    if tuple(counts.shape) != lists or tuple(blocks.shape[:3]) != lists:
        raise ValueError(f"counts {{tuple(counts.shape)}}, blocks {{tuple(blocks.shape)}}; expected {{lists}} lists")
    if pad is {"None" if spec.padded else "not None"}:
        raise ValueError("this kernel was emitted for {wanted}")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
"""


def _launcher(spec: BlockPrefill, split: bool) -> str:
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    return f'''

def _loads(q, k, v):
    """The key of LAUNCHES for these tensors."""
    if torch.version.hip:
        return "hip"
    return "descriptors" if "descriptors" in LAUNCHES and descriptors_serve(q, k, v) else "pointers"


def _inputs(q, k, v, tile, loads):
    """q, k, v as the kernel takes them, and their strides, which descriptors know."""
    if loads != "descriptors":
        return (q, k, v), [step for t in (q, k, v) for step in t.stride()[:3]]
    return (descriptor(q, tile, {dim}), descriptor(k, tile, {dim}), descriptor(v, tile, {dim_v})), [0] * 9
{_prefill(spec, split)}'''


def _prefill(spec: BlockPrefill, split: bool) -> str:
    heads, kv_heads, dim, dim_v, block = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v, spec.block
    whole = (
        f"""
    # Of which column blocks every key is real; behind the last key there is none.
    whole = torch.nn.functional.pad(pad, (0, -keys % {block})).view(batch, -1, {block}).all(-1).view(torch.uint8)
    # A weight of 0 does not hide what is no number.
    v = v.masked_fill(~pad[:, None, :, None], 0.0)
    pad = pad.contiguous().view(torch.uint8)"""
        if spec.padded
        else ""
    )
    return f'''

def prefill(q, k, v, heads, counts, blocks, bounds, scale, pad, window, out, lse=None):
    """q (B, {heads}, N, {dim}), k (B, {kv_heads}, M, {dim}), v (B, {kv_heads}, M, {dim_v}), all {spec.dtype}; M >= N.

    Writes the heads `heads`, int32 (h,), of out (B, {heads}, N, {dim_v}), and lse float32 (B, h, N) where it is given.
    counts int32 (B, h, R) and blocks int32 (B, h, R, L): the column blocks that each of R blocks of rows visits.
    bounds float32 (h,) or (B, h), at most 0: a block is skipped where every score is less than its row's largest so far
    plus the head's bound; -inf for none. pad {"bool (B, M)" if spec.padded else "None"}; window: of every head, 0 for
    none. Returns int32 (B, h, R), the blocks skipped. Nothing is read on the host.
    """
    _check(q, k, v, heads, counts, blocks, pad, out)
    (batch, served, row_blocks), queries, keys = counts.shape, q.shape[2], k.shape[2]
    skipped = torch.empty(counts.shape, dtype=torch.int32, device=q.device)
    if not skipped.numel():
        return skipped{whole}
    written = out
    if INTERPRETED and out.dtype == torch.bfloat16:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v, written = q.float(), k.float(), v.float(), out.float()
    # The kernel takes each row's largest score before it scales, and so wants a positive scale.
    if abs(scale) < 1e-37:
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    q, k, v, blocks = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, blocks))
{_call(spec, split)}    if written is not out:
        out.copy_(written)
    return skipped
'''


def _call(spec: BlockPrefill, split: bool) -> str:
    """The lines of `prefill` that launch the kernel: once, or twice where a block is larger than the tile chosen."""
    pad = "\n        pad,\n        whole," if spec.padded else ""
    needs, needs_argument, capacity = "", "", ""
    launch = "block_prefill[grid](*arguments, **options)"
    if split:
        needs = f"""
    divided = config["TILE"] < {spec.block}
    needs = torch.zeros(blocks.shape, dtype=torch.int32, device=q.device) if divided else None"""
        needs_argument, capacity = "\n        needs,", "\n        blocks.shape[3],"
        launch = """for find in (True, False) if divided else (False,):
            block_prefill[grid](*arguments, **options, FIND=find)"""
    return f"""    loads = _loads(q, k, v)
    config = LAUNCHES[loads]
    inputs, strides = _inputs(q, k, v, config["TILE"], loads){needs}
    arguments = (
        *inputs,
        written,
        lse,
        skipped,
        heads.contiguous(),
        counts,
        blocks,
        bounds.expand(batch, served).contiguous(),{pad}{needs_argument}
        queries,
        keys,
        row_blocks,
        served,
        window or 2**31 - 1,{capacity}
        scale * LOG2E.value,
        *strides,
        *written.stride(),
        *((0, 0, 0) if lse is None else lse.stride()),
        *counts.stride(),
        *blocks.stride()[:3],
    )
    options = {{**config, "DESCRIPTORS": loads == "descriptors", "enable_fp_fusion": True}}
    grid = (batch * served * triton.cdiv(queries, config["TILE"]),)
    with torch.cuda.device_of(q):
        {launch}
"""


def _aot(spec: BlockPrefill, split: bool) -> str:
    dtype, dim, dim_v = TRITON_DTYPES[spec.dtype], padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    pad_line = '\n        **dict.fromkeys(("pad", "whole"), "*u8"),' if spec.padded else ""
    find = divided = needs = capacity = find_line = fixed = ""
    if split:
        find, divided = ", find=False", f'\n    divided = LAUNCHES[loads]["TILE"] < {spec.block}'
        needs = '\n        "needs": "*i32" if divided else "constexpr",'
        capacity, find_line = '\n        "capacity": "i32",', '\n        "FIND": "constexpr",'
        fixed = '\n    constexprs |= {"FIND": find} if divided else {"FIND": False, "needs": None}'
    return f'''

def aot_signature(loads, lse=False{find}):
    """What triton.compile needs for LAUNCHES[loads], as the JIT would have it for aligned tensors."""
    steps = [f"{{tensor}}_{{step}}" for tensor in ("q", "k", "v", "out") for step in ("batch", "head", "row")]
    tile = LAUNCHES[loads]["TILE"]{divided}
    signature = {{
        **dict.fromkeys(("q", "k", "v", "out"), "*{dtype}"),
        "lse": "*fp32" if lse else "constexpr",
        **dict.fromkeys(("skipped", "heads", "counts", "blocks"), "*i32"),
        "bounds": "*fp32",{pad_line}{needs}
        **dict.fromkeys(("queries", "keys", "row_blocks", "served", "window"), "i32"),{capacity}
        "scale_log2": "fp32",
        **dict.fromkeys(steps, "i32"),
        "out_dim": "constexpr",
        **dict.fromkeys(CHANGING[-9:], "i32"),
        **dict.fromkeys(("TILE", "DESCRIPTORS"), "constexpr"),{find_line}
    }}
    if loads == "descriptors":
        for name, width in ("q", {dim}), ("k", {dim}), ("v", {dim_v}):
            signature[name] = f"tensordesc<{dtype}[1, 1, {{tile}}, {{width}}]>"
    constexprs = {{"TILE": tile, "DESCRIPTORS": loads == "descriptors", "out_dim": 1}}
    constexprs |= {{}} if lse else {{"lse": None}}{fixed}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name not in CHANGING]
    return {{
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {{(i,): [["tt.divisibility", 16]] for i in aligned}},
        "options": {{n: x for n, x in LAUNCHES[loads].items() if n != "TILE"}} | {{"enable_fp_fusion": True}},
    }}
'''
