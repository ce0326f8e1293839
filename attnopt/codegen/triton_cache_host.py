"""The host's side of an emitted Triton step of a cache: what is launched, how, and what a compiler is told of it."""

from __future__ import annotations

from attnopt.codegen import triton_decode_host
from attnopt.codegen.spec import CacheStep
from attnopt.codegen.triton_cache_write import ROWS as WRITE_ROWS
from attnopt.codegen.triton_decode_host import BLOCK_P, merge_warps
from attnopt.codegen.triton_text import TRITON_DTYPES

# The most rows of a tile, as triton_decode.py has them; more rows are more tiles.
MAX_ROWS, MAX_ROWS_FLOAT = 64, 32


def launch(spec: CacheStep) -> tuple[int, dict[int, int], int]:
    """(slots per block, warps of a tile by its rows, pipeline stages); a tile has no more rows than are named."""
    block, warps, stages = triton_decode_host.launch(spec)
    rows = (n for n in (16, 32, 64) if n <= (MAX_ROWS_FLOAT if spec.dtype == "float32" else MAX_ROWS))
    # In four warps, 64 rows of 256 features spill 388 bytes on sm_90, in eight none.
    wide = max(spec.head_dim, spec.head_dim_v) > 128
    return block, {n: 8 if wide and n == MAX_ROWS else warps for n in rows}, stages


def launcher(spec: CacheStep) -> str:
    heads, groups, dim, dim_v = spec.heads, spec.kv_heads, spec.head_dim, spec.head_dim_v
    upcast, downcast = "", ""
    if spec.dtype == "bfloat16":
        upcast = """
    kept = keys, values
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        q, k, v, keys, values = (x.float() for x in (q, k, v, keys, values))"""
        downcast = """
    if INTERPRETED:
        for cache, wide in zip(kept, (keys, values), strict=True):
            cache.copy_(wide)"""
    return f'''

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(attend, triton.JITFunction)


def _check(q, k, v, keys, values, n, valid, table, spans):
    batch, tokens, slots = q.shape[0], q.shape[2], keys.shape[1]
    shapes = [tuple(x.shape) for x in (q, k, v, keys, values, n, table, spans)]
    new = (batch, {groups}, tokens, {dim}), (batch, {groups}, tokens, {dim_v})
    caches = (batch, slots, {dim}), (batch, slots, {dim_v})
    wanted = [(batch, {heads}, tokens, {dim}), *new, *caches, (batch,), ({groups}, 4), ({heads}, 2)]
    if shapes != wanted or (valid is not None and valid.shape != (batch, tokens)):
        raise ValueError(f"q, k, v, keys, values, n, table, spans have shapes {{shapes}}; this kernel wants {{wanted}}")
    if not q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype == torch.{spec.dtype}:
        raise ValueError(f"q is {{q.dtype}} and the cache {{keys.dtype}}; this kernel wants {spec.dtype} throughout")
    if any(x.dtype != torch.int32 or not x.is_contiguous() for x in (n, table, spans)):
        raise ValueError("n and the tables of a cache are int32 and contiguous")
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("a slot of the cache is contiguous: it is not copied to be made so")
    if not (INTERPRETED or q.is_cuda):
        raise ValueError(f"Triton needs a GPU, and q is on {{q.device}}; set ATTNOPT_TARGET to cpu or reference")


def _ranks(valid):
    """(B, T): how many tokens are real up to and with each one, 0 for those that are not; None if all are."""
    if valid is None:
        return None
    if valid.shape[1] == 1:
        return valid.view(torch.int8)
    return valid.cumsum(1, dtype=torch.int32).mul_(valid)


def step(q, k, v, keys, values, n, valid, table, spans, scale, fresh):
    """q (B, {heads}, T, {dim}), k (B, {groups}, T, {dim}), v (B, {groups}, T, {dim_v}) -> (B, {heads}, T, {
        dim_v
    }), laid out tokens first.

    keys (B, S, {dim}), values (B, S, {dim_v}) and n int32 (B,) are attended, then written; valid bool (B, T) or None;
    table int32 ({groups}, 4), spans int32 ({heads}, 2). fresh: n is 0, and a prompt of more rows than a tile takes the
    kernel of a prefill. No value of a tensor is read here, but those of table and spans, once.
    """
    _check(q, k, v, keys, values, n, valid, table, spans)
    batch, tokens, dtype = q.shape[0], q.shape[2], q.dtype{upcast}
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, tokens, {heads}, {dim_v}), dtype=q.dtype, device=q.device).transpose(1, 2)
    if batch and tokens:
        ranks = _ranks(valid)
        with torch.cuda.device_of(q):
            if fresh and SHARE * tokens > max(WARPS):
                out = prefill("triton", q, k, v, valid, spans, scale)
            else:
                _attend(q, k, v, keys, values, n, ranks, table, spans, scale, out)
            _write(k, v, keys, values, n, ranks, table){downcast}
    return out.to(dtype)


def _attend(q, k, v, keys, values, n, ranks, table, spans, scale, out):
    if scale < 0:
        # The kernel takes each row's largest score before it scales.
        q, scale = -q, -scale
    batch, _, tokens, _ = q.shape
    rows = min(max(WARPS), max(16, triton.next_power_of_2(SHARE * tokens)))
    tiles = triton.cdiv(SHARE * tokens, rows)
    work = cache_list(table, batch, tiles)
    if work.slots != keys.shape[1]:
        raise ValueError(f"the table ends at slot {{work.slots}}, and the cache has {{keys.shape[1]}}")
    partial = torch.empty((batch, work.partials, SHARE * tokens, {dim_v}), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((batch, work.partials, SHARE * tokens), dtype=torch.float32, device=q.device)
    attend[(work.items.numel() * batch * tiles,)](
        *(q, k, v, keys, values, out, partial, partial_lse, n, n if ranks is None else ranks, table, spans),
        *(work.items, work.parts, batch, tiles, tokens, work.chunk, work.partials, scale * 1.4426950408889634),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:2], *values.stride()[:2]),
        0 if ranks is None else ranks.stride(0),
        PADDED=ranks is not None,
        ROWS=rows,
        BLOCK_T=min(LAUNCH["BLOCK_N"], max(16, triton.next_power_of_2(tokens))),
        num_warps=WARPS[rows],
        **LAUNCH,
        enable_fp_fusion=True,
    )
    if work.partials:
        merge[(work.split.numel() * SHARE * tokens * batch,)](
            *(out, partial, partial_lse, n, table, work.split, work.parts, batch, tokens, work.chunk, work.partials),
            BLOCK_P={BLOCK_P},
            num_warps={merge_warps(spec)},
            enable_fp_fusion=True,
        )


def _write(k, v, keys, values, n, ranks, table):
    batch, _, tokens, _ = k.shape
    tiles = triton.cdiv({groups} * tokens, {WRITE_ROWS})
    counts = n
    if ranks is not None and tiles > 1:
        counts = ranks.amax(1)
    write[(batch * tiles,)](
        *(k, v, keys, values, n, n if ranks is None else ranks, counts, table, tiles, tokens),
        *(*k.stride()[:3], *v.stride()[:3], *keys.stride()[:2], *values.stride()[:2]),
        0 if ranks is None else ranks.stride(0),
        PADDED=ranks is not None,
        ADVANCE=tiles == 1,
        ROWS={WRITE_ROWS} if tiles > 1 else triton.next_power_of_2({groups} * tokens),
        enable_fp_fusion=True,
    )
    if tiles > 1:
        n.add_(tokens if ranks is None else counts)
'''


