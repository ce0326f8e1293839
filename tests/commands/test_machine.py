"""`attnopt env`: what a report of a mistake needs, and nothing that is private."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from attnopt.cli import main
from attnopt.report.data import machine


def test_the_machine_is_told_without_what_is_private(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("TORCH_LOGS", f"+dynamo,{tmp_path}/logs,https://me:word@example.org")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("CUDA_API_KEY", "sesame")
    monkeypatch.setenv("ATTNOPT_TARGET", "tpu")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "kept" / "costs").mkdir(parents=True)
    (tmp_path / "kept" / "costs" / "a.json").write_text("12345")
    assert main(["env", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["variables"]["TORCH_LOGS"] == "+dynamo,~/logs,https://example.org"
    assert data["variables"]["CUDA_API_KEY"] == "set" and "HF_TOKEN" not in data["variables"]
    assert data["variables"]["ATTNOPT_CACHE"] == "~/kept" and data["variables"]["ATTNOPT_VERIFY"] == "0"
    assert data["caches"][0] == {"of": "attnopt", "path": "~/kept", "files": 1, "bytes": 5}
    assert "is no target" in data["kernel target"]["cpu"] and data["torch"] and data["threads"] >= 1
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "```text" and lines[-1] == "```" and lines.count("```") == 1
    assert f"torch: {data['torch']}" in lines and "  attnopt: 1 files, 5 B, ~/kept" in lines
    for private in (str(tmp_path), "hf_abc", "sesame", "word"):
        assert private not in text


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert machine.commit_of(tmp_path) is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert machine.commit_of(tmp_path) == head[:12]
    (tmp_path / "file").write_text("b")
    assert machine.commit_of(tmp_path) == f"{head[:12]}-dirty"
