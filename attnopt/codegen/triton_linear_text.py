"""Pieces of text that the emitted Triton kernels of linear attention to far keys share: feature maps and states.

A kernel walks blocks of keys with the query rows whose windows end there: keys [n, n + BLOCK) beside the rows
[n + window, n + window + BLOCK). Key a of a block is far from row b beside it where a <= b, whatever the window is, and
what lies before the block is far from all of its rows, so that they need its state alone. Features are made from q and
k where they are used, and never written to memory.
"""

from __future__ import annotations

from attnopt.codegen.spec import Linear
from attnopt.codegen.triton_text import check, dim_mask, load_text, mask_argument, padded_dim

# The most features of a map, padded to a power of two: their state takes half of an SM's registers.
MAX_FEATURES = 128
KINDS = ("exp", "taylor")
LOG2_E = "1.4426950408889634"
LN_2 = "0.6931471805599453"


def features(spec: Linear) -> int:
    """How many a map has: as many as rows, or a constant, the rows and the products of every two."""
    return spec.rank if spec.kind == "exp" else 1 + spec.rank + spec.rank**2


def padded_features(spec: Linear) -> int:
    return padded_dim(features(spec))


def check_linear(spec: Linear) -> None:
    """ValueError where no kernel can be emitted for `spec`."""
    check(spec)
    if spec.kind not in KINDS:
        raise ValueError(f"the triton target has no feature maps of kind {spec.kind!r}; it has {', '.join(KINDS)}")
    if padded_features(spec) > MAX_FEATURES:
        raise ValueError(
            f"{spec.kind}/{spec.rank} has {features(spec)} features, and {MAX_FEATURES} are the most whose state fits "
            "into an SM: plan with maps of fewer features, or set ATTNOPT_TARGET to reference"
        )


def maps_of(spec: Linear, sides: str = "qk") -> list[str]:
    """The maps' tensors that kernels take, in their order; ck and cq are 0 for kind "taylor"."""
    norms = spec.kind == "exp"
    queries = ["wq", "bq", *(["cq"] if norms else [])]
    keys = ["wk", "bk", *(["ck"] if norms else [])]
    return [*(queries if "q" in sides else []), *(keys if "k" in sides else []), *(["u", "u0"] if "q" in sides else [])]


def exact(spec: Linear) -> str:
    """How features are multiplied: of bfloat16 as they are, of float32 without rounding, of float16 as tf32, which has
    its precision and the exponents that a key's feature of up to e^40 wants."""
    return {"float32": ', input_precision="ieee"', "float16": ', input_precision="tf32"'}.get(spec.dtype, "")


def narrow(spec: Linear, name: str) -> str:
    """Text of a float32 tile as the operand of a product."""
    return f"{name}.to(values.dtype)" if spec.dtype == "bfloat16" else name


def operand(spec: Linear, name: str) -> str:
    """Text of a tile of inputs as the operand of a product with features."""
    return f"{name}.to(tl.float32)" if spec.dtype == "float16" else name


def dot(spec: Linear, a: str, b: str, acc: str = "") -> str:
    return f"tl.dot({a}, {b}{acc and ', ' + acc}{exact(spec)})"


def map_text(spec: Linear) -> str:
    """`load_map`, `project`, `query_features` and `key_features` of the spec's kind."""
    return _load_map(spec) + (_exponentials(spec) if spec.kind == "exp" else _second_order(spec))


