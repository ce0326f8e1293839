"""The Triton target of masked attention: a fused prefill into which a mask, a bias, a soft-cap and a sink are printed.

A tile of query rows visits the key blocks that any of its rows may keep, by arithmetic from the predicate
(`masks/live_range.py`): first those that every row keeps whole, without a mask, then the edges. Where data other than
documents and padding decides, every live block is masked. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import MaskedPrefill
from attnopt.codegen.triton_masked_text import LOG2E, FormText, indented
from attnopt.codegen.triton_text import (
    TRITON_DTYPES,
    check,
    dim_mask,
    load_text,
    mask_argument,
    need_triton,
    padded_dim,
)
from attnopt.masks.kernel_form import form_from
from attnopt.registry import TARGETS

# Query rows, keys per block, warps, pipeline stages.
Launch = tuple[int, int, int, int]
# By what the device is; "sm_80" is every NVIDIA GPU below sm_90, some of which have 99 KiB of shared memory only. On
# gfx942 stages cost shared memory, of which there is 64 KiB, and blocks of 64 keys more registers than there are.
LAUNCHES_HALF: dict[str, Launch] = {"sm_90": (128, 64, 8, 3), "sm_80": (128, 32, 8, 3), "hip": (128, 32, 8, 1)}
# Data over pairs of positions takes registers and shared memory of its own, a head dimension of 256 more of both.
LAUNCHES_PAIRS: dict[str, Launch] = {"sm_90": (128, 32, 8, 2), "sm_80": (64, 32, 4, 2), "hip": (64, 32, 4, 1)}
LAUNCHES_HALF_256: dict[str, Launch] = {"sm_90": (64, 32, 8, 2), "sm_80": (64, 32, 8, 2), "hip": (64, 32, 4, 1)}
# float32 goes without tensor cores, which would round to tf32, and so needs small tiles.
LAUNCHES_FLOAT: dict[str, Launch] = dict.fromkeys(("sm_90", "sm_80", "hip"), (32, 32, 8, 1))
LAUNCHES_FLOAT_128: dict[str, Launch] = dict.fromkeys(("sm_90", "sm_80", "hip"), (32, 16, 8, 1))


def launches(spec: MaskedPrefill) -> dict[str, Launch]:
    """The shipped launch configurations of `spec`; tests compile those of three forms ahead of time."""
    dim = padded_dim(max(spec.head_dim, spec.head_dim_v))
    if spec.dtype == "float32":
        return LAUNCHES_FLOAT if dim <= 64 else LAUNCHES_FLOAT_128
    if dim > 128:
        return LAUNCHES_HALF_256
    return LAUNCHES_PAIRS if FormText(form_from(spec.form)).pairs else LAUNCHES_HALF


def _header(spec: MaskedPrefill, text: FormText) -> str:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    configs = {
        device: "{" + ", ".join(f'"{n}": {x}' for n, x in zip(names, row, strict=True)) + "}"
        for device, row in launches(spec).items()
    }
    constants = ""
    if text.form.softcap or text.form.added.terms or text.form.sink in ("h", "bhi"):
        constants = f"\n# Scores are in base 2.\nLOG2E = tl.constexpr({LOG2E})"
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}. Emitted by attnopt; edits are overwritten.

{text.description}
"""

import torch
import triton
import triton.language as tl

LAUNCHES = {{
    "sm_90": {configs["sm_90"]},
    "sm_80": {configs["sm_80"]},
    "hip": {configs["hip"]},
}}{constants}
'''


def _kernel_start(spec: MaskedPrefill, text: FormText) -> str:
    q_mask = "rows[:, None] < queries", dim_mask(spec.head_dim, "dims[None, :]")
    arguments = "".join(f"\n    {name}," for name in text.pointers)
    strides = "".join(f"\n    {name}," for name in text.strides)
    counted = ", ".join(f'"{name}"' for name in ("queries", "keys", "tiles", *text.counted))
    reads = indented(text.row_lines, 4)
    last = "\n    last = tl.minimum(first + BLOCK_M, queries) - 1" if "last" in text.bound_names else ""
    rows = "\n    i = rows[:, None]" if text.uses("i") else ""
    return f'''

