"""The map of heads: its measures, their classes, and what its script is given."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pages
import pytest

from attnopt.ir import DENSE, Choice
from attnopt.report import data
from attnopt.report.page.heads import Measure, head_facts, heads, measures


def measure(key: str, given: dict[str, Any]) -> Measure:
    return next(found for found in measures(given) if found.key == key)


def mixed() -> dict[str, Any]:
    windows = (32, 64, 1024)
    choices = {
        "layers.0.attn": (*map(pages.narrow, windows), DENSE),
        "layers.1.attn": (Choice.of("pruned", {}),) * 2 + (pages.narrow(33), DENSE),
    }
    return {"plan": data.plan_json(replace(pages.plan(), choices=choices))}


def test_windows_of_one_class_are_of_one_power_of_two() -> None:
    chosen = measure("choice", mixed())
    assert [sign for _, sign in chosen.marks["layers.0.attn"]] == ["a", "b", "c", ""]
    assert [mark for mark, _ in chosen.marks["layers.1.attn"]] == [
        "gone",
        "gone",
        chosen.marks["layers.0.attn"][1][0],
        "dense",
    ]
    assert [text for *_, text in chosen.legend] == ["window ≤ 32", "window ≤ 64", "window ≤ 1024", "pruned", "dense"]
    assert chosen.values["layers.0.attn"] == [32, 64, 1024, 4096]


def test_classes_of_kept_pairs_halve() -> None:
    given = mixed()
    for head, kept in zip(given["plan"]["sites"]["layers.0.attn"], (1.0, 0.5, 0.26, 0.0), strict=True):
        head["kept"] = kept
    found = measure("kept", given)
    assert [sign for _, sign in found.marks["layers.0.attn"]] == ["h", "g", "g", "a"]
    texts = {sign: text for _, sign, text in found.legend}
    assert texts["h"] == "≤ 100 %" and texts["g"] == "≤ 50 %" and texts["a"] == "≤ 0.781 %"


def test_damages_are_classed_by_rank_and_equal_ones_alike() -> None:
    given = pages.whole(2, 8)
    found = measure("removal", given)
    ranked = sorted((v, found.marks[s][n][1]) for s, row in found.values.items() for n, v in enumerate(row))
    assert "".join(sign for _, sign in ranked) == "aabbccddeeffgghh"
    for row in given["profile"]["sites"].values():
        for head in row["64"]:
            head["ablation"] = 0.25
    found = measure("removal", given)
    assert {mark for row in found.marks.values() for mark in row} == {("0", "a")} and len(found.legend) == 1


def test_a_legend_says_where_each_class_begins() -> None:
    given = pages.whole(2, 8)
    for key in ("removal", "harm"):
        found = measure(key, given)
        starts = {sign: float(text.removeprefix("from ")) for _, sign, text in found.legend}
        for site, row in found.values.items():
            for value, (_, sign) in zip(row, found.marks[site], strict=True):
                assert value is not None and value >= starts[sign] * 0.94


def test_what_is_not_known_has_no_class() -> None:
    given = pages.whole()
    for row in given["profile"]["sites"].values():
        for head in row["64"]:
            head["ablation"] = None
    assert "removal" not in [found.key for found in measures(given)]
    given["candidates"]["sites"]["layers.0.attn"]["chosen"] = [0] * 4
    assert measure("harm", given).marks["layers.0.attn"] == [("", "")] * 4
    assert not any("its choice costs" in line for line in head_facts(given, "layers.0.attn", 0))


def test_a_profile_alone_has_its_windows_as_curves() -> None:
    seen = pages.profile_data(pages.profile())
    embedded = json.loads(heads({"profile": seen})[1][0].split(">", 1)[1].rsplit("</script>")[0])
    assert [c["choice"] for c in embedded["choices"][:2]] == ["sink 0, window 8", "sink 0, window 16"]
    head = seen["sites"]["layers.1.attn"]["64"][2]
    assert embedded["damage"][1][2] == pytest.approx([x for row in head["damage"] for x in row], rel=1e-3)
    assert embedded["chosen"] == [None, None] and embedded["mass"][1][2] == head["mass"]


def test_sites_of_which_only_some_were_profiled_stand_in_one_map() -> None:
    given = {"plan": data.plan_json(pages.plan(3)), "profile": pages.profile_data(pages.profile(2))}
    page, embedded = heads(given)
    assert page[0].count('scope="row"') == 3
    assert json.loads(embedded[0].split(">", 1)[1].rsplit("</script>")[0])["mass"][2] == []
    assert len(head_facts(given, "layers.2.attn", 0)) == 3 and len(head_facts(given, "layers.1.attn", 0)) == 6


def test_figures_of_a_tooltip() -> None:
    given = pages.whole()
    lines = head_facts(given, "layers.1.attn", 1)
    seen = given["profile"]["sites"]["layers.1.attn"]["64"][1]
    assert lines[:2] == ["layers.1.attn, head 1", "window 128, sink 4"]
    assert f"removing it costs {seen['ablation']:.3g} nats per token" in lines
    assert (
        f"its choice costs {given['candidates']['sites']['layers.1.attn']['damage'][1][1]:.3g} nats per token" in lines
    )
