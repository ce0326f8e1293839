"""What an emitted file does when it is run: it agrees or says where not, is timed only if it agrees, and exits so."""

from __future__ import annotations

import runpy
from functools import partial

import pytest
import torch

from attnopt.codegen import emit, self_check, self_check_backward, self_check_prefill
from attnopt.codegen.reference_backward import backward
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.reference_prefill import prefill_lse as with_lse
from attnopt.codegen.self_check import Check, Race, error
from attnopt.codegen.spec import SpanBackward, SpanPrefill
from attnopt.codegen.triton_prefill import source

SPEC = SpanPrefill("cpu", "float32", 4, 2, 16, 8, False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SECONDS", 0.0)
    monkeypatch.setitem(self_check_prefill.TIMED, "cpu", 256)


def code_of(spec: SpanPrefill, prefill, prefill_lse) -> int:
    with pytest.raises(SystemExit) as done:
        self_check_prefill.check(spec, prefill, prefill_lse)
    return done.value.code


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_file_agrees_and_is_timed(dtype, padded, target, capsys):
    """Run as a script, as `python FILE` does."""
    spec = SpanPrefill(target, dtype, 4, 2, 16, 8, padded)
    emit.load(spec)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(emit.kernel_folder() / f"{spec.key()}.py"), run_name="__main__")
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert told.count("  agrees  ") == 6 and "WRONG" not in told
    assert "threads: " in told
    if target == "cpu":
        assert "this kernel" in told and "dense SDPA" in told and "× fewer pairs" in told


@pytest.mark.parametrize("padded", [False, True])
def test_a_backward_checks_itself(padded, capsys):
    spec = SpanBackward("cpu", "float32", 4, 2, 16, 8, padded)
    emit.load(spec)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(emit.kernel_folder() / f"{spec.key()}.py"), run_name="__main__")
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert told.count("  agrees  ") == 3 and ("those of dense SDPA" in told) == (not padded)


def test_a_wrong_backward_is_named(capsys):
    def wrong(dout, q, k, v, out, lse, sinks, windows, scale, pad=None, dlse=None):
        return backward(dout, q, k, v, out, lse, sinks + 1, windows, scale, pad, dlse)

    with pytest.raises(SystemExit) as done:
        self_check_backward.check(SpanBackward("cpu", "float32", 4, 2, 16, 8, False), wrong)
    assert done.value.code == 1 and "dq, dk, dv" in capsys.readouterr().err


def off_by_one(q, k, v, sinks, windows, scale, pad=None, run=reference):
    return run(q, k, v, sinks, windows + 1, scale, pad)


@pytest.mark.parametrize("broken", ["out", "lse"])
def test_a_wrong_file_is_named_and_not_timed(broken, capsys):
    out = off_by_one if broken == "out" else reference
    lse = with_lse if broken == "out" else partial(off_by_one, run=with_lse)
    assert code_of(SPEC, out, lse) == 1
    told = capsys.readouterr()
    assert "disagrees with the reference" in told.err and ("LSE" in told.err) == (broken == "lse")
    assert "WRONG" in told.out and "timed" not in told.out


def test_what_is_not_noticed_fails():
    """A check that the wrong result passes is no check."""
    one = partial(torch.ones, 3)
    blind = Check("blind", one, one, 1e-3, wrong=lambda: one() + 1e-5)
    with pytest.raises(SystemExit) as done:
        self_check.run(SPEC, CPU, [blind], [])
    assert done.value.code == 1


def test_error():
    inf, one = float("inf"), torch.tensor([3.0, 4.0])
    assert error(one, one.double()) == 0.0
    assert error(one + torch.tensor([0.0, 0.5]), one.double()) == pytest.approx(0.1)
    assert error(torch.tensor([-inf, 4.0]), torch.tensor([-inf, 4.0])) == 0.0
    assert error(one, torch.tensor([-inf, 4.0])) == inf
    assert error(torch.tensor([-inf, 4.0]), one) == inf
    assert error(torch.tensor([float("nan"), 4.0]), one) == inf
    assert error(one[:1], one) == inf
    assert error((one, one * 2), (one, one)) == pytest.approx(1.0)


def test_calls_are_timed_in_turns(capsys):
    seen: list[str] = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    with pytest.raises(SystemExit) as done:
        self_check.run(SPEC, CPU, [], [Race("race", calls)])
    assert done.value.code == 0
    assert seen == ["a", "b"] * 4  # one unmeasured, three measured


def test_a_triton_file_without_a_gpu_says_what_it_needs(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "kernel.py"
    path.write_text(source(SpanPrefill("triton", "float16", 4, 2, 16, 16, False)), encoding="utf-8")
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(path), run_name="__main__")
    assert done.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err
