"""The profiler's pass in Triton against the naive twin and the pass in PyTorch.

Triton fixes its interpreter when kernels are imported, so all numbers come from one child process: this file run as a
script with TRITON_INTERPRET=1, which prints one JSON object per case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from interpreting import interpreted_rows
from torch import Tensor

from attnopt.statistics import Grid, Observation, Observe, naive_observation, stream

GRID = Grid((0, 1, 4), (1, 3, 8, 20, 64, 500))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


class Case(NamedTuple):
    length: int
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (8, 8)
    window: int | None = None
    padding: str = ""  # which side, of every sample but the first
    softcap: float = 0.0
    dtype: str = "float32"
    sharp: float = 1.0
    batch: int = 1
    grid: Grid = GRID
    few_rows: bool = False  # rows taken one tile at a time
    layout: str = "transposed"
    tiles: tuple[int, int] | None = None  # instead of those shipped
    gap: float = 0.0  # all but about exp(-gap) of the mass on key 3


CASES = {
    "grouped, values wider": Case(67, (4, 2), (12, 20), sharp=2.0),
    "values narrower": Case(40, dims=(24, 9)),
    "one key": Case(1),
    "a tile": Case(32, (2, 2)),
    "several cells of whole tiles": Case(144, (1, 1), tiles=(16, 16), grid=Grid((0, 4, 40), (8, 64, 100, 128))),
    "no sink, one window": Case(50, grid=Grid((0,), (16,))),
    "keys larger than rows": Case(70, tiles=(16, 64)),
    "few rows at a time": Case(50, few_rows=True, batch=2, heads=(2, 2)),
    "window": Case(72, (1, 1), window=30, tiles=(16, 16)),
    "window of one tile, many cells": Case(112, (1, 1), window=90, tiles=(16, 16), grid=Grid((0, 2), (4, 16, 32, 64))),
    "padded left": Case(50, padding="left", batch=3, heads=(2, 1)),
    # Padded rows that see keys: they count in no sum, and pass gradients on.
    "padded right": Case(40, padding="right", batch=2),
    "padded right, window": Case(40, padding="right", batch=2, window=12),
    "capped": Case(40, softcap=2.0, sharp=3.0),
    "capped, padded, grouped": Case(45, (2, 1), (12, 20), None, "left", 1.5, sharp=2.0, batch=2),
    "capped, saturated": Case(40, softcap=4.0, sharp=12.0),
    "peaky": Case(50, sharp=6.0),
    "little kept mass": Case(40, gap=30.0),
    "float16": Case(70, dims=(64, 64), dtype="float16", sharp=2.0),
    "bfloat16, capped": Case(50, (4, 2), (16, 12), softcap=3.0, dtype="bfloat16"),
    "contiguous": Case(40, batch=2, layout="contiguous"),
    "features strided": Case(40, batch=2, layout="strided"),
}
# Sums against float64 on the same inputs; gradients, in the inputs' own type.
SUMS, GRADIENTS = 1e-5, {"float32": 1e-5, "float16": 2e-3, "bfloat16": 4e-3}


def tensors(case: Case) -> tuple[list[Tensor], Tensor, Tensor | None]:
    torch.manual_seed(case.length)
    heads, kv_heads = case.heads

    def normal(count: int, dim: int) -> Tensor:
        if case.layout == "contiguous":
            made = torch.randn(case.batch, count, case.length, dim)
        elif case.layout == "strided":
            made = torch.randn(case.batch, count, dim, case.length).transpose(2, 3)
        else:
            made = torch.randn(case.batch, case.length, count, dim).transpose(1, 2)
        return made.to(getattr(torch, case.dtype))

    qkv = [normal(heads, case.dims[0]), normal(kv_heads, case.dims[0]), normal(kv_heads, case.dims[1])]
    if case.gap:
        qkv[0][..., 0], qkv[1][..., 0], qkv[1][:, :, 3, 0] = case.dims[0] ** 0.5, 0.0, case.gap
    grad, pad = normal(heads, case.dims[1]), None
    if case.padding:
        pad = torch.ones(case.batch, case.length, dtype=torch.bool)
        for b in range(case.batch):
            cut = b * case.length // 4
            pad[b, slice(0, cut) if case.padding == "left" else slice(case.length - cut, None)] = False
    return qkv, grad, pad


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def run(case: Case) -> dict[str, Any]:
    """In the interpreter: how far the case is from its twins, and from twins of something slightly different."""
    from attnopt.statistics import triton_pass

    qkv, grad, pad = tensors(case)
    scale = case.sharp * case.dims[0] ** -0.5
    shipped, calls, kernels = (triton_pass.tiles_of, triton_pass.ROWS_AT_ONCE), 0, triton_pass.stream

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernels(*args)

    triton_pass.stream = counted
    if case.tiles is not None:
        triton_pass.tiles_of = lambda *_: (triton_pass.Tiles(*case.tiles, 4, 1),) * 2
    if case.few_rows:
        triton_pass.ROWS_AT_ONCE = 1
    found = Observation.zeros(case.heads[0], case.grid, case.length)
    inputs = [x.detach().requires_grad_() for x in qkv]
    empty = torch.empty
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(float("nan"))  # type: ignore[assignment]
    try:
        Observe.apply(*inputs, scale, pad, found, case.window, case.softcap).backward(grad)
    finally:
        torch.empty = empty
        triton_pass.stream, (triton_pass.tiles_of, triton_pass.ROWS_AT_ONCE) = kernels, shipped
    ran = calls

    def twin(window: int | None, softcap: float) -> Observation:
        return naive_observation(*qkv, grad, case.grid, scale, pad, window, False, softcap)

    exact, wide = twin(case.window, case.softcap), [x.double() for x in qkv]
    plain = Observation.zeros(case.heads[0], case.grid, case.length)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gradients = stream(*wide, grad.double(), scale, pad, plain, case.window, softcap=case.softcap)
    other = twin(case.window and case.window + 1, case.softcap and 2 * case.softcap)
    return {
        "ran": ran,
        "fallback": [str(w.message) for w in warned],
        "rows": (found.rows, found.samples) == (exact.rows, exact.samples),
        "sums": {
            name: error(found.sums[name], exact.sums[name]) for name in exact.sums if name not in ("t1", "sketch")
        },
        # These cancel: judged against the size of what they sum.
        "t1": float(((found.t1 - exact.t1).abs() / (exact.t2 * exact.rows).sqrt().clamp(min=1e-9)).max()),
        "sketch": float((found.sketch - exact.sketch).abs().max() / exact.t2[:, -1].sqrt().sum().clamp(min=1e-9)),
        "gradients": [error(x.grad, g) for x, g in zip(inputs, gradients, strict=True)],  # type: ignore[arg-type]
        "dtypes": [x.grad.dtype == x.dtype for x in inputs],  # type: ignore[union-attr]
        "if it were another": error(found.t2, other.t2),
    }


def whole_model() -> dict[str, Any]:
    """A profile whose passes run in the interpreter, and the same in PyTorch."""
    from models import NanoGPT, tokens

    from attnopt.profiler import profile_model

    profiles = []
    for target in ("triton", "auto"):
        os.environ["ATTNOPT_TARGET"] = target
        profiles.append(profile_model(NanoGPT().eval(), [tokens(1, 24)], Grid((0, 2), (4, 8))))
    pairs = [(one.t2, profiles[1].observations[key].t2) for key, one in profiles[0].observations.items()]
    return {"sites": len(pairs), "errors": [error(*pair) for pair in pairs]}


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case)}), flush=True)
    print(json.dumps({"case": "whole model", **whole_model()}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"), ATTNOPT_TARGET="triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_twins(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted[name]
    assert row["ran"] == 1 and row["rows"] and all(row["dtypes"])
    # A score of 30 is rounded by 2e-6, and its weight with it.
    tolerance = 10 * SUMS if CASES[name].gap else SUMS
    assert max(row["sums"].values()) <= tolerance, row["sums"]
    assert row["t1"] <= tolerance and row["sketch"] <= tolerance
    assert max(row["gradients"]) <= GRADIENTS[CASES[name].dtype], row["gradients"]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.window or case.softcap])
def test_the_tolerance_rejects_another_window_or_cap(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted[name]["if it were another"] > 100 * SUMS


def test_a_type_without_kernels_falls_back_with_a_warning(interpreted: dict[str, dict[str, Any]]) -> None:
    said = {text for name in CASES for text in interpreted[name]["fallback"]}
    assert said == {"The profiler's pass runs in PyTorch, not in Triton: its kernels have no float64."}


def test_a_profile_is_that_of_the_other_pass(interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted["whole model"]
    assert row["sites"] == 2 and max(row["errors"]) <= 1e-4


@needs_triton
def test_what_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.statistics import triton_pass

    monkeypatch.setenv("ATTNOPT_TARGET", "triton")
    qkv, grad, _ = tensors(Case(20))
    found, plain = (Observation.zeros(2, GRID, 20) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="not in Triton: Triton needs a GPU, and the model is on cpu"):
        stream(*qkv, grad, 0.3, None, found)
    monkeypatch.setenv("ATTNOPT_TARGET", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(*qkv, grad, 0.3, None, plain)
    assert torch.equal(found.t2, plain.t2)
    monkeypatch.setattr(triton_pass, "INTERPRETED", True)
    q, wide = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 300)
    assert triton_pass.refused(q, q, q, found) == ""
    assert "torch.float32, torch.float16" in triton_pass.refused(q, q.half(), q, found)
    assert "300 features exceed 256" in triton_pass.refused(q, q, wide, found)
    assert "how far outputs move" in triton_pass.refused(q, q, q, Observation.zeros(2, GRID, 20, delta=True))
    assert "more than one grid holds" in triton_pass.refused(q.expand(1 << 15, -1, -1, -1), q, q, found)


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, grad, _ = tensors(Case(20))
    monkeypatch.setenv("ATTNOPT_TARGET", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="the package triton is not installed"):
        stream(*qkv, grad, 0.3, None, Observation.zeros(2, GRID, 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_agrees_on_a_gpu(dtype: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((0, 4, 16), (32, 64, 100, 256, 1024))
    case = Case(2500, (8, 2), (dim, dim), None, "left", 20.0, dtype, batch=2, grid=grid)
    qkv, grad, pad = tensors(case)
    inputs = [x.cuda() for x in (*qkv, grad)]
    found, plain = (Observation.zeros(8, grid, 2500) for _ in range(2))
    ours = stream(*inputs, dim**-0.5, pad.cuda(), found, softcap=20.0)  # type: ignore[union-attr]
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")
    theirs = stream(*inputs, dim**-0.5, pad.cuda(), plain, softcap=20.0)  # type: ignore[union-attr]
    assert all(error(found.sums[n], plain.sums[n]) <= 1e-3 for n in ("t2", "mass", "entropy", "mass_at_key"))
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) <= GRADIENTS[dtype] * 4  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
