"""The Triton decoding, run by Triton's interpreter in a child process, against the reference in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows
from ragged import CASES, TOLERANCE, Case, arguments, drawn, relative

from attnopt.codegen import decode_list, emit, self_check_decode
from attnopt.codegen.reference_decode import decode as reference
from attnopt.codegen.spec import SpanDecode
from attnopt.codegen.triton_decode import source
from attnopt.registry import TARGETS

# Chunks of this many slots, so that short segments are divided; some cases run with others too.
CHUNK = 64
RUNS: dict[str, tuple[str | Case, torch.dtype, int]] = {
    **{f"{name}, float32": (name, torch.float32, CHUNK) for name in CASES},
    **{f"{name}, {d}": (name, d, CHUNK) for name in ("uneven", "spans") for d in (torch.float16, torch.bfloat16)},
    "left padding, whole segments": ("left padding", torch.float32, 512),
    "spans, chunks of 128": ("spans", torch.float32, 128),
    **{f"drawn {seed}": (drawn(seed), torch.float32, CHUNK) for seed in range(8)},
}
OWN_CHECK = SpanDecode("triton", "bfloat16", 4, 2, 16, 24)


def spec_of(case: Case, dtype: torch.dtype) -> SpanDecode:
    groups = len(case.capacities)
    name = str(dtype).removeprefix("torch.")
    return SpanDecode("triton", name, groups * case.share, groups, *case.dims, case.tokens, bool(case.windows))


def run(case: Case, dtype: torch.dtype, chunk: int) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    decode_list.chunk_of = lambda *_: chunk  # type: ignore[assignment]
    decode_list._built.cache_clear()
    q, k, v, starts, filled, *spans = arguments(case, dtype)
    module = emit.load(spec_of(case, dtype))
    kernel, seen = module.span_decode, set()

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                seen.update(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
                kernel[grid](*args, **options)

            return call

    # A result nobody wrote would be NaN.
    empty = torch.empty
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(float("nan"))  # type: ignore[assignment]
    module.span_decode = Recorded()
    try:
        out = module.decode(q, k, v, starts, filled, case.scale, *spans)
    finally:
        torch.empty, module.span_decode = empty, kernel
    wide = q.double(), k.double(), v.double(), starts
    expected = reference(*wide, filled, case.scale, *spans)
    if spans:
        spans[1] = spans[1] - 1
    off = reference(*wide, filled - int(not spans), case.scale, *spans)
    return {
        "error": relative(out, expected),
        "zero where nothing is kept": bool((out[expected.abs().sum(-1) == 0] == 0).all()),
        "dtype": out.dtype == q.dtype,
        "error of one slot less": relative(out, off),
        "seen": sorted(seen),
        "divided": decode_list.decode_list(starts, max(1, case.batch)).split.tolist(),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name, (case, dtype, chunk) in RUNS.items():
        print(
            json.dumps({"run": name, **run(CASES[case] if isinstance(case, str) else case, dtype, chunk)}), flush=True
        )
    module = emit.load(OWN_CHECK)
    try:
        self_check_decode.check(OWN_CHECK, module.decode)
    except SystemExit as done:
        print(json.dumps({"run": "own check", "code": done.code}))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"), "run")


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["error"] <= TOLERANCE[RUNS[name][1]]
    assert row["zero where nothing is kept"] and row["dtype"]


@pytest.mark.parametrize("name", ["uneven, torch.bfloat16", "spans, torch.bfloat16", "left padding, float32"])
def test_the_tolerance_rejects_one_slot_less(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted[name]["error of one slot less"] > 2 * TOLERANCE[RUNS[name][1]]


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["uneven, torch.float16"]["seen"] == ["torch.float16", "torch.float32", "torch.int32"]
    assert interpreted["uneven, torch.bfloat16"]["seen"] == ["torch.float32", "torch.int32"]


def test_divided_and_whole_segments_were_run(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["left padding, float32"]["divided"] == [0]
    assert interpreted["left padding, whole segments"]["divided"] == []
    assert interpreted["spans, chunks of 128"]["divided"] == [0]


def test_an_emitted_file_checks_itself(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["own check"]["code"] == 0


SPEC = SpanDecode("triton", "bfloat16", 32, 8, 128, 128)
ODD = [
    SPEC,
    SpanDecode("triton", "bfloat16", 32, 8, 128, 128, 1, True),
    SpanDecode("triton", "float16", 64, 4, 192, 128, 3, True),
    SpanDecode("triton", "float32", 6, 2, 96, 80, 2),
    SpanDecode("triton", "float32", 16, 1, 64, 64, 1, True),
]


def test_golden_text() -> None:
    check_golden("span_decode_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_unsupported_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(SpanDecode("triton", "float64", 4, 4, 64, 64))
    with pytest.raises(ValueError, match="exceed 256"):
        source(SpanDecode("triton", "float16", 4, 4, 320, 64))
    with pytest.raises(ValueError, match="exceed 64 rows"):
        source(SpanDecode("triton", "float16", 32, 4, 64, 64, 9))
    with pytest.raises(ValueError, match="exceed 32 rows"):
        source(SpanDecode("triton", "float32", 32, 4, 64, 64, 5))


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = emit.load(SpanDecode("triton", "float16", 4, 2, 16, 16))
    q, k, starts = torch.zeros(1, 4, 1, 16).half(), torch.zeros(1, 8, 16).half(), torch.tensor([0, 4, 8]).int()
    filled = torch.tensor([[4, 4]]).int()
    with pytest.raises(ValueError, match="needs a GPU"):
        module.decode(q, k, k, starts, filled, 1.0)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="have shapes"):
        module.decode(q[:, :2], k, k, starts, filled, 1.0)
    with pytest.raises(ValueError, match="wants float16"):
        module.decode(q, k.float(), k, starts, filled, 1.0)
    with pytest.raises(ValueError, match="int32"):
        module.decode(q, k, k, starts.long(), filled, 1.0)
    with pytest.raises(ValueError, match="not copied"):
        module.decode(q, k, k.transpose(1, 2).contiguous().transpose(1, 2), starts, filled, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["left padding", "uneven", "spans, several tokens"])
def test_agrees_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k, v, starts, filled, *spans = (x.cuda() for x in arguments(case, dtype))
    out = emit.load(spec_of(case, dtype)).decode(q, k, v, starts, filled, case.scale, *spans)
    expected = reference(q.double(), k.double(), v.double(), starts, filled, case.scale, *spans)
    assert relative(out, expected) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_serves_a_growing_cache() -> None:
    case = Case([600, 600, 64, 64], batch=2, dims=(64, 64))
    q, k, v, starts, filled = (x.cuda() for x in arguments(case, torch.float16))
    module = emit.load(spec_of(case, torch.float16))
    module.decode(q, k, v, starts, filled, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.decode(q, k, v, starts, filled, 0.1)
    for used in (1, 64, 300, 600):
        filled.copy_(torch.tensor([[used, used // 2, 64, 1]] * 2))
        graph.replay()
        expected = reference(q.double(), k.double(), v.double(), starts, filled, 0.1)
        assert relative(out, expected) <= TOLERANCE[torch.float16]


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton span_decode"].emit(SPEC) == source(SPEC)


if __name__ == "__main__":
    main()
