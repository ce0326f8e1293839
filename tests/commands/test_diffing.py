"""`attnopt diff`: heads, totals and settings of two plans; ranks of two profiles; what does not compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_plans import LENGTHS, made_plan, random_profile, sites_of

from attnopt.cli import main
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice
from attnopt.plan import Budget, Plan
from attnopt.report.cells import without_common
from attnopt.report.data import plans_json, profiles_json

from .lines import Fails

NARROW = Choice.of("sink_window", {"sink": 4, "alpha": 8, "beta": 0.0})
WIDE = Choice.of("sink_window", {"sink": 4, "alpha": 32, "beta": 0.0})


def plan_of(**rows: str) -> Plan:
    """Choices by letter, n(arrow), w(ide) or d(ense), of l0, l1, ..."""
    letters = {"n": NARROW, "w": WIDE, "d": DENSE}
    choices = {f"model.layers.{name[1:]}.self_attn": tuple(letters[x] for x in row) for name, row in rows.items()}
    return replace(made_plan(random_profile(layers=len(rows)), sites_of(len(rows))), choices=choices)


def test_changes_fold_over_heads_and_layers() -> None:
    one = plan_of(l0="nnnd", l1="nnnd", l2="wwww", l3="dddd")
    other = plan_of(l0="wwnd", l1="wwnd", l2="wwdd", l3="nddd")
    found = plans_json(one, other, ("a", "b"))
    assert [(r["sites"], r["heads"], r["count"], *r["labels"]) for r in found["changes"]] == [
        ("model.layers.0-1.self_attn", "0-1", 4, "window 8, sink 4", "window 32, sink 4"),
        ("model.layers.2.self_attn", "2-3", 2, "window 32, sink 4", "dense"),
        ("model.layers.3.self_attn", "0", 1, "dense", "window 8, sink 4"),
    ]
    assert found["changed"] == 7 and found["heads"] == 16 and not found["same"]
    changed = {site: [head["changed"] for head in heads] for site, heads in found["sites"].items()}
    assert changed["model.layers.2.self_attn"] == [False, False, True, True]
    kept = found["sites"]["model.layers.3.self_attn"][0]["kept"]
    pairs = sum(min(i + 1, 8) + min(4, max(i - 7, 0)) for i in range(LENGTHS[-1]))
    assert kept == pytest.approx([1.0, pairs / (LENGTHS[-1] * (LENGTHS[-1] + 1) / 2)])
    assert found["changes"][2]["cost"] == pytest.approx(kept)


def test_totals_and_settings_stand_side_by_side() -> None:
    one = plan_of(l0="nnnd", l1="nnnd")
    other = replace(one, budget=Budget("loss", 0.5), min_length=64, measured=())
    found = plans_json(one, other, ("a", "b"))
    settings = {row["what"]: (row["one"], row["other"]) for row in found["settings"]}
    assert settings == {
        "budget": ("1 percent of the dense loss", "0.5 percent of the dense loss"),
        "dense under": ("0 tokens", "64 tokens"),
    }
    totals = {row["what"]: (row["one"], row["other"]) for row in found["totals"]}
    assert totals["heads replaced"] == (6, 6) and found["changes"] == [] and not found["same"]
    assert plans_json(one, one, ("a", "a"))["same"]


def test_plans_for_two_lengths_are_compared_at_one() -> None:
    """A wider window keeps less of a longer input: neither length may stand for the other."""
    one, other = plan_of(l0="wwwd"), plan_of(l0="nnwd")
    other = replace(other, lengths=replace(other.lengths, planned=LENGTHS[0]))
    found = plans_json(one, other, ("a", "b"))
    kept = [head["kept"] for head in found["sites"]["model.layers.0.self_attn"]]
    assert kept[0][0] > kept[0][1] and kept[2][0] == kept[2][1] and kept[3] == [1.0, 1.0]
    assert found["changes"][0]["cost"] == pytest.approx(kept[0])
    density = next((row["one"], row["other"]) for row in found["totals"] if row["what"] == "density")
    assert density == pytest.approx([sum(pair[n] for pair in kept) / 4 for n in (0, 1)])
    assert any(f"of {LENGTHS[1]} tokens in both" in note for note in found["notes"])


def test_only_time_is_called_fast() -> None:
    one = plan_of(l0="nnnd")
    counted, ms = (
        replace(one, objective=objective, predicted=replace(one.predicted, unit=unit))
        for objective, unit in (("memory", "MiB of cache"), ("prefill", "ms"))
    )
    names = [[row["what"] for row in plans_json(*pair, ("a", "b"))["totals"]] for pair in ((ms, ms), (counted, ms))]
    assert "times as fast, predicted" in names[0] and not any("fast" in name for name in names[1])
    assert "memory, MiB of cache: dense / planned" in str(plans_json(counted, counted, ("a", "b"))["totals"])


def test_the_terminal_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    plan_of(l0="nnnd", l1="nnnd").save("a.json")
    plan_of(l0="wwnd", l1="wwnd").save("b.json")
    assert main(["diff", "a.json", "b.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["diff", "a.json", "b.json"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    for row in found["totals"]:
        if isinstance(row["one"], float):
            assert f"{row['what']} {row['one']:.4g} {row['other']:.4g}" in text
    assert "4 of 8 heads have another choice" in text and "0 + + · · 1 + + · ·" in text
    assert "0-1 window 8, sink 4 window 32, sink 4" in text
    for command, code in ((["a.json", "b.json"], 1), (["a.json", "a.json"], 0)):
        try:
            ended = main(["diff", *command, "--exit-code"])
        except SystemExit as stopped:
            ended = int(str(stopped.code))
        assert ended == code
    assert "The plans do not differ." in capsys.readouterr().out


def test_profiles_are_compared_by_rank() -> None:
    one, other = random_profile(), random_profile(text="more")
    for n in LENGTHS:
        # One head of the second layer, by hand: from its place to the top.
        other.observations["model.layers.1.self_attn", n].t2[3] *= 1e6
    found = profiles_json(one, other, ("a", "b"))
    assert found["unit"] == "nats per token" and (found["window"], found["sink"]) == (8, 4)
    (first, *_) = found["moved"]
    assert (first["site"], first["head"]) == ("model.layers.1.self_attn", 3) and first["ranks"][1] == 1
    assert first["damages"][1] == pytest.approx(1e6 * first["damages"][0])
    by_hand = [
        torch.cat([p.observations[site, LENGTHS[-1]].t2[:, 1, 0] for site in p.sites]).argsort().argsort().double()
        for p in (one, other)
    ]
    correlation = float(torch.corrcoef(torch.stack(by_hand))[0, 1])
    assert found["lengths"][-1]["correlation"] == pytest.approx(correlation) and correlation < 0.999
    assert [row["what"] for row in found["settings"]] == ["text"] and not found["same"]
    assert profiles_json(one, one, ("a", "a"))["same"]


def test_profiles_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    random_profile().save("a.safetensors")
    random_profile(seed=1).save("b.safetensors")
    assert main(["diff", "a.safetensors", "b.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["diff", "a.safetensors", "b.safetensors"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for row in found["lengths"]:
        assert f"{row['length']} {row['heads']} {row['correlation']:.4g} {row['ratio']:.4g}" in text
    row = found["moved"][0]
    assert f"{row['site']} {row['head']} {row['damages'][0]:.3g} {row['damages'][1]:.3g}" in text


def test_what_does_not_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.chdir(tmp_path)
    plan_of(l0="nnnd", l1="nnnd").save("a.json")
    plan_of(l0="nnnd").save("short.json")
    random_profile().save("p")
    random_profile(layers=1).save("q")
    Path("cut").write_bytes(b"{")
    assert "different models: model.layers.1.self_attn has 4 heads and 0 heads" in fails(
        ["diff", "a.json", "short.json"]
    )
    assert "of different models" in fails(["diff", "p", "q"])
    assert "a.json is a plan and p a profile" in fails(["diff", "p", "a.json"])
    assert "There is no file none" in fails(["diff", "a.json", "none"])
    assert "cut" in fails(["diff", "a.json", "cut"])


def test_a_fine_tuned_model_is_compared_with_a_note() -> None:
    one = plan_of(l0="nnnd")
    other = replace(one, fingerprint=Fingerprint(one.fingerprint.structure, (0.5,)))
    assert "same structure and different weights" in plans_json(one, other, ("a", "b"))["notes"][0]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["m.0.a", "m.1-3.a"], ("m.*.a", ["0", "1-3"])),
        (["a.x.0", "b.x.0"], ("*.x.0", ["a", "b"])),
        (["a.b", "a.b"], ("", ["a.b", "a.b"])),
        (["a", "b.c"], ("", ["a", "b.c"])),
        (["a.b", "a.b.c.b"], ("*.b", ["a", "a.b.c"])),
        ([], ("", [])),
    ],
)
def test_names_without_what_they_share(names: Any, expected: Any) -> None:
    assert without_common(names) == expected
