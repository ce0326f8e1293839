"""The emitted Triton step of heads that select tokens: its text, and in Triton's interpreter its numbers.

As for the other Triton kernels, all numbers come from one child process: this file run as a script with
TRITON_INTERPRET=1, which prints one JSON object per case.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows
from selecting_tokens import decode
from torch import Tensor

from attnopt.codegen import decode_list, emit, token_lists
from attnopt.codegen.emit import write_atomically
from attnopt.codegen.reference_token_step import step as reference
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.codegen.self_check import TOLERANCE, error
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.triton_tokens import source
from attnopt.registry import TARGETS

# Scores that `pick` looks at together here, and slots of a chunk: of both there are several.
BLOCK = 16


class Case(NamedTuple):
    """of: the sources of the heads; valid: whether tokens are missing; parts: most programs of a list, at batch 2."""

    rules: list[TokenRule | None]
    length: int
    prompt: int
    of: tuple[int, ...] = ()
    valid: bool = False
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    capacity: int = 0
    parts: int = 2


CASES = {
    "of all kinds, padded": Case(
        [TokenRule(9, 2, 5, every=3), None, TokenRule(4, every=99, similar=0.9), TokenRule(40, 1, 30)],
        45, 38, valid=True, dims=(24, 40),
    ),
    "by features, of two sources": Case(
        [TokenRule(6, 1, 1, channels=5), TokenRule(6, 0, 1, 2, channels=11), TokenRule(5, 99, 99), TokenRule(6, 0, 1)],
        42, 39, (-1, -1, 1, 0),
    ),
    "from the first token on": Case([TokenRule(2, 1, 1), TokenRule(2, every=2)], 4, 0, valid=True, parts=1),
    "bfloat16, by features": Case([TokenRule(6, 1, 2, channels=3)] * 2, 71, 70, dtype="bfloat16", parts=1),
}  # fmt: skip


def walk(case: Case) -> list[Tensor]:
    """q, k, v in float64: queries near each other, of few bits, so that no score is rounded and many are equal."""
    made = torch.Generator().manual_seed(case.length)
    heads = len(case.rules), 2, 2
    q, k, v = (
        torch.randn(2, n, case.length, dim, generator=made, dtype=torch.float64)
        for n, dim in zip(heads, (case.dims[0], *case.dims), strict=True)
    )
    q = q[:, :, :1] + (0.3 * q).cumsum(2)
    return [(2 * x).round().clamp(-6, 6).div(4) for x in (q, k, v)]


def decoded(case: Case, step: Callable[..., None], dtype: torch.dtype, more: int = 0) -> tuple[Tensor, dict[str, Any]]:
    made = torch.Generator().manual_seed(1)
    sources = [
        torch.stack([torch.randperm(case.prompt, generator=made)[:9] for _ in range(2 * len(case.rules))])
        .sort(-1).values.view(2, len(case.rules), 9).int()
        for _ in range(max(case.of, default=-1) + 1)
    ]  # fmt: skip
    valid = torch.rand(2, case.length, generator=made) < 0.7 if case.valid else None
    rules = [rule and replace(rule, recent=rule.recent + more) for rule in case.rules]
    given = [x.to(dtype) for x in walk(case)]
    return decode(step, *given, rules, case.prompt, valid, lambda at: sources, case.of, case.capacity)


def spec_of(case: Case) -> TokenStep:
    return TokenStep("triton", case.dtype, len(case.rules), 2, *case.dims)


def run(case: Case) -> dict[str, Any]:
    """In the interpreter: the case's error, and what else the tests ask."""
    decode_list.chunk_of = lambda *_: BLOCK  # type: ignore[assignment]
    token_lists.divided = lambda longest, *_: (case.parts, -(-longest // (32 * case.parts)) * 32)  # type: ignore[assignment]
    decode_list._built.cache_clear()
    token_lists._built.cache_clear()
    module, seen = emit.load(spec_of(case)), dict[str, int]()
    module.LAUNCH["pick"]["BLOCK"] = BLOCK

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            seen[self.name] = seen.get(self.name, 0) + 1
            return self.kernel[grid]

    for name in ("decide", "scan", "pick", "gather", "merge"):
        setattr(module, name, Counted(name))
    # A result nobody wrote would be NaN, and a score too.
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -7)

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        found, held = decoded(case, module.step, getattr(torch, case.dtype))
    finally:
        torch.empty = empty
    expected, wanted = decoded(case, reference, torch.float64)
    off, _ = decoded(case, reference, torch.float64, 1)
    serving = [h for h, rule in enumerate(case.rules) if rule is not None]
    names = "picked", "asked", "age", "n", "chosen", "labels"
    return {
        "error": error(found[:, serving], expected[:, serving]),
        "error of a recent key more": error(found[:, serving], off[:, serving]),
        "untouched": bool(found[:, [h for h in range(len(case.rules)) if h not in serving]].isnan().all()),
        "state": [
            n for n in names if not torch.equal(held[n].double().nan_to_num(9), wanted[n].double().nan_to_num(9))
        ],
        "reused": bool((wanted["age"] > 0).any()),
        "seen": seen,
    }


def run_file(spec: TokenStep) -> dict[str, Any]:
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
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case)}), flush=True)
    print(json.dumps({"case": "as a script", **run_file(TokenStep("triton", "float16", 4, 1, 16, 16))}))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row, tolerance = interpreted[name], TOLERANCE[CASES[name].dtype]
    assert row["error"] <= tolerance and row["error of a recent key more"] > 5 * tolerance
    assert row["untouched"]
    # Positions, and what is copied: equal to the last bit.
    assert not row["state"]


