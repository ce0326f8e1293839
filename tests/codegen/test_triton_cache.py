"""The Triton step of a cache, run by Triton's interpreter in a child process, against the reference in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows
from ragged import TOLERANCE, relative

from attnopt.cache import Layout
from attnopt.codegen import decode_list, emit
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.spec import CacheStep
from attnopt.codegen.triton_cache import source
from attnopt.registry import TARGETS


@dataclass(frozen=True)
class Case:
    """A cache, and what happens to it. spans: sink and window of every query head. steps: for each step the new tokens
    of a row, or of every row which of them are real, as "10" for one that is and one that is not; negative: tokens
    taken back. chunk: slots of an item."""

    spans: tuple[tuple[int, int], ...]
    kv_heads: int
    length: int
    steps: tuple[int | tuple[str, ...], ...]
    chunk: int
    slack: int = 0
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    scale: float = 0.3

    @property
    def layout(self) -> Layout:
        sinks, windows = zip(*self.spans, strict=True)
        return Layout.of_spans(sinks, windows, self.kv_heads, self.length, self.slack)


CASES = {
    # A prompt through the prefill kernel; a full head beside a ring, each with unequal spans in a group; pads left and
    # inside; wraps; several tiles of rows.
    "padded": Case(
        ((0, 99), (0, 20), (2, 9), (1, 12)),
        2,
        80,
        (("0000" + 28 * "1" + "0101", 12 * "110"), 3, ("1", "0"), 12, ("01", "00"), 1, 20, 1),
        16,
    ),
    # Rollback by as much as the slack, before and after rings have wrapped; a sink that comes with a long chunk, which
    # only some heads keep; a chunk that has the newest slot and behind it the oldest; windows shorter than a tile.
    "rollback": Case(
        ((0, 7), (3, 9), (0, 3), (0, 20), (3, 20), (0, 19), (0, 2), (0, 1), (0, 2)),
        3,
        99,
        (5, -3, 40, 4, -4, 1, -3, 4, 1, 1, 1, 1),
        16,
        4,
        (16, 24),
        1,
        -0.3,
    ),
    "one token of each dtype": Case(((4, 40), (0, 99)), 2, 99, (66, 1), 64, 0, (24, 16), 1),
}
RUNS = {
    "padded, torch.float32": ("padded", torch.float32),
    "rollback, torch.float32": ("rollback", torch.float32),
    **{f"one token, {dtype}": ("one token of each dtype", dtype) for dtype in (torch.float16, torch.bfloat16)},
}


def spec_of(case: Case, dtype: torch.dtype) -> CacheStep:
    return CacheStep("triton", str(dtype).removeprefix("torch."), len(case.spans), case.kv_heads, *case.dims)


def trace(case: Case, dtype: torch.dtype, step: Any, wide: bool, narrower: int = 0) -> dict[str, torch.Tensor]:
    """Outputs of all steps, n and the cache after them, for tokens that are the same whatever `wide` is."""
    generator = torch.Generator().manual_seed(1)
    table, spans = case.layout.tables()
    spans = spans - torch.tensor([0, narrower], dtype=torch.int32)
    held = torch.float64 if wide else dtype
    dim, dim_v = case.dims
    # What was never written is NaN, and so are the values of tokens that do not count.
    keys, values = (torch.full((case.batch, case.layout.slots, d), float("nan"), dtype=held) for d in case.dims)
    n = torch.zeros(case.batch, dtype=torch.int32)
    outs: list[torch.Tensor] = []
    for now in case.steps:
        if isinstance(now, int) and now < 0:
            n += now
            continue
        tokens = now if isinstance(now, int) else len(now[0])
        real = None if isinstance(now, int) else torch.tensor([[c == "1" for c in row] for row in now])
        shape = (case.batch, tokens, len(case.spans), dim), *((case.batch, tokens, case.kv_heads, d) for d in case.dims)
        q, k, v = (torch.randn(s, generator=generator).to(dtype).to(held).transpose(1, 2) for s in shape)
        if real is not None:
            k, v = (x.masked_fill(~real[:, None, :, None], float("nan")) for x in (k, v))
        out = step(q, k, v, keys, values, n, real, table, spans, case.scale, not outs)
        assert out.stride() == (tokens * len(case.spans) * dim_v, dim_v, len(case.spans) * dim_v, 1)
        outs.append(out.transpose(1, 2).flatten(2))
    return {"out": torch.cat(outs, 1), "n": n, "keys": keys, "values": values}


def run(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    decode_list.chunk_of = lambda *_: case.chunk  # type: ignore[assignment]
    decode_list._built.cache_clear()
    module = emit.load(spec_of(case, dtype))
    seen: dict[str, set[str]] = {}

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                seen.setdefault(self.name, set()).update(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
                self.kernel[grid](*args, **options)

            return call

    for name in ("attend", "merge", "write"):
        setattr(module, name, Recorded(name))
    # A result nobody wrote would be NaN.
    empty = torch.empty
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(float("nan"))  # type: ignore[assignment]
    try:
        found = trace(case, dtype, module.step, False)
    finally:
        torch.empty = empty
    expected, off = (trace(case, dtype, reference, True, narrower) for narrower in (0, 1))
    return {
        "error": relative(found["out"], expected["out"]),
        "error of a narrower window": relative(found["out"], off["out"]),
        "zero where nothing is kept": bool((found["out"][expected["out"].abs().sum(-1) == 0] == 0).all()),
        "cache": all(
            torch.equal(found[name].double().nan_to_num(9e9), expected[name].nan_to_num(9e9))
            for name in ("keys", "values")
        ),
        "n": torch.equal(found["n"], expected["n"]),
        "seen": {name: sorted(dtypes) for name, dtypes in seen.items()},
    }


def overfull() -> dict[str, Any]:
    """Three tokens into the last slot of a head that holds every token, and one more after them."""
    table, spans = Layout.of_spans([0, 0], [16, 2], 2, 16, 0).tables()
    step = emit.load(CacheStep("triton", "float32", 2, 2, 16, 16)).step
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 19, 16, generator=generator) for _ in range(3))
    keys, values, n = torch.zeros(1, 32, 16), torch.zeros(1, 32, 16), torch.zeros(1, dtype=torch.int32)
    for first, last in ((0, 15), (15, 18), (18, 19)):
        new = (x[:, :, first:last] for x in (q, k, v))
        out = step(*new, keys, values, n, None, table, spans, 0.25, False)
    # Those of the slots in the window of 16, and the token itself.
    held = [*range(3, 16), 18]
    expected = torch.softmax(k[0, 0, held].double() @ q[0, 0, 18].double() * 0.25, 0) @ v[0, 0, held].double()
    return {
        "n": n.tolist(),
        "kept": torch.equal(keys[0, :16], k[0, 0, :16]) and torch.equal(values[0, :16], v[0, 0, :16]),
        "error": relative(out[0, 0, 0], expected),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"run": "overfull", **overfull()}), flush=True)
    for name, (case, dtype) in RUNS.items():
        print(json.dumps({"run": name, **run(CASES[case], dtype)}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"), "run")


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row, tolerance = interpreted[name], TOLERANCE[RUNS[name][1]]
    assert row["error"] <= tolerance and row["error of a narrower window"] > 2 * tolerance
    assert row["zero where nothing is kept"]
    # What is kept is copied: equal to the last bit, and no slot else is written.
    assert row["cache"] and row["n"]


def test_what_a_full_head_has_no_slot_for_is_dropped_and_counted(interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted["overfull"]
    assert row["kept"] and row["n"] == [19] and row["error"] <= TOLERANCE[torch.float32]


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    seen = interpreted["one token, torch.bfloat16"]["seen"]
    assert seen["attend"] == ["torch.float32", "torch.int32"]
    assert interpreted["one token, torch.float16"]["seen"]["write"] == ["torch.float16", "torch.int32"]


def test_every_kernel_was_run(interpreted: dict[str, dict[str, Any]]) -> None:
    assert {*interpreted["padded, torch.float32"]["seen"]} == {"attend", "merge", "write"}
    # Validity of one token is read as it is, without a kernel that counts.
    assert "torch.int8" in interpreted["padded, torch.float32"]["seen"]["attend"]


SPEC = CacheStep("triton", "bfloat16", 32, 8, 128, 128)
ODD = [
    SPEC,
    CacheStep("triton", "float32", 6, 2, 96, 80),
    CacheStep("triton", "float16", 24, 4, 192, 128),
    CacheStep("triton", "float32", 8, 8, 64, 64),
    CacheStep("triton", "float16", 100, 10, 256, 64),
]


def test_golden_text() -> None:
    check_golden("cache_step_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_unsupported_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(CacheStep("triton", "float64", 4, 4, 64, 64))
    with pytest.raises(ValueError, match="exceed 256"):
        source(CacheStep("triton", "float16", 4, 4, 320, 64))


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = emit.load(CacheStep("triton", "float16", 4, 2, 16, 16))
    q, k, cache = torch.zeros(1, 4, 1, 16).half(), torch.zeros(1, 2, 1, 16).half(), torch.zeros(1, 32, 16).half()
    table, spans = Layout.of_spans([0] * 4, [16] * 4, 2, 16).tables()
    n = torch.zeros(1, dtype=torch.int32)
    rest = n, None, table, spans, 1.0, True
    with pytest.raises(ValueError, match="needs a GPU"):
        module.step(q, k, k, cache, cache, *rest)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="have shapes"):
        module.step(q[:, :2], k, k, cache, cache, *rest)
    with pytest.raises(ValueError, match="wants float16"):
        module.step(q, k, k, cache.float(), cache, *rest)
    with pytest.raises(ValueError, match="int32"):
        module.step(q, k, k, cache, cache, n, None, table.long(), spans, 1.0, True)
    with pytest.raises(ValueError, match="not copied"):
        module.step(q, k, k, cache.mT.contiguous().mT, cache, *rest)
    with pytest.raises(ValueError, match="ends at slot 32"):
        module.step(q, k, k, cache[:, :16], cache[:, :16], *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case, module = CASES[name], emit.load(spec_of(CASES[name], dtype))

    def on_gpu(q, k, v, keys, values, n, valid, table, spans, scale, fresh):  # type: ignore[no-untyped-def]
        held = [None if x is None else x.cuda() for x in (q, k, v, keys, values, n, valid, table, spans)]
        out = module.step(*held, scale, fresh)
        for mine, theirs in zip((keys, values, n), held[3:6], strict=True):
            mine.copy_(theirs)
        return out.cpu()

    found, expected = trace(case, dtype, on_gpu, False), trace(case, dtype, reference, True)
    assert relative(found["out"], expected["out"]) <= TOLERANCE[dtype]
    for part in ("keys", "values", "n"):
        assert torch.equal(found[part].double().nan_to_num(9e9), expected[part].double().nan_to_num(9e9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_serves_a_growing_cache() -> None:
    layout = Layout.of_spans([0, 0, 4, 4], [600, 600, 60, 40], 2, 600)
    table, spans = layout.tables("cuda")
    module = emit.load(CacheStep("triton", "float16", 4, 2, 64, 64))
    q, k, v = (torch.randn(2, heads, 1, 64, device="cuda").half() for heads in (4, 2, 2))
    keys, values = (torch.zeros(2, layout.slots, 64, device="cuda").half() for _ in range(2))
    n = torch.zeros(2, dtype=torch.int32, device="cuda")
    wide = keys.double().cpu(), values.double().cpu(), n.cpu()
    valid = torch.ones(2, 1, dtype=torch.bool, device="cuda")
    rest = table, spans, 0.1, False
    module.step(q, k, v, keys.clone(), values.clone(), n.clone(), valid, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.step(q, k, v, keys, values, n, valid, *rest)
    for _ in range(300):
        for x in (q, k, v):
            x.normal_()
        valid.copy_(torch.rand(2, 1) < 0.8)
        graph.replay()
        new = [x.double().cpu() for x in (q, k, v)]
        expected = reference(*new, *wide, valid.cpu(), table.cpu(), spans.cpu(), 0.1, False)
        assert relative(out.cpu(), expected) <= TOLERANCE[torch.float16]
    assert torch.equal(n.cpu(), wide[2]) and torch.equal(keys.double().cpu(), wide[0])


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton cache_step"].emit(SPEC) == source(SPEC)


if __name__ == "__main__":
    main()
