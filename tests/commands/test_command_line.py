"""The command line: help, exit codes, and one clear message for each mistake in it."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnopt.cli import EXAMPLES, HELP, main
from attnopt.errors import OptionError
from attnopt.options import INTERRUPTED, OPTIONS

from .lines import Fails, plan_command, snapshot


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and all(line in out for line in EXAMPLES[command].split("\n"))


def test_every_command_is_listed_once_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3].isalpha()]
    assert sorted(named) == sorted(HELP) == sorted(OPTIONS) == sorted(EXAMPLES)
    assert [line for line in lines if line.endswith(":")] == [
        "look:", "measure:", "plan:", "run:", "tools:", "options:",
    ]  # fmt: skip
    assert max(map(len, lines)) < 80 and set(INTERRUPTED) <= set(HELP)


def test_help_is_there_before_torch_is() -> None:
    """In a process of its own: in this one torch was imported long ago."""
    code = "import sys, attnopt.cli\ntry: attnopt.cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


def test_without_a_command_there_is_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["attnopt", "examine"], ["attnopt", "demo"], ["attnopt", "--help"]]


WRONG_LINES = {
    "examin demo": "Did you mean examine?",
    "enf": "Did you mean env?",
    "completion fish": "invalid choice: 'fish'",
    "plan demo --profile p --out x --progress loud": "invalid choice: 'loud'",
    "examine demo --lenght 3": "Did you mean --length?",
    "examine demo --dtype fp8": "fp8",
    "examine demo --length 512,4096": "several go to --lengths",
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
    "calibrate --heads 6 --head-dim 8 --device nowhere": "The device 'nowhere' cannot be used",
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


def test_the_hub_is_asked_once(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = fails(["examine", "no-such-model"])
    assert "There is no folder no-such-model, and the hub does not give it: " in said and "Retrying" not in said


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def with_half_its_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def with_a_broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def of_an_unknown_kind(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "nothing"}')


@pytest.fixture
def copied(work: Path, tmp_path: Path) -> Path:
    """A model of one's own to spoil."""
    return Path(shutil.copytree(work / "shallow", tmp_path / "model"))


@pytest.mark.parametrize("spoil", [without_weights, with_half_its_weights, with_a_broken_config, of_an_unknown_kind])
def test_a_spoilt_model_is_refused(spoil: Any, copied: Path, fails: Fails) -> None:
    spoil(copied)
    message = fails(["examine", str(copied)])
    assert f"The model in {copied} could not be loaded: " in message and "save_pretrained" in message


def test_a_tokenizer_that_cannot_be_read_is_told(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert main(["profile", str(copied), "--out", str(tmp_path / "p")]) == 2
    told = capsys.readouterr().err
    assert "The tokenizer of" in told and "line 1 column 2" in told and "comes without a tokenizer" in told


OWN = """
import torch
def raises():
    raise ValueError("a path is needed\\nfor it")
def wants(size):
    pass
def nothing():
    return None
def empty():
    return torch.nn.ReLU()
def numbers():
    return torch.nn.Linear(3, 3)
"""
OWN_FAULTS = {
    "own_model:raises": "failed: ValueError: a path is needed (own_model.py:4)",
    "own_model:wants": "failed: TypeError: wants() missing 1 required positional argument",
    "own_model:nothing": "returned a NoneType",
    "own_model:empty": "a module without parameters",
    "own_model:numbers": "failed on token ids int64 (1, 8): RuntimeError",
    "own_model:elsewhere": "has no attribute 'elsewhere'",
    "own_spoilt:make": "own_spoilt could not be imported: SyntaxError",
}


@pytest.mark.parametrize("name", OWN_FAULTS)
def test_a_model_of_ones_own_that_fails(
    name: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    (tmp_path / "own_spoilt.py").write_text("def make(:")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("own_model", "own_spoilt"):
        sys.modules.pop(module, None)
    assert OWN_FAULTS[name] in fails(["bench", name, "--lengths", "16"])


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


def test_an_error_is_a_document_where_the_result_would_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in {
        ("examine", "demo", "--json", "--lenght", "3"): (
            "unrecognized arguments: --lenght 3",
            "Did you mean --length?",
        ),
        ("show", "no.json", "--json"): ("There is no file no.json.", "Give a plan"),
    }.items():
        assert main(list(words)) == 2
        captured = capsys.readouterr()
        error = json.loads(captured.err)
        assert captured.out == "" and set(error) == {"error", "remedy", "exit_code"} and error["exit_code"] == 2
        assert told[0] in error["error"] and told[1] in error["remedy"]


def test_json_for_the_command_of_somebody_else_is_not_asked_of_this_one(
    fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnopt import commands

    monkeypatch.setitem(commands.COMMANDS, "bisect", Failing(OptionError("This cannot be.", "Choose another.")))
    told = fails(["bisect", "--", "python", "check.py", "--json"])
    assert told == "This cannot be.\n  Choose another.\n"


def test_a_message_moves_no_cursor(fails: Fails) -> None:
    told = fails(["show", "no\x1b]0;owned\x07\x1b[31m.json"])
    assert r"no\x1b]0;owned\x07\x1b[31m.json" in told and not {"\x1b", "\x07"} & set(told)


TALKING = """
import sys
print("imported")
def make():
    from models import build
    print("made"); sys.stdout.write("no line end")
    return build("llama", num_hidden_layers=1)
"""


def test_what_a_model_prints_stays_out_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talking_model.py").write_text(TALKING)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["examine", "talking_model:make", "--length", "16", "--prompt-only", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) and "imported" in captured.err and "no line end" in captured.err


class Failing:
    """A command that meets `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, args: Any) -> None:
        raise self.error


MET = {
    OSError(errno.ENOSPC, "No space left on device", "p.json"): ("p.json: No space left on device.", "Make room"),
    PermissionError(errno.EACCES, "Permission denied", "m"): ("m: Permission denied.", "Check who may read"),
    FileNotFoundError(errno.ENOENT, "No such file", "t"): ("t: No such file.", "Check the name."),
    MemoryError(): ("There is not enough memory: an allocation failed", "Use shorter lengths"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore"): ("you tried", "Use shorter lengths"),
    KeyboardInterrupt(): ("Interrupted.", "Nothing was written."),
}


@pytest.mark.parametrize("error", MET, ids=repr)
def test_what_the_machine_refuses_is_one_message(
    error: BaseException, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnopt import commands

    monkeypatch.setitem(commands.COMMANDS, "show", Failing(error))
    message = fails(["show", "x"], code=1)
    assert all(part in message for part in MET[error])


def test_a_mistake_of_attnopt_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt import commands

    monkeypatch.setitem(commands.COMMANDS, "show", Failing(RuntimeError("a shape is wrong")))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        main(["show", "x"])


@pytest.mark.parametrize("command", [[], ["show"]])
def test_help_is_a_command_too(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for line in (["help", *command], [*command, "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(line)
        told.append(capsys.readouterr().out)
        assert ended.value.code == 0
    assert told[0] == told[1] and " ".join(["attnopt", *command]) in told[0]
