"""`attnopt show` and `explain`: what stands on the terminal is what stands in the JSON, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_plans import LENGTHS, made_plan, random_profile, sites_of, timed

from attnopt.cli import main
from attnopt.fingerprint import Fingerprint, fingerprint_of
from attnopt.profile_file import Profile
from attnopt.profiler import discover
from attnopt.report.data import plan_facts

from .lines import Fails, snapshot

SITE = "model.layers.1.self_attn"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan and its profile among others, in the current folder."""
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    profile = random_profile()
    made_plan(profile, sites_of()).save("plan.json")
    profile.save("profile.safetensors")
    random_profile(text="another").save("a.safetensors")
    Path("b.safetensors").write_bytes(b"no tensors")
    return folder


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    """What is printed, which fits 80 columns and has no colour."""
    capsys.readouterr()
    assert main([*command]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    return out.splitlines()


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    return " ".join(" ".join(lines(capsys, *command)).split())


def test_a_plan_on_the_terminal_is_its_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "show", "plan.json")["plan"]
    text = printed(capsys, "show", "plan.json")
    for label, value in plan_facts(found):
        assert f"{label} {' '.join(value.split())}" in text, label
    totals = found["totals"]
    assert totals["budget_kept"] is True and totals["margin"] == pytest.approx(0.25)
    assert "kept: at most 0.75, allowed 1 percent of the dense loss; 0.25 to spare" in text
    assert f"{totals['replaced']} of {totals['heads']} heads replaced" in text and totals["heads"] == 8
    # The map: a line per layer, a letter per head, the legend's counts.
    rows = [line.split() for line in lines(capsys, "show", "plan.json") if re.fullmatch(r"[01]( [a-z#]){4} *", line)]
    signs = [sign for row in rows for sign in row[1:]]
    legend = re.findall(r"([a-z#]) (?:dense|window <= \d+) \((\d+)\)", text)
    assert {sign: int(count) for sign, count in legend} == {sign: signs.count(sign) for sign in signs}
    assert len(signs) == 8 and signs.count("#") == sum(s["heads"] for s in found["spans"] if s["dense"])