def test_every_kernel_was_run(interpreted: dict[str, dict[str, Any]]) -> None:
    kinds = interpreted["of all kinds, padded"]
    assert {*kinds["seen"]} == {"decide", "scan", "pick", "gather", "merge"} and kinds["reused"]
    # One launch for the lists of the layer itself and of each source.
    assert interpreted["by features, of two sources"]["seen"]["gather"] == 3 * 3
    assert "merge" not in interpreted["from the first token on"]["seen"]


def test_the_file_checks_itself_in_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    row = interpreted["as a script"]
    assert row["code"] == 0
    assert row["told"].count("  agrees  ") == 1 and "Not timed" in row["told"]


SPEC = TokenStep("triton", "bfloat16", 32, 8, 128, 128)
ODD = [
    SPEC,
    TokenStep("triton", "float32", 6, 2, 96, 80),
    TokenStep("triton", "float16", 24, 4, 192, 128),
    TokenStep("triton", "float16", 16, 1, 64, 64),
    TokenStep("triton", "float32", 8, 8, 64, 64),
]


def test_golden_text() -> None:
    check_golden("token_step_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_unsupported_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(TokenStep("triton", "float64", 4, 4, 64, 64))
    with pytest.raises(ValueError, match="exceed 256"):
        source(TokenStep("triton", "float16", 4, 4, 320, 64))
    with pytest.raises(ValueError, match="exceed 64 rows"):
        source(TokenStep("triton", "float16", 80, 1, 64, 64))


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    case = Case([TokenRule(3)] * 4, 4, 3, dims=(16, 16), dtype="float16")
    module = emit.load(spec_of(case))

    def call(**changes: Callable[[Tensor], Tensor]) -> None:
        names = "q", "keys", "values", "n", "valid", "table", "rules", "similar", "picked", "asked", "age"

        def step(*given: Any) -> None:
            changed = [changes.get(name, lambda x: x)(x) for name, x in zip(names, given, strict=False)]
            module.step(*changed, *given[len(names) :])

        decoded(case, step, torch.float16)

    with pytest.raises(ValueError, match="needs a GPU"):
        call()
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="have shapes"):
        call(q=lambda q: q[:, :2])
    with pytest.raises(ValueError, match="wants float16"):
        call(keys=Tensor.float)
    with pytest.raises(ValueError, match="lists of tokens are int32"):
        call(picked=Tensor.long)
    with pytest.raises(ValueError, match="int32"):
        call(age=Tensor.long)
    with pytest.raises(ValueError, match="none is copied"):
        call(keys=lambda x: x.mT.contiguous().mT)
    with pytest.raises(ValueError, match="are contiguous"):
        call(asked=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))


def on_gpu(module: Any) -> Callable[..., None]:
    """A step whose tensors go to the GPU and come back."""

    def step(*given: Any) -> None:
        held = [
            [y.cuda() for y in x] if isinstance(x, list) else x.cuda() if isinstance(x, Tensor) else x for x in given
        ]
        module.step(*held)
        for mine, theirs in zip(given, held, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)

    return step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_agrees_on_a_gpu_over_many_steps(dim: int, dtype: str) -> None:
    rules = [TokenRule(40, 2, 5, every=3), None, TokenRule(64, every=99, similar=0.9), TokenRule(700, 1, 30)]
    rules += [TokenRule(60, 1, 1, channels=16), TokenRule(33, channels=5, every=2), TokenRule(40, 99), TokenRule(1)]
    case = Case(rules, 5400, 5300, (-1,) * 6 + (1, -1), True, (dim, dim), dtype)
    found, held = decoded(case, on_gpu(emit.load(spec_of(case))), getattr(torch, dtype))
    expected, wanted = decoded(case, reference, torch.float64)
    serving = [0, *range(2, 8)]
    assert error(found[:, serving], expected[:, serving]) <= TOLERANCE[dtype] and bool(found[:, 1].isnan().all())
    assert all(torch.equal(held[name], wanted[name]) for name in ("picked", "age", "n"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_selects_and_reuses() -> None:
    """One graph for the steps that select and those that do not, as nothing of it depends on which they are."""
    case = Case([TokenRule(40, 2, 5, every=3), TokenRule(64, every=99, similar=0.9)], 700, 600, dtype="float16")
    module, graphs, at = emit.load(spec_of(case)), list[Any](), list[Any]()

    def step(*given: Any) -> None:
        tensors = [x for x in given if isinstance(x, Tensor)]
        if not graphs:
            at.extend(x.cuda() for x in tensors)
            # Tables are read, and kernels compiled, ahead of the capture.
            on_gpu(module)(*(x.clone() if isinstance(x, Tensor) else x for x in given))
            fixed = iter(at)
            moved = [next(fixed) if isinstance(x, Tensor) else x for x in given]
            module.step(*[x.clone() if i not in (5, 6) and isinstance(x, Tensor) else x for i, x in enumerate(moved)])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                module.step(*moved)
            graphs.append(graph)
        for fixed_at, new in zip(at, tensors, strict=True):
            fixed_at.copy_(new)
        graphs[0].replay()
        for mine, theirs in zip(tensors, at, strict=True):
            mine.copy_(theirs)

    found, held = decoded(case._replace(of=(-1, -1)), step, torch.float16)
    expected, wanted = decoded(case._replace(of=(-1, -1)), reference, torch.float64)
    assert error(found, expected) <= TOLERANCE["float16"] and torch.equal(held["picked"], wanted["picked"])


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton token_step"].emit(SPEC) == source(SPEC)


if __name__ == "__main__":
    main()
