"""The host's side of an emitted Triton step of heads that select tokens: what is launched, how, and what a compiler is
told of it."""

from __future__ import annotations

from attnopt.codegen import triton_decode_host
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.token_lists import BLOCK
from attnopt.codegen.triton_decode_host import BLOCK_P
from attnopt.codegen.triton_text import TRITON_DTYPES, padded_dim

# Columns of a table of rules.
WIDTH = 6
# Scores that `pick` looks at together.
PICKED = 4096


def launches(spec: TokenStep) -> dict[str, dict[str, int]]:
    """The launch configurations by kernel; tests compile them ahead of time and check what they spill."""
    block, warps, stages = triton_decode_host.launch(spec)
    wide = padded_dim(max(spec.head_dim, spec.head_dim_v)) > 128
    return {
        "decide": {"num_warps": 1},
        "scan": {"BLOCK_N": block, "num_warps": warps, "num_stages": stages},
        "pick": {"BLOCK": PICKED, "num_warps": 8},
        "gather": {"BLOCK_N": BLOCK, "num_warps": 8 if wide else 4},
    }


def launcher(spec: TokenStep) -> str:
    return _checks(spec) + _step(spec) + _launches(spec)


def _checks(spec: TokenStep) -> str:
    heads, groups, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    return f"""

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(gather, triton.JITFunction)


def _check(q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, out):
    batch, slots, features = q.shape[0], keys.shape[1], chosen.shape[2]
    shapes = [tuple(x.shape) for x in (q, keys, values, n, table, rules, similar, asked, age, chosen, labels, out)]
    wanted = [(batch, {heads}, 1, {dim}), (batch, slots, {dim}), (batch, slots, {dim_v}), (batch,), ({groups}, 4)]
    wanted += [({heads}, {WIDTH}), ({heads},), (batch, {heads}, {dim}), (batch, {heads}), (batch, {groups}, features)]
    wanted += [(batch, features, slots), (batch, {heads}, 1, {dim_v})]
    if shapes != wanted or (valid is not None and valid.shape != (batch, 1)):
        raise ValueError(f"the tensors of a step have shapes {{shapes}}; this kernel wants {{wanted}}")
    if any(x.shape[:2] != (batch, {heads}) or x.dtype != torch.int32 for x in (picked, *sources)):
        raise ValueError("lists of tokens are int32 (batch, {heads}, tokens)")
    if any(x.dtype != torch.{spec.dtype} for x in (q, keys, values, asked, labels, out)):
        raise ValueError(f"q is {{q.dtype}} and the cache {{keys.dtype}}; this kernel wants {spec.dtype} throughout")
    if any(x.dtype != torch.int32 for x in (n, table, rules, age)) or chosen.dtype != torch.int64:
        raise ValueError("n, age and the tables of a cache are int32, the features chosen int64")
    if not all(x.is_contiguous() for x in (n, table, rules, similar, asked, age, chosen)):
        raise ValueError("n, the tables and the state of a step are contiguous")
    if any(x.stride(-1) != 1 for x in (keys, values, picked, *sources, labels, out) if x.shape[-1] > 1):
        raise ValueError("a slot of the cache, a list and a row of the result are contiguous: none is copied")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")
"""


