"""Linear far parts on the CPU against the reference in float64, forward and backward."""

from __future__ import annotations

import shutil
from dataclasses import replace

import linears
import pytest
import torch
from emitting import check_clean

from attnopt.codegen import linear_cpu, linear_native, reference_linear
from attnopt.codegen.emit import load
from attnopt.codegen.self_check import error
from attnopt.codegen.spec import LinearBackward, LinearDecode, LinearPrefill
from attnopt.registry import TARGETS

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3}
SIZES = "cpu", "float32", 8, 4, 16, 24, 5
LENGTHS = (0, 1, 6, 64, 65, 203, 330)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request, monkeypatch):
    """Both ways; the one out of torch's operators in small segments, several of them and with few heads each."""
    if request.param == "torch":
        monkeypatch.setenv("ATTNOPT_NATIVE", "0")
        monkeypatch.setattr(linear_cpu, "SEGMENT", 256)
        monkeypatch.setattr(linear_cpu, "CHUNK", 32)
    elif reason := linear_native.unusable(torch.float32):
        # A failed build is no reason to skip.
        assert not reason.startswith("not compiled") or not any(map(shutil.which, ("g++", "c++", "clang++")))
        pytest.skip(reason)
    return request.param


def check(q, k, v, tables, maps, pad, tolerance, lse_tolerance=2e-6):
    """Both kernels against the reference in float64; nothing for one of them to hide in: gradients at both results."""
    dtype, padded = str(q.dtype).removeprefix("torch."), pad is not None
    sizes = "cpu", dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], maps.heads, maps.kind, maps.rank, padded
    out, lse = load(LinearPrefill(*sizes)).prefill(q, k, v, *tables, maps, pad)
    wide = [x.double() for x in (q, k, v)]
    expected, sums = reference_linear.prefill(*wide, *tables, maps, pad)
    assert out.dtype == v.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert torch.equal(lse.isneginf(), sums.isneginf())
    assert error(out, expected) <= tolerance and error(lse, sums) <= min(tolerance, lse_tolerance)
    dout, dlse = torch.randn(out.shape).to(v.dtype), torch.randn(lse.shape, dtype=lse.dtype)
    found = load(LinearBackward(*sizes)).backward(dout, dlse, q, k, v, out, lse, *tables, maps, pad)
    given = dout.double(), dlse.double(), *wide, expected, sums
    for x, y in zip(found, reference_linear.backward(*given, *tables, maps, pad), strict=True):
        assert error(x, y) <= 2 * tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", linears.RANK)
def test_lengths_and_padding(kind, dtype, way):
    if dtype == torch.float64 and way == "compiled":
        pytest.skip("never compiled")
    maps, paddings = linears.maps(kind, 5, 16), ("left", "right", "all of one", "holes")
    for length in LENGTHS:
        q, k, v = linears.inputs(length, dtype)
        for pad in ("none", paddings[length % 4]):
            check(q, k, v, linears.tables(), maps, linears.padding(pad, length), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["as they are", "odd rows", "odd start"])
