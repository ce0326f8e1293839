"""The emitted kernels with a mask printed into them: their text, and in Triton's interpreter their numbers.

All numbers come from one child process, this file run as a script with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emitting import ROOT, check_clean, check_golden
from forms import CASES, Case, doubled, error, inputs_of
from interpreting import interpreted_rows

from attnopt.codegen import emit
from attnopt.codegen.reference_masked import attend as reference
from attnopt.codegen.spec import MaskedPrefill
from attnopt.codegen.triton_masked import source
from attnopt.registry import TARGETS

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# (query rows, keys per block): two tiles of rows, three blocks of keys, the last of both cut off; smaller ones where a
# narrow span is to leave blocks out, or to keep some whole.
LENGTH, TILE, SMALL = 70, (64, 32), (32, 16)
NARROW = ("first keys and a window, sink of a head", "both sides", "window and padding")


def spec_of(case: Case, dim: int = 16) -> MaskedPrefill:
    return MaskedPrefill("triton", case.dtype, 4, 2, dim, dim, case.form.text)


def run(case: Case, length: int = LENGTH, tile: tuple[int, int] = TILE) -> dict[str, Any]:
    torch.manual_seed(0)
    module = emit.load(spec_of(case))
    kernel, seen = module.masked_prefill, []

    class Recorded:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                seen.extend(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
                kernel[grid](*args, **options)

            return call

    inputs = inputs_of(case, length)
    empty = torch.empty
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(float("nan"))  # type: ignore[assignment]
    module.masked_prefill, module.LAUNCHES["sm_90"] = Recorded(), dict(zip(("BLOCK_M", "BLOCK_N"), tile, strict=True))
    try:
        out = module.attend(*inputs)
    finally:
        torch.empty = empty
    module.masked_prefill = kernel
    expected = reference(*doubled(inputs), form=case.form)
    return {
        "error": error(out, expected),
        "error of the neighbour": error(reference(*doubled(inputs), form=case.near), expected),
        "finite": bool(out.isfinite().all()),
        "layout": out.transpose(1, 2).is_contiguous() and out.dtype == inputs[0].dtype,
        "seen": sorted(set(seen)),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case, tile=SMALL if name in NARROW else TILE)}), flush=True)
    for length in (0, 1):
        print(json.dumps({"case": f"length {length}", **run(CASES["window and padding"], length)}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row, limit = interpreted[name], TOLERANCE[CASES[name].dtype]
    assert row["finite"], "a row was left unwritten or became NaN"
    assert row["error"] <= limit and row["layout"]
    assert row["error of the neighbour"] > 5 * limit


def test_one_token_and_none(interpreted: dict[str, dict[str, Any]]) -> None:
    for length in (0, 1):
        row = interpreted[f"length {length}"]
        assert row["finite"] and row["error"] <= TOLERANCE["float32"]


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "torch.float16" in interpreted["float16"]["seen"]
    assert interpreted["bfloat16"]["seen"] == ["torch.float32"]


def test_golden_text() -> None:
    form = CASES["first keys and a window, sink of a head"].form
    check_golden("masked_prefill_bfloat16.py", source(MaskedPrefill("triton", "bfloat16", 32, 8, 128, 128, form.text)))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, [source(spec_of(case, dim)) for case in CASES.values() for dim in (16, 24)])


@pytest.mark.slow
def test_an_emitted_file_checks_itself(tmp_path: Path) -> None:
    """As it was emitted, and with a window that is shorter by a key."""
    pytest.importorskip("triton", minversion="3.7")
    path, environment = tmp_path / "kernel.py", {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    text = source(spec_of(CASES["window and padding"]))
    for written, code in ((text, 0), (text.replace("keep &= i - j < 30", "keep &= i - j < 29"), 1)):
        path.write_text(written, encoding="utf-8")
        ran = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "interpreting.py"), str(path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        assert ("WRONG" in ran.stdout) == (code == 1)


def test_the_predicate_is_there_to_be_read() -> None:
    text = source(spec_of(CASES["window and padding"]))
    assert "where ``i - j < 30 and j <= i and t0[b, j]``" in text
    assert "keep &= i - j < 30\n" in text and "keep &= j <= i\n" in text and "keep &= t0_bj\n" in text


def test_only_what_data_decides_is_masked_everywhere() -> None:
    whole = {name for name, case in CASES.items() if "range(whole_first, whole_end)" in source(spec_of(case))}
    data = {"rows and keys padded", "flags over pairs", "one row of flags"}
    assert whole == set(CASES) - data


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = emit.load(spec_of(CASES["window and padding"]))
    q, k, v, tensors, *rest = inputs_of(CASES["window and padding"], 8)
    with pytest.raises(ValueError, match="needs a GPU"):
        module.attend(q, k, v, tensors, *rest)
    with pytest.raises(ValueError, match="shapes"):
        module.attend(q, q, v, tensors, *rest)
    with pytest.raises(ValueError, match="wants float32"):
        module.attend(q.half(), k, v, tensors, *rest)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="reads tensors of"):
        module.attend(q, k, v, [t.long() for t in tensors], *rest)


def test_unsupported_specs_are_refused() -> None:
    form = CASES["alibi"].form.text
    with pytest.raises(ValueError, match="no float64"):
        source(MaskedPrefill("triton", "float64", 4, 4, 64, 64, form))
    with pytest.raises(ValueError, match="exceed 256"):
        source(MaskedPrefill("triton", "float16", 4, 4, 320, 64, form))
    with pytest.raises(ValueError, match="reads no complex64"):
        source(MaskedPrefill("triton", "float16", 4, 4, 64, 64, form.replace("float32", "complex64")))


def test_is_a_registered_target() -> None:
    pytest.importorskip("triton")
    spec = spec_of(CASES["alibi"])
    assert TARGETS["triton masked_prefill"].emit(spec) == source(spec)


if __name__ == "__main__":
    main()