def _step(spec: TokenStep) -> str:
    upcast, downcast = "", ""
    if spec.dtype == "bfloat16":
        upcast = """
    kept = asked, labels, out
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, keys, values, asked, labels, out = (x.float() for x in (q, keys, values, asked, labels, out))"""
        downcast = """
    if INTERPRETED:
        for narrow, wide in zip(kept, (asked, labels, out), strict=True):
            narrow.copy_(wide)"""
    return f'''

def step(
    q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, scale, out
):  # fmt: skip
    """q (B, {spec.heads}, 1, {spec.head_dim}), keys (B, S, {spec.head_dim}), values (B, S, {spec.head_dim_v}); the {
        ""
    }rest as in attnopt/codegen/reference_token_step.py.

    Written are picked, asked, age and labels, and the heads of out (B, {spec.heads}, 1, {
        spec.head_dim_v
    }) that select. No value of a
    tensor is read here, but those of table and rules, once.
    """
    _check(q, keys, values, n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels, out)
    batch = q.shape[0]
    if not batch:
        return{upcast}
    q = q if q.stride(-1) == 1 else q.contiguous()
    valid = None if valid is None else valid.view(torch.int8)
    with torch.cuda.device_of(q):
        work = token_lists(rules, table, batch)
        if len(sources) + 1 < len(work.readers):
            raise ValueError(f"heads read {{len(work.readers) - 1}} sources, and {{len(sources)}} are given")
        if work.heads.numel():
            state = rules, similar, picked, asked, age, chosen, labels
            _select(work, q, keys, n, valid, table, *state)
        for lists, readers in zip((picked, *sources), work.readers, strict=False):
            if readers is not None:
                _attend(readers, q, keys, values, n, valid, table, rules, lists, scale, out){downcast}
'''


def _launches(spec: TokenStep) -> str:
    dim_v = spec.head_dim_v
    return f"""

def _select(work, q, keys, n, valid, table, rules, similar, picked, asked, age, chosen, labels):
    batch, served, features = q.shape[0], work.heads.numel(), chosen.shape[2]
    due = torch.empty((batch, {spec.heads}), dtype=torch.int32, device=q.device)
    scores = torch.empty((batch, served, work.room), dtype=torch.float32, device=q.device)
    lanes = max(16, triton.next_power_of_2(features)) if features else 0
    decide[(batch * {spec.heads},)](
        *(q, keys, n, valid, table, rules, similar, asked, age, chosen, labels, due, features),
        *(*q.stride()[:2], *keys.stride()[:2], *labels.stride()[:2], 0 if valid is None else valid.stride(0)),
        FEATURES=lanes,
        **LAUNCH["decide"],
    )
    chunks = cache_list(table, batch, 1)
    if chunks.slots != keys.shape[1]:
        raise ValueError(f"the table ends at slot {{chunks.slots}}, and the cache has {{keys.shape[1]}}")
    scan[(chunks.items.numel() * batch,)](
        *(q, keys, labels, chosen, n, table, rules, due, work.places, scores, chunks.items),
        *(batch, served, chunks.chunk, features, work.room),
        *(*q.stride()[:2], *keys.stride()[:2], *labels.stride()[:2]),
        FEATURES=lanes,
        **LAUNCH["scan"],
    )
    pick[(served * batch,)](
        *(scores, picked, n, table, rules, due, work.heads, batch, served, work.room, *picked.stride()[:2]),
        **LAUNCH["pick"],
    )


def _attend(readers, q, keys, values, n, valid, table, rules, lists, scale, out):
    batch, heads = q.shape[0], readers.heads
    if lists.shape[2] < readers.most:
        raise ValueError(f"lists of {{lists.shape[2]}} tokens, and a head reads {{readers.most}}")
    split = readers.parts > 1
    partial = torch.empty((readers.parts * split, heads.numel() * batch, {dim_v}), device=q.device)
    partial_lse = torch.empty((readers.parts * split, heads.numel() * batch), device=q.device)
    valid_batch = 0 if valid is None else valid.stride(0)
    gather[(readers.parts * heads.numel() * batch,)](
        *(q, keys, values, out, partial, partial_lse, n, valid, table, rules, lists, heads),
        *(batch, readers.parts, readers.chunk, scale * 1.4426950408889634),
        *(*q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *out.stride()[:2], *lists.stride()[:2]),
        valid_batch,
        SPLIT=split,
        **LAUNCH["gather"],
        enable_fp_fusion=True,
    )
    if split:
        merge[(heads.numel() * batch,)](
            *(out, partial, partial_lse, n, valid, table, rules, heads, batch, readers.chunk, *out.stride()[:2]),
            valid_batch,
            BLOCK_P={BLOCK_P},
            **LAUNCH["merge"],
            enable_fp_fusion=True,
        )
"""


