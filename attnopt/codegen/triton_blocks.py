"""The Triton target of a prefill over lists of blocks: one program for each block of query rows of each served head.

A program reads its list on the device, so that nothing waits for the selection. Every visited block is a tile, and a
branch on a scalar masks those that causality, a window, padding or the end of the keys cuts. There are two loops: heads
without a bound load values ahead like any prefill, and for the others the load of the values, the exponentials and
their product stand behind a branch on whether any row needs them.

A block that is too large for one tile is divided, among rows too. What its rows need together is then found by a launch
of its own, of scores alone and of heads with a bound alone. Nothing here has been timed on a GPU.

Triton itself is imported by the emitted files alone.
"""

from __future__ import annotations

from textwrap import indent

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import BLOCKS, BlockPrefill
from attnopt.codegen.triton_blocks_host import host_text
from attnopt.codegen.triton_text import check, dim_mask, fetch_text, load_text, mask_argument, need_triton, padded_dim
from attnopt.registry import TARGETS

# (side of a tile, warps, pipeline stages) by the side of a block.
Launch = tuple[int, int, int]
LAUNCHES_HALF: dict[str, dict[int, Launch]] = {
    # Blocks of 64 take 150 registers at D = 128, blocks of 128 take 212; two of the former share an SM.
    "descriptors": {16: (16, 1, 3), 32: (32, 2, 3), 64: (64, 4, 3), 128: (128, 8, 2)},
    # A tile of 128 would spill 44 bytes on sm_80, and need more shared memory than its smaller GPUs have.
    "pointers": {16: (16, 1, 3), 32: (32, 2, 3), 64: (64, 4, 2), 128: (64, 8, 2)},
    # On gfx942 a tile of 128 spills with eight warps; four have 412 of 512 registers.
    "hip": {16: (16, 1, 1), 32: (32, 2, 1), 64: (64, 4, 1), 128: (128, 4, 1)},
}
LAUNCHES_HALF_256: dict[str, dict[int, Launch]] = {
    "descriptors": {16: (16, 2, 2), 32: (32, 4, 2), 64: (64, 8, 2), 128: (64, 8, 2)},
    "pointers": {16: (16, 2, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 2)},
    "hip": {16: (16, 2, 1), 32: (32, 4, 1), 64: (32, 4, 1), 128: (32, 4, 1)},
}
# float32 goes without tensor cores, which would round to tf32, and so needs small tiles and no descriptors.
LAUNCHES_FLOAT: dict[int, Launch] = {16: (16, 2, 1), 32: (32, 8, 1), 64: (32, 8, 1), 128: (32, 8, 1)}
LAUNCHES_FLOAT_256: dict[int, Launch] = dict.fromkeys(BLOCKS, (16, 4, 1))


def launches(spec: BlockPrefill) -> dict[str, Launch]:
    """The shipped launch configurations of `spec`, by how tiles are loaded; tests compile them ahead of time."""
    wide = padded_dim(max(spec.head_dim, spec.head_dim_v)) > 128
    if spec.dtype == "float32":
        return dict.fromkeys(("pointers", "hip"), (LAUNCHES_FLOAT_256 if wide else LAUNCHES_FLOAT)[spec.block])
    return {loads: by_block[spec.block] for loads, by_block in (LAUNCHES_HALF_256 if wide else LAUNCHES_HALF).items()}


def splits(spec: BlockPrefill) -> bool:
    """Whether a block is larger than a tile in any launch of `spec`."""
    return any(tile < spec.block for tile, _, _ in launches(spec).values())


