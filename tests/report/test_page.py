"""The page: self-contained, escaped, well-formed, bounded, and its figures are those of the JSON data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import EVIL, KERNEL, front, plan, profile, rendered, whole

from attnopt.report import data, figures, page, profile_map
from attnopt.report.cells import cell_text
from attnopt.report.page.code import PLAIN_FROM, highlighted
from attnopt.report.page.pieces import NO_MATPLOTLIB

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


def test_everything_is_json_and_the_page_of_what_comes_back_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    given = {k: v for k, v in whole().items() if k != "summary"}
    again = json.loads(json.dumps(given, allow_nan=False))
    assert again == given and page.render(again) == page.render(given)


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    given, text = rendered()
    path = page.write_page(tmp_path / "deep" / "page.html", {"title": given["title"], "notes": given["notes"]})
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    reader = read(text)
    for name, heading, keys, _ in page.SECTIONS:
        assert (heading in reader.text) == any(key in given for key in keys), name
    for part in ("layers.0-2.attn", "j ≤ i", "left <b>bold</b>", "not provable", "m.py:3", "a <i>note</i>", "no bound",
                 "the chosen point ringed", "Without scripts"):  # fmt: skip
        assert part in reader.text, part
    assert 'name="viewport"' in text and len(text.encode()) < 2_000_000


def test_sections_link_to_where_they_are() -> None:
    tags = read(rendered()[1]).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = [str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"]
    assert len(ids) == len(set(ids)) and set(links) <= set(ids) and links[0] == "summary" and len(links) == 12


def test_names_are_never_markup() -> None:
    reader = read(rendered()[1])
    assert [a.get("type") for tag, a in reader.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in reader.tags if tag in ("img", "iframe", "object", "link")]
    assert EVIL in reader.text and "A <title>" in reader.text and KERNEL in reader.text


def test_a_page_holds_no_character_that_html_may_not() -> None:
    text = page.render({"title": "a\x1b[31m\0\ud800"})
    assert r"a\x1b[31m\x00\ud800" in text
    assert not set(text) & {"\x1b", "\0", "\ud800"}


def test_the_policy_names_the_one_script_there_is() -> None:
    text = rendered()[1]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_embedded_data_cannot_end_their_element() -> None:
    given = whole()
    name = "</script><script>alert(1)</script><!--"
    given["plan"]["sites"] = {name: given["plan"]["sites"]["layers.0.attn"]}
    text = page.render({"plan": given["plan"]})
    (embedded,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    assert "<" not in embedded and json.loads(embedded)["sites"] == [name]
    assert [a.get("type") for tag, a in read(text).tags if tag == "script"] == ["application/json", None]


def test_nothing_is_loaded_from_anywhere() -> None:
    text = rendered()[1]
    for _, attributes in read(text).tags:
        assert "src" not in attributes and not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            value = value or ""
            assert not re.match(r"\s*(https?:)?//", value), (name, value)
            assert "href" not in name or value.startswith("#")
            assert "url(" not in value or "url(#" in value
    assert "@import" not in text and "<link" not in text and "<img" not in text


def test_the_figures_are_those_of_the_json_data() -> None:
    given, page_text = rendered()
    text = read(page_text).text
    measured = given["plan"]["measured"][0]
    assert f"increase {measured['increase']:.4g}, at most {measured['upper_95']:.4g}" in text
    assert f"{given['plan']['predicted']['kl_nats_per_token']:.3g} nats per token" in text
    assert f"{100 * given['plan']['density']:.1f} %" in text
    assert cell_text(given["records"][0]["increase"]) in text and cell_text(given["bench"][1]["milliseconds"]) in text
    for row in given["profile"]["worst"]:
        assert cell_text(row["nats_per_token"]) in text


def test_what_the_summary_says_the_plan_does_not_repeat() -> None:
    held = data.plan_json(plan())
    text = read(page.render({"plan": held, "summary": data.plan_facts(held)})).text
    assert text.count("nats per token on 65504 tokens") == 1
    assert read(page.render({"plan": held})).text.count("nats per token on 65504 tokens") == 1


def test_every_reason_has_its_place_and_its_page() -> None:
    (row,) = [row for row in rendered()[0]["graphs"]["rows"] if row["state"] == "not recognised"]
    listed = read(rendered()[1]).text
    assert row["why"] in listed and row["source"] in listed and f"explained in {row['page']}" in listed


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("name", ["span", "spans.cpp"])
def test_a_kernel_is_coloured_and_stays_as_it_is(name: str, end: str) -> None:
    source = KERNEL + end
    made = highlighted(name, source)
    assert read(made).text == source and 'class="k"' in made and 'class="s"' in made


def test_a_long_kernel_has_no_colours() -> None:
    assert "<" not in highlighted("span", "if x:\n" * PLAIN_FROM)


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


def test_a_page_stays_small_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LIMIT", 100_000)
    given = {"plan": data.plan_json(plan(8, 16)), "kernels": {"long": "x\n" * 60_000, "short": "y" * 100}}
    text = page.render(given)
    assert len(text.encode()) < 100_000
    reader = read(text)
    assert "Left out for its size: kernel long." in reader.text and "x\nx" not in reader.text
    assert "y" * 100 in reader.text and 'id="heads"' in text


def test_without_matplotlib_charts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    reader = read(page.render({**whole(), "figures": {}}))
    assert NO_MATPLOTLIB in reader.text and not [tag for tag, _ in reader.tags if tag == "svg"]


def test_charts_take_the_colours_of_the_page() -> None:
    pytest.importorskip("matplotlib")
    charts = figures.damage_figures(data.profile_json(profile()))
    assert len(charts) == 3 and all("currentColor" in svg and figures.INK not in svg for svg in charts.values())
    empty = profile()
    for seen in empty.observations.values():
        seen.sums["t2"].zero_()
    assert figures.damage_figures(data.profile_json(empty)) == {}


def test_the_front_marks_what_was_chosen_and_measured() -> None:
    pytest.importorskip("matplotlib")
    labels = ("chosen", "measured, holds", "misses", "cost, ms")
    drawn = figures.front_figure(front())
    assert all(f">{label}</text>" in drawn for label in labels)
    alone = figures.front_figure(front() | {"measured": []})
    assert [f">{label}</text>" in alone for label in labels] == [True, False, False, True]
    dense = [{"predicted": 0.0, "cost": 1.0, "chosen": True}, {"predicted": None, "cost": 2.0, "chosen": False}]
    assert figures.front_figure({"unit": "ms", "points": dense}) == ""


def test_a_front_of_other_costs_than_the_plans_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    text = read(page.render({"front": front() | {"plan_unit": "pairs"}})).text
    assert "The plan was made with costs in pairs" in text
    assert "The plan was made" not in read(page.render({"front": front() | {"plan_unit": "ms"}})).text


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


def test_pictures_of_rewrites_are_placed_the_first_of_them_open() -> None:
    ops = [{"name": name, "op": "input", "inputs": [], "shape": "1, 4, 64, 16"} for name in "qkv"]
    one = {"name": "out", "op": "scaled_dot_product_attention", "inputs": ["q", "k", "v"], "shape": "1, 4, 64, 16"}
    item = {"site": EVIL, "caption": "one call", "before": [*ops, one], "after": [*ops, one]}
    reader = read(page.render({"pictures": [item, item | {"site": "other"}]}))
    assert [tag for tag, _ in reader.tags].count("svg") == 2 and [tag for tag, _ in reader.tags].count("details") == 1
    assert f"{EVIL}: one call" in reader.text and "Before and after" in reader.text