def _load_map(spec: Linear) -> str:
    rank, dim, tile = spec.rank, spec.head_dim, padded_dim(spec.rank)
    base = f" * {LOG2_E}" if spec.kind == "exp" else ""
    inside = mask_argument("" if rank == tile else f"at[None, :] < {rank}", dim_mask(dim, "dims[:, None]"))
    empty = 'float("-inf")' if spec.kind == "exp" else "0.0"
    bias_mask = "" if rank == tile else f", mask=at[None, :] < {rank}, other={empty}"
    if spec.dtype == "float32":
        parts, product = "weight, 0.0", 'tl.dot(x, weight, input_precision="ieee")'
    else:
        parts = "weight.to(x_type), (weight - weight.to(x_type).to(tl.float32)).to(x_type)"
        product = "tl.dot(x, weight, tl.dot(x, rest))"
    in_base = ", of exponents of 2" if spec.kind == "exp" else ""
    return f'''

@triton.jit
def load_map(w, slot, x_type: tl.constexpr):
    """A served head's map ({padded_dim(dim)}, {tile}), and what x_type leaves of it{in_base}."""
    at = tl.arange(0, {tile})
    dims = tl.arange(0, {padded_dim(dim)})
    places = w + slot * {rank * dim} + at[None, :] * {dim} + dims[:, None]
    weight = tl.load(places{inside}{", other=0.0" if inside else ""}){base}
    return {parts}


@triton.jit
def project(x, weight, rest, b, slot):
    """x (rows, {padded_dim(dim)}) times a map in two parts: one alone would cost as much as rounding x again."""
    at = tl.arange(0, {tile})
    # Loaded where it is added, as it would take registers all the time.
    bias = tl.load(b + slot * {rank} + at[None, :]{bias_mask}){base}
    return {product} + bias


@triton.jit
def row_factor(x, square, linear, constant):
    """linear . x - square |x|^2 + constant of every row, float32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * (linear[None, :] - square * wide), 1) + constant
'''


def _exponentials(spec: Linear) -> str:
    return f'''

@triton.jit
def query_features(x, weight, rest, b, slot, square, linear, constant):
    """f (rows, {padded_features(spec)}), at most 1, and (rows,): log2 of the factor that they still lack."""
    e = project(x, weight, rest, b, slot)
    top = tl.max(e, 1)
    return tl.exp2(e - top[:, None]), top + row_factor(x, square, linear, constant) * {LOG2_E}


@triton.jit
def key_features(x, weight, rest, b, slot, square):
    """f (rows, {padded_features(spec)}), at most e^40."""
    wide = x.to(tl.float32)
    norm = tl.sum(wide * wide, 1) * (square * {LOG2_E})
    return tl.exp2(tl.minimum(project(x, weight, rest, b, slot) - norm[:, None], 57.70780163555853))
'''


def _second_order(spec: Linear) -> str:
    rank, tile, size = spec.rank, padded_dim(spec.rank), padded_features(spec)
    if spec.dtype == "float32":
        spread = f"tl.dot(y, place{exact(spec)})"
    else:
        spread = """high = y.to(x_type)
    rest = (y - high.to(tl.float32)).to(x_type)
    place = place.to(x_type)
    spread = tl.dot(high, place, tl.dot(rest, place))"""
    made = f"    spread = {spread}" if spec.dtype == "float32" else f"    {spread}"
    return f'''

@triton.jit
def places():
    """Where y (rows, {tile}) stands in the two factors of each of {size} features: 1 and 1, y_a and 1, y_a and y_b.

    Two matrices ({tile}, {size}) of zeros and ones, and what each factor and their product has beside.
    """
    row = tl.arange(0, {tile})[:, None]
    at = tl.arange(0, {size})
    pair = at - {1 + rank}
    is_pair = (pair >= 0) & (pair < {rank * rank})
    of_left = tl.where(is_pair, pair // {rank}, tl.where((at >= 1) & (at <= {rank}), at - 1, -1))
    of_right = tl.where(is_pair, pair % {rank}, -1)
    left = tl.where(row == of_left[None, :], 1.0, 0.0)
    right = tl.where(row == of_right[None, :], 1.0, 0.0)
    root = tl.where(is_pair, {2**-0.5}, 1.0)
    return left, right, tl.where(at == 0, 1.0, 0.0), tl.where(is_pair, 0.0, 1.0), root


@triton.jit
def factor(y, place, beside, x_type: tl.constexpr):
{made}
    return spread + beside[None, :]


@triton.jit
def second_order(x, weight, rest, b, slot):
    """f (rows, {size}): 1, y and all y_a y_b / sqrt 2, so that two of them make 1 + s + s^2 / 2 of s = y . y'."""
    y = project(x, weight, rest, b, slot)
    left, right, one, other, root = places()
    return factor(y, left, one, x.dtype) * factor(y, right, other, x.dtype) * root[None, :]


@triton.jit
def query_features(x, weight, rest, b, slot, linear, constant):
    """f (rows, {size}) and (rows,): log2 of the factor that they still lack."""
    return second_order(x, weight, rest, b, slot), row_factor(x, 0.0, linear, constant) * {LOG2_E}


@triton.jit
def key_features(x, weight, rest, b, slot):
    return second_order(x, weight, rest, b, slot)
'''