def _header(spec: BlockPrefill) -> str:
    rows = "".join(
        f'\n    "{loads}": {{"TILE": {tile}, "num_warps": {warps}, "num_stages": {stages}}},'
        for loads, (tile, warps, stages) in launches(spec).items()
    )
    padding = " and ``pad[b, j]``" if spec.padded else ""
    capacity = ', "capacity"' if splits(spec) else ""
    return f'''"""{str(spec)[0].upper()}{str(spec)[1:]}.
Emitted by attnopt; edits are overwritten.

Within a listed block the query at position p keeps key j where ``j <= p and p - j < window``{padding}.
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton_descriptors import descriptor, descriptors_serve

# Query rows, and keys, of a block.
BLOCK = tl.constexpr({spec.block})
# Scores are in base 2.
LOG2E = tl.constexpr(1.4426950408889634)
# By how tiles are loaded; of a tile, TILE query rows and keys.
LAUNCHES = {{{rows}
}}
# What changes from call to call makes no kernel of its own.
CHANGING = ["queries", "keys", "row_blocks", "served", "window"{capacity}]
CHANGING += [f"{{table}}_{{step}}" for table in ("lse", "counts", "blocks") for step in ("batch", "head", "row")]
'''


def _kernel_start(spec: BlockPrefill) -> str:
    pad_pointers = "\n    pad,\n    whole," if spec.padded else ""
    needs, capacity, find = (
        ("\n    needs,", "\n    capacity,", "\n    FIND: tl.constexpr,") if splits(spec) else ("",) * 3
    )
    return f'''

@triton.jit(do_not_specialize=CHANGING)
def block_prefill(
    q,
    k,
    v,
    out,
    lse,
    skipped,
    heads,
    counts,
    blocks,
    bounds,{pad_pointers}{needs}
    queries,
    keys,
    row_blocks,
    served,
    window,{capacity}
    scale_log2,
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
    out_row,
    out_dim,
    lse_batch,
    lse_head,
    lse_row,
    counts_batch,
    counts_head,
    counts_row,
    blocks_batch,
    blocks_head,
    blocks_row,
    TILE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,{find}
):
    """{_kernel_docstring(spec)}"""
'''


def _kernel_docstring(spec: BlockPrefill) -> str:
    what = "TILE query rows" if splits(spec) else "One block of query rows"
    needs = (
        """
    needs: where TILE < BLOCK, zeros int32 (batch, served, row_blocks, capacity), else None. Of heads with a bound, a
    launch with FIND writes there first whether any row needs a visit. It skips none: no largest score would change.
"""
        if splits(spec)
        else "\n"
    )
    return f"""{what} of one served head, against the blocks of keys that their list names.

    q, k, v: tensor descriptors if DESCRIPTORS, else pointers. window: at least 1. skipped: int32, contiguous.
    lse: float32 (batch, served, queries), or None where it is not wanted.{needs}    """


def _program_text(spec: BlockPrefill) -> str:
    """From the program's number to its rows and its list."""
    tile = """    pairs = tl.num_programs(0) // row_blocks
    row_block = row_blocks - 1 - tl.program_id(0) // pairs
    first = row_block * BLOCK"""
    needs = ""
    if splits(spec):
        tile = """    tiles = (queries + TILE - 1) // TILE
    pairs = tl.num_programs(0) // tiles
    first = (tiles - 1 - tl.program_id(0) // pairs) * TILE
    row_block = first // BLOCK"""
        needs = f"""
    PARTS: tl.constexpr = {spec.block} // TILE
    if PARTS > 1:
        needs += (pair.to(tl.int64) * row_blocks + row_block) * capacity"""
    return f"""    # The last rows first, whose lists are the longest as a rule; side by side heads, which share keys.
{tile}
    pair = tl.program_id(0) % pairs
    place = pair % served
    entry = pair // served
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = entry.to(tl.int64)
    head = tl.load(heads + place)
    kv_head = head // {spec.share}
    count = tl.load(counts + batch * counts_batch + place.to(tl.int64) * counts_head + row_block * counts_row)
    listed = blocks + batch * blocks_batch + place.to(tl.int64) * blocks_head + row_block.to(tl.int64) * blocks_row
    bound = tl.load(bounds + pair) * LOG2E{needs}
"""


