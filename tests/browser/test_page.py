"""The page in a browser: what it shows are the data's figures, by mouse, by keyboard, on a phone and on paper."""

from __future__ import annotations

import re
from typing import Any

import pages
import pytest

from attnopt.report import page as report
from attnopt.report.cells import cell_text
from attnopt.statistics import Grid

CELLS = ".map tbody td"
SCROLLS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def drawn() -> tuple[dict[str, Any], str]:
    return pages.rendered()


def cell(page: Any, layer: int, head: int) -> Any:
    return page.locator(f".map tbody tr:nth-child({layer + 1}) td:nth-child({head + 2})")


def active(page: Any) -> list[int]:
    return page.evaluate("[document.activeElement.parentNode.sectionRowIndex, document.activeElement.cellIndex - 1]")


def letter(page: Any, layer: int, head: int) -> tuple[str, str]:
    style = "(e) => [getComputedStyle(e, '::before').content, getComputedStyle(e).backgroundColor]"
    sign, colour = cell(page, layer, head).evaluate(style)
    return sign.strip('"'), colour


def test_what_is_shown_is_the_data(opened, drawn):
    data, text = drawn
    page = opened(text)
    tiles = page.locator(".tile").evaluate_all(
        "all => all.map(e => [...e.children].map(c => c.firstChild.textContent).concat(e.classList[1]))"
    )
    assert [tuple(tile) for tile in tiles] == [tuple(tile) for tile in report.strip(data)]
    totals = data["plan"]["totals"]
    assert tiles[0][1] == f"{totals['replaced']} of {totals['heads']}" and f"{totals['increase']:+.2f}" in tiles[2][1]
    site = data["plan"]["sites"]["layers.1.attn"]
    labels = {span["choice"]: span["label"] for span in data["plan"]["spans"]}
    for head, span in enumerate(site):
        told = cell(page, 1, head).get_attribute("aria-label")
        assert told.startswith(f"layers.1.attn, head {head}; {labels[span['choice']]}")
        assert f"{100 * span['kept']:.1f} % of the dense pairs kept" in told
    shown = [row.split("\t") for row in page.locator("#search tbody").inner_text().splitlines()]
    wanted = [[cell_text(r[key]) for key in ("predicted", "cost", "increase")] for r in data["records"]]
    assert [row[1:4] for row in shown] == wanted
    page.click("#front summary")
    costs = page.locator("#front tbody tr td:first-child").all_inner_texts()
    assert costs == [cell_text(p["cost"]) for p in data["front"]["points"]]
    assert page.locator("#front tbody tr:has-text('chosen') td:first-child").inner_text() == "3"


def test_a_head_that_is_clicked_shows_its_candidates_and_its_curves(opened, drawn):
    data, text = drawn
    page = opened(text)
    cell(page, 1, 3).click()
    assert page.locator("#head h3").inner_text() == "layers.1.attn, head 3"
    of = data["candidates"]["sites"]["layers.1.attn"]
    order = sorted(range(len(of["damage"][3])), key=lambda n: data["candidates"]["choices"][n]["cost"])
    rows = [r.split("\t") for r in page.locator("#head tbody").inner_text().splitlines()]
    choices = data["candidates"]["choices"]
    named = [choices[n].get("label", choices[n]["choice"]) for n in order]
    assert [re.sub("✓ |, chosen", "", row[2]) for row in rows] == named
    damages = [None if row[1] == "not offered" else float(row[1]) for row in rows]
    assert damages == [of["damage"][3][n] for n in order]
    assert [float(row[0].rstrip(" %")) for row in rows] == pytest.approx(
        [100 * data["candidates"]["choices"][n]["cost"] for n in order]
    )
    (chosen,) = [n for n, row in zip(order, rows, strict=True) if "chosen" in row[2]]
    assert chosen == of["chosen"][3]
    assert page.locator("#head tr[aria-current]").count() == 1
    mass = data["profile"]["sites"]["layers.1.attn"]["64"][3]["mass"]
    bars = page.locator("#head .bar title").all_text_contents()
    assert [float(bar.split(": ")[1].rstrip(" %")) for bar in bars] == pytest.approx([100 * m for m in mass], rel=1e-3)
    # What was not offered has no point; what costs nothing lies on the axis.
    assert page.locator("#head circle:not(.ring)").count() == len(order) - 1
    assert page.locator("#head .ring").count() == 1
    # The highest bar and the dearest point are where their numbers say.
    heights = page.locator("#head .bar").evaluate_all("all => all.map(e => Number(e.getAttribute('height')))")
    assert heights == pytest.approx([max(heights) * m / max(mass) for m in mass])


