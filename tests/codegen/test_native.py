"""The compiled CPU kernels against the plain-PyTorch reference in float64, and what happens where it cannot be had."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace

import pytest
import torch
from ragged import CASES, Case, arguments, drawn, relative

from attnopt.codegen import decode_cpu, linear_native, native, span_cpu
from attnopt.codegen.reference_decode import decode as decoded
from attnopt.codegen.reference_prefill import prefill_lse as reference

HEADS = 8
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
WIDEST = 2**31 - 1
# (sink, window) of eight heads: nothing kept, one key, sinks past the window, around a block, a span and a tile, dense.
SPANS = {
    "mixed": [(0, 1), (4, 32), (90, 7), (16, 200), (0, WIDEST), (-1, 40), (3, -2), (0, 0)],
    "blocks": [(31, 33), (32, 32), (33, 31), (64, 64), (65, 63), (1, 65), (0, 96), (128, 1)],
    "long": [(0, 1023), (5, 1024), (0, 1025), (64, 600), (1100, 3), (0, 1088), (7, 1056), (0, 1500)],
}


def has_compiler() -> bool:
    return any(map(shutil.which, ("g++", "c++", "clang++")))


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel must serve here: a failed build is no reason to skip."""
    return has_compiler() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    if not serves(request.param):
        pytest.skip("needs a C++ compiler and AVX-512")
    reason = native.unusable(request.param)
    if "matrix unit" in reason:
        pytest.skip(reason)
    assert not reason
    return request.param


def inputs(length, dtype, batch=2, kv_heads=4, dim=32, dim_v=64):
    generator = torch.Generator().manual_seed(length)

    def normal(heads, width):
        return torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)

    return normal(HEADS, dim), normal(kv_heads, dim), normal(kv_heads, dim_v)


def tables(spans):
    return tuple(torch.tensor(column, dtype=torch.int32) for column in zip(*spans, strict=True))


def padding(name, length):
    column = torch.arange(length)
    rows = {
        "none": None,
        "holes": torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.4,
        "dead blocks": ((column < 40) | (column > 170)).repeat(2, 1),
        "all of one": torch.stack((column < 0, column >= 0)),
    }
    return rows[name]


def run(q, k, v, spans, scale=0.2, pad=None, heads=range(HEADS)):
    """All heads by the kernel alone, into poisoned memory."""
    batch, count, length, _ = q.shape
    out = torch.full((batch, length, count, v.shape[3]), float("nan"), dtype=q.dtype).transpose(1, 2)
    lse = torch.full((batch, count, length), float("nan"))
    native.prefill(q, k, v, out, lse, *tables(spans), pad, list(heads), scale)
    return out, lse


def errors(q, k, v, spans, scale=0.2, pad=None):
    out, lse = run(q, k, v, spans, scale, pad)
    expected, sums = reference(q.double(), k.double(), v.double(), *tables(spans), scale, pad)
    assert out.isfinite().all() and torch.equal(lse.isneginf(), sums.isneginf())
    assert (out[sums.isneginf()] == 0).all()
    away = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    kept = sums.isfinite()
    return away, float((lse.double() - sums)[kept].abs().max()) if kept.any() else 0.0


@pytest.mark.parametrize("pad", ["none", "holes", "dead blocks", "all of one"])
@pytest.mark.parametrize("length", [1, 31, 64, 65, 257])
@pytest.mark.parametrize("name", ["mixed", "blocks"])
def test_agrees_with_the_reference(name, length, pad, dtype):
    away, sums = errors(*inputs(length, dtype), SPANS[name], pad=padding(pad, length))
    assert away <= TOLERANCE[dtype] and sums <= 1e-5


def test_spans_longer_than_what_is_held_at_once(dtype):
    away, sums = errors(*inputs(1200, dtype, batch=1), SPANS["long"])
    assert away <= TOLERANCE[dtype] and sums <= 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (128, 32), (256, 256)])
def test_head_sharing_and_sizes(kv_heads, dim, dim_v, dtype):
    q, k, v = inputs(130, dtype, kv_heads=kv_heads, dim=dim, dim_v=dim_v)
    assert errors(q, k, v, SPANS["mixed"], dim**-0.5)[0] <= TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["heads first", "dims strided", "odd rows", "odd start"])
def test_layouts(layout, dtype):
    q, k, v = inputs(100, dtype, dim=32, dim_v=32)
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "dims strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    else:
        # Rows, or the first element, at addresses that are no multiple of a pair's.
        width, start = (33, 0) if layout == "odd rows" else (34, 1)
        wide = [x.new_zeros(*x.shape[:3], width) for x in (q, k, v)]
        for x, into in zip((q, k, v), wide, strict=True):
            into[..., start : start + 32] = x
        q, k, v = (x[..., start : start + 32] for x in wide)
    assert errors(q, k, v, SPANS["mixed"])[0] <= TOLERANCE[dtype]