def states_text(spec: Linear, padded: bool) -> str:
    """`key_states` and `add_up`: what the keys before each segment of the keys amount to."""
    dim, dim_v, size = padded_dim(spec.head_dim), padded_dim(spec.head_dim_v), padded_features(spec)
    pointers = "".join(f"\n    {name}," for name in maps_of(spec, "k"))
    return f'''

@triton.jit(do_not_specialize=["length", "segments", "parts"])
def key_states(
    k,
    v,
    states,
    totals,
    sinks,
    windows,
    heads,{pad_pointer(padded)}{pointers}
    length,
    segments,
    parts,
    segment,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """The sums of f_j v_j^T and of f_j over the far keys of one segment of `segment` keys, for one served head.

    states: float32 (batch, {spec.served}, segments, {size}, {dim_v}), totals: the same without its last axis; of the
    segments the first `parts` are written.
    """
{place_text(spec, "parts")}
    local = tl.arange(0, BLOCK)
    dims = tl.arange(0, {dim})
    dims_v = tl.arange(0, {dim_v})
{key_pointers(padded)}
{load_key_map(spec)}
    state = tl.zeros([{size}, {dim_v}], tl.float32)
    total = tl.zeros([{size}], tl.float32)
{loop(spec)}
{key_block(spec, padded)}
{value_block(spec)}
        state = {dot(spec, f"tl.trans({narrow(spec, 'of_keys')})", operand(spec, "values"), "state")}
        total += tl.sum(of_keys, 0)
{store_states(spec)}


@triton.jit(do_not_specialize=["segments"])
def add_up(states, totals, segments, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """In the place of the sums of every segment the sum of all before it, or if REVERSE of all behind it."""
    program = tl.program_id(0).to(tl.int64)
    size = {size * dim_v}
    at = program % (size // BLOCK + 1) * BLOCK + tl.arange(0, BLOCK)
    row = program // (size // BLOCK + 1) * segments
    is_state = at < size
    is_total = (at >= size) & (at < size + {size})
    sums = tl.zeros([BLOCK], tl.float32)
    for n in range(0, segments - 1):
        place = row + (segments - 1 - n if REVERSE else n)
        state = tl.load(states + place * size + at, mask=is_state, other=0.0)
        total = tl.load(totals + place * {size} + at - size, mask=is_total, other=0.0)
        tl.store(states + place * size + at, sums, mask=is_state)
        tl.store(totals + place * {size} + at - size, sums, mask=is_total)
        sums += state + total
    place = row + (0 if REVERSE else segments - 1)
    tl.store(states + place * size + at, sums, mask=is_state)
    tl.store(totals + place * {size} + at - size, sums, mask=is_total)
'''


def pad_pointer(padded: bool) -> str:
    return "\n    pad," if padded else ""


def place_text(spec: Linear, segments: str, keys: bool = True) -> str:
    """Lines that say which segment of which served head a program has; `segments` names how many are walked."""
    kv_head = f"\n    kv_head = head // {spec.heads // spec.kv_heads}" if keys else ""
    return f"""    # Which segment: (batch * segments + segment) * {spec.served} + head; heads of a KV head share L2.
    program = tl.program_id(0)
    slot = program % {spec.served}
    part = program // {spec.served} % {segments}
    # 64 bits: a large batch has more elements than 32 bits count.
    batch = (program // {spec.served} // {segments}).to(tl.int64)
    head = tl.load(heads + slot){kv_head}
    sink = tl.minimum(tl.maximum(tl.load(sinks + slot), 0), length)
    window = tl.minimum(tl.maximum(tl.load(windows + slot), 0), length)
    # Keys from the sink up to `last` are far from some row.
    last = tl.where(sink < length - window, length - window, 0)
    first = sink // BLOCK * BLOCK
    begin = tl.maximum(part * segment, first)
    end = tl.minimum((part + 1) * segment, last)"""


def key_pointers(padded: bool) -> str:
    pad = "\n    pad += batch * length" if padded else ""
    return f"""    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head{pad}"""


def load_key_map(spec: Linear) -> str:
    square = "\n    k_square = tl.load(ck + slot)" if spec.kind == "exp" else ""
    return f"""    if not RELOAD:
        k_map, k_rest = load_map(wk, slot, k.dtype.element_ty){square}"""


