"""The emitted Triton prefill: its text, and in Triton's interpreter its numbers.

Triton fixes the interpreter when a kernel is imported, so all numbers come from one child process: this file run as a
script with TRITON_INTERPRET=1, which prints one JSON object per case.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from emitting import check_clean, check_golden
from interpreting import interpreted_rows

from attnopt.codegen import emit, work_list
from attnopt.codegen.emit import write_atomically
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.reference_prefill import span_mask
from attnopt.codegen.spec import SpanPrefill
from attnopt.codegen.triton_prefill import launches, source
from attnopt.errors import DependencyError
from attnopt.registry import TARGETS

# Relative Frobenius norms against float64, and the largest error of a logarithm, which stays in float32.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
TOLERANCE_LSE = 1e-5
DENSE = 2**31 - 1


class Case(NamedTuple):
    length: int
    sinks: list[int]
    windows: list[int]
    kv_heads: int = 2
    dims: tuple[int, int] = (32, 32)
    dtype: str = "float32"
    batch: int = 1
    padding: list[list[int]] | None = None  # per batch entry the padded positions, as [first, end)
    scale: float = 0.2
    shipped: bool = False  # keep the tiles shipped for the dtype; else those of the half types
    layout: str = "transposed"
    loads: str = ""  # descriptors or pointers; "" for what the launcher chooses


MIXED = [0, 5, 64, 100], [DENSE, 1, 40, 130]
CASES = {
    **{f"length {n}": Case(n, *MIXED) for n in (1, 17, 63, 64, 100, 128, 200, 256)},
    **{f"length {n}, pointers": Case(n, *MIXED, loads="pointers") for n in (1, 63, 128, 200)},
    **{f"group of {4 // g}": Case(100, *MIXED, kv_heads=g) for g in (1, 2, 4)},
    "shipped float32 tiles": Case(100, *MIXED, shipped=True),
    "window 1, no sink": Case(130, [0] * 4, [1] * 4),
    "window 1, one sink": Case(130, [1] * 4, [1] * 4),
    "nothing kept": Case(70, [0, 0, 3, 0], [0, 0, 0, 5]),
    "negative counts as none": Case(70, [-3, -3, 3, 2], [-1, 4, -9, 5]),
    "all dense": Case(200, [0, 3, 64, 300], [DENSE, 200, 201, 300]),
    "sinks reach past the window's start": Case(200, [150, 199, 200, 128], [10, 64, 1, 70]),
    "windows around a block": Case(256, [0, 63, 64, 65], [63, 64, 65, 66]),
    "windows around two blocks": Case(256, [127, 128, 129, 1], [127, 128, 129, 191]),
    "batch 2": Case(100, *MIXED, batch=2),
    "contiguous inputs": Case(100, *MIXED, batch=2, layout="contiguous"),
    "contiguous inputs, pointers": Case(100, *MIXED, batch=2, layout="contiguous", loads="pointers"),
    "last dimension strided": Case(40, *MIXED, layout="strided"),
    "in a longer buffer": Case(70, *MIXED, batch=2, layout="longer"),
    "in a longer buffer, pointers": Case(70, *MIXED, batch=2, layout="longer", loads="pointers"),
    "unaligned": Case(70, *MIXED, layout="unaligned"),
    "dims 24 and 40": Case(100, *MIXED, dims=(24, 40)),
    "dims 24 and 40, pointers": Case(100, *MIXED, dims=(24, 40), loads="pointers"),
    "dims 8 and 16": Case(40, *MIXED, dims=(8, 16)),
    "dims 64": Case(100, *MIXED, dims=(64, 64)),
    "dims 128": Case(100, *MIXED, dims=(128, 128)),
    "negative scale": Case(100, *MIXED, scale=-0.3),
    "scale 0": Case(70, *MIXED, scale=0.0),
    "float16": Case(200, *MIXED, dtype="float16", dims=(64, 64)),
    "float16, dims 256": Case(70, *MIXED, dtype="float16", dims=(256, 256), shipped=True),
    "float16, pointers": Case(100, *MIXED, dtype="float16", dims=(64, 64), loads="pointers"),
    "bfloat16": Case(100, *MIXED, dtype="bfloat16", batch=2),
    "bfloat16, pointers": Case(100, *MIXED, dtype="bfloat16", loads="pointers"),
    "padded left": Case(100, *MIXED, batch=2, padding=[[0, 70], [0, 0]]),
    "padded right": Case(100, *MIXED, batch=2, padding=[[90, 100], [30, 100]]),
    "padded middle": Case(200, *MIXED, batch=2, padding=[[50, 140], [64, 128]]),
    "padded middle, pointers": Case(100, *MIXED, batch=2, padding=[[20, 90], [64, 100]], loads="pointers"),
    "padded beside runs of blocks": Case(
        256, *MIXED, batch=5, padding=[[0, 63], [0, 65], [127, 130], [191, 256], [65, 256]], dtype="float16"
    ),
    "padded everywhere": Case(70, *MIXED, batch=2, padding=[[0, 70], [0, 69]]),
    "padded, shipped tiles": Case(70, *MIXED, batch=2, padding=[[0, 20], [60, 70]], shipped=True),
    "padded float16": Case(100, *MIXED, dtype="float16", batch=2, padding=[[0, 33], [98, 100]]),
    "padded, dims 24 and 40": Case(70, *MIXED, dims=(24, 40), padding=[[0, 20]]),
    "empty": Case(0, *MIXED),
    "empty batch": Case(10, *MIXED, batch=0),
}


def spec_of(case: Case) -> SpanPrefill:
    padded = case.padding is not None
    return SpanPrefill("triton", case.dtype, len(case.sinks), case.kv_heads, *case.dims, padded)


def tensor(case: Case, heads: int, dim: int) -> torch.Tensor:
    if case.layout == "contiguous":
        return torch.randn(case.batch, heads, case.length, dim).to(getattr(torch, case.dtype))
    if case.layout == "strided":
        return torch.randn(case.batch, heads, dim, case.length).to(getattr(torch, case.dtype)).transpose(2, 3)
    made = torch.randn(case.batch, case.length, heads, dim).to(getattr(torch, case.dtype)).transpose(1, 2)
    if case.layout == "longer":
        # As a slice of a cache: nothing around it may be read.
        around = torch.full((case.batch, heads, case.length + 60, dim), float("nan"), dtype=made.dtype)
        around[:, :, : case.length] = made
        return around[:, :, : case.length]
    if case.layout == "unaligned":
        around = made.new_empty(case.batch, heads, case.length, dim + 1)
        around[..., 1:] = made
        return around[..., 1:]
    return made


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def poisoned(fresh: torch.Tensor) -> torch.Tensor:
    """New memory with what shows if it is used before it is written."""
    return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30)


def lse_of(
    q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor, windows: torch.Tensor, scale: float, pad: torch.Tensor | None
) -> torch.Tensor:
    """Natural logarithm of each row's soft-max sum: q (B, H, N, D), k (B, G, N, D) -> float64 (B, H, N)."""
    keep = (
        span_mask(q.shape[2], sinks, windows)
        if pad is None
        else span_mask(q.shape[2], sinks, windows) & pad[:, None, None]
    )
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * scale
    return scores.masked_fill(~keep, float("-inf")).logsumexp(-1)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite where one of the two is -inf and the other is not."""
    return (
        float(torch.where(found == expected, 0.0, (found.double() - expected).abs()).nan_to_num(1e9).max())
        if found.numel()
        else 0.0
    )


def run(case: Case) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    torch.manual_seed(0)
    module = emit.load(spec_of(case))
    kernel, own, choose = module.span_prefill, module.LAUNCHES, module._loads
    seen: list[str] = []
    loads: list[str] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                bases = [getattr(a, "base", a) for a in args]
                seen.extend(str(a.dtype) for a in bases if isinstance(a, torch.Tensor))
                loads.append("descriptors" if options["DESCRIPTORS"] else "pointers")
                kernel[grid](*args, **options)

            return call

    heads = len(case.sinks)
    q, k = tensor(case, heads, case.dims[0]), tensor(case, case.kv_heads, case.dims[0])
    v = tensor(case, case.kv_heads, case.dims[1])
    sinks = torch.tensor(case.sinks, dtype=torch.int32)
    windows = torch.tensor(case.windows, dtype=torch.int32)
    pad = None
    if case.padding is not None:
        j = torch.arange(case.length)
        pad = torch.stack([(j < first) | (j >= end) for first, end in case.padding])
    empty = torch.empty
    torch.empty = lambda *a, **o: poisoned(empty(*a, **o))  # type: ignore[assignment]
    module.span_prefill = Recorded()
    if not case.shipped:
        module.LAUNCHES = dict.fromkeys(
            ("descriptors", "pointers"), tuple({"BLOCK_M": m, "BLOCK_N": 64} for m in (128, 64))
        )
    if case.loads:
        module._loads = lambda *tensors: case.loads
    try:
        out, lse = module.prefill_lse(q, k, v, sinks, windows, case.scale, pad)
        alone = module.prefill(q, k, v, sinks, windows, case.scale, pad) if case is CASES["length 100"] else out
        works = work_list.work_lists(sinks, windows, case.kv_heads, case.length, case.batch, ((128, 64), (64, 64)))
    finally:
        torch.empty, module.span_prefill = empty, kernel
        module.LAUNCHES, module._loads = own, choose
    exact = functools.partial(reference, q.double(), k.double(), v.double(), scale=case.scale, pad=pad)
    expected = exact(sinks, windows)
    expected_lse = lse_of(q, k, sinks, windows, case.scale, pad)
    return {
        "error": error(out, expected),
        "error of lse": largest_difference(lse, expected_lse),
        "lse": lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == out.shape[:3],
        "same without lse": torch.equal(alone, out),
        "finite": bool(out.isfinite().all()),
        "zero where nothing is kept": bool((out[expected.abs().sum(-1) == 0] == 0).all()),
        "shape": list(out.shape) == [case.batch, heads, case.length, case.dims[1]],
        "dtype": out.dtype == q.dtype,
        "layout": out.transpose(1, 2).is_contiguous(),
        "error of a longer window": error(out, exact(sinks, windows.clamp(max=2**20) + 1)),
        "error of a longer sink": error(out, exact(sinks + 1, windows)),
        "lse of a longer window": largest_difference(
            lse, lse_of(q, k, sinks, windows.clamp(max=2**20) + 1, case.scale, pad)
        ),
        "seen": sorted(set(seen)),
        "loads": sorted(set(loads)),
        "classes": [work.tile_class for work in works],
    }


def run_file(spec: SpanPrefill) -> dict[str, Any]:
    """In the interpreter: the emitted file run as a script."""
    told = io.StringIO()
    path = emit.kernel_folder() / f"{spec.key()}.py"
    write_atomically(path, source(spec))
    try:
        with contextlib.redirect_stdout(told):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        return {"code": done.code, "told": told.getvalue()}
    return {}


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"case": "as a script", **run_file(SpanPrefill("triton", "float16", 4, 2, 16, 16, True))}))
    # So that these short inputs meet both tile classes.
    work_list.SHORT_SPAN, work_list.LONGEST_SHARE = 120, float("inf")
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case)}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["finite"], "a row was left unwritten or became NaN"
    assert row["error"] <= TOLERANCE[CASES[name].dtype]
    assert row["zero where nothing is kept"] and row["shape"] and row["dtype"] and row["layout"]
    assert row["error of lse"] <= TOLERANCE_LSE and row["lse"] and row["same without lse"]


@pytest.mark.parametrize(
    "name",
    [
        "length 200",
        "length 200, pointers",
        "float16",
        "bfloat16",
        "bfloat16, pointers",
        "padded middle",
        "windows around a block",
    ],
)
def test_the_tolerance_rejects_a_span_off_by_one(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["error of a longer window"] > 5 * TOLERANCE[CASES[name].dtype]
    assert row["error of a longer sink"] > 5 * TOLERANCE[CASES[name].dtype]
    assert row["lse of a longer window"] > 1000 * TOLERANCE_LSE


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "torch.float16" in interpreted["float16"]["seen"]
    for name in ("bfloat16", "bfloat16, pointers"):
        assert interpreted[name]["seen"] == ["torch.float32", "torch.int32"]


def test_descriptors_where_strides_and_addresses_are_aligned(interpreted: dict[str, dict[str, Any]]) -> None:
    by_pointers = {name for name, row in interpreted.items() if row.get("loads") == ["pointers"]}
    chosen = {"unaligned", "shipped float32 tiles", "padded, shipped tiles"}
    assert by_pointers == {name for name, case in CASES.items() if case.loads} | chosen
    assert interpreted["dims 24 and 40"]["loads"] == ["descriptors"]


def test_the_file_checks_itself_in_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted["as a script"]
    assert row["code"] == 0
    assert row["told"].count("  agrees  ") == 6 and "Not timed" in row["told"]


def test_both_tile_classes_were_run(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["length 200"]["classes"] == [0, 1]
    assert interpreted["padded middle"]["classes"] == [0, 1]


SPEC = SpanPrefill("triton", "bfloat16", 32, 8, 128, 128, False)
ODD = [
    SPEC,
    SpanPrefill("triton", "bfloat16", 32, 8, 128, 128, True),
    SpanPrefill("triton", "float16", 16, 16, 192, 128, False),
    SpanPrefill("triton", "float32", 6, 2, 96, 80, True),
]


def test_golden_text() -> None:
    check_golden("span_prefill_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_constants_are_literals() -> None:
    text = source(SpanPrefill("triton", "float16", 6, 2, 96, 80, False))
    for literal in (
        "item // tiles % 6",
        "head // 3",
        "tl.arange(0, 128)",
        "dims[None, :] < 96",
        "dims_v[None, :] < 80",
    ):
        assert literal in text
    assert " pad" not in text.split("# Chosen by")[0].split('"""', 2)[2]


