"""`attnopt bisect` on a model in which one rewrite of several is wrong, and on commands that fail from some fuel on."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import VOCABULARY, NanoGPT

from attnopt import backend, hf
from attnopt.cli import main
from attnopt.commands import bisecting
from attnopt.passes import lower_exact

from .lines import Fails

WRONG = "h.1"


def quiet(what: str, done: int, of: int) -> None:
    """No progress."""


def loaded(blocks: int) -> hf.Loaded:
    made = NanoGPT(flash=False)
    made.config = SimpleNamespace(vocab_size=VOCABULARY)
    made.h = torch.nn.ModuleList([*made.h, *NanoGPT(flash=False).h][:blocks])
    return hf.Loaded(made.eval(), None, "test")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causal mask is lost where one site of three is rewritten."""
    right = lower_exact.lower_plain

    def wrong(program: Any, causal: bool) -> Any:
        return lambda region: right(program, causal and region.site.name != WRONG)(region)

    monkeypatch.setattr(lower_exact, "lower_plain", wrong)


def test_the_wrong_rewrite_of_a_model_is_named(
    eagerly: list[Any], planted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bisecting, "load", lambda args: loaded(3))
    monkeypatch.setenv("ATTNOPT_FUEL", "17")
    made = backend.FUEL.made
    assert main(["bisect", "any", "--length", "12", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    culprit = found["culprit"]
    assert found["verdict"] == "rewrite" and culprit["number"] == 2 and "Rewrite 2 breaks the output." in err
    (rewrite,) = culprit["rewrites"]
    assert rewrite["site"] == WRONG and rewrite["lowering"] == "SDPA is_causal" and "models.py:" in rewrite["source"]
    assert culprit["difference_without"] < found["tolerance"] < 0.01 < culprit["difference_with"]
    assert {trial["fuel"]: trial["good"] for trial in found["trials"]} == {
        None: False, 0: True, 1: True, 2: False,
    }  # fmt: skip
    assert "float64" in found["reference"] and os.environ["ATTNOPT_FUEL"] == "17" and backend.FUEL.made == made


def test_a_model_of_which_nothing_is_broken(
    eagerly: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bisecting, "load", lambda args: loaded(1))
    assert main(["bisect", "any", "--length", "12"]) == 0
    out = capsys.readouterr().out
    assert "Nothing is broken" in out and "all 1" in out and "wrong" not in out


def test_a_model_that_is_broken_without_a_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by inductor: what it makes of any graph adds a little."""
    import torch._inductor.compile_fx

    def compile_fx(gm: Any, inputs: Any, **_: Any) -> Any:
        return lambda *args: [out + 0.1 if out.is_floating_point() else out for out in gm(*args)]

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    found = bisecting.of_model(loaded(1), 12, quiet).to_json()
    assert found["verdict"] == "without" and found["culprit"] is None
    assert [trial["fuel"] for trial in found["trials"]] == [None, 0]


def test_a_run_that_raises_is_wrong(eagerly: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fx(gm: Any, inputs: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            if "scaled_dot_product" in gm.code:
                raise RuntimeError("a kernel failed")
            return gm(*args)

        return run

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    found = bisecting.of_model(loaded(1), 12, quiet).to_json()
    assert found["culprit"]["number"] == 1 and found["culprit"]["rewrites"][0]["leads"]
    assert any("a kernel failed" in trial["said"] for trial in found["trials"])


@pytest.mark.parametrize("options", [["--json"], []])
def test_logits_that_are_no_numbers_are_told_in_json_that_can_be_read(
    options: list[str], eagerly: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in eager too: no rewrite is to blame, and its own difference is no tolerance."""
    broken = loaded(1)
    torch.nn.init.constant_(next(broken.model.parameters()), math.nan)
    monkeypatch.setattr(bisecting, "load", lambda args: broken)
    assert main(["bisect", "any", "--length", "12", *options]) == 1
    out = capsys.readouterr().out
    if options:
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert found["verdict"] == "without" and 0 < found["tolerance"] < 1 and found["eager_difference"] is None
        assert [trial["difference"] for trial in found["trials"]] == [None, None]
    else:
        assert out.count("not finite") == 3 and "wrong" in out


def command(condition: str) -> list[str]:
    """A command that is right where a condition on `fuel` holds; no limit is a million."""
    read = "import os; fuel = os.environ['ATTNOPT_FUEL']; fuel = 10**6 if fuel == 'none' else int(fuel)"
    return ["bisect", "--json", "--", sys.executable, "-S", "-c", f"{read}; print('ran'); assert {condition}"]


@pytest.mark.parametrize("first", [1, 2, 7, 100])
def test_a_command_that_leaves_no_dump_is_bisected_all_the_same(first: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(f"fuel < {first}")) == 1
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["verdict"] == "rewrite" and found["culprit"]["number"] == first and not found["culprit"]["rewrites"]
    assert f"ATTNOPT_FUEL={first - 1}" in err
    assert any(trial["said"].startswith("ran") for trial in found["trials"])


def test_the_verdict_on_commands_that_are_right_or_always_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command("True")) == 0
    assert json.loads(capfd.readouterr().out)["verdict"] == "nothing"
    assert main(command("False")) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["verdict"] == "without" and "not what breaks it" in err
    assert main(command("fuel < 10**6")) == 1
    assert "may change from run to run" in capfd.readouterr().err


def test_the_rewrite_is_read_from_what_the_command_dumped(
    eagerly: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of each process and in the order in which graphs were compiled."""
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path))
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(NanoGPT(flash=False).eval(), backend=backend.attnopt)(torch.arange(12)[None])
    (made,) = bisecting.rewrites_in(tmp_path)
    assert [(r.site, r.leads) for r in made] == [("h.0", True), ("h.1", False)] * 2
    assert all("models.py:" in r.source and r.lowering == "SDPA is_causal" for r in made)


def test_wrong_command_lines(fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Give a MODEL, or a command after --" in fails(["bisect"])
    assert "Give a MODEL, or a command after --" in fails(["bisect", "demo", "--", "true"])
    assert "There is no command after --" in fails(["bisect", "--"])
    assert "cannot be run" in fails(["bisect", "--", "no-such-command"])
    assert "Say with --tolerance" in fails(["bisect", "demo", "--plan", "plan.json"])
    assert "Did you mean --tolerance?" in fails(["bisect", "demo", "--tolerence", "1"])
