"""The strip of four figures: what was done, what it saved, what it cost, and whether the budget was kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pages
import pytest

from attnopt.ir import Choice
from attnopt.plan import Budget
from attnopt.report import data
from attnopt.report.page import strip


def of_plan(**changed: Any) -> dict[str, Any]:
    return {"plan": data.plan_json(replace(pages.plan(), **changed))}


def by_label(given: dict[str, Any]) -> dict[str, Any]:
    return {tile.label: tile for tile in strip(given)}


def measured(**changed: Any) -> tuple[Any, ...]:
    (one,) = pages.plan().measured
    return (replace(one, **changed),)


def test_a_plan_that_was_measured_and_timed() -> None:
    given = of_plan() | {"bench": pages.BENCH, "graphs": data.graphs_json([pages.graph()])}
    density = 100 * given["plan"]["density"]
    assert [tuple(tile) for tile in strip(given)] == [
        ("Heads changed", "6 of 8", f"{density:.1f} % of the dense query-key pairs at 4096 tokens; 3 of 4 attentions "
         "rewritten", "plain"),
        ("Speed", "1.60×", "as fast as inductor at 4096 tokens, measured; 1.25× exact mode", "plain"),
        ("Cost in quality", "+0.54 %", "loss on the final text at 2048 tokens; at most 0.77 % (95 %)", "plain"),
        ("Budget kept", "yes", "1 percent of the dense loss; 0.23 to spare", "good"),
    ]  # fmt: skip


def test_a_speed_that_was_not_timed_is_called_predicted() -> None:
    tile = by_label(of_plan())["Speed"]
    assert tile.value == "2.47×" and "predicted (from times measured on this device)" in tile.detail


def test_what_is_no_time_is_no_speed() -> None:
    counted = replace(pages.plan().predicted, cost="bytes", unit="MiB of cache")
    tiles = by_label(of_plan(predicted=counted, objective="memory"))
    tile = tiles["Cost against dense"]
    assert "Speed" not in tiles and tile.value == "40.5 %" and "memory: 12.3 to 5 MiB of cache" in tile.detail


@pytest.mark.parametrize(
    ("upper", "value", "state", "told"),
    [
        (1.0, "yes", "good", "0 to spare"),
        (1.5, "no", "bad", "exceeded by 0.5"),
    ],
)
def test_the_budget_is_kept_if_the_bound_is_within_it(upper: float, value: str, state: str, told: str) -> None:
    tile = by_label(of_plan(measured=measured(upper_95=upper)))["Budget kept"]
    assert (tile.value, tile.state) == (value, state) and told in tile.detail


def test_the_final_text_decides_where_there_is_one() -> None:
    (final,) = measured()
    worse = replace(final, split="verify", increase=3.0, upper_95=4.0)
    tiles = by_label(of_plan(measured=(worse, final)))
    assert tiles["Budget kept"].value == "yes" and tiles["Cost in quality"].value == "+0.54 %"
    tiles = by_label(of_plan(measured=(worse,)))
    assert tiles["Budget kept"].value == "no" and tiles["Cost in quality"].value == "+3.00 %"


def test_the_worst_length_decides() -> None:
    (one,) = measured()
    tiles = by_label(of_plan(measured=(one, replace(one, length=4096, increase=1.2, upper_95=1.5))))
    assert tiles["Budget kept"].value == "no" and "4096" in tiles["Cost in quality"].detail


def test_the_strip_and_the_facts_below_it_agree() -> None:
    """A length with the larger increase is not the one that decides if another's bound is larger; a window wider than
    the planned length is a changed head that loses nothing."""
    (one,) = measured(length=1024, increase=0.6, upper_95=0.7)
    wide = {site: (Choice.of("sink_window", {"sink": 4, "alpha": 10**6, "beta": 0.0}),) * 4 for site in pages.names(2)}
    made = replace(pages.plan(), choices=wide)
    both = (one, replace(one, length=2048, increase=0.5, upper_95=0.95))
    given = of_plan(choices=wide, measured=tuple(replace(m, choices=made.choices_id) for m in both))
    tiles, facts = by_label(given), dict(data.plan_facts(given["plan"]))
    assert tiles["Heads changed"].value == "8 of 8" and "8 of 8 heads replaced" in facts["density"]
    assert (
        tiles["Cost in quality"].value == "+0.50 %" and "2048 tokens; at most 0.95 %" in tiles["Cost in quality"].detail
    )
    assert "at most 0.95, allowed 1 percent" in facts["budget"] and "0.05 to spare" in tiles["Budget kept"].detail


def test_a_budget_that_was_kept_hides_no_answers_that_were_lost() -> None:
    given = of_plan(measured=measured(dense_retrieval=1.0, planned_retrieval=0.25))
    said = "questions about far lines answered at 2048 tokens: 25 %, dense 100 %"
    tile = by_label(given)["Budget kept"]
    assert (tile.value, tile.state) == ("yes", "open") and said in tile.detail
    assert ("beware", said) in data.plan_facts(given["plan"])
    assert (
        by_label(of_plan(measured=measured(dense_retrieval=0.9, planned_retrieval=0.9)))["Budget kept"].state == "good"
    )


def test_what_was_not_measured_is_not_known() -> None:
    tiles = by_label(of_plan(measured=()))
    assert (tiles["Budget kept"].value, tiles["Budget kept"].state) == ("not known", "open")
    assert tiles["Cost in quality"].value == "0.0123" and "nothing measured" in tiles["Cost in quality"].detail


def test_an_edited_plan_has_measurements_of_another() -> None:
    changed = {site: (Choice("dense", ()),) * 4 for site in pages.names(2)}
    given = of_plan(choices=changed)
    tiles = by_label(given)
    for label in ("Cost in quality", "Budget kept"):
        assert tiles[label].value == "not known" and "edited" in tiles[label].detail
    assert "before it was edited" in tiles["Speed"].detail
    told = [text for label, text in data.plan_facts(given["plan"]) if label in ("prefill", "predicted", "final text")]
    assert len(told) == 3 and all(text.endswith(", of other choices than these") for text in told)


def test_graphs_and_profiles_alone_have_figures_of_their_own() -> None:
    graphs = data.graphs_json([pages.graph()])
    assert [(t.label, t.value) for t in strip({"graphs": graphs})] == [
        ("Attentions rewritten", "3 of 4"), ("Left alone", "1"), ("Not recognised", "1"), ("Time in passes", "1 ms"),
    ]  # fmt: skip
    profile = data.profile_json(pages.profile())
    assert by_label({"profile": profile})["Heads"].value == "8" and len(strip({"profile": profile})) == 4
    assert strip({}) == []


def test_a_budget_in_nats_has_figures_in_nats() -> None:
    tiles = by_label(of_plan(budget=Budget("kl", 0.7)))
    assert tiles["Cost in quality"].value == "0.543" and "at most 0.765 (95 %)" in tiles["Cost in quality"].detail
    assert tiles["Budget kept"].value == "no" and "0.7 nats per token; exceeded by 0.065" in tiles["Budget kept"].detail
