"""A profile's map: what is local, what rests on the first keys, what is alike, as data and as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from attnopt.cli import main
from attnopt.errors import DependencyError, ProfileError
from attnopt.fingerprint import Fingerprint
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.profile_map import draw_profile, profile_json, similarity
from attnopt.report.terminal import print_profile
from attnopt.statistics import Grid, measure_forward, stream

GRID, LENGTH = Grid((0, 4), (8, 64)), 256


def profile(backward: bool = True) -> Profile:
    """Two layers of three heads: one looks near itself, one at key 0, one anywhere; in another order in the second."""
    made = Profile.empty(Fingerprint("00", (0.1,)), GRID, ["text"], ["float32"], not backward, backward)
    torch.manual_seed(0)
    place = torch.arange(LENGTH) / 41.0
    q = torch.randn(1, 3, LENGTH, 4) * 0.01
    k = q.clone()
    # exp(50 cos) of a slowly turning angle falls off within some tokens; the first key's own direction draws the rest.
    q[0, 0, :, :2] = k[0, 0, :, :2] = torch.stack((place.cos(), place.sin()), -1) * 10
    q[0, 1, :, 2], k[0, 1, 0, 2] = 10.0, 10.0
    for name, order in (("layers.0.attn", [0, 1, 2]), ("layers.1.attn", [2, 0, 1])):
        seen = made.observation(name, 3, LENGTH)
        tensors = (q[:, order], k[:, order], torch.randn(1, 3, LENGTH, 4))
        if backward:
            stream(*tensors, torch.randn(1, 3, LENGTH, 4), 0.5, None, seen)
        else:
            measure_forward(*tensors, 0.5, None, seen)
    return made


def test_what_heads_look_at() -> None:
    found = profile_json(profile())
    first, second = (found["sites"][f"layers.{n}.attn"][str(LENGTH)] for n in (0, 1))
    near, sink, anywhere = first
    assert sink["sink"] > 0.95 > 0.2 > near["sink"] and sink["entropy"] < 0.5 < anywhere["entropy"]
    assert near["local"] > anywhere["local"] + 0.1 and near["distance"][1] < anywhere["distance"][1]
    assert [head["sink"] for head in second] == pytest.approx([anywhere["sink"], near["sink"], sink["sink"]])
    totals = found["totals"]
    assert totals["heads"] == 6 and totals["sink_heads"] == 2
    assert totals["sink"] == pytest.approx(sum(h["sink"] for h in first) / 3)


def test_heads_that_recall_are_listed_by_the_probe_alone(capsys: pytest.CaptureFixture[str]) -> None:
    made = profile()
    assert profile_json(made)["recalling"] == []
    for (site, _), seen in made.observations.items():
        t2 = torch.zeros_like(seen.t2)
        t2[1] = 6.0 if site == "layers.1.attn" else 3.0
        seen.probe, seen.asked = {"t2": t2, "ablation_t2": seen.ablation_t2}, 10.0
    found = profile_json(made)["recalling"]
    assert [(r["site"], r["head"]) for r in found[:2]] == [("layers.1.attn", 1), ("layers.0.attn", 1)]
    assert [r["nats_per_token"] for r in found] == pytest.approx([0.3, 0.15, 0, 0, 0, 0])
    print_profile(profile_json(made))
    assert "answers about lines far above" in " ".join(capsys.readouterr().out.split())


def test_heads_that_attend_alike_are_found() -> None:
    made = profile()
    found = similarity(made)
    assert found["sites"] == ["layers.0.attn", "layers.1.attn"] and found["length"] == LENGTH
    pairs = {(p["one"], p["other"]): p["cosine"] for p in found["alike"]}
    for mine, theirs in ((0, 1), (1, 2), (2, 0)):
        assert pairs[f"layers.0.attn.{mine}", f"layers.1.attn.{theirs}"] == pytest.approx(1.0)
    layers = torch.tensor(found["layers"])
    torch.testing.assert_close(layers, layers.T)
    # Within a layer no head is compared with itself, between these two each has its like.
    assert float(layers[0, 1]) > float(layers[0, 0]) + 0.1
    assert similarity(Profile(made.header))["layers"] == []


@pytest.mark.parametrize("backward", [True, False])
def test_the_picture_and_the_terminal(backward: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = profile(backward)
    made.save(tmp_path / "p")
    command = [
        "show",
        "profile",
        str(tmp_path / "p"),
        "--svg",
        str(tmp_path / "a.svg"),
        "--png",
        str(tmp_path / "a.png"),
    ]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "first 4 keys" in out and "How alike layers attend" in out and "layers.0.attn.0 and" in out
    assert ("squared change of the output" in out) is not backward
    drawn = (tmp_path / "a.svg").read_bytes()
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and drawn.count(b"<image") >= 4
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw_profile(profile_json(made), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == drawn, "the same every time"
    assert main(["show", str(tmp_path / "p"), "--html", str(tmp_path / "a.html")]) == 0


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = profile()
    made.save(tmp_path / "p")
    with pytest.raises(ProfileError, match="no site"):
        draw_profile(profile_json(Profile(made.header)), tmp_path / "a.svg")
    for command in (
        ["show", "plan", "p"],
        ["show", "p", "p"],
        ["show", "p", "--png", "a.svg"],
        ["show", "profile", "q"],
    ):
        monkeypatch.chdir(tmp_path)
        assert main(command) == 2, command
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="matplotlib"):
        draw_profile(profile_json(made), tmp_path / "a.svg")
    assert main(["show", str(tmp_path / "p"), "--svg", str(tmp_path / "a.svg")]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    terminal.print_profile(profile_json(made))