@triton.jit(do_not_specialize=[{counted}])
def masked_prefill(
    q,
    k,
    v,
    out,{arguments}
    queries,
    keys,
    tiles,
    scale,
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
    out_row,{strides}
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head, against blocks of BLOCK_N keys."""
    {text.order}
    h = (pair % {spec.heads}).to(tl.int64)
    b = (pair // {spec.heads}).to(tl.int64)
    first = tile * BLOCK_M{last}

    inner = tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, {padded_dim(spec.head_dim)})
    dims_v = tl.arange(0, {padded_dim(spec.head_dim_v)})
    rows = first + inner{rows}
    q += b * q_batch + h * q_head + first.to(tl.int64) * q_row
    k += b * k_batch + h // {spec.heads // spec.kv_heads} * k_head
    v += b * v_batch + h // {spec.heads // spec.kv_heads} * v_head
    out += b * out_batch + h * out_head + first.to(tl.int64) * out_row
    k_tile = local[None, :] * k_row + dims[:, None]
    v_tile = local[:, None] * v_row + dims_v[None, :]
    q_tile = inner[:, None] * q_row + dims[None, :]
    q_block = {load_text("q + q_tile", *q_mask)}
{reads}
    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
{indented(text.sink_lines, 4)}    acc = tl.zeros([BLOCK_M, {padded_dim(spec.head_dim_v)}], tl.float32)

{indented(text.range_lines, 4)}'''


def _body(spec: MaskedPrefill, text: FormText, masked: bool) -> str:
    """One key block: of the first loop, whose blocks are kept whole, or of the second."""
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    inside = ("cols[None, :] < keys", "cols[:, None] < keys") if masked else ("", "")
    k_load = load_text("k_start + k_tile", inside[0], dim_mask(spec.head_dim, "dims[:, None]"))
    v_load = load_text("v_start + v_tile", inside[1], dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    lines = []
    if masked or text.uses("j", masked):
        lines.append("cols = start + local")
    if text.uses("j", masked) or masked:
        lines.append("j = cols[None, :]")
    lines += [
        "k_start = k + start.to(tl.int64) * k_row",
        f"k_block = {k_load}",
        f"scores = tl.dot(q_block, k_block{exact})",
    ]
    lines += text.column_lines(masked)
    plain = not masked and not text.form.softcap and not text.form.added.terms
    if not plain:
        lines += text.score_lines
    if masked:
        lines += [*text.keep_lines, 'scores = tl.where(keep, scores, float("-inf"))']
    if plain:
        # The launcher sees to it that the scale is not negative.
        lines.append("new_top = tl.maximum(top, tl.max(scores, 1) * scale)")
        lines.append("weights = tl.exp2(scores * scale - new_top[:, None])")
        lines.append("shrink = tl.exp2(top - new_top)")
    else:
        lines += [
            "new_top = tl.maximum(top, tl.max(scores, 1))",
            "# A row that has met no kept key yet: -inf minus -inf would be NaN.",
            'base = tl.where(new_top == float("-inf"), 0.0, new_top)',
            "weights = tl.exp2(scores - base[:, None])",
            "shrink = tl.exp2(top - base)",
        ]
    lines += [
        "total = total * shrink + tl.sum(weights, 1)",
        "acc = acc * shrink[:, None]",
        "v_start = v + start.to(tl.int64) * v_row",
        f"v_block = {v_load}",
        f"acc = tl.dot(weights.to(v_block.dtype), v_block, acc{exact})",
        "top = new_top",
    ]
    return indented(lines, 8)


def _loops(spec: MaskedPrefill, text: FormText) -> str:
    found = ""
    if text.live.whole is not None:
        found = f"""    # Kept whole by every row: no mask.
    for n in range(whole_first, whole_end):
        start = n * BLOCK_N
{_body(spec, text, False)}
"""
    return f"""{found}{indented(text.edge_lines, 4)}{_body(spec, text, True)}
    # A row without a kept key is 0.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_tile = inner[:, None] * out_row + dims_v[None, :]
    out_mask = {mask_argument("rows[:, None] < queries", dim_mask(spec.head_dim_v, "dims_v[None, :]"))[7:]}
    tl.store(out + out_tile, acc.to(out.dtype.element_ty), mask=out_mask)
"""


def _launcher(spec: MaskedPrefill, text: FormText) -> str:
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    upcast = ""
    if spec.dtype == "bfloat16":
        upcast = """    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v = q.float(), k.float(), v.float()
"""
    factor = f"{LOG2E}"
    if text.form.softcap:
        factor = f"{2 * LOG2E / text.form.softcap!r}"
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(masked_prefill, triton.JITFunction)
DTYPES = ({"".join(f"torch.{name}, " for name in text.dtypes)[: -1 if len(text.dtypes) == 1 else -2]})


def _check(q, k, v, tensors, sizes):
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    wanted = (batch, {heads}, queries, {dim}), (batch, {kv_heads}, keys, {dim}), (batch, {kv_heads}, keys, {dim_v})
    if shapes != wanted:
        raise ValueError(f"q, k, v have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == torch.{spec.dtype}:
        raise ValueError(f"q, k, v are {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this kernel wants {spec.dtype}")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
    if tuple(t.dtype for t in tensors) != DTYPES or len(sizes) != {text.form.sizes}:
        raise ValueError(f"this kernel reads tensors of {{DTYPES}} and {text.form.sizes} sizes")


def _config(q):
    if torch.version.hip:
        return LAUNCHES["hip"]
    # Consumer cards of later generations have the shared memory of sm_86.
    return LAUNCHES["sm_90" if INTERPRETED or 9 <= torch.cuda.get_device_capability(q.device)[0] < 12 else "sm_80"]


def _data(tensor):
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    # Triton's interpreter reads no bfloat16.
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def attend(q, k, v, tensors, sizes, sink, scale):
    """q (B, {heads}, Sq, {dim}), k (B, {kv_heads}, Sk, {dim}), v (B, {kv_heads}, Sk, {dim_v}).

    All {spec.dtype}; tensors and sizes as the predicate names them; sink {text.sink_shape}.
    Returns (B, {heads}, Sq, {dim_v}), laid out as (B, Sq, {heads}, {dim_v}).
    """
    _check(q, k, v, tensors, sizes)
    batch, queries, dtype = q.shape[0], q.shape[2], q.dtype
{upcast}    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty((batch, queries, {heads}, {dim_v}), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not out.numel():
        return out.to(dtype)
{text.unpacking}{text.sink_line}    config = _config(q)
    tiles = triton.cdiv(queries, config["BLOCK_M"])
    strides = [step for t in (q, k, v, out) for step in t.stride()[:3]]
    with torch.cuda.device_of(q):
        masked_prefill[(batch * {heads} * tiles,)](
            q,
            k,
            v,
            out,{"".join(f"{chr(10)}            {name}," for name in text.pointers)}
            queries,
            k.shape[2],
            tiles,
            scale * {factor},
            *strides,{"".join(f"{chr(10)}            {value}," for value in text.stride_values)}
            **config,
            enable_fp_fusion=True,
        )
    return out.to(dtype)
'''


def _aot(spec: MaskedPrefill, text: FormText) -> str:
    pointers = {**dict.fromkeys(("q", "k", "v", "out"), f"*{TRITON_DTYPES[spec.dtype]}"), **text.pointer_types}
    strides = [f"{t}_{step}" for t in ("q", "k", "v", "out") for step in ("batch", "head", "row")]
    steps = [n for n in text.strides if n not in text.counted]
    # The last dimension of data is laid out without steps, as the JIT sees it.
    ones = [n for n in steps if n in text.last_steps]
    signature = [*((n, f'"{t}"') for n, t in pointers.items())]
    signature += [(n, '"i32"') for n in ("queries", "keys", "tiles")] + [("scale", '"fp32"')]
    signature += [(n, '"i32"') for n in strides]
    signature += [(n, '"constexpr"' if n in ones else '"i32"') for n in text.strides]
    signature += [(n, '"constexpr"') for n in ("BLOCK_M", "BLOCK_N")]
    lines = "".join(f'\n        "{n}": {t},' for n, t in signature)
    aligned = [n for n in (*pointers, *strides, *steps) if n not in ones]
    names = "".join(f'\n        "{n}",' for n in aligned)
    fixed = "".join(f', "{n}": 1' for n in ones)
    return f'''

def aot_signature(target):
    """What triton.compile needs, as the JIT would have it for aligned tensors; target: one of LAUNCHES."""
    signature = {{{lines}
    }}
    aligned = ({names}
    )
    attrs = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}}
    config = LAUNCHES[target]
    constexprs = {{"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"]{fixed}}}
    options = {{name: config[name] for name in ("num_warps", "num_stages")}} | {{"enable_fp_fusion": True}}
    return {{"signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}}
'''


def source(spec: MaskedPrefill) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    text = FormText(form_from(spec.form))
    kernel = _kernel_start(spec, text) + _loops(spec, text)
    run = footer(spec, "self_check_masked", "attend")
    return _header(spec, text) + kernel + _launcher(spec, text) + _aot(spec, text) + run


@TARGETS.register("triton masked_prefill")
class TritonMasked:
    @staticmethod
    def emit(spec: MaskedPrefill) -> str:
        need_triton()
        return source(spec)
