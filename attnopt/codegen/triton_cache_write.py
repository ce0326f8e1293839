"""Text of the Triton kernel that writes the new tokens of a ragged cache that are kept, after they were attended."""

from __future__ import annotations

from attnopt.codegen.spec import CacheStep
from attnopt.codegen.triton_text import dim_mask, load_text, mask_argument, padded_dim

# Rows, a KV head and a token each, of a program: 64 of 128 features are 16 KiB of bfloat16.
ROWS = 64


def _moved(spec: CacheStep, name: str, dim: int, dims: str) -> str:
    conditions = "kept[:, None]", dim_mask(dim, f"{dims}[None, :]")
    source = f"new_{name} + from_{name}[:, None] + {dims}[None, :]"
    target = f"{name} + to_{name}[:, None] + {dims}[None, :]"
    offset = f"token.to(tl.int64) * new_{name}_token"
    return f"""    {dims} = tl.arange(0, {padded_dim(dim)})
    from_{name} = entry * new_{name}_batch + group.to(tl.int64) * new_{name}_head + {offset}
    to_{name} = entry * {name}_batch + slot.to(tl.int64) * {name}_slot
    moved = {load_text(source, *conditions)}
    tl.store({target}, moved{mask_argument(*conditions)})
"""


def write_kernel(spec: CacheStep) -> str:
    return f'''

@triton.jit(do_not_specialize=["tiles"])
def write(
    new_k,
    new_v,
    k,
    v,
    lengths,
    ranks,
    counts,
    table,
    tiles,
    tokens,
    new_k_batch,
    new_k_head,
    new_k_token,
    new_v_batch,
    new_v_head,
    new_v_token,
    k_batch,
    k_slot,
    v_batch,
    v_slot,
    ranks_batch,
    PADDED: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of rows, a KV head and a new token each: those that later tokens will not have overwritten, into their
    slots. A token that a full head has no slot for is dropped; the lengths count it, and so says that it was.

    counts (B,), if PADDED and not ADVANCE: real tokens. ADVANCE: this program has all rows of its sequence, and adds
    them to the length itself.
    """
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    group = row // tokens
    token = row % tokens
    inside = group < {spec.kv_heads}
    seen = tl.load(lengths + entry)
    rank = token + 1
    count = tokens
    if PADDED:
        rank = tl.load(ranks + entry * ranks_batch + token, mask=inside, other=0).to(tl.int32)
        if ADVANCE:
            count = tl.max(rank, 0)
        else:
            count = tl.load(counts + entry)
    capacity = tl.load(table + group * 4 + 1, mask=inside, other=1)
    sink = tl.load(table + group * 4 + 2, mask=inside, other=0)
    ring = capacity - sink
    ring = tl.where(tl.load(table + group * 4 + 3, mask=inside, other=0) > ring, {1 << 30}, ring)
    position = seen + rank - 1
    past = tl.maximum(position - sink, 0)
    slot = tl.where(position < sink, position, sink + past % ring)
    lasts = (position < sink) | (position >= seen + count - ring)
    kept = inside & (rank > 0) & lasts & (slot < capacity)
    slot += tl.load(table + group * 4, mask=inside, other=0)
{_moved(spec, "k", spec.head_dim, "dims")}{_moved(spec, "v", spec.head_dim_v, "dims_v")}    if ADVANCE:
        # Every thread has read it by then.
        tl.debug_barrier()
        tl.store(lengths + entry, seen + count)
'''
