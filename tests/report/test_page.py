"""The page: self-contained, escaped, well-formed, bounded, and its figures are those of the JSON data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, GraphReport, Mask, Miss, Refusal, Rewrite, Site, Step
from attnopt.plan import Budget, Lengths, Measured, Plan, Predicted
from attnopt.planner.verify import Record
from attnopt.profile_file import Profile
from attnopt.report import data, figures, page, profile_map
from attnopt.report.cells import cell_text
from attnopt.statistics import Grid

EVIL = 'model.<script>alert("x")</script>&attn'
VOID = {"meta", "br", "hr", "link", "img", "input"}


class Reader(HTMLParser):
    """Collects text and attributes; a tag that is not closed, or closed twice, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text: str) -> None:
        self.text += text


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def graph() -> GraphReport:
    sites = [Site(f"layers.{n}.attn", 0, "sdpa", 4, 4, 8, 8, 0.3, "float32", Mask(causal=True)) for n in range(3)]
    odd = replace(sites[0], path=EVIL, mask=Mask(window=7))
    return GraphReport(
        (*sites, odd), tuple(Rewrite(s, "sdpa_causal") for s in sites), (Refusal("left <b>bold</b>", odd.name),),
        (Miss("not provable", "m", "m.py:3"),), (Step("match", 1.25, 9, 9),), "", "", ("a <i>note</i>",),
    )  # fmt: skip


def plan(layers: int = 2, heads: int = 4) -> Plan:
    narrow = Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0})
    made = Plan(
        "demo", Fingerprint("0123456789abcdef", (0.125,)), Budget("loss", 1.0), Lengths((512,), 4096, (2048,)),
        {f"layers.{n}.attn": (narrow,) * (heads - 1) + (DENSE,) for n in range(layers)},
        Predicted(0.012345678, "measured", "ms", 12.345678, 5.0, 2.4691, 0.4, 0.25), min_length=256,
    )  # fmt: skip
    return replace(made, measured=(Measured("final", 2048, 32, 65504, 2.0, 2.01, 0.54321, 0.76543, made.choices_id),))


def profile(layers: int = 2, heads: int = 4) -> Profile:
    made = Profile.empty(Fingerprint("0123456789abcdef", (0.125,)), Grid((0, 4), (8, 16, 32)), ["text"], ["float32"])
    for n in range(layers):
        seen = made.observation(f"layers.{n}.attn", heads, 64)
        seen.rows, seen.samples = 128, 2
        for name in seen.sums:
            seen.sums[name] += torch.rand(seen.sums[name].shape, dtype=torch.float64)
    return made


def records() -> list[Record]:
    one = Measured("verify", 2048, 32, 65504, 2.0, 2.01, 0.51234, 0.75, "abc")
    endless = replace(one, increase=float("inf"), upper_95=float("inf"))
    return [Record("point 4", 0.01, 5.0, (one,), True), Record("point 8", 0.1, 2.0, (endless,), False)]


def whole() -> dict[str, Any]:
    return {
        "title": "A <title>",
        "summary": [("speed", 1.23456), ("kept", True)],
        "environment": data.environment(),
        "graphs": data.graphs_json([graph()]),
        "plan": data.plan_json(plan()),
        "profile": data.profile_json(profile()),
        "records": data.records_json(records()),
        "bench": [{"case": "a", "dense_ms": 1.23456}, {"case": EVIL, "ratio": 2.5}],
        "notes": ["a & b"],
        "kernels": {"span<cpu>": "if a < b && c:  # https://arxiv.org/abs/2309.17453\n    pass"},
        "figures": {
            "own": '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path id="p" d="M0 0"/></svg>'
        },
    }


def test_everything_is_json_and_comes_back_the_same() -> None:
    given = {k: v for k, v in whole().items() if k != "summary"}
    again = json.loads(json.dumps(given, allow_nan=False))
    assert again == given and page.render(again) == page.render(given)


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    path = page.write_page(tmp_path / "deep" / "page.html", whole())
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    text = path.read_text(encoding="utf-8")
    reader = read(text)
    for _, heading, _ in page.SECTIONS:
        assert heading in reader.text
    for part in (
        "layers.0-2.attn",
        "j <= i",
        "left <b>bold</b>",
        "not provable",
        "m.py:3",
        "a <i>note</i>",
        "no bound",
    ):
        assert part in reader.text
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text and len(text) < 2_000_000


def test_names_are_never_markup() -> None:
    reader = read(page.render(whole()))
    assert not [tag for tag, _ in reader.tags if tag in ("script", "b", "i")]
    assert EVIL in reader.text and "A <title>" in reader.text and "if a < b && c" in reader.text


