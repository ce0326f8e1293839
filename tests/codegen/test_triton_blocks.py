"""The emitted Triton prefill over lists of blocks: its text, and in Triton's interpreter its numbers.

As for the other Triton kernels, all numbers come from one child process: this file run as a script with
TRITON_INTERPRET=1, which prints one JSON object per case.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows
from torch import Tensor

from attnopt.codegen import emit, self_check_blocks
from attnopt.codegen.emit import write_atomically
from attnopt.codegen.reference_blocks import prefill as reference
from attnopt.codegen.self_check import TOLERANCE, error
from attnopt.codegen.self_check_prefill import SCALE
from attnopt.codegen.spec import BlockPrefill
from attnopt.codegen.triton_blocks import source
from attnopt.errors import DependencyError
from attnopt.registry import TARGETS

TOLERANCE_LSE = 1e-5
NEVER = float("-inf")
# Least distance of a threshold from the scores it decides on, so that rounding decides nothing.
MARGIN = 1e-4
# What stands in a list behind its count, and in heads of `out` that are not served.
UNREAD, UNTOUCHED = 2**20, 7.0


class Case(NamedTuple):
    queries: int
    keys: int = 0  # 0: as many
    block: int = 16
    heads: tuple[int, ...] = (0, 2, 3)  # served, of 4
    kv_heads: int = 2
    dims: tuple[int, int] = (32, 32)
    dtype: str = "float32"
    batch: int = 1
    padding: list[list[int]] | None = None  # per batch entry the padded positions, as [first, end)
    window: int = 0
    bounds: tuple[float, ...] = (NEVER,)  # of the heads, in turn
    lists: str = "random"
    lse: str = "contiguous"
    layout: str = "transposed"
    scale: float = 0.2
    level: float = 0.0  # how far the scores of one block lie from those of another


BOUNDED = (-1.0, NEVER, -0.25)
CASES = {
    "three heads of four": Case(50),
    "blocks of 32, one KV head": Case(70, block=32, kv_heads=1, dims=(64, 64)),
    "no group, dims 24 and 40": Case(35, kv_heads=4, dims=(24, 40)),
    # A tile that reaches one key past the first row, and in the other one before the window of the last.
    "more keys than queries": Case(30, 76),
    "one token after many": Case(1, 70, bounds=BOUNDED),
    "one token, below a block": Case(1, block=32),
    "window, more keys": Case(33, 60, window=42, lists="all"),
    "empty lists, no lse": Case(50, lists="some empty", lse=""),
    "blocks ahead of their rows": Case(40, heads=(1, 2), lists="ahead", bounds=(NEVER, -1.0)),
    "padded with holes": Case(60, heads=(2,), batch=2, padding=[[0, 20], [17, 35]]),
    "padded everywhere, more keys": Case(20, 40, batch=2, padding=[[0, 40], [39, 40]], bounds=(NEVER, -1.0)),
    "bounds": Case(90, bounds=BOUNDED, lists="all", level=2.0),
    "bounds, more keys, window": Case(33, 80, bounds=BOUNDED, lists="all", window=53, level=2.0),
    "bounds, blocks of 32, padded": Case(
        130, block=32, heads=(1,), bounds=(-0.5,), lists="all", dims=(64, 64), padding=[[20, 50]], level=3.0
    ),
    "float16, bounds": Case(70, heads=(0, 3), batch=2, dtype="float16", bounds=BOUNDED[::2], lists="all", level=2.0),
    "a block of two tiles, bounds": Case(66, 270, block=64, heads=(1,), bounds=(-1.0,), lists="all", level=2.0),
    "a block of two tiles, padded": Case(90, block=64, heads=(0, 2), bounds=(NEVER, -2.0), padding=[[40, 60]]),
    "blocks of 128, in one tile": Case(
        300, block=128, heads=(1, 2), dtype="float16", bounds=(-1.0, NEVER), lists="all", level=2.0
    ),
    "blocks of 128, in two tiles": Case(
        300, block=128, heads=(1, 2), dtype="float16", bounds=(-1.0, NEVER), lists="all", level=2.0, layout="unaligned"
    ),
    "bfloat16": Case(40, heads=(3,), dtype="bfloat16", batch=2),
    "lists that heads share": Case(40, heads=(0, 3), batch=2, lists="shared"),
    "contiguous, strided lse, negative scale": Case(40, heads=(0, 2), layout="contiguous", lse="strided", scale=-0.3),
    "last dimension strided, scale 0": Case(20, layout="strided", scale=0.0, bounds=(-1.0, NEVER)),
    "no queries": Case(0, 20),
    "no batch": Case(20, batch=0),
}
# Those of which something is skipped, and those that are also compared with what is wrong by little.
SKIPPING = [name for name, case in CASES.items() if case.level]
NEAR = [
    "three heads of four",
    "bfloat16",
    "padded with holes",
    "window, more keys",
    "bounds",
    "float16, bounds",
    "a block of two tiles, bounds",
]


def spec_of(case: Case) -> BlockPrefill:
    return BlockPrefill("triton", case.dtype, 4, case.kv_heads, *case.dims, case.block, case.padding is not None)


def tensor(case: Case, heads: int, length: int, dim: int) -> Tensor:
    made = torch.randn(case.batch, length, heads, dim)
    made = made.to(getattr(torch, case.dtype)).transpose(1, 2)
    if case.layout == "contiguous":
        return made.contiguous()
    if case.layout == "strided":
        return made.mT.contiguous().mT
    if case.layout == "unaligned":
        return torch.nn.functional.pad(made, (1, 0))[..., 1:]
    return made


def lists_of(case: Case, keys: int) -> tuple[Tensor, Tensor]:
    """counts int32 (B, h, R), blocks int32 (B, h, R, L)."""
    rows, columns = -(-case.queries // case.block), -(-keys // case.block)
    served = 1 if case.lists == "shared" else len(case.heads)
    counts = torch.zeros(case.batch, served, rows, dtype=torch.int32)
    blocks = torch.full((case.batch, served, rows, columns), UNREAD, dtype=torch.int32)
    for b in range(case.batch):
        for n in range(served):
            for r in range(rows):
                last = (min((r + 1) * case.block, case.queries) - 1 + keys - case.queries) // case.block
                keep = torch.rand(columns) > 0.4
                if case.lists == "all":
                    keep[:] = True
                if case.lists != "ahead":
                    keep[last + 1 :] = False
                if case.lists != "some empty":
                    keep[last] = True
                elif (n + r) % 2:
                    keep[:] = False
                found = keep.nonzero()[:, 0]
                counts[b, n, r] = len(found)
                blocks[b, n, r, : len(found)] = found
    if case.lists == "shared":
        counts, blocks = (t.expand(-1, len(case.heads), *t.shape[2:]) for t in (counts, blocks))
    return counts, blocks


def ascending(counts: Tensor, blocks: Tensor) -> Tensor:
    """Lists that the reference visits from the first upward."""
    turned = blocks.clone()
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        count = int(counts[tuple(at)])
        turned[tuple(at)][1:count] = blocks[tuple(at)][1:count].flip(0)
    return turned


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Infinite where one of the two is -inf and the other is not."""
    away = torch.where(found == expected, 0.0, (found.double() - expected).abs())
    return float(away.nan_to_num(1e9).amax()) if found.numel() else 0.0


