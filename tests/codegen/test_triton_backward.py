"""The emitted Triton backward: its text, its work list, and in Triton's interpreter its numbers.

Triton fixes the interpreter when a kernel is imported, so all numbers come from one child process: this file run as a
script with TRITON_INTERPRET=1, which prints one JSON object per case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows

from attnopt.codegen import emit, work_list_backward
from attnopt.codegen.reference_backward import backward as reference
from attnopt.codegen.reference_prefill import prefill_lse, span_mask
from attnopt.codegen.spec import SpanBackward
from attnopt.codegen.triton_backward import launches, source
from attnopt.registry import TARGETS

# Relative Frobenius norms against float64 of dq, dk and dv; of their own norm and a tenth of dv's.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
DENSE = 2**31 - 1


class Case(NamedTuple):
    length: int
    sinks: list[int]
    windows: list[int]
    kv_heads: int = 2
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    batch: int = 1
    padding: list[list[int]] | None = None  # per batch entry the padded positions, as [first, end)
    scale: float = 0.2
    strided: bool = False
    shipped: bool = False
    through_lse: bool = False


MIXED = [0, 5, 40, 70], [DENSE, 1, 30, 90]
CASES = {
    "one token": Case(1, *MIXED),
    "length 131": Case(131, *MIXED, dims=(24, 40), kv_heads=1, through_lse=True),
    "every head alone": Case(96, *MIXED, kv_heads=4, batch=2),
    "window 1 and nothing kept": Case(70, [0, 0, 3, 1], [1, 0, 0, 1]),
    "windows around a block": Case(160, [0, 31, 32, 33], [31, 32, 33, 65]),
    "sinks past the window's start": Case(120, [90, 119, 120, 64], [10, 33, 1, 70]),
    "negative scale, strided": Case(70, *MIXED, scale=-0.3, strided=True),
    "shipped tiles": Case(100, *MIXED, shipped=True),
    "float16": Case(131, *MIXED, dtype="float16"),
    "bfloat16": Case(70, *MIXED, dtype="bfloat16", through_lse=True),
    "padded left": Case(100, *MIXED, batch=2, padding=[[0, 55], [0, 0]], through_lse=True),
    "padded middle": Case(100, *MIXED, batch=2, padding=[[30, 80], [32, 64]], dims=(24, 16)),
    "padded everywhere": Case(40, *MIXED, batch=2, padding=[[0, 40], [0, 39]]),
    "empty": Case(0, *MIXED),
    "empty batch": Case(10, *MIXED, batch=0),
}


def spec_of(case: Case) -> SpanBackward:
    return SpanBackward("triton", case.dtype, len(case.sinks), case.kv_heads, *case.dims, case.padding is not None)


def inputs(case: Case) -> list[torch.Tensor]:
    """dout, q, k and v."""
    torch.manual_seed(0)
    heads, (dim, dim_v) = len(case.sinks), case.dims

    def normal(count: int, width: int) -> torch.Tensor:
        if case.strided:
            return torch.randn(case.batch, count, width, case.length).transpose(2, 3)
        return torch.randn(case.batch, case.length, count, width).transpose(1, 2)

    made = normal(heads, dim_v), normal(heads, dim), normal(case.kv_heads, dim), normal(case.kv_heads, dim_v)
    return [x.to(getattr(torch, case.dtype)) for x in made]


def error(found: Any, expected: Any) -> float:
    least = 0.1 * expected[2].norm()
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm() / torch.maximum(b.norm(), least).clamp(min=1e-30)) for a, b in pairs)


def run(case: Case) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    module = emit.load(spec_of(case))
    shipped, empty, seen = module.LAUNCHES, torch.empty, []
    dout, q, k, v = inputs(case)
    sinks, windows = (torch.tensor(x, dtype=torch.int32) for x in (case.sinks, case.windows))
    pad = None
    if case.padding is not None:
        j = torch.arange(case.length)
        pad = torch.stack([(j < first) | (j >= end) for first, end in case.padding])
    wide = [x.double() for x in (q, k, v)]
    dlse = dout[..., 0].float() if case.through_lse else None

    def exact(more: int, longer: int) -> Any:
        tables = sinks + more, windows.clamp(0, 2**20) + longer
        both = prefill_lse(*wide, *tables, case.scale, pad)
        return reference(dout.double(), *wide, *both, *tables, case.scale, pad, dlse)

    out, lse = prefill_lse(*wide, sinks, windows, case.scale, pad)
    expected = exact(0, 0)
    if not case.shipped:
        # Several blocks to a tile, so that short inputs meet every range of both kernels.
        module.LAUNCHES = {"sm_90": {"dq": {"BLOCK_M": 64, "BLOCK_N": 32}, "dkv": {"BLOCK_M": 32, "BLOCK_N": 64}}}
    originals = {name: getattr(module, name) for name in ("row_sums", "span_dq", "span_dkv")}

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                seen.extend(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
                self.kernel[grid](*args, **options)

            return call

    for name, kernel in originals.items():
        setattr(module, name, Recorded(kernel))
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(float("nan"))  # type: ignore[assignment]
    try:
        found = module.backward(dout, q, k, v, out.to(q.dtype), lse.float(), sinks, windows, case.scale, pad, dlse)
    finally:
        torch.empty, module.LAUNCHES = empty, shipped
        for name, kernel in originals.items():
            setattr(module, name, kernel)
    return {
        "error": error(found, expected),
        "finite": all(bool(x.isfinite().all()) for x in found),
        "zero where padded": pad is None
        or all(bool((x[~pad[:, None].expand(x.shape[:3])] == 0).all()) for x in found[1:]),
        "shape": all(a.shape == b.shape and a.dtype == q.dtype for a, b in zip(found, (q, k, v), strict=True)),
        "layout": all(x.transpose(1, 2).is_contiguous() for x in found),
        "error of a longer window": error(found, exact(0, 1)),
        "error of a longer sink": error(found, exact(1, 0)),
        "seen": sorted(set(seen)),
    }


def main() -> None:
    torch.set_num_threads(1)
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
    assert row["zero where padded"] and row["shape"] and row["layout"]


@pytest.mark.parametrize("name", ["length 131", "float16", "bfloat16", "padded middle", "windows around a block"])
def test_the_tolerance_rejects_a_span_off_by_one(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["error of a longer window"] > 3 * TOLERANCE[CASES[name].dtype]
    assert row["error of a longer sink"] > 3 * TOLERANCE[CASES[name].dtype]


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "torch.float16" in interpreted["float16"]["seen"]
    assert interpreted["bfloat16"]["seen"] == ["torch.float32", "torch.int32"]


@pytest.mark.parametrize("length", [1, 63, 160])
def test_the_work_list_counts_the_blocks_that_see_a_key(length: int) -> None:
    """Every tile of keys once, longest first, with the number of query blocks between the first and the last live."""
    sinks, windows, tile = torch.tensor([0, 5, 40, 70]), torch.tensor([length, 1, 30, 0]), (16, 32)
    blocks = work_list_backward.query_blocks(sinks, windows, length, tile)
    keep = span_mask(length, sinks, windows)
    for head in range(4):
        for t in range(-(-length // 32)):
            live = keep[head, :, 32 * t : 32 * t + 32].any(1).nonzero()
            last = int(live.max()) if len(live) else 32 * t - 1
            wanted = -(-(last + 1 - 32 * t) // 16)
            # Its own rows are always visited: a window of 0 has none, and is not worth a case.
            assert wanted <= blocks[head, t] <= max(wanted, 2)
    work = work_list_backward.build_keys(sinks, windows, 2, length, 3, tile)
    assert work is not None and sorted(work.items.tolist()) == list(range(3 * 2 * work.tiles))
    cost = blocks.unflatten(0, (2, 2)).sum(1).reshape(-1)
    taken = cost[work.items.long() % (2 * work.tiles)].tolist()
    assert taken == sorted(taken, reverse=True)


SPEC = SpanBackward("triton", "bfloat16", 32, 8, 128, 128, False)
ODD = [
    SPEC,
    SpanBackward("triton", "float32", 6, 2, 96, 80, True),
    SpanBackward("triton", "float16", 8, 8, 192, 128, True),
]


def test_golden_text() -> None:
    check_golden("span_backward_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_blocks_divide_tiles() -> None:
    for spec in ODD:
        for dq, dkv in launches(spec).values():
            assert dq[0] % dq[1] == 0 and dkv[1] % dkv[0] == 0


def test_what_cannot_be_served_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(SpanBackward("triton", "float64", 4, 4, 64, 64, False))
    pytest.importorskip("triton")
    assert TARGETS["triton span_backward"].emit(SPEC) == source(SPEC)
    module = emit.load(SpanBackward("triton", "float16", 4, 2, 16, 16, False))
    q, k, lse = torch.zeros(1, 4, 8, 16).half(), torch.zeros(1, 2, 8, 16).half(), torch.zeros(1, 4, 8)
    tables = torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    for message, arguments in {
        "have shapes": (q, q, q, k, q, lse),
        "lse float32": (q, q, k, k, q, lse.half()),
        "needs a GPU": (q, q, k, k, q, lse),
    }.items():
        with pytest.raises(ValueError, match=message):
            module.backward(*arguments, *tables, 1.0)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="pass no pad"):
        module.backward(q, q, k, k, q, lse, *tables, 1.0, torch.ones(1, 8, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_on_a_gpu(dtype: str, dim: int, padded: bool) -> None:
    case = Case(2500, [0, 5, 64, 700], [DENSE, 1, 400, 1500], dims=(dim, dim), dtype=dtype, batch=2)
    dout, q, k, v = (x.cuda() for x in inputs(case))
    tables = [torch.tensor(t, dtype=torch.int32, device="cuda") for t in (case.sinks, case.windows)]
    pad = torch.rand(2, 2500, device="cuda") > 0.2 if padded else None
    wide = [x.double() for x in (q, k, v)]
    out, lse = prefill_lse(*wide, *tables, case.scale, pad)
    module = emit.load(SpanBackward("triton", dtype, 4, 2, dim, dim, padded))
    found = module.backward(dout, q, k, v, out.to(q.dtype), lse.float(), *tables, case.scale, pad)
    expected = reference(dout.double(), *wide, out, lse, *tables, case.scale, pad)
    assert error(found, expected) <= TOLERANCE[dtype]


if __name__ == "__main__":
    main()
