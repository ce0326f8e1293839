"""The host's half of the emitted Triton kernels of linear attention: what is checked, launched, and told a compiler."""

from __future__ import annotations

from attnopt.codegen.spec import Linear, LinearPrefill
from attnopt.codegen.triton_linear_text import maps_of, padded_features
from attnopt.codegen.triton_text import TRITON_DTYPES, padded_dim

# Elements of a state that a program of add_up takes.
ADDED = 1024
# Keys and rows of a block, warps, pipeline stages, and whether maps are loaded for every block anew, as where they
# do not fit into registers and shared memory beside the rest.
Launch = tuple[int, int, int, bool]


def _launches(launches: dict[str, dict[str, Launch]]) -> str:
    names, text = ("BLOCK", "num_warps", "num_stages", "RELOAD"), ""
    for device, kernels in launches.items():
        text += f'\n    "{device}": {{'
        for kernel, values in kernels.items():
            named = dict(zip(names, values, strict=True))
            if kernel == "linear_decode":
                # One token has no blocks.
                named = {name: named[name] for name in names[1:3]}
            shown = ", ".join(f'"{name}": {x}' for name, x in named.items())
            text += f'\n        "{kernel}": {{{shown}}},'
        text += "\n    },"
    return f"LAUNCHES = {{{text}\n}}"


def header(spec: Linear, about: str, imports: str, launches: dict[str, dict[str, Launch]]) -> str:
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}.
Emitted by attnopt; edits are overwritten.

{about}
"""

import torch
import triton
import triton.language as tl

{imports}
{_launches(launches)}
# Said, because the default of Triton's versions differs.
FUSED = {{"enable_fp_fusion": True}}


def launches(device):
    """The launches of a device: of the largest of LAUNCHES' compute capabilities that it has."""
    if torch.version.hip:
        return LAUNCHES["hip"]
    recent = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return LAUNCHES["sm_90" if recent else "sm_80"]
'''


def strides(*names: str) -> str:
    """Parameters of a kernel: the strides of its tensors."""
    return "".join(f"\n    {name}_{step}," for name in names for step in ("batch", "head", "row"))


def upcast(spec: Linear, names: str) -> str:
    if spec.dtype != "bfloat16":
        return ""
    return f"""
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        {names} = (t.float() for t in ({names}))"""


def maps_text(spec: Linear) -> str:
    names = ", ".join(f'"{name}"' for name in maps_of(spec))
    return f'''

MAPS = ({names})


def _maps(maps, device):
    """The tensors of a FeatureMap by name, contiguous on `device`."""
    if (maps.kind, maps.heads, maps.rank) != ("{spec.kind}", {spec.served}, {spec.rank}):
        found = f"{{maps.heads}} maps {{maps.kind}}/{{maps.rank}}"
        raise ValueError(f"{{found}} are given; this kernel wants {spec.served} maps {spec.kind}/{spec.rank}")
    if maps.wq.dtype != torch.float32 or maps.wq.shape[2] != {spec.head_dim}:
        raise ValueError(f"maps of {{maps.wq.shape[2]}} {{maps.wq.dtype}}; this kernel wants {spec.head_dim} float32")
    return {{name: getattr(maps, name).to(device).contiguous() for name in MAPS}}
'''


def checks(spec: LinearPrefill, kernel: str) -> str:
    """`INTERPRETED`, `_check` of the inputs, `_maps` and `_far`."""
    heads, kv_heads, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    wanted = "padded inputs; pass pad" if spec.padded else "unpadded inputs; pass no pad"
    pad = ", pad.contiguous().view(torch.uint8)" if spec.padded else ""
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance({kernel}, triton.JITFunction)


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
{maps_text(spec)}

def _steps(*tensors):
    return [step for t in tensors for step in t.stride()[:3]]


def _rows(*tensors):
    """Tensors whose last axis is contiguous."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _far(heads, sinks, windows, pad, length, device):
    """What every kernel is told of far keys, and the tables it is part of."""
    tables = far_tables(heads, sinks, windows, {heads}, {kv_heads}, length, device)
    if len(tables.heads) != {spec.served}:
        raise ValueError(f"{{len(tables.heads)}} heads are served; this kernel wants {spec.served}")
    return (tables.sinks, tables.windows, tables.heads{pad}), tables
'''


def states_launcher(spec: LinearPrefill) -> str:
    """`_empty_states` and `_before`, which fills them with what lies before each segment."""
    size, dim_v, served = padded_features(spec), padded_dim(spec.head_dim_v), spec.served
    maps = ", ".join(f'"{name}"' for name in maps_of(spec, "k"))
    return f'''

def _empty_states(batch, count, device):
    of = (batch, {served}, count, {size})
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((*of, {dim_v}), of)]


def _add_up(states, count, reverse):
    programs = states[1].shape[0] * {served} * {size * dim_v // ADDED + 1}
    add_up[(programs,)](*states, count, REVERSE=reverse, BLOCK={ADDED}, **FUSED)


def _sums(k, v, far, maps, length, cut, parts, launch):
    """The states and totals of the first `parts` of the segments that the keys are cut into."""
    count, size = cut
    states = _empty_states(k.shape[0], count, k.device)
    if parts:
        of_keys = [maps[name] for name in ({maps})]
        key_states[(k.shape[0] * {served} * parts,)](
            k, v, *states, *far, *of_keys, length, count, parts, size, *_steps(k, v), **launch["key_states"], **FUSED
        )
    return states


def _before(k, v, far, maps, length, cut, launch):
    """What lies before each segment."""
    states = _sums(k, v, far, maps, length, cut, cut[0] - 1, launch)
    if cut[0] > 1:
        _add_up(states, cut[0], False)
    return states
'''


def aot(spec: Linear, inputs: str, kernels: str) -> str:
    """`aot_signatures`. inputs: names of parameters that point at the spec's dtype; kernels: names, all with a launch
    of their own but add_up."""
    listed = ", ".join(f'"{name}"' for name in inputs.split())
    many = "".join(f"\n        {name}," for name in kernels.split()) + "\n    " if " " in kernels else f"{kernels},"
    added = "{}"
    if " " in kernels:
        added = f'{{"REVERSE": False, "BLOCK": {ADDED}}}'
    return f'''

def aot_signatures(target="sm_90"):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors."""
    plain = dict.fromkeys(("length", "segments", "parts", "segment"), "i32")
    kinds = {{
        **dict.fromkeys(({listed}), "*{TRITON_DTYPES[spec.dtype]}"),
        **dict.fromkeys(("sinks", "windows", "heads", "groups", "slots"), "*i32"),
        "pad": "*u8",
        **dict.fromkeys(("BLOCK", "REVERSE", "RELOAD"), "constexpr"),
        **plain,
    }}
    unaligned = ("length", "segments", "parts", "BLOCK", "REVERSE", "RELOAD")
    for kernel in ({many}):
        config = LAUNCHES[target].get(kernel.__name__, {added})
        steps = ("_batch", "_head", "_row", "_slot")
        signature = {{n: kinds.get(n, "i32" if n.endswith(steps) else "*fp32") for n in kernel.arg_names}}
        aligned = [i for i, n in enumerate(signature) if n not in unaligned]
        yield {{
            "kernel": kernel,
            "signature": signature,
            "constexprs": {{n: x for n, x in config.items() if n in signature}},
            "attrs": {{(i,): [["tt.divisibility", 16]] for i in aligned}},
            "options": {{**{{n: x for n, x in config.items() if n.startswith("num_")}}, **FUSED}},
        }}
'''