def test_a_head_under_the_mouse_has_a_tooltip_of_plain_text(opened, drawn):
    page = opened(drawn[1])
    tip = page.locator("#tip")
    assert not tip.is_visible()
    cell(page, 0, 2).hover()
    assert tip.inner_text().splitlines()[0] == "layers.0.attn, head 2" and "nats per token" in tip.inner_text()
    page.hover("h1")
    assert not tip.is_visible()


def test_heads_are_filtered_by_layer_candidate_and_threshold(opened, drawn):
    data, text = drawn
    page = opened(text)

    def shown() -> list[int]:
        found = page.locator(CELLS).evaluate_all("all => all.flatMap((e, n) => e.classList.contains('off') ? [] : [n])")
        assert page.inner_text("#count") == f"{len(found)} of 8 heads"
        return found

    assert shown() == list(range(8))
    page.select_option("#of-layer", label="1")
    assert shown() == [4, 5, 6, 7]
    page.select_option("#of-candidate", label="dense")
    assert shown() == [7]
    page.click("button[type=reset]")
    # Not by a function in text, which the page's policy forbids to evaluate.
    page.locator("#heads .off").first.wait_for(state="detached")
    page.check("#by-removal")
    values = [head["ablation"] for by in data["profile"]["sites"].values() for head in by["64"]]
    bound = float(f"{sorted(values)[4]:.2g}")
    page.fill("#threshold", str(bound))
    assert page.inner_text("#unit") == "nats per token"
    assert shown() == [n for n, value in enumerate(values) if float(f"{value:.4g}") >= bound]
    page.select_option("#side", label="at most")
    assert shown() == [n for n, value in enumerate(values) if float(f"{value:.4g}") <= bound]


def test_the_map_is_coloured_by_what_is_asked_for(opened, drawn):
    page = opened(drawn[1])
    assert letter(page, 0, 0)[0] == "a" and letter(page, 0, 3)[0] == "none"
    before = letter(page, 0, 0)[1]
    page.get_by_label("share of pairs kept").check()
    assert letter(page, 0, 3)[0] == "h" and letter(page, 0, 3)[1] != before
    assert page.locator(".legend:visible").all_inner_texts()[0].split("\n")[0] == "e"
    for name in ("half of the mass", "removing the head", "damage of the choice"):
        page.get_by_label(name).check()
        assert page.locator(".legend:visible").count() == 1 and letter(page, 1, 1)[0] in "abcdefgh"


def test_letters_are_legible_on_every_colour(opened, drawn):
    contrast = """() => { const light = (colour) => { const v = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => {
        x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const made = document.body.appendChild(document.createElement('i')), found = {};
      for (let n = 0; n < 8; n++) { made.style.cssText = `background:var(--r-${n});color:var(--t-${n})`;
        const s = getComputedStyle(made), [a, b] = [light(s.color), light(s.backgroundColor)].sort((x, y) => y - x);
        found[n] = (a + 0.05) / (b + 0.05); }
      return found; }"""
    for scheme in ("light", "dark"):
        found = opened(drawn[1], color_scheme=scheme).evaluate(contrast)
        assert min(found.values()) >= 4.5, (scheme, found)