def load_query_map(spec: Linear) -> str:
    dims = mask_argument(dim_mask(spec.head_dim, "dims"))
    square = "\n    q_square = tl.load(cq + slot)" if spec.kind == "exp" else ""
    return f"""    if not RELOAD:
        q_map, q_rest = load_map(wq, slot, q.dtype.element_ty)
    q_linear = tl.load(u + slot * {spec.head_dim} + dims{dims}{", other=0.0" if dims else ""})
    q_constant = tl.load(u0 + slot){square}"""


def of_keys(spec: Linear) -> str:
    return f"key_features(keys, k_map, k_rest, bk, slot{', k_square' if spec.kind == 'exp' else ''})"


def of_queries(spec: Linear) -> str:
    square = "q_square, " if spec.kind == "exp" else ""
    return f"query_features(queries, q_map, q_rest, bq, slot, {square}q_linear, q_constant)"


def loop(spec: Linear) -> str:
    """The head of a loop over a segment's blocks, and its first line."""
    # What does not change from block to block, constants of every product above all, would be kept in registers and
    # not fit there: linear_prefill on sm_90, D=128, 64 rows and 4 warps, spills 476 bytes, and so 100.
    return """    for start in tl.range(begin, end, BLOCK, disable_licm=True):
        cols = start + local
        held = cols[:, None] < last"""


def held(dim: int, name: str) -> str:
    """Which elements of a tile of keys, or of the rows beside them, there are; `name`: of the tile's axis of `dim`."""
    return f"held & ({name}[None, :] < {dim})" if dim_mask(dim, name) else "held"


def key_block(spec: Linear, padded: bool) -> str:
    """Lines in a loop that load a block of keys and make the features of those that are far."""
    keys = load_text("k + wide * k_row + dims[None, :]", held(spec.head_dim, "dims"))
    real = "\n        far = far & (tl.load(pad + cols, mask=cols < last, other=0) != 0)" if padded else ""
    return f"""        wide = cols[:, None].to(tl.int64)
        keys = {keys}
        if RELOAD:
            k_map, k_rest = load_map(wk, slot, keys.dtype)
        far = (cols >= sink) & (cols < last){real}
        of_keys = tl.where(far[:, None], {of_keys(spec)}, 0.0)"""


def value_block(spec: Linear) -> str:
    return "        values = " + load_text("v + wide * v_row + dims_v[None, :]", held(spec.head_dim_v, "dims_v"))


def query_block(spec: Linear) -> str:
    """Lines in a loop that load the query rows beside the keys, `window` behind them, and make their features."""
    queries = load_text("q + row * q_row + dims[None, :]", held(spec.head_dim, "dims"))
    return f"""        # The rows whose windows end there, start + window and on.
        row = (cols + window)[:, None].to(tl.int64)
        queries = {queries}
        if RELOAD:
            q_map, q_rest = load_map(wq, slot, queries.dtype)
        of_queries, shift = {of_queries(spec)}"""


def state_place(spec: Linear) -> str:
    """Lines that set `place`, that of a program's segment in states, and `rows_of`, its rows in them."""
    return f"""    place = (batch * {spec.served} + slot) * segments + part
    at = tl.arange(0, {padded_features(spec)})
    in_state = at[:, None] * {padded_dim(spec.head_dim_v)} + dims_v[None, :]"""


def store_states(spec: Linear) -> str:
    size, dim_v = padded_features(spec), padded_dim(spec.head_dim_v)
    return f"""{state_place(spec)}
    tl.store(states + place * {size * dim_v} + in_state, state)
    tl.store(totals + place * {size} + at, total)"""


def first_states(spec: Linear) -> str:
    """Lines that set `state` and `total` to what lies before a program's segment, or behind it."""
    size, dim_v = padded_features(spec), padded_dim(spec.head_dim_v)
    return f"""    state = tl.zeros([{size}, {dim_v}], tl.float32)
    total = tl.zeros([{size}], tl.float32)
    if segments > 1:
    {state_place(spec).replace(chr(10), chr(10) + "    ")}
        state = tl.load(states + place * {size * dim_v} + in_state)
        total = tl.load(totals + place * {size} + at)"""
