"""`attnopt profile` and `merge`: text and supervision, refusals that leave nothing half-written, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from models import save_model

from attnopt.cli import main
from attnopt.profile_file import Profile

from .lines import Fails, snapshot


def test_profiles_are_merged(work: Path, fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def profiled(model: str, seed: int) -> str:
        out = str(tmp_path / f"{model}-{seed}")
        command = ["profile", str(work / model), "--lengths", "128", "--samples", "1", "--seed", str(seed)]
        assert main([*command, "--probe", "0", "--text", str(work / "text.py"), "--out", out]) == 0
        return out

    one, two, other = profiled("shallow", 0), profiled("shallow", 1), profiled("weights", 2)
    capsys.readouterr()
    assert main(["merge", one, two, "--out", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile_file"] == str(tmp_path / "both")
    assert Profile.load(tmp_path / "both").samples == {128: 2}
    before = snapshot(tmp_path)
    assert "observed the same text" in fails(["merge", one, two, one, "--out", str(tmp_path / "both")])
    assert "different weights" in fails(["merge", one, other, "--out", str(tmp_path / "new")])
    assert "no profile" in fails(["merge", one, str(tmp_path / "none"), "--out", str(tmp_path / "both")])
    assert snapshot(tmp_path) == before


def test_texts_that_do_not_do(work: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("def f(): pass")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    before = snapshot(tmp_path)
    for name, message in {
        "empty": "The text is empty", "short": "too short for one sequence of 64", "none": "There is no text file",
        "binary": "cannot be read as UTF-8",
    }.items():  # fmt: skip
        command = ["profile", str(work / "model"), "--lengths", "64", "--out", str(tmp_path / "p"), "--text"]
        assert message in fails([*command, str(tmp_path / name)])
    assert snapshot(tmp_path) == before


CHAT = [
    {"prompt": "def add(a, b):\n    ", "answer": "return a + b\n" * 12},
    {"prompt": "# the sum of all\n" * 9, "answer": "total = sum(values)\n" * 3},
]


@pytest.mark.slow
def test_supervision_from_the_command_line(work: Path, fails: Fails, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(CHAT[n % 2]) for n in range(24)))
    base = ["profile", str(work / "shallow"), "--lengths", "128", "--samples", "1", "--json", "--probe", "0"]

    def header(name: str, *options: str) -> Any:
        capsys.readouterr()
        assert main([*base, *options, "--out", str(tmp_path / name)]) == 0
        found = json.loads(capsys.readouterr().out)["profile"]
        return found["supervision"], found["lengths"][0]["tokens"]

    words = ["--text", str(work / "text.py")]
    assert header("text", *words, "--draws", "2") == (["model labels on text"], 256)
    assert header("data", *words, "--labels", "data") == (["data labels on text"], 127)
    assert header("own", *words, "--labels", "continuation") == (["model labels on its own sampled continuation"], 32)
    supervision, tokens = header("chat", "--text", str(tmp_path / "chat.jsonl"), "--labels", "data")
    assert supervision == ["data labels on chat answers"] and 10 < tokens < 100
    few = ["--text", str(tmp_path / "chat.jsonl"), "--samples", "99", "--out", str(tmp_path / "few")]
    assert main([*base, *few]) == 0
    assert "of the 99 sequences of 128 tokens" in capsys.readouterr().err
    both = header("both", *words, "--probe", "1")
    assert both == (["model labels on probe answers, softened 4 times", "model labels on text"], 128)
    merged = ["merge", str(tmp_path / "text"), str(tmp_path / "chat"), "--out", str(tmp_path / "mixed")]
    assert "--mixed" in fails(merged) and not (tmp_path / "mixed").exists()
    assert main([*merged, "--mixed"]) == 0


def test_supervision_that_cannot_be(work: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "silent.jsonl").write_text('{"prompt": "a", "answer": ""}\n')
    (tmp_path / "broken.jsonl").write_text(json.dumps(CHAT[0]) + "\n{")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "out").write_text("kept")
    before = snapshot(tmp_path)
    options = ["--lengths", "64", "--samples", "1", "--out", str(tmp_path / "out"), "--text"]
    base = ["profile", str(work / "model"), *options]
    for words, message in {
        ("silent.jsonl",): "Line 1 of",
        ("broken.jsonl",): "is not JSON",
        ("chat.jsonl",): "no chat template",
    }.items():
        assert message in fails([*base, str(tmp_path / words[0]), *words[1:]])
    text = str(work / "text.py")
    for others, message in {
        ("--lengths", "8", "--probe", "1"): "no room", ("--forward-only", "--probe", "1"): "backward pass",
        ("--labels", "data", "--draws", "2"): "not drawn",
    }.items():  # fmt: skip
        assert message in fails([*base, text, *others])
    broken = tmp_path / "model"
    save_model(broken)
    import safetensors.torch

    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in fails(["profile", str(broken), *options, str(work / "text.py"), "--dtype", "bf16"])
    shutil.rmtree(broken)
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_an_interrupted_profile_goes_on(work: Path, tmp_path: Path, fails: Fails) -> None:
    samples, draws, out = 4, 5, tmp_path / "profile"
    partial, ended = tmp_path / "profile.partial", threading.Event()
    command = ["profile", str(work / "shallow"), "--lengths", "256", "--samples", str(samples), "--text",
               str(work / "text.py"), "--draws", str(draws), "--probe", "0", "--out", str(out)]  # fmt: skip

    def interrupt() -> None:
        while not partial.exists() and not ended.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    # Where no command runs, the signal does nothing.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    watching = threading.Thread(target=interrupt)
    watching.start()
    try:
        said = fails(command, code=1)
    finally:
        ended.set()
        watching.join()
        signal.signal(signal.SIGINT, before)
    assert "Interrupted." in said and "run the same command again" in said
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    done = Profile.load(partial).header.data
    assert 0 < len(done) < samples * draws

    assert main(command) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    again = Profile.load(out).header.data
    assert set(done) < set(again) and len(again) == samples * draws