def test_bytes_are_told_where_sizes_are_known(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "show", "plan.json")["plan"]["totals"]["kv_bytes"] is None
    sites = sites_of(kv_heads=2)
    table = timed(sites)
    table.save(files.parent / "cache" / "costs" / "t.json")
    plan = made_plan(random_profile(), sites, table)
    plan.save("timed.json")
    totals = answer(capsys, "show", "timed.json")["plan"]["totals"]
    dense = 2 * 2 * (64 + 64) * 4 * LENGTHS[-1]
    assert totals["dense_kv_bytes"] == dense and totals["kv_bytes"] == round(plan.predicted.kv_memory * dense)
    assert f"{dense / 2**10:.3g} KiB a sequence" in printed(capsys, "show", "timed.json")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"upper_95": 1.5}, "missed: at most 1.5, allowed 1 percent of the dense loss; 0.5 too much"),
        ({"choices": "0" * 12}, "not known whether it is kept: edited since"),
    ],
)
def test_whether_the_budget_was_kept(change: Any, said: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = made_plan(random_profile(), sites_of())
    replace(plan, measured=tuple(replace(m, **change) for m in plan.measured)).save("p.json")
    assert said in printed(capsys, "show", "p.json")


def test_the_profile_is_found_beside_the_plan(files: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    full = answer(capsys, "explain", "plan.json", f"{SITE}.2")
    assert full["profile_file"] == str(files / "profile.safetensors") and full["head"] == f"{SITE}.2"
    for short in ("layers.1.self_attn.2", "layers.1.2", "1.2"):
        assert answer(capsys, "explain", "plan.json", short) == full
    text = printed(capsys, "explain", "plan.json", "1.2")
    assert " ".join(full["reason"].split()) in text
    hull = [row for row in full["candidates"] if row["hull"]]
    for row in full["candidates"]:
        shown = f"{row['label']} " + " ".join(f"{row['damages'][str(n)]:.2g}" for n in LENGTHS)
        assert (f"{shown} {row['damage']:.2g} {100 * row['cost']:.3g} %" in text) == (row in hull), row
    assert f"{len(full['candidates']) - len(hull)} further candidates" in text
    every = printed(capsys, "explain", "plan.json", "1.2", "--all")
    assert all(f"{row['label']} {row['damages']['64']:.2g}" in every for row in full["candidates"])
    (files / "profile.safetensors").rename("elsewhere")
    message = fails(["explain", "plan.json", "1.2"])
    digest = json.loads((files / "plan.json").read_text())["calibration"]
    assert digest in message and "a.safetensors is " in message and "--profile FILE" in message
    assert answer(capsys, "explain", "plan.json", "1.2", "--profile", "elsewhere")["candidates"] == full["candidates"]
    other = answer(capsys, "explain", "plan.json", "1.2", "--profile", "a.safetensors")
    assert any(f"made from another profile, {digest}" in note for note in other["notes"])


def test_of_profiles_of_one_text_that_of_the_plan_s_model_is_taken(
    files: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digest is of the text alone: other models, lengths and grids have the same."""
    own = answer(capsys, "explain", "plan.json", "1.2")
    random_profile(model=Fingerprint("f" * 16, (0.5,))).save("0.safetensors")
    shorter = random_profile()
    shorter.observations = {key: seen for key, seen in shorter.observations.items() if key[1] == LENGTHS[0]}
    shorter.save("1.safetensors")
    assert answer(capsys, "explain", "plan.json", "1.2") == own
    random_profile(seed=1).save("z.safetensors")
    (*rest, note) = answer(capsys, "explain", "plan.json", "1.2")["notes"]
    assert rest == own["notes"] and "Taken from profile.safetensors; z.safetensors may be meant as well" in note
    for name in ("profile.safetensors", "z.safetensors"):
        Path(name).unlink()
    message = fails(["explain", "plan.json", "1.2"])
    assert "0.safetensors is of another model" in message and f"1.safetensors is of {LENGTHS[0]} tokens" in message


def test_heads_that_are_not_there_or_several(files: Path, fails: Fails) -> None:
    assert "Try model.layers.1.self_attn.0 to .3" in fails(["explain", "plan.json", "1.4"])
    assert "Try model.layers.0.self_attn.0" in fails(["explain", "plan.json", "9.0"])
    assert "no head 'nothing'" in fails(["explain", "plan.json", "nothing"])
    assert "may be any of model.layers.0.self_attn, model.layers.1" in fails(["explain", "plan.json", "self_attn.3"])


def test_what_is_not_what_it_should_be(files: Path, fails: Fails) -> None:
    before = snapshot(files)
    random_profile(model=Fingerprint("f" * 16, (0.5,))).save("other")
    Path("cut.json").write_bytes((files / "plan.json").read_bytes()[:200])
    Path("cut").write_bytes((files / "profile.safetensors").read_bytes()[:200])
    known = {name: content for name, content in snapshot(files).items()}
    told = {
        ("explain", "profile.safetensors", "1.2"): "is not a plan",
        ("explain", "plan.json", "1.2", "--profile", "plan.json"): "is not a profile",
        ("explain", "plan.json", "1.2", "--profile", "other"): "another model",
        ("explain", "plan.json", "1.2", "--profile", "cut"): "truncated",
        ("explain", "cut.json", "1.2"): "cut.json",
        ("show", "plan.json", "--svg", "a.svg"): "Pictures are drawn of profiles",
        ("show", "plan.json", "--profile", "plan.json"): "is not a profile",
        ("show", "plan.json", "--profile", "other", "--html", "a.html"): "another model",
        ("show", "plan.json", "--fitted", "cut"): "Give --profile",
        ("show", "profile.safetensors", "--model", "demo"): "--model: profile.safetensors is a profile",
        ("show", "profile", "plan.json"): "is not a profile",
        ("show", "."): "is a folder",
    }
    for command, message in told.items():
        assert message in fails(list(command)), command
    assert snapshot(files) == known and set(known) == {*before, "other", "cut", "cut.json"}


def test_the_whole_report_of_a_plan(work: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a real model: its own sites, their caches, graphs and kernels."""
    from attnopt import hf

    model = hf.load(str(work / "model")).model
    sites = list(discover(model, torch.arange(64)[None] % 61).sites.values())
    profile = random_profile(model=fingerprint_of(model, sites))
    replace(made_plan(profile, sites), min_length=LENGTHS[-1]).save("plan.json")
    profile.save("own.safetensors")
    given = ["show", "plan.json", "--profile", "own.safetensors", "--model", str(work / "model")]
    found = answer(capsys, *given, "--html", "page.html")
    assert set(found) == {"notes", "graphs", "plan", "profile", "front", "candidates", "pictures", "kernels"}
    assert found["notes"] == [] and found["graphs"]["counts"]["rewritten"] == 2
    # The graphs are those that the plan makes, which stays dense under its break-even.
    assert all("span kernel" in row["done"] for row in found["graphs"]["rows"])
    assert all(item["before"] and item["after"] for item in found["pictures"]) and found["pictures"]
    dense = sum(s.kv_heads * 2 * s.head_dim * 4 for s in sites) * LENGTHS[-1]
    assert found["plan"]["totals"]["dense_kv_bytes"] == dense and [s.kv_heads for s in sites] == [2, 2]
    # The model tells how heads share keys, which the plan does not; without it they are said to share none.
    notes = [answer(capsys, "explain", "plan.json", "0.1", "--profile", "own.safetensors", *more)["notes"]
             for more in (["--model", str(work / "model")], [])]  # fmt: skip
    assert not any("KV heads" in note for note in notes[0]) and any("--model MODEL tells" in note for note in notes[1])
    (source,) = found["kernels"].values()
    assert "def prefill(" in source
    page = Path("page.html").read_text(encoding="utf-8")
    assert "attnopt show plan.json" in page and SITE in page and "Before and after" in page
    without = answer(capsys, "show", "plan.json", "--html", "small.html")
    assert set(without) == {"notes", "plan"} and Path("small.html").stat().st_size < len(page)


def test_a_profile_on_the_terminal_fits_80_columns(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = random_profile(layers=3, heads=96)
    wide.save("wide")
    found = answer(capsys, "show", "wide")["profile"]
    text = printed(capsys, "show", "wide", "--html", "wide.html")
    assert text.endswith("wrote wide.html") and Path("wide.html").is_file()
    totals = found["totals"]
    assert f"{totals['heads']} heads: {totals['local_heads']} with 80% of their mass within 64 tokens" in text
    # 96 heads are two blocks, each under its own ruler.
    assert "0 8 16 24 32 40 48 56 64" in text and "72 80 88" in text
    heads = [by_length[str(LENGTHS[-1])] for by_length in found["sites"].values()]
    buckets = found["grid"]["distances"]
    assert buckets[0] == [0, 0] and buckets[-1] == [64, 127] and len(heads[0][0]["mass"]) == len(buckets)
    seen = Profile.load("wide").observations["model.layers.0.self_attn", LENGTHS[-1]]
    assert heads[0][5]["mass"] == pytest.approx((seen.mass_by_distance[5] / seen.rows).tolist(), rel=1e-3)