def test_heads_are_reached_and_pinned_by_keyboard(opened, drawn):
    page = opened(drawn[1])
    page.focus("button[type=reset]")
    page.keyboard.press("Tab")
    assert active(page) == [0, 0] and page.inner_text("#tip").startswith("layers.0.attn, head 0")
    for key, wanted in (("ArrowRight", [0, 1]), ("ArrowDown", [1, 1]), ("ArrowDown", [1, 1]), ("End", [1, 3]),
                        ("ArrowRight", [1, 3]), ("Home", [1, 0]), ("ArrowUp", [0, 0])):  # fmt: skip
        page.keyboard.press(key)
        assert active(page) == wanted, key
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.inner_text("#head h3") == "layers.0.attn, head 3"
    assert page.locator("[aria-selected=true]").get_attribute("aria-label").startswith("layers.0.attn, head 3")
    assert page.locator(f"{CELLS}[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


def test_colours_follow_the_system_and_the_button(opened, drawn):
    page = opened(drawn[1], color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    light = page.evaluate(background)
    assert (light, page.inner_text("#theme")) == ("rgb(255, 255, 255)", "○ light") and dark != light
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.click("#theme")
    assert page.evaluate(background) == light


@pytest.mark.parametrize("width", [390, 800])
def test_only_boxes_scroll_sideways(opened, drawn, width):
    page = opened(drawn[1], viewport={"width": width, "height": 800})
    assert page.evaluate(SCROLLS) == 0
    page.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true; })")
    assert page.evaluate(SCROLLS) == 0


def test_on_paper_all_is_open_light_and_uncut(opened, drawn):
    page = opened(drawn[1], color_scheme="dark", java_script_enabled=False, viewport={"width": 700, "height": 900})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#kernels pre").is_visible() and page.locator("#front table").is_visible()
    assert not page.locator("nav").is_visible() and not page.locator("#theme").is_visible()
    assert len(page.pdf()) > 10_000


def test_a_print_opens_what_is_folded_and_closes_it_again(opened, drawn):
    page = opened(drawn[1])
    count = "document.querySelectorAll('details[open]').length"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(count) == page.locator("details").count() > 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(count) == 0


def test_without_scripts_all_but_the_curves_is_there(opened, drawn):
    page = opened(drawn[1], java_script_enabled=False)
    page.get_by_label("share of pairs kept").check()
    assert letter(page, 0, 3)[0] == "h"
    assert cell(page, 0, 1).get_attribute("title").startswith("layers.0.attn, head 1\nwindow 128, sink 4")
    assert page.locator("noscript").count() == 1 and not page.locator("#theme").is_visible()
    assert "Without scripts" in page.inner_text("#map")


def test_names_from_models_and_files_are_text_everywhere(opened):
    data = pages.whole()
    for key in ("plan", "profile", "candidates"):
        data[key]["sites"] = {pages.EVIL: data[key]["sites"]["layers.0.attn"]}
    data["candidates"]["choices"][1]["label"] = "</script><script>alert(1)</script>"
    data["plan"]["candidates"] = {"<img src=x onerror=alert(1)>": 4}
    for head in data["plan"]["sites"][pages.EVIL]:
        head["candidate"] = "<img src=x onerror=alert(1)>"
    data["profile"]["worst"] = []
    page = opened(report.render({k: v for k, v in data.items() if k not in ("front", "records")}))
    cell(page, 0, 1).click()
    assert page.inner_text("#head h3") == f"{pages.EVIL}, head 1"
    assert "</script><script>alert(1)</script>" in page.inner_text("#head tr[aria-current]")
    assert "<img src=x" in page.locator("#of-candidate").inner_text()
    assert page.locator("pre.code").text_content() == pages.KERNEL
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0


def test_the_policy_lets_no_other_script_run(opened, drawn):
    text = drawn[1].replace("<main>", "<main><script>document.title = 'taken'</script>")
    page = opened(text)
    assert page.title() == "A <title>"
    assert len(page.errors) == 1 and "Content Security Policy" in page.errors[0]
    page.errors.clear()


def test_a_page_of_a_thousand_heads_is_small_and_whole(opened):
    data = pages.whole(32, 32, Grid((0, 4, 16, 64), (32, 64, 128, 256, 512, 1024, 2048, 4096)), 8192)
    text = report.render(data)
    assert len(text.encode()) < 2_000_000 and "Left out" not in text
    page = opened(text)
    assert page.locator(CELLS).count() == 1024
    assert page.locator("#head circle:not(.ring)").count() == 32
