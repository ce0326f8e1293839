"""Heads that select tokens while decoding, in every report: what a step reads, nowhere that they keep everything."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pages
import pytest
import torch
from made_plans import made_plan, random_profile, sites_of
from rich.console import Console

from attnopt.fitted import Fitted, Header
from attnopt.ir import DENSE, Choice, Share
from attnopt.plan import Plan
from attnopt.planner.again import pose
from attnopt.report import data, terminal
from attnopt.report.cells import signs
from attnopt.report.data.candidates import label
from attnopt.report.fits import fitted_json, print_fitted
from attnopt.report.page.heads import head_facts, measures
from attnopt.statistics.trials import Trials

OWN = {"k": 64, "sink": 4, "recent": 32}
TOP = Choice.of("top_tokens", {**OWN, "every": 8, "similar": 0.875, "behind": 0})
READING = Choice.of("top_tokens", {**OWN, "every": 1, "similar": 0.0, "behind": 1})
CHANNELS = Choice.of("channels", {**OWN, "every": 1, "r": 16})
POOLED = Choice.of("pooled", {"mass": 0.75, "count": 1 << 20, "alike": -1.0, "block": 64, "skip": 0.0})
SITE = "layers.0.attn"


def plan(**other: Any) -> Plan:
    choices = {SITE: (TOP, CHANNELS, POOLED, DENSE), "layers.1.attn": (READING, DENSE, DENSE, DENSE)}
    visits = {SITE: {0: Share(0.125, 0.0, 0.91), 2: Share(0.25, 0.0, 0.98)}, "layers.1.attn": {0: Share(0.0, 0.0, 0.9)}}
    return replace(pages.plan(), choices=choices, visits=visits, measured=(), **other)


def printed(found: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    terminal.print_plan(found, Console(file=out, width=width))
    return out.getvalue()


def test_labels_name_their_settings_and_numbers_are_whole() -> None:
    assert label(TOP) == "top_tokens, k 64, sink 4, recent 32, every 8, similar 0.875"
    assert label(READING) == "top_tokens, k 64, sink 4, recent 32, every 1, behind 1"
    assert label(CHANNELS) == "channels, k 64, sink 4, recent 32, r 16, every 1"
    assert str(POOLED) == "pooled(alike=-1, block=64, count=1048576, mass=0.75, skip=0)"


def test_a_plan_says_what_a_step_reads() -> None:
    found = data.plan_json(plan())
    top, channels, pooled, _ = found["sites"][SITE]
    assert [head["far"] for head in (top, channels, pooled)] == ["tokens", "tokens", "selected"]
    assert top["kept"] == channels["kept"] == 100 / 4096 and not top["dense"] and pooled["kept"] == 0.25
    assert [value for name, value in data.plan_facts(found) if name == "selected"] == [
        "1 head, pooled, mass 0.75, block 64: visits 25 % of its blocks, recalls 98.0 % of the mass",
        f"1 head, {label(CHANNELS)}: a step attends to 100 of 4096 keys, selected in every step",
        f"1 head, {label(TOP)}: a step attends to 100 of 4096 keys, selected in 12.5 % of the steps, "
        "recalls 91.0 % of the mass",
        f"1 head, {label(READING)}: a step attends to 100 of 4096 keys, selected by the attention 1 before, "
        "recalls 90.0 % of the mass",
    ]
    said = " ".join(printed(found).split())
    assert f"{label(CHANNELS)} 1 4 selected 2.4 %" in said
    assert "(of heads that select tokens, what a step attends to); 4 of 8 heads replaced" in said
    letters = signs()
    assert len(set(letters.values())) == len(letters)
    for name, count in (("top_tokens", 2), ("channels", 1), ("pooled", 1)):
        assert f" {letters[name]} {name} ({count})" in said
    assert f"0 {letters['top_tokens']} {letters['channels']} {letters['pooled']} #" in said


def test_the_map_of_the_page_says_the_same() -> None:
    given = {"plan": data.plan_json(plan())}
    found = {measure.key: measure for measure in measures(given)}
    shades = [shade for shade, _ in found["choice"].marks[SITE]]
    assert shades == ["tokens", "tokens", "selected", "dense"]
    assert {"top_tokens", "channels", "pooled", "dense"} <= {text for *_, text in found["choice"].legend}
    assert found["kept"].values[SITE] == pytest.approx([100 * 100 / 4096] * 2 + [25.0, 100.0])
    assert head_facts(given, SITE, 1)[1:] == [
        label(CHANNELS), "a step attends to 100 of 4096 keys, selected in every step"
    ]  # fmt: skip
    unknown = data.plan_json(replace(plan(), visits={}))
    of = next(measure for measure in measures({"plan": unknown}) if measure.key == "kept")
    assert of.values[SITE][2] is None and of.marks[SITE][2] == ("", "")


def test_they_keep_less_than_dense_in_a_comparison() -> None:
    made = plan()
    dense = replace(made, choices={site: (DENSE,) * 4 for site in made.choices}, visits={})
    found = data.plans_json(dense, made, ("a", "b"))
    assert found["sites"][SITE][0]["kept"] == [1.0, 100 / 4096]
    out = io.StringIO()
    terminal.print_difference(found, Console(file=out, width=200))
    assert "0 - - - ·" in " ".join(out.getvalue().split()) and "100 -> 2.44 %" in out.getvalue()


def test_one_head_is_explained_by_the_same_words() -> None:
    profile, sites = random_profile(), sites_of(2)
    made = made_plan(profile, sites)
    choices = {**made.choices, sites[0].name: (TOP, CHANNELS, *made.choices[sites[0].name][2:])}
    made = replace(made, choices=choices, visits={sites[0].name: {0: Share(0.125, 0.0, 0.91)}})
    found = data.head_json(made, profile, pose(made, profile, sites), sites[0].name, 0)
    row = next(row for row in found["candidates"] if row["chosen"])
    assert row["visits"] == (
        "a step attends to 100 of 128 keys, selected in 12.5 % of the steps, recalls 91.0 % of the mass"
    )
    assert row["cost"] == 100 / 128 and row["label"] == label(TOP)


def test_every_setting_that_was_tried_is_listed() -> None:
    trials = Trials.zeros(4, (TOP, CHANNELS))
    trials.tokens = trials.rows = 1000.0
    trials.possible.fill_(1000.0)
    trials.visited[:] = torch.tensor([125.0, 1000.0])
    trials.recalled[:] = torch.tensor([910.0, 800.0])
    trials.t2[:, 1] = 2 * 1000 * 0.01
    found = fitted_json(Fitted(Header(pages.MODEL, lengths=(512,)), trials={(SITE, 512): trials}))
    out = io.StringIO()
    print_fitted(found, Console(file=out, width=200))
    said = " ".join(out.getvalue().split())
    assert f"{label(TOP)} 4 of 4 100 12.5 % 91 % 0" in said and f"{label(CHANNELS)} 4 of 4 100 100 % 80 % 0.04" in said
    assert "keys that a step attends to, steps that select anew" in said and "replacement" not in said