def test_unsupported_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(SpanPrefill("triton", "float64", 4, 4, 64, 64, False))
    with pytest.raises(ValueError, match="exceed 256"):
        source(SpanPrefill("triton", "float16", 4, 4, 320, 64, False))


def test_every_tile_is_a_multiple_of_its_blocks() -> None:
    for spec in ODD:
        assert all(rows % keys == 0 for tiles in launches(spec).values() for rows, keys, _, _ in tiles)


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install triton"):
        emit.load(SPEC)


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = emit.load(SpanPrefill("triton", "float16", 4, 2, 16, 16, False))
    padded = emit.load(SpanPrefill("triton", "float16", 4, 2, 16, 16, True))
    q, k = torch.zeros(1, 4, 8, 16).half(), torch.zeros(1, 2, 8, 16).half()
    tables = torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="shapes"):
        module.prefill(q, q, k, *tables, 1.0)
    with pytest.raises(ValueError, match="wants float16"):
        module.prefill(q.float(), k, k, *tables, 1.0)
    with pytest.raises(ValueError, match="needs a GPU"):
        module.prefill(q, k, k, *tables, 1.0)
    monkeypatch.setattr(module, "INTERPRETED", True)
    monkeypatch.setattr(padded, "INTERPRETED", True)
    with pytest.raises(ValueError, match="pass no pad"):
        module.prefill(q, k, k, *tables, 1.0, torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="pass pad"):
        padded.prefill(q, k, k, *tables, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("layout", ["transposed", "contiguous", "unaligned"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_on_a_gpu(dtype: str, layout: str, dim: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_list, "LONGEST_SHARE", float("inf"))  # both tile classes, so both streams
    case = Case(
        2500,
        [0, 5, 64, 700],
        [DENSE, 1, 400, 1500],
        dims=(dim, dim),
        dtype=dtype,
        batch=2,
        layout=layout.replace("unaligned", "transposed"),
    )
    q, k, v = (tensor(case, heads, dim).cuda() for heads in (4, 2, 2))
    if layout == "unaligned":
        q, k, v = (F.pad(t, (1, 0))[..., 1:] for t in (q, k, v))
    sinks, windows = (torch.tensor(t, dtype=torch.int32, device="cuda") for t in (case.sinks, case.windows))
    pad = None
    if padded:
        pad = torch.rand(2, 2500, device="cuda") > 0.2
        pad[0] = torch.arange(2500, device="cuda") >= 700
    module = emit.load(SpanPrefill("triton", dtype, 4, 2, dim, dim, padded))
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **o: poisoned(empty(*a, **o)))
        out, lse = module.prefill_lse(q, k, v, sinks, windows, dim**-0.5, pad)
    assert largest_difference(lse, lse_of(q, k, sinks, windows, dim**-0.5, pad)) <= 1e-3
    expected = reference(q.double(), k.double(), v.double(), sinks, windows, dim**-0.5, pad)
    assert error(out, expected) <= TOLERANCE[dtype]


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton span_prefill"].emit(SPEC) == source(SPEC)


if __name__ == "__main__":
    main()