def test_only_the_named_heads_are_written(dtype):
    q, k, v = inputs(70, dtype)
    out, lse = run(q, k, v, SPANS["mixed"], heads=[1, 4])
    whole, _ = run(q, k, v, SPANS["mixed"])
    written = [1, 4]
    others = [h for h in range(HEADS) if h not in written]
    assert torch.equal(out[:, written], whole[:, written])
    assert out[:, others].isnan().all() and lse[:, others].isnan().all()


def test_threads_change_nothing(dtype):
    q, k, v = inputs(1200, dtype)
    alone = run(q, k, v, SPANS["long"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run(q, k, v, SPANS["long"])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("wrong", [(0, 1), (0, -1), (1, 0)])
def test_a_span_off_by_one_is_out_of_tolerance(wrong, dtype):
    q, k, v = inputs(257, dtype)
    found, _ = run(q, k, v, [(4 + wrong[0], 32 + wrong[1])] * HEADS)
    expected, _ = reference(q.double(), k.double(), v.double(), *tables([(4, 32)] * HEADS), 0.2)
    assert float((found.double() - expected).norm() / expected.norm()) > 5 * TOLERANCE[dtype]


def test_large_scores_do_not_overflow(dtype):
    q, k, v = inputs(200, dtype)
    assert errors(q * 30, k * 30, v, SPANS["mixed"])[0] <= 5 * TOLERANCE[dtype]


def test_dtypes_must_agree(dtype):
    q, k, v = inputs(10, dtype)
    with pytest.raises(ValueError, match="expected one dtype"):
        run(q, k.double(), v, SPANS["mixed"])


def test_the_prefill_takes_it(dtype, monkeypatch):
    """But dense heads, which stay SDPA's, and those that keep nothing; with the switch off nothing is the kernel's, and
    the results are as close."""
    q, k, v = inputs(300, dtype, dim=64)
    asked = []
    monkeypatch.setattr(native, "prefill", lambda *a, kernel=native.prefill: (asked.append(a[8]), kernel(*a)))
    with_kernel = span_cpu.prefill(q, k, v, *tables(SPANS["mixed"]), 0.2)
    assert [sorted(heads) for heads in asked] == [[0, 1, 2, 3, 5, 6]]
    monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    without = span_cpu.prefill(q, k, v, *tables(SPANS["mixed"]), 0.2)
    assert len(asked) == 1
    assert float((with_kernel - without).double().norm() / without.double().norm()) <= 2 * TOLERANCE[dtype]


def decoding(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel alone gives for a cache, and what is right, in float64."""
    q, k, v, *tables = arguments(case, dtype)
    found = native.decode(q, k, v, *tables[:2], case.scale, *tables[2:])
    assert found.dtype == dtype and found.is_contiguous()
    return found, decoded(q.double(), k.double(), v.double(), *tables[:2], case.scale, *tables[2:])


SERVED = [name for name, case in CASES.items() if case.batch and case.scale > 0]


@pytest.mark.parametrize("name", SERVED)
def test_decoding_agrees_with_the_reference(name, dtype):
    found, expected = decoding(replace(CASES[name], dims=(32, 64)), dtype)
    assert relative(found, expected) <= TOLERANCE[dtype]
    assert (found[expected.abs().sum(-1) == 0] == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_in_several_pieces(threads, dtype):
    """A piece cut off, a piece filled, three pieces; more rows than the products take at once, and rows one by one in
    fours, twos and ones."""
    case = Case([511, 512, 1300, 1537], share=6, tokens=3, dims=(64, 32), windows=[700] * 12 + [2**30] * 12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        few = replace(case, share=7, tokens=1, windows=[700] * 14 + [2**30] * 14)
        for each in (case, few, replace(case, windows=[], filled=[[511, 3, 1025, 0], [1, 512, 1300, 1537]])):
            found, expected = decoding(each, dtype)
            assert relative(found, expected) <= TOLERANCE[dtype]
    finally:
        torch.set_num_threads(before)


def test_decoding_from_random_caches(dtype):
    for seed in range(60):
        case = replace(drawn(seed), dims=(32, 32))
        found, expected = decoding(case, dtype)
        assert relative(found, expected) <= TOLERANCE[dtype], case


def test_a_slot_more_or_less_is_out_of_tolerance(dtype):
    case = replace(CASES["one dense head of four"], dims=(32, 32))
    q, k, v, starts, filled = arguments(case, dtype)
    _, expected = decoding(case, dtype)
    assert relative(native.decode(q, k, v, starts, filled - 1, case.scale), expected) > 5 * TOLERANCE[dtype]


def test_the_decoding_takes_it(dtype, monkeypatch):
    """Where the rows fit; and what cannot be a cache is refused before it is read."""
    asked = []
    monkeypatch.setattr(native, "decode", lambda *a, kernel=native.decode: asked.append(a) or kernel(*a))
    case = replace(CASES["spans"], dims=(32, 32))
    q, k, v, starts, filled, *spans = arguments(case, dtype)
    decode_cpu.decode(q, k, v, starts, filled, 0.25, *spans)
    assert len(asked) == 1
    wide = replace(case, tokens=33, windows=[])
    decode_cpu.decode(*arguments(wide, dtype), 0.25)
    assert len(asked) == 1
    for segments, reason in (
        ([0, 400, 40, 380], "follow"),
        ([1, 40, 60, 380], "begin"),
        ([0, 4, 8, 379], "ends at 379"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode_cpu.decode(q, k, v, torch.tensor(segments), filled, 0.25)


FAR = 2**50
# What is packed for a kernel whose memory nothing could hold, which is asked for before an address is read; {} is that
# of zeros.
TOO_LARGE = {
    "decode": ["0 0 0 0 {} {} 0 0 0 0", "0 " * 11, f"0 1 1 {FAR} 32 32 0"],
    "step": ["0 0 0 0 0 0 {} 0 {} {}", "0 " * 17, f"1 1 1 {FAR} 0 32 32"],
    "look": ["0 0 0 0 0", "0 " * 14, "0", f"1 1 1 {FAR} 0 32 32"],
    "blocks": ["0 " * 11, "0 " * 12, f"1 1 1 0 {FAR} 32 32 0 16 0 0"],
    "linear prefill": ["0 0 0 0 0 {} {} {} 0", "0 " * 8, "0 " * 12, f"1 1 1 1 {FAR} 32 1 {FAR} 0"],
    "linear decode": ["0 0 0 0 0 {} {} 0", "0 " * 8, "0 " * 6, f"1 1 1 1 {FAR} 32 1 {FAR} 0"],
}


@pytest.mark.parametrize("name", [*TOO_LARGE, "prefill"])
def test_exceptions_end_in_python(name, dtype):
    """And not the process: ctypes lets none through."""
    zeros = torch.zeros(64, dtype=torch.int32)
    said = f"{name.split()[-1]}_{str(dtype)[6:]} .* failed .*ATTNOPT_NATIVE=0"
    with pytest.raises(RuntimeError, match=said):
        if name == "prefill":
            x = torch.zeros(32, dtype=dtype).as_strided((1, FAR, 2, 32), (0, 0, 0, 1))
            native.prefill(x, x, x, x, None, zeros, zeros, None, [0], 0.2)
        else:
            numbers = [int(x) for x in " ".join(TOO_LARGE[name]).format(*[zeros.data_ptr()] * 3).split()]
            packed = struct.pack(f"{len(numbers)}q", *numbers)
            if name.startswith("linear"):
                linear_native._entry(name.split()[1], dtype)(packed)
            else:
                native._entry(name, dtype)(packed, 0.2)


@pytest.fixture
def asked_anew():
    """What this process knows about the kernels is found out in the test, and again after it."""
    native._loaded.cache_clear(), native._cannot.cache_clear()
    yield
    native._loaded.cache_clear(), native._cannot.cache_clear()


def test_what_they_do_not_serve_is_said(asked_anew, monkeypatch):
    assert "float16" in native.unusable(torch.float16)
    assert not native.takes(torch.float32, 40, 32)
    assert native.unusable(torch.bfloat16, "blocks") in ("", "this CPU does not multiply bfloat16")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX-512" in native.unusable()
    monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    assert native.told() == dict.fromkeys(("float32", "bfloat16"), "ATTNOPT_NATIVE is 0")


def test_kernels_are_there_where_the_dispatcher_is_another(asked_anew, monkeypatch):
    """What is built on torch's insides is left out where it does not compile."""
    from torch._inductor.codecache import CppCodeCache

    whole, load, asked = "".join(path.read_text() for path in native.SOURCES), CppCodeCache.load, []

    def compiled(text):
        asked.append("registerImpl" in text)
        if asked[-1]:
            raise RuntimeError("no member named registerImpl")
        # Not compiled once more for this test.
        return load(whole)

    monkeypatch.setattr(CppCodeCache, "load", compiled)
    assert native.unusable() == "" and asked == [True, False]


def test_without_a_compiler_torchs_operators_run(asked_anew, monkeypatch, caplog):
    from torch._inductor.codecache import CppCodeCache

    def missing(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(CppCodeCache, "load", missing)
    q, k, v = inputs(100, torch.float32)
    found = span_cpu.prefill(q, k, v, *tables(SPANS["mixed"]), 0.2)
    assert "No working C++ compiler" in native.unusable()
    (said,) = caplog.messages
    assert "Install a C++ compiler" in said and "ATTNOPT_NATIVE=0" in said
    expected, _ = reference(q.double(), k.double(), v.double(), *tables(SPANS["mixed"]), 0.2)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-5