def aot(spec: CacheStep) -> str:
    element = TRITON_DTYPES[spec.dtype]
    return f'''

def aot_signatures(tokens=1):
    """Per kernel what triton.compile needs, as the JIT would have it for aligned tensors, `tokens` new ones."""
    rows = min(max(WARPS), max(16, triton.next_power_of_2(SHARE * tokens)))
    new = ("new_k_batch", "new_k_head", "new_k_token", "new_v_batch", "new_v_head", "new_v_token")
    strides = (*new, "k_batch", "k_slot", "v_batch", "v_slot")
    moved = dict.fromkeys(("new_k", "new_v", "k", "v"), "*{element}")
    signature = {{
        "q": "*{element}",
        **moved,
        "out": "*{element}",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("lengths", "ranks", "table", "spans", "items", "parts"), "*i32"),
        **dict.fromkeys(("batch", "tiles"), "i32"),
        "tokens": "constexpr" if tokens == 1 else "i32",
        **dict.fromkeys(("chunk", "partials"), "i32"),
        "scale_log2": "fp32",
        **dict.fromkeys(("q_batch", "q_head", "q_token", *strides), "i32"),
        **dict.fromkeys(("ranks_batch", "PADDED", "ROWS", "BLOCK_T", "BLOCK_N"), "constexpr"),
    }}
    block = min(LAUNCH["BLOCK_N"], max(16, triton.next_power_of_2(tokens)))
    fixed = {{"tokens": tokens, "ranks_batch": 0, "PADDED": False, "ROWS": rows, "BLOCK_T": block}}
    yield _aot(attend, signature, {{**fixed, **LAUNCH, "num_warps": WARPS[rows]}})
    signature = {{
        "out": "*{element}",
        **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
        **dict.fromkeys(("lengths", "table", "split", "parts"), "*i32"),
        **dict.fromkeys(("batch", "tokens", "chunk", "partials"), "i32"),
        "BLOCK_P": "constexpr",
    }}
    yield _aot(merge, signature, {{"BLOCK_P": {BLOCK_P}, "num_warps": {merge_warps(spec)}}})
    signature = {{
        **moved,
        **dict.fromkeys(("lengths", "ranks", "counts", "table"), "*i32"),
        "tiles": "i32",
        "tokens": "constexpr",
        **dict.fromkeys(strides, "i32"),
        **dict.fromkeys(("ranks_batch", "PADDED", "ADVANCE", "ROWS"), "constexpr"),
    }}
    fixed = {{"tokens": 1, "ranks_batch": 0, "PADDED": False, "ADVANCE": True}}
    yield _aot(write, signature, {{**fixed, "ROWS": triton.next_power_of_2({spec.kv_heads})}})


def _aot(kernel, signature, config):
    unaligned = ("batch", "tiles", "tokens", "partials", "scale_log2")
    attrs = {{
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unaligned
    }}
    options = {{**{{k: v for k, v in config.items() if k not in signature}}, "enable_fp_fusion": True}}
    return {{
        "kernel": kernel,
        "signature": signature,
        "constexprs": {{name: value for name, value in config.items() if signature.get(name) == "constexpr"}},
        "attrs": attrs,
        "options": options,
    }}
'''
