"""The Triton target for a step of heads that select tokens: the device decides who selects, and nobody waits for it.

Five kernels. `decide` says of each query head whether it selects in this step, and writes down what that changes.
`scan` and `pick` end at once where none does, so that a step which reuses lists reads no key that it does not attend
to. `scan` writes the scores of all keys, or of the features that are kept of them; `pick` finds the least score that is
kept, digit by digit, and the positions from there on: torch.topk would go through the scores in every step, and takes
any of those that are equal. `gather` attends to one list (triton_token_gather.py), and `merge` adds up the parts of
those that are divided. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from attnopt.codegen.reference_token_step import CHANNELS, COUNT, EVERY, SOURCE
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.triton_decode_host import merge_warps
from attnopt.codegen.triton_text import check, dim_mask, load_text, mask_argument, need_triton, padded_dim
from attnopt.codegen.triton_token_gather import gather_kernel, merge_kernel
from attnopt.codegen.triton_token_host import WIDTH, aot, launcher, launches
from attnopt.registry import TARGETS

# The most query heads of a KV head, which are the rows of one tile.
MAX_SHARE = 64
# Bits of a score that `pick` looks at in turn, the highest first.
DIGITS = (11, 11, 10)


def _header(spec: TokenStep) -> str:
    rows = "".join(
        f'\n    "{name}": {{{", ".join(f"{key!r}: {value}" for key, value in config.items())}}},'.replace("'", '"')
        for name, config in {**launches(spec), "merge": {"num_warps": merge_warps(spec)}}.items()
    )
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}.
Emitted by attnopt; edits are overwritten.

A query head attends to its first and last keys and to those that it selected, or that an earlier layer did. Rows of
rules: keys that are selected, sink, recent keys, steps that a selection serves, features of the scores, source.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.decode_list import cache_list
from attnopt.codegen.token_lists import token_lists

LAUNCH = {{{rows}
}}
if torch.version.hip:
    # An AMD compute unit has 64 KiB of shared memory.
    LAUNCH["scan"]["num_stages"] = 2
'''


def _decide(spec: TokenStep) -> str:
    heads, groups, share, dim = spec.heads, spec.kv_heads, spec.share, spec.head_dim
    mask = dim_mask(dim, "dims")
    return f'''

@triton.jit(do_not_specialize=["features"])
def decide(
    q,
    k,
    n,
    valid,
    table,
    rules,
    similar,
    asked,
    age,
    chosen,
    labels,
    due,
    features,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    labels_batch,
    labels_row,
    valid_batch,
    FEATURES: tl.constexpr,
):
    """Whether a query head selects, and the features of the newest key of its KV head; in one warp, as what is read
    here is written here too."""
    entry = (tl.program_id(0) // {heads}).to(tl.int64)
    head = tl.program_id(0) % {heads}
    place = entry * {heads} + head
    counts = 1
    if valid is not None:
        counts = tl.load(valid + entry * valid_batch).to(tl.int32)
    own = (tl.load(rules + head * {WIDTH} + {COUNT}) > 0) & (tl.load(rules + head * {WIDTH} + {SOURCE}) < 0)
    since = tl.load(age + place)
    limit = tl.load(similar + head)
    dims = tl.arange(0, {padded_dim(dim)})
    query = {load_text("q + entry * q_batch + head * q_head + dims", mask)}
    now = query.to(tl.float32)
    then = {load_text(f"asked + place * {dim} + dims", mask)}.to(tl.float32)
    near = limit * tl.sqrt(tl.sum(now * now, 0)) * tl.sqrt(tl.sum(then * then, 0))
    apart = (limit > 0) & (tl.sum(now * then, 0) < near)
    over = (since < 0) | (since + 1 >= tl.load(rules + head * {WIDTH} + {EVERY})) | apart
    selects = own & (counts != 0) & over
    tl.store(due + place, selects.to(tl.int32))
    tl.store(age + place, tl.where(selects, 0, since + counts), mask=own)
    tl.store(asked + place * {dim} + dims, query, mask=dims < tl.where(selects, {dim}, 0))
    if FEATURES > 0:
        group = head // {share}
        slot = tl.load(n + entry) - 1
        fits = (slot >= 0) & (slot < tl.load(table + group * 4 + 1))
        if (head % {share} == 0) & (counts != 0) & fits:
            newest = (tl.load(table + group * 4) + slot).to(tl.int64)
            feature = tl.arange(0, FEATURES)
            live = feature < features
            index = tl.load(chosen + (entry * {groups} + group) * features + feature, mask=live, other=0)
            key = tl.load(k + entry * k_batch + newest * k_slot + index, mask=live)
            tl.store(labels + entry * labels_batch + feature.to(tl.int64) * labels_row + newest, key, mask=live)
'''


def _scan(spec: TokenStep) -> str:
    heads, groups, share = spec.heads, spec.kv_heads, spec.share
    rows = padded_dim(share)
    row = mask_argument("" if rows == share else f"row < {share}")
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    q_load = load_text("q + q_row[:, None] + dims[None, :]", "full[:, None]", dim_mask(spec.head_dim, "dims[None, :]"))
    k_load = load_text("k_block + k_tile", "live[None, :]", dim_mask(spec.head_dim, "dims[:, None]"))
    return f'''

@triton.jit(do_not_specialize=["batch", "served", "features"])
def scan(
    q,
    k,
    labels,
    chosen,
    n,
    table,
    rules,
    due,
    places,
    scores,
    items,
    batch,
    served,
    chunk,
    features,
    room,
    q_batch,
    q_head,
    k_batch,
    k_slot,
    labels_batch,
    labels_row,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores of one chunk of the keys of one KV head, for those of its query heads that select now."""
    # Which chunk: chunk * {groups} KV heads + KV head.
    item = tl.load(items + tl.program_id(0) // batch)
    # 64 bits: a cache has more elements than 32 bits count.
    entry = (tl.program_id(0) % batch).to(tl.int64)
    group = item % {groups}
    row = tl.arange(0, {rows})
    head = group * {share} + row
    selects = tl.load(due + entry * {heads} + head{row}{", other=0" if row else ""})
    if tl.max(selects, 0) == 0:
        # No key is read.
        return

    length = tl.minimum(tl.load(n + entry), tl.load(table + group * 4 + 1))
    begin = item // {groups} * chunk
    end = tl.minimum(begin + chunk, length)
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    # A head that selects as many keys as there are takes them all.
    needed = (selects != 0) & (tl.load(rules + head * {WIDTH} + {COUNT}{row}) < length)
    narrow = needed & (tl.load(rules + head * {WIDTH} + {CHANNELS}{row}) > 0)
    full = needed & (narrow == 0)
    segment = tl.load(table + group * 4).to(tl.int64)
    q_row = entry * q_batch + head.to(tl.int64) * q_head
    local = tl.arange(0, BLOCK_N)
    written = (entry * served + tl.load(places + head{row})) * room
    written = scores + written[:, None] + local[None, :]
    if tl.max(full.to(tl.int32), 0) > 0:
        dims = tl.arange(0, {padded_dim(spec.head_dim)})
        queries = {q_load}
        k += entry * k_batch + segment * k_slot
        k_tile = local[None, :] * k_slot + dims[:, None]
        for block in range(0, blocks):
            start = begin + block * BLOCK_N
            live = start + local < end
            k_block = k + start.to(tl.int64) * k_slot
            keys = {k_load}
            found = tl.dot(queries, keys{exact})
            tl.store(written + start, found, mask=full[:, None] & live[None, :])
    if FEATURES > 0:
        feature = tl.arange(0, FEATURES)
        real = feature < features
        if tl.max(narrow.to(tl.int32), 0) > 0:
            index = tl.load(chosen + (entry * {groups} + group) * features + feature, mask=real, other=0)
            # A head that asks for fewer features has 0 at the others.
            asks = feature[None, :] < tl.load(rules + head * {WIDTH} + {CHANNELS}{row})[:, None]
            queries = tl.load(q + q_row[:, None] + index[None, :], mask=narrow[:, None] & asks, other=0.0)
            labels += entry * labels_batch + segment
            tile = feature.to(tl.int64)[:, None] * labels_row + local[None, :]
            for block in range(0, blocks):
                start = begin + block * BLOCK_N
                live = start + local < end
                keys = tl.load(labels + tile + start, mask=real[:, None] & live[None, :], other=0.0)
                found = tl.dot(queries, keys{exact})
                tl.store(written + start, found, mask=narrow[:, None] & live[None, :])
'''


def _digit(shift: int, bits: int) -> str:
    """Lines of `pick` that add a digit to the least score that is kept."""
    among = "live" if shift + bits == 32 else f"live & (score >> {shift + bits} == least)"
    digit = f"score >> {shift} & {(1 << bits) - 1}" if shift else f"score & {(1 << bits) - 1}"
    start = "" if shift + bits == 32 else f"least << {bits} | "
    return f"""
    # How many scores with the digits so far have each digit, of {bits} bits.
    seen = tl.zeros([{1 << bits}], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        seen += tl.histogram(({digit}).to(tl.int32), {1 << bits}, mask={among})
    larger = tl.sum(seen, 0) - tl.cumsum(seen, 0)
    here = (larger < left) & (larger + seen >= left)
    digit = tl.sum(tl.where(here, tl.arange(0, {1 << bits}), 0), 0).to(tl.uint32)
    left -= tl.sum(tl.where(here, larger, 0), 0)
    least = {start}digit
"""


def _pick(spec: TokenStep) -> str:
    shifts = [32 - sum(DIGITS[: n + 1]) for n in range(len(DIGITS))]
    digits = "".join(_digit(shift, bits) for shift, bits in zip(shifts, DIGITS, strict=True))
    return f'''

@triton.jit
def _ordered(at, live):
    """Scores as unsigned integers in the same order; both zeros are the same."""
    score = tl.load(at, mask=live, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["batch", "served"])
def pick(
    scores,
    picked,
    n,
    table,
    rules,
    due,
    heads,
    batch,
    served,
    room,
    picked_batch,
    picked_head,
    BLOCK: tl.constexpr,
):
    """What one query head selects: positions ascending, and -1 behind them where there are fewer."""
    place = tl.program_id(0) // batch
    entry = (tl.program_id(0) % batch).to(tl.int64)
    head = tl.load(heads + place)
    if tl.load(due + entry * {spec.heads} + head) == 0:
        return

    length = tl.minimum(tl.load(n + entry), tl.load(table + head // {spec.share} * 4 + 1))
    count = tl.load(rules + head * {WIDTH} + {COUNT})
    scores += (entry * served + place) * room
    picked += entry * picked_batch + head * picked_head
    local = tl.arange(0, BLOCK)
    if length <= count:
        for start in range(0, count, BLOCK):
            at = start + local
            tl.store(picked + at, tl.where(at < length, at, -1), mask=at < count)
        return

    # How many of the scores that share all digits so far are kept.
    left = count
{digits}
    # All larger ones, and of those that are as large the first.
    taken = 0
    met = 0
    for start in range(0, length, BLOCK):
        at = start + local
        live = at < length
        score = _ordered(scores + at, live)
        equal = (live & (score == least)).to(tl.int32)
        keep = live & (score > least) | ((equal != 0) & (met + tl.cumsum(equal, 0) <= left))
        place_of = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(picked + place_of, at, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        met += tl.sum(equal, 0)
'''


def source(spec: TokenStep) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    if spec.share > MAX_SHARE:
        raise ValueError(f"{spec.share} query heads a KV head exceed {MAX_SHARE} rows of a tile")
    kernels = _decide(spec) + _scan(spec) + _pick(spec) + gather_kernel(spec) + merge_kernel(spec)
    return _header(spec) + kernels + launcher(spec) + aot(spec) + footer(spec, "self_check_tokens", "step")


@TARGETS.register("triton token_step")
class Triton:
    @staticmethod
    def emit(spec: TokenStep) -> str:
        need_triton()
        return source(spec)