def _row_text(spec: BlockPrefill) -> str:
    """Its queries, sums of its rows, and where its list begins."""
    dim, dim_v = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v)
    q_load = load_text("q + q_tile", "rows[:, None] < queries", dim_mask(spec.head_dim, "dims[None, :]"))
    pad_rows = "\n    pad += batch * keys\n    whole += batch * ((keys + BLOCK - 1) // BLOCK)" if spec.padded else ""
    return f"""
    inner = tl.arange(0, TILE)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
    rows = first + inner
    if DESCRIPTORS:
        # What lies past the last row or dim is read as zero.
        query_tile = q.load([entry, head, first, 0]).reshape([TILE, {dim}])
    else:
        q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row
        k += batch * k_batch + kv_head.to(tl.int64) * k_head
        v += batch * v_batch + kv_head.to(tl.int64) * v_head
        q_tile = inner[:, None] * q_row + dims[None, :]
        k_tile = inner[None, :] * k_row + dims[:, None]
        v_tile = inner[:, None] * v_row + dims_v[None, :]
        query_tile = {q_load}

    # Per row: the largest score in base 2, the sum of weights relative to it, and the weighted sum of values.
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, {dim_v}], tl.float32)
    skips = 0

    # Every row keeps all of the keys of a tile that begins between these two.
    position = first + keys - queries
    whole_first = position + TILE - window
    whole_last = position - (TILE - 1){pad_rows}
    # The first of the list, then from its last down; `block` is read one visit ahead.
    block = tl.load(listed, mask=count > 0, other=0)
    unbounded = tl.where(bound == float("-inf"), count, 0)
"""


def _visit(spec: BlockPrefill) -> str:
    """Lines of a loop's body that say which keys it is about, and read ahead whose turn is next."""
    holes = "\n        holes = tl.load(whole + block) == 0" if spec.padded else ""
    if not splits(spec):
        return f"""        start = block * BLOCK{holes}
        block = tl.load(listed + (count - 1 - visit))
"""
    return f"""        start = block * BLOCK + step % PARTS * TILE{holes}
        following = (step + 1) // PARTS
        block = tl.load(listed + tl.where(following == 0, 0, count - following))
"""


def _scores(spec: BlockPrefill) -> str:
    """Lines up to the scores of a tile, -inf where a key is not kept."""
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    tile = f"k.load([entry, kv_head, start, 0]).reshape([TILE, {padded_dim(spec.head_dim)}]).T"
    mask = "cols[None, :] < keys", dim_mask(spec.head_dim, "dims[:, None]")
    at = "k_block = k + start.to(tl.int64) * k_row"
    limit, holes, within = "", "", "window.to(tl.uint32)"
    if spec.padded:
        limit = """
            real = tl.load(pad + cols, mask=cols < keys, other=0) != 0
            limit = tl.where(real, window, 0).to(tl.uint32)"""
        holes, within = " | holes", "limit[None, :]"
    return f"""        cols = start + inner
{fetch_text("key_tile", tile, at, load_text("k_block + k_tile", *mask))}
        scores = tl.dot(query_tile, key_tile{exact})
        if (start < whole_first) | (start > whole_last){holes}:
            # Kept where 0 <= p - j < limit: one comparison, as without its sign a negative number is large.{limit}
            back = ((position + inner)[:, None] - cols[None, :]).to(tl.uint32)
            scores = tl.where(back < {within}, scores, float("-inf"))
        here = tl.max(scores, 1) * scale_log2
"""


def _need(here: str) -> str:
    """Lines that set `need`: 0 where no row keeps anything, 1 where what is kept is below the bound, else 2."""
    return f"""        need = tl.where({here} < top + bound, 1, 2)
        need = tl.max(tl.where(({here} == float("-inf")) | (rows >= queries), 0, need), 0)
"""


