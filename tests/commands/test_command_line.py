"""The command line: help, exit codes, and one clear message for each mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.cli import EXAMPLES, main

from .lines import Fails, plan_command, snapshot


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and all(line in out for line in EXAMPLES[command].split("\n"))


WRONG_LINES = {
    "examin demo": "Did you mean examine?",
    "examine demo --lenght 3": "Did you mean --length?",
    "examine demo --dtype fp8": "fp8",
    "examine demo --length 1": "--length must be at least 2",
    "examine demo --device nowhere": "nowhere",
    "profile demo --out x --lengths 64,many": "64,many",
    "profile demo --out x --samples 0": "'0' is not a positive whole number",
    "plan demo --profile p --out x --max-loss-increase none": "'none' is not a positive percentage",
    "plan demo --profile p --out x --max-kl -1": "--max-kl",
    "plan demo --profile p --out x --min-speedup 0.5": "'0.5' is not a speed-up of at least 1",
    "plan demo --profile p --out x --max-kv-memory 140%": "'140%' is not a share",
    "plan demo --profile p --out x --objective speed": "invalid choice: 'speed'",
    "plan demo --profile p --out x --tensor-parallel 2": "Name it with --device-preset",
    "plan demo --profile p --out x --device-preset h10": "Did you mean 'h100'?",
    "plan demo --profile p --out x --device-preset h100 --devices no.toml": "There is no file of devices",
    "calibrate": "Give --model, or --heads and --head-dim",
    "calibrate --heads 6 --kv-heads 4 --head-dim 8": "do not share",
    "calibrate --model demo --heads 6": "--model has sizes of its own",
    "plan demo --out x": "--profile",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_ends_with_2(
    line: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert WRONG_LINES[line] in fails(line.split())
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_there(fails: Fails, tmp_path: Path) -> None:
    assert f"There is no model at {tmp_path}/none" in fails(["examine", f"{tmp_path}/none"])
    assert "could not be loaded" in fails(["examine", "no-such-model"])
    assert "no config.json" in fails(["examine", str(tmp_path)])
    assert "could not be called" in fails(["examine", "no_such_module:model"])


def test_an_output_that_cannot_be_written_is_found_out_first(work: Path, fails: Fails, tmp_path: Path) -> None:
    """Below a regular file no folder can be made, whoever runs the test."""
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "sub" / "out"
    assert "cannot be written" in fails(plan_command(work, inside), code=1)
    assert "cannot be written" in fails(["profile", "no-such-model", "--out", str(inside)], code=1)
    assert "cannot be written" in fails(["examine", "no-such-model", "--html", str(inside)], code=1)
    assert "cannot be written" in fails(["demo", "--out", str(inside)], code=1)
    assert "is a folder" in fails(["profile", "no-such-model", "--out", str(tmp_path)], code=1)
    assert snapshot(tmp_path) == {"file": b""}
