"""`attnopt distill`: what it writes and prints, and refusals that leave everything as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnopt.cli import main
from attnopt.commands import distilling
from attnopt.fitted import Fitted
from attnopt.profile_file import Profile
from attnopt.report.fits import print_fitted

from .lines import SITE, Fails, snapshot

SMALL = ["--features", "4", "--ranks", "2", "--windows", "8,32", "--sinks", "0", "--steps", "2", "--samples", "1"]


@pytest.fixture(scope="module")
def profile(work: Path) -> Path:
    path = work / "shallow-profile"
    command = ["profile", str(work / "shallow"), "--lengths", "64", "--samples", "1", "--probe", "0"]
    assert main([*command, "--text", str(work / "text.py"), "--out", str(path), "--json"]) == 0
    return path


def test_fits_are_written_and_told(
    work: Path, profile: Path, fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "f.safetensors", ["--text", str(work / "text.py")]
    command = ["distill", str(work / "shallow"), "--profile", str(profile), "--out", str(out), *words, *SMALL]
    assert main([*command, "--json"]) == 0
    told, made = json.loads(capsys.readouterr().out), Fitted.load(out)
    assert told["fitted_file"] == str(out) and told["fitted"]["lengths"] == [64]
    assert made.header.fingerprint == Profile.load(profile).header.fingerprint
    rows = told["fitted"]["sites"][SITE]
    assert [row["family"] for row in rows] == 2 * ["compensation", "linear", "taylor"] + ["prune"]
    for row, choice in zip(rows, [c for c in made.choices(SITE) if c.candidate != "sink_window"], strict=True):
        assert row["offered"] == made.offered(SITE, choice).nonzero()[:, 0].tolist()
        assert row["damage"]["64"] == made.damage(SITE, 64, choice).tolist()
        better = [
            a < b for a, b in zip(row["damage"]["64"], (row["window_damage"] or {"64": [9.0] * 4})["64"], strict=True)
        ]
        assert row["offered"] == [head for head, is_better in enumerate(better) if is_better]
    # The table says the same.
    print_fitted(told["fitted"])
    table = " ".join(capsys.readouterr().out.split())
    offered = len({head for row in rows if row["family"] == "taylor" for head in row["offered"]})
    assert f"taylor: offered on {offered} of 4 heads" in table and "prune: offered on 4 of 4 heads" in table
    assert "linear" in table and "window=8" in table and "window=32" not in table

    before = snapshot(tmp_path)
    assert list(before) == ["f.safetensors"]
    others: dict[str, dict[str, Any]] = {
        "belongs to another model": {"distill": "weights", "--profile": str(profile)},
        "no profile": {"--profile": str(tmp_path / "none")},
        "not a profile": {"--profile": str(out)},
        "does not hold two sequences of 64": {"--text": str(work / "short")},
        "no family hedgehog": {"--families": ""},
    }
    (work / "short").write_text("def f(): pass\n" * 20)
    for message, changes in others.items():
        changed = list(command)
        for name, value in changes.items():
            if name in changed:
                changed[changed.index(name) + 1] = str(work / value) if name == "distill" else value
        if "--families" in changes:
            changed += ["--families", "hedgehog"]
        assert message in fails(changed), message
        assert snapshot(tmp_path) == before


def test_the_two_parts_of_the_text_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    ids = torch.arange(1000)
    monkeypatch.setattr(distilling.text, "stream", lambda *_: ids)
    args: Any = SimpleNamespace(text=[], samples=3)
    loaded: Any = SimpleNamespace(tokenizer=None, model=torch.nn.Linear(1, 1))
    fit, tried = distilling.texts(args, loaded, (64, 200), True)
    # A third does not hold two sequences of 200.
    assert [tuple(x.shape) for x in fit] == [(1, 64)] * 3 and [s.length for s in tried] == [64] * 3 + [200] * 3
    assert max(int(x.max()) for x in fit) < min(int(s.ids.min()) for s in tried)
    # Where nothing is fitted the same is tried.
    none, alike = distilling.texts(args, loaded, (64, 200), False)
    assert none == [] and all(torch.equal(a.ids, b.ids) for a, b in zip(tried, alike, strict=True))