def _mix(spec: BlockPrefill) -> str:
    """Lines that add a tile to the result of its rows."""
    exact = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    tile = f"v.load([entry, kv_head, start, 0]).reshape([TILE, {padded_dim(spec.head_dim_v)}])"
    mask = "cols[:, None] < keys", dim_mask(spec.head_dim_v, "dims_v[None, :]")
    at = "v_block = v + start.to(tl.int64) * v_row"
    return f"""        new_top = tl.maximum(top, here)
        # A row that has met no kept key yet: -inf minus -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
{fetch_text("values", tile, at, load_text("v_block + v_tile", *mask))}
        acc = tl.dot(weights.to(values.dtype), values, acc{exact})
        top = new_top
"""


def _loops(spec: BlockPrefill) -> str:
    visit, scores, mix = _visit(spec), _scores(spec), _mix(spec)
    if splits(spec):
        return _find_loop(spec) + _split_loops(spec)
    return f"""
    # A head without a bound visits all of its list.
    for visit in range(0, unbounded):
{visit}{scores}{mix}
    # The others skip a block that no row needs.
    for visit in range(unbounded, count):
{visit}{scores}        # 0 where no row keeps any of the keys, 1 where all scores kept are below the bound, else 2.
{_need("here")}        skips += (need == 1).to(tl.int32)
        if need == 2:
{indent(mix, "    ")}"""


def _find_loop(spec: BlockPrefill) -> str:
    """The launch that finds out what heads with a bound need, where a block is more than a tile."""
    body = f"""{_visit(spec)}{_scores(spec)}        peak = tl.where(step % PARTS == 0, here, tl.maximum(peak, here))
        if step % PARTS == PARTS - 1:
            # 0 where no row keeps any of the keys, 1 where all scores kept are below the bound, else 2.
{indent(_need("peak"), "    ")}            tl.atomic_max(needs + step // PARTS, need)
            top = tl.maximum(top, peak)
"""
    return f"""
    if FIND:
        peak = top
        for step in range(unbounded * PARTS, count * PARTS):
{indent(body, "    ")}        return
"""


def _split_loops(spec: BlockPrefill) -> str:
    visit, scores, mix = _visit(spec), _scores(spec), _mix(spec)
    return f"""
    # A head without a bound visits all of its list.
    for step in range(0, unbounded * PARTS):
{visit}{scores}{mix}
    # The others skip a block that no row needs.
    for step in range(unbounded * PARTS, count * PARTS):
{visit}        if PARTS > 1:
            need = tl.load(needs + step // PARTS)
        else:
{indent(scores + _need("here"), "    ")}        skips += ((need == 1) & (step % PARTS == 0)).to(tl.int32)
        if need == 2:
            if PARTS > 1:
{indent(scores, "        ")}{indent(mix, "    ")}"""


def _kernel_end(spec: BlockPrefill) -> str:
    mask = mask_argument("rows[:, None] < queries", dim_mask(spec.head_dim_v, "dims_v[None, :]"))
    return f"""
    tl.store(skipped + pair.to(tl.int64) * row_blocks + row_block, skips)
    # A row without a kept key is 0, and its logarithm -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if lse is not None:
        # From base 2 to the natural logarithm.
        lse += batch * lse_batch + place.to(tl.int64) * lse_head
        tl.store(lse + rows.to(tl.int64) * lse_row, (top + tl.log2(total)) / LOG2E, mask=rows < queries)
    out += batch * out_batch + head.to(tl.int64) * out_head + first.to(tl.int64) * out_row
    out_tile = inner[:, None] * out_row + dims_v[None, :] * out_dim
    tl.store(out + out_tile, acc.to(out.dtype.element_ty){mask})
"""


def source(spec: BlockPrefill) -> str:
    """The emitted file; needs no Triton. ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    kernel = _kernel_start(spec) + _program_text(spec) + _row_text(spec) + _loops(spec) + _kernel_end(spec)
    return _header(spec) + kernel + host_text(spec, splits(spec)) + footer(spec, "self_check_blocks", "prefill")


@TARGETS.register("triton block_prefill")
class Triton:
    @staticmethod
    def emit(spec: BlockPrefill) -> str:
        need_triton()
        return source(spec)