def aot(spec: TokenStep) -> str:
    element = TRITON_DTYPES[spec.dtype]
    return f'''

def aot_signatures(features=0):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors and no padding."""
    lanes = max(16, triton.next_power_of_2(features)) if features else 0
    moved = dict.fromkeys(("k_batch", "k_slot"), "i32")
    label_steps = dict.fromkeys(("labels_batch", "labels_row"), "i32")
    asking = {{"q": "*{element}", "k": "*{element}"}}
    tables = dict.fromkeys(("table", "rules"), "*i32")
    wanted = {{"q_batch": "i32", "q_head": "i32", **moved}}
    yield _aot(
        decide,
        {{**asking, "n": "*i32", "valid": "constexpr", **tables, "similar": "*fp32", "asked": "*{element}"}}
        | {{"age": "*i32", "chosen": "*i64", "labels": "*{element}", "due": "*i32", "features": "i32", **wanted}}
        | {{**label_steps, "valid_batch": "constexpr", "FEATURES": "constexpr"}},
        {{"valid": None, "valid_batch": 0, "FEATURES": lanes, **LAUNCH["decide"]}},
    )
    yield _aot(
        scan,
        {{**asking, "labels": "*{element}", "chosen": "*i64", "n": "*i32", **tables, "due": "*i32", "places": "*i32"}}
        | {{"scores": "*fp32", "items": "*i32"}}
        | dict.fromkeys(("batch", "served", "chunk", "features", "room"), "i32")
        | {{**wanted, **label_steps, "FEATURES": "constexpr", "BLOCK_N": "constexpr"}},
        {{"FEATURES": lanes, **LAUNCH["scan"]}},
    )
    yield _aot(
        pick,
        {{"scores": "*fp32", "picked": "*i32", "n": "*i32", **tables, "due": "*i32", "heads": "*i32"}}
        | dict.fromkeys(("batch", "served", "room", "picked_batch", "picked_head"), "i32")
        | {{"BLOCK": "constexpr"}},
        LAUNCH["pick"],
    )
    written = {{"out_batch": "i32", "out_head": "i32"}}
    parts = dict.fromkeys(("partial", "partial_lse"), "*fp32")
    for split in (False, True):
        yield _aot(
            gather,
            {{**asking, "v": "*{element}", "out": "*{element}", **parts, "n": "*i32", "valid": "constexpr", **tables}}
            | {{"picked": "*i32", "heads": "*i32", **dict.fromkeys(("batch", "parts", "chunk"), "i32")}}
            | {{"scale_log2": "fp32", **wanted, "v_batch": "i32", "v_slot": "i32", **written}}
            | {{"picked_batch": "i32", "picked_head": "i32"}}
            | dict.fromkeys(("valid_batch", "SPLIT", "BLOCK_N"), "constexpr"),
            {{"valid": None, "valid_batch": 0, "SPLIT": split, **LAUNCH["gather"]}},
        )
    yield _aot(
        merge,
        {{"out": "*{element}", **parts, "n": "*i32", "valid": "constexpr", **tables, "heads": "*i32", "batch": "i32"}}
        | {{"chunk": "i32", **written, **dict.fromkeys(("valid_batch", "BLOCK_P"), "constexpr")}},
        {{"valid": None, "valid_batch": 0, "BLOCK_P": {BLOCK_P}, **LAUNCH["merge"]}},
    )


def _aot(kernel, signature, config):
    unaligned = ("batch", "served", "features", "parts", "scale_log2")
    attrs = {{
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unaligned
    }}
    return {{
        "kernel": kernel,
        "signature": signature,
        "constexprs": {{name: value for name, value in config.items() if signature.get(name) == "constexpr"}},
        "attrs": attrs,
        "options": {{k: v for k, v in config.items() if k not in signature}} | {{"enable_fp_fusion": True}},
    }}
'''