def run(case: Case, near_misses: bool) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    torch.manual_seed(0)
    module, keys, served = emit.load(spec_of(case)), case.keys or case.queries, list(case.heads)
    q = tensor(case, 4, case.queries, case.dims[0])
    k, v = (tensor(case, case.kv_heads, keys, dim) for dim in case.dims)
    if case.level:
        # One feature says of a block of keys how far its scores lie from those of others; later ones are larger.
        each = torch.arange(-(-keys // case.block)) / 2
        q[..., 0] = 1 / case.scale
        k[..., 0] = case.level * (each + torch.randn(len(each))).repeat_interleave(case.block)[:keys]
    counts, blocks = lists_of(case, keys)
    heads = torch.tensor(case.heads, dtype=torch.int32)
    bounds = torch.tensor([case.bounds[n % len(case.bounds)] for n in range(len(served))])
    if case.batch > 1:
        # Of each entry its own.
        bounds = torch.stack([bounds, bounds.flip(0)])
    pad = None
    if case.padding is not None:
        j = torch.arange(keys)
        pad = torch.stack([(j < first) | (j >= end) for first, end in case.padding])

    def exact(
        blocks: Tensor = blocks, bounds: Tensor = bounds, window: int = case.window
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros(case.batch, 4, case.queries, case.dims[1], dtype=torch.float64)
        lse = torch.zeros(case.batch, len(served), case.queries, dtype=torch.float64)
        wide = (t.double() for t in (q, k, v))
        skipped = reference(*wide, heads, counts, blocks, bounds, case.scale, pad, window, case.block, out, lse)
        return out[:, served], lse, skipped

    out = torch.full((case.batch, case.queries, 4, case.dims[1]), UNTOUCHED, dtype=q.dtype).transpose(1, 2)
    out[:, served] = float("nan")
    if case.layout == "strided":
        out = out.mT.contiguous().mT
    lse = torch.full((case.batch, len(served), case.queries), float("nan"))
    if case.lse == "strided":
        lse = lse.mT.contiguous().mT
    given = heads, counts, blocks, bounds, case.scale, pad, case.window, out
    hidden = k, v
    if pad is not None:
        # What stands at padding may be no number.
        hidden = tuple(t.masked_fill(~pad[:, None, :, None], x) for t, x in ((k, float("inf")), (v, float("nan"))))
    skipped = module.prefill(q, *hidden, *given, lse if case.lse else None)
    found = out[:, served]
    expected, expected_lse, expected_skipped = exact()
    row = {
        "error": error(found, expected),
        "error of lse": largest_difference(lse, expected_lse) if case.lse else 0.0,
        "finite": bool(found.isfinite().all()),
        "untouched": bool((out[:, [h for h in range(4) if h not in served]] == UNTOUCHED).all()),
        "skipped": skipped.tolist() == expected_skipped.tolist() and skipped.dtype == torch.int32,
        "count": int(skipped.sum()),
        "tile": module.LAUNCHES[module._loads(q, k, v)]["TILE"],
    }
    if case.level:
        row["margin"] = all(torch.equal(exact(bounds=bounds + m)[2], expected_skipped) for m in (-MARGIN, MARGIN))
    if near_misses:
        wrong = {"a block to the left": exact((blocks - 1).clamp(min=0))[0]}
        if case.window:
            wrong["a longer window"] = exact(window=case.window + 1)[0]
        if case.level:
            wrong["no bound"] = exact(bounds=bounds * float("inf"))[0]
            wrong["another order"], _, other = exact(ascending(counts, blocks))
            row["skipped in another order"] = other.tolist() != expected_skipped.tolist()
        row["near misses"] = {name: error(found, result) for name, result in wrong.items()}
    return row


def run_file(spec: BlockPrefill) -> dict[str, Any]:
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
    print(json.dumps({"case": "as a script", **run_file(BlockPrefill("triton", "float16", 2, 1, 16, 16, 16, True))}))
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case, name in NEAR)}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["finite"], "a row was left unwritten or became NaN"
    assert row["error"] <= TOLERANCE[CASES[name].dtype] and row["error of lse"] <= TOLERANCE_LSE
    assert row["untouched"] and row["skipped"]


@pytest.mark.parametrize("name", SKIPPING)
def test_bounds_skip_blocks(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted[name]["margin"], "rounding decides what is skipped here: choose other data"
    assert interpreted[name]["count"] > 0


def test_blocks_larger_than_a_tile_are_among_these(interpreted: dict[str, dict[str, Any]]) -> None:
    tiles = {name: (case.block, interpreted[name]["tile"]) for name, case in CASES.items() if case.block >= 64}
    assert sorted(tiles.values()) == [(64, 32), (64, 32), (128, 64), (128, 128)]


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_noticed(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert min(row["near misses"].values()) > 5 * TOLERANCE[CASES[name].dtype]
    assert row.get("skipped in another order", True)


def test_the_file_checks_itself_in_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted["as a script"]
    assert row["code"] == 0
    assert row["told"].count("  agrees  ") == 10 and "Not timed" in row["told"]


SPEC = BlockPrefill("triton", "bfloat16", 32, 8, 128, 128, 64, False)
ODD = [
    SPEC,
    BlockPrefill("triton", "bfloat16", 32, 8, 128, 128, 128, True),
    BlockPrefill("triton", "float16", 16, 16, 192, 128, 16, False),
    BlockPrefill("triton", "float32", 6, 2, 96, 80, 64, True),
]


def test_golden_text() -> None:
    check_golden("block_prefill_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_unsupported_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(BlockPrefill("triton", "float64", 4, 4, 64, 64, 64, False))
    with pytest.raises(ValueError, match="exceed 256"):
        source(BlockPrefill("triton", "float16", 4, 4, 320, 64, 64, False))


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install triton"):
        emit.load(SPEC)


def test_wrong_arguments_are_named() -> None:
    pytest.importorskip("triton")
    module, padded = (emit.load(BlockPrefill("triton", "float16", 4, 2, 16, 16, 16, p)) for p in (False, True))
    q, k = torch.zeros(1, 4, 8, 16).half(), torch.zeros(1, 2, 8, 16).half()
    heads, counts = torch.arange(4, dtype=torch.int32), torch.zeros(1, 4, 1, dtype=torch.int32)
    lists = heads, counts, counts[..., None], torch.full((4,), NEVER)
    with pytest.raises(ValueError, match="shapes"):
        module.prefill(q, q, k, *lists, 1.0, None, 0, q)
    with pytest.raises(ValueError, match="M >= N"):
        module.prefill(q, k[:, :, :4], k[:, :, :4], *lists, 1.0, None, 0, q)
    with pytest.raises(ValueError, match="wants float16"):
        module.prefill(q.float(), k, k, *lists, 1.0, None, 0, q)
    with pytest.raises(ValueError, match="lists"):
        module.prefill(q, k, k, heads[:3], *lists[1:], 1.0, None, 0, q)
    with pytest.raises(ValueError, match="pass no pad"):
        module.prefill(q, k, k, *lists, 1.0, torch.ones(1, 8, dtype=torch.bool), 0, q)
    with pytest.raises(ValueError, match="pass pad"):
        padded.prefill(q, k, k, *lists, 1.0, None, 0, q)
    with pytest.raises(ValueError, match="needs a GPU"):
        module.prefill(q, k, k, *lists, 1.0, None, 0, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_agrees_on_a_gpu(dtype: str, layout: str, dim: int, block: int, padded: bool) -> None:
    device = torch.device("cuda")
    spec = BlockPrefill("triton", dtype, 4, 2, dim, dim, block, padded)
    inputs = self_check_blocks.inputs_of(spec, 2, 500, 700, device)
    if layout == "unaligned":
        inputs = tuple(torch.nn.functional.pad(t, (1, 0))[..., 1:] for t in inputs)
    counts, blocks = self_check_blocks.lists_of(block, (2, 3), 500, 700, device)
    heads = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    bounds = torch.tensor([self_check_blocks.BOUND, NEVER, self_check_blocks.BOUND], device=device)
    pad = torch.rand(2, 700, device=device) > 0.1 if padded else None
    given = heads, counts, blocks, bounds, SCALE, pad, 400 if padded else 0
    out, exact = (
        torch.full((2, 4, 500, dim), torch.nan, dtype=t, device=device) for t in (inputs[0].dtype, torch.double)
    )
    lse, exact_lse = (torch.full((2, 3, 500), torch.nan, dtype=t, device=device) for t in (torch.float, torch.double))
    skipped = emit.load(spec).prefill(*inputs, *given, out, lse)
    expected = reference(*(t.double() for t in inputs), *given, block, exact, exact_lse)
    assert torch.equal(skipped, expected)
    assert error(out[:, [0, 1, 3]], exact[:, [0, 1, 3]]) <= TOLERANCE[dtype] and bool(out[:, 2].isnan().all())
    assert largest_difference(lse, exact_lse) <= 1e-3


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton block_prefill"].emit(SPEC) == source(SPEC)


if __name__ == "__main__":
    main()