def test_nothing_is_loaded_from_anywhere() -> None:
    text = page.render(whole())
    for _, attributes in read(text).tags:
        assert "src" not in attributes and not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            value = value or ""
            assert not re.match(r"\s*(https?:)?//", value), (name, value)
            assert "href" not in name or value.startswith("#")
            assert "url(" not in value or "url(#" in value
    assert "@import" not in text and "<link" not in text and "<img" not in text


def test_the_figures_are_those_of_the_json_data() -> None:
    given = whole()
    text = read(page.render(given)).text
    measured = given["plan"]["measured"][0]
    assert f"increase {measured['increase']:.4g}, at most {measured['upper_95']:.4g}" in text
    assert f"{given['plan']['predicted']['kl_nats_per_token']:.3g} nats per token" in text
    assert f"{100 * given['plan']['density']:.1f} %" in text
    assert cell_text(given["records"][0]["increase"]) in text and cell_text(given["bench"][0]["dense_ms"]) in text
    for row in given["profile"]["worst"]:
        assert cell_text(row["nats_per_token"]) in text


def test_the_numbers_of_a_profile_are_sums_per_token() -> None:
    made = profile()
    found = data.profile_json(made)
    seen = made.observations["layers.1.attn", 64]
    head = found["sites"]["layers.1.attn"]["64"][2]
    assert head["damage"][1][0] == pytest.approx(seen.damage(2, 4, 8) / 128)
    assert head["ablation"] == pytest.approx(float(seen.ablation_t2[2]) / 2 / 128)
    worst = found["worst"][0]
    every = [o.damage(h, 4, 8) / 128 for o in made.observations.values() for h in range(4)]
    assert worst["nats_per_token"] == pytest.approx(max(every)) and len(found["worst"]) == 8


def test_median_distance_is_the_bucket_where_half_the_mass_is_reached() -> None:
    seen = profile().observations["layers.0.attn", 64]
    mass = seen.sums["mass_by_distance"]  # buckets begin at 0, 1, 2, 4, 8, 16, 32
    mass.zero_()
    mass[0, 0], mass[1, 6] = 1.0, 1.0
    mass[2, 0], mass[2, 3] = 0.4, 0.6
    assert [profile_map.median_distance(seen, h) for h in range(4)] == [(0, 0), (32, 63), (4, 7), (0, 0)]


def test_counts_and_density_of_a_plan() -> None:
    found = data.plan_json(plan())
    assert [(s["heads"], s["dense"]) for s in found["spans"]] == [(2, True), (6, False)]
    kept = found["spans"][1]["kept"]
    assert found["density"] == pytest.approx((2 + 6 * kept) / 8)
    pairs = sum(min(i + 1, 128) + min(4, max(i - 127, 0)) for i in range(4096))
    assert kept == pytest.approx(pairs / (4096 * 4097 / 2))


def test_an_empty_page_is_a_page() -> None:
    assert "attnopt" in read(page.render({})).text


def test_a_page_stays_small_and_says_what_it_left_out() -> None:
    given = {
        "plan": data.plan_json(plan(64, 64)),
        "profile": data.profile_json(profile(64, 64)),
        "kernels": {"long": "x" * 3_000_000, "short": "y"},
    }
    text = page.render(given)
    assert len(text.encode()) < 2_000_000
    reader = read(text)
    assert "Left out for its size: kernel long." in reader.text and "yyy" not in reader.text


def test_without_matplotlib_charts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    reader = read(page.render({**whole(), "figures": {}}))
    assert page.NO_MATPLOTLIB in reader.text and not [tag for tag, _ in reader.tags if tag == "svg"]


def test_charts_take_the_colours_of_the_page() -> None:
    pytest.importorskip("matplotlib")
    charts = figures.damage_figures(data.profile_json(profile()))
    assert len(charts) == 3 and all("currentColor" in svg and figures.INK not in svg for svg in charts.values())
    empty = profile()
    for seen in empty.observations.values():
        seen.sums["t2"].zero_()
    assert figures.damage_figures(data.profile_json(empty)) == {}


def test_a_figure_loses_scripts_references_and_shared_ids() -> None:
    svg = (
        '<!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" onload="x()"><script>x()</script><metadata>m</metadata>'
        '<image href="https://example.org/a.png"/><a xlink:href="https://example.org"><path id="p"/></a>'
        '<use xlink:href="#p" clip-path="url(#p)" fill="url(https://example.org/#g)"/></svg>'
    )
    assert figures.inline(svg, "f1") == (
        '<svg><g/><g><path id="f1-p"/></g><use href="#f1-p" clip-path="url(#f1-p)" fill="none"/></svg>'
    )
    assert figures.inline("no picture", "f1") == ""