def test_sizes_that_a_matrix_unit_takes(dtype, layout):
    """Features and chunks are then products in bfloat16, and logsumexps are as exact as the features in them."""
    # Where rows are no whole words it is not asked, and results are exact again.
    pairs = dtype == torch.bfloat16 and layout == "as they are"
    for length in (1, 66, 200) if layout == "as they are" else (130,):
        q, k, v = linears.inputs(length, dtype, dim=64, dim_v=32)
        if layout != "as they are":
            width, start = (65, 0) if layout == "odd rows" else (66, 1)
            wide = [x.new_zeros(*x.shape[:3], width) for x in (q, k, v)]
            for x, into in zip((q, k, v), wide, strict=True):
                into[..., start : start + x.shape[3]] = x
            q, k, v = (to[..., start : start + x.shape[3]] for to, x in zip(wide, (q, k, v), strict=True))
        for pad in ("none", "left", "holes"):
            given = linears.tables(), linears.maps("exp", 5, 64, rank=32), linears.padding(pad, length)
            check(q, k, v, *given, TOLERANCE[dtype], 2e-4 if pairs else 2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_head_sharing(kv_heads):
    q, k, v = linears.inputs(150, kv_heads=kv_heads, dim=8, dim_v=8)
    for served in (linears.SERVED, range(8), (5,), ()):
        tables = linears.tables(tuple(served))
        check(q, k, v, tables, linears.maps("exp", len(served), 8), linears.padding("left", 150), 2e-6)
        check(q, k, v, tables, linears.maps("exp", len(served), 8), None, 2e-6)


@pytest.mark.parametrize("length", [40, 64, 129, 700])
def test_few_heads_are_cut_among_threads(length):
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        for kind in linears.RANK:
            q, k, v = linears.inputs(length)
            tables = linears.tables((1,)), linears.tables((6,), windows=(1,) * 8)
            for each in tables:
                check(q, k, v, each, linears.maps(kind, 1, 16), linears.padding("holes", length), 2e-6)
    finally:
        torch.set_num_threads(before)


def test_layouts_and_an_empty_batch():
    q, k, v = linears.inputs(100)
    maps = linears.maps("exp", 5, 16)
    check(*(x.contiguous() for x in (q, k, v)), linears.tables(), maps, None, 2e-6)
    check(*(x.mT.contiguous().mT for x in (q, k, v)), linears.tables(), maps, None, 2e-6)
    check(*(x[:0] for x in (q, k, v)), linears.tables(), maps, None, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_is_not_read(dtype):
    q, k, v = linears.inputs(100, dtype, dim=64, dim_v=32)
    pad, rest = linears.padding("left", 100), (*linears.tables(), linears.maps("exp", 5, 64, rank=32))
    clean = linear_cpu.prefill(q, k, v, *rest, pad)
    k, v = (x.masked_fill(~pad[:, None, :, None], float("nan")) for x in (k, v))
    found = linear_cpu.prefill(q, k, v, *rest, pad)
    assert all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(found, clean, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [(1, 0), (-1, 0), (0, 1)])
def test_a_span_off_by_one_is_out_of_tolerance(wrong, dtype):
    q, k, v = linears.inputs(200, dtype, dim=64, dim_v=32)
    maps = linears.maps("exp", 5, 64, rank=32)
    heads, sinks, windows = linears.tables()
    found = linear_cpu.prefill(q, k, v, heads, sinks, windows, maps)
    spans = sinks + wrong[1], windows + wrong[0]
    expected = reference_linear.prefill(q.double(), k.double(), v.double(), heads, *spans, maps)
    assert error(found[0], expected[0]) > 2 * TOLERANCE[dtype] and error(found[1], expected[1]) > 4e-4


def test_another_shape_kind_or_padding_is_refused():
    q, k, v = linears.inputs(9)
    module = load(LinearPrefill(*SIZES, "exp", 24, False))
    for maps, pad in ((linears.maps("exp", 5, 16, rank=8), None), (linears.maps("exp", 5, 16), torch.ones(2, 9) > 0)):
        with pytest.raises(ValueError, match="emitted"):
            module.prefill(q, k, v, *linears.tables(), maps, pad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", linears.RANK)
def test_steps_after_a_prompt(kind, dtype):
    """A few tokens of two sequences, one of which has padding on its left, against the reference in float64."""
    length, prompt = 75, 70
    q, k, v = linears.inputs(length, dtype)
    heads, sinks, windows = linears.tables()
    maps, pad = linears.maps(kind, 5, 16), linears.padding("left", length)
    module = load(LinearDecode("cpu", str(dtype)[6:], 8, 1, 16, 24, 5, kind, maps.rank))
    state = module.state(k[:, :, :prompt], v[:, :, :prompt], heads, 8, sinks, windows, maps, pad[:, :prompt])
    wide = state.double()
    cache = [x.permute(0, 2, 1, 3).flatten(1, 2) for x in (k, v)]  # slot: token times KV heads and KV head
    for i in range(prompt, length):
        leaving = i - windows
        far = (leaving >= sinks) & pad[:, leaving.clamp(min=0).long()]
        slots = torch.where(far, leaving * 4 + heads // 2, -1).to(torch.int32)
        now = q[:, :, i : i + 1]
        found = module.decode(now, *cache, slots, heads, state, maps)
        expected = reference_linear.decode(now.double(), *(x.double() for x in cache), slots, heads, wide, maps)
        assert found[0].dtype == dtype and error(found[0], expected[0]) <= TOLERANCE[dtype]
        assert error(found[1], expected[1]) <= 1e-6 and error(state, wide) <= 2e-6
    whole = reference_linear.prefill(*(x.double() for x in (q, k, v)), heads, sinks, windows, maps, pad)
    assert error(expected[0], whole[0][:, :, -1:]) <= 2e-6 and error(expected[1], whole[1][:, :, -1:]) <= 2e-6


def test_a_slot_beyond_the_cache_is_refused(way):
    if way == "torch":
        pytest.skip("torch refuses it itself")
    module = load(LinearDecode("cpu", "float32", 8, 1, 16, 24, 5, "exp", 24))
    q, slots, state = linears.inputs(1)[0], torch.full((2, 5), 7, dtype=torch.int32), torch.zeros(2, 5, 24, 25)
    with pytest.raises(ValueError, match="slots reach 7, and the cache has 7"):
        module.decode(
            q,
            torch.randn(2, 7, 16),
            torch.randn(2, 7, 24),
            slots,
            linears.tables()[0],
            state,
            linears.maps("exp", 5, 16),
        )
    assert (state == 0).all()


@pytest.mark.parametrize("kind", linears.RANK)
def test_state_after_a_prompt(kind):
    heads, sinks, windows = linears.tables()
    maps = linears.maps(kind, 5, 16)
    module = load(LinearDecode("cpu", "float32", 8, 1, 16, 24, 5, kind, maps.rank))
    for length in (0, 1, 37, 300):
        _, k, v = linears.inputs(length)
        for name in ("none", "left"):
            pad = linears.padding(name, length)
            found = module.state(k, v, heads, 8, sinks, windows, maps, pad)
            expected = reference_linear.state(k.double(), v.double(), heads, 8, sinks, windows, maps, pad)
            assert found.dtype == torch.float32 and error(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_grows_to_64k_tokens(dtype):
    """Keys whose features reach e^30, all of one sign: what is lost in a sum of 65536 of them, against float64.

    Only the last rows are compared, whose state holds the whole past; and a run of 64k rows is as exact as a short one.
    """
    length = 2**16
    q, k, v = linears.inputs(length, dtype, batch=1, kv_heads=1, dim=32, dim_v=32)
    v = v + 3.0
    maps = linears.maps("exp", 1, 32, rank=32)
    maps.bk.copy_(torch.linspace(-20, 30, 32)[None])
    tables = linears.tables((3,), (4,) * 8, (100,) * 8)
    out, lse = linear_cpu.prefill(q, k, v, *tables, maps)
    state = reference_linear.state(k.double(), v.double(), tables[0], 8, *tables[1:], maps)
    # The reference's own row: the last query against that state.
    nowhere = torch.full((1, 1), -1)
    row = reference_linear.decode(q[:, :, -1:].double(), k[:, :, 0], v[:, :, 0], nowhere, tables[0], state, maps)
    assert error(out[:, :, -1:], row[0]) <= (1e-6 if dtype == torch.float32 else 4e-3)
    assert error(lse[:, :, -1:], row[1]) <= (1e-6 if dtype == torch.float32 else 1e-4)
    found = linear_cpu.state(k, v, tables[0], 8, *tables[1:], maps)
    assert error(found, state) <= 1e-6


def test_emitted_files_are_clean(tmp_path):
    sizes = "cpu", "bfloat16", 32, 8, 64, 128, 12, "taylor", 8
    specs = [LinearDecode(*sizes), *(f(*sizes, pad) for f in (LinearPrefill, LinearBackward) for pad in (True, False))]
    both = [replace(spec, target=target) for spec in specs for target in ("cpu", "reference")]
    check_clean(tmp_path, (TARGETS[f"{spec.target} {spec.kernel}"].emit(spec) for spec in both))
