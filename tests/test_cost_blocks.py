"""Times of walks over selected blocks and of selections: between what was measured, beyond it, stored and measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import BlockTable, CostTable, Joined, Roofline, Selection, device, kept_pairs, load_or_measure_blocks
from attnopt.cost.blocks import key_of
from attnopt.cost.timing import path_of
from attnopt.errors import AttnoptError
from attnopt.ir import Share
from attnopt.registry import CANDIDATES

SPEC = SpanPrefill("cpu", "float32", 4, 2, 16, 16, False)
PARAMS = {"mass": 0.75, "count": 4, "alike": -1.0, "block": 16, "skip": 0.0}


def linear_table() -> BlockTable:
    """A block costs 8 of n² / 1024, a skipped one half of it, whatever is visited 1 more; selections n / 512."""
    walks = {}
    for n in (512, 1024):
        unit = n * n / 1024**2
        for visited, skipped in ((0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 0.8)):
            walks[n, 64, visited, skipped] = unit * (1 + 8 * visited * (1 - skipped / 2))
    selections = ((512, "pooled", (64.0,)), 1.0), ((1024, "pooled", (64.0,)), 2.0)
    return BlockTable((), tuple(walks.items()), selections, ((512, 2.5), (1024, 10.0)))


def test_a_walk_costs_what_it_visits_and_never_less_than_was_measured() -> None:
    table = linear_table()
    assert [table.cost(1024, 64, x, 0.0) for x in (0.25, 0.4, 1.0)] == pytest.approx([3.0, 4.2, 9.0])
    assert table.cost(1024, 64, 0.0, 0.0) == table.cost(1024, 64, 0.01, 0.5) == table.cost(1024, 64, 0.25, 0.0)
    # A skipped block saves what it did where nearly all were, at any density.
    assert table.cost(1024, 64, 0.5, 0.5) == pytest.approx(1 + 8 * 0.5 * 0.75)
    assert table.cost(724, 64, 1.0, 0.0) == pytest.approx(9 * 724**2 / 1024**2)
    assert table.cost(4096, 64, 0.5, 0.0) == pytest.approx(16 * table.cost(1024, 64, 0.5, 0.0))
    assert table.cost(100, 64, 0.5, 0.0) == table.cost(512, 64, 0.5, 0.0)
    assert table.selection(2048, "pooled", (64.0,)) == 8.0 and table.selection(100, "pooled", (64.0,)) == 1.0
    for call in (lambda: table.cost(512, 32, 1.0, 0.0), lambda: table.selection(512, "pooled", (32.0,))):
        with pytest.raises(AttnoptError, match="was timed") as caught:
            call()
        assert "load_or_measure_blocks" in caught.value.remedy


def test_a_head_pays_for_its_own_visits_and_its_selection() -> None:
    spans = CostTable((), tuple(((1024, s, w), ms) for s, w, ms in ((0, 1024, 10.0), (4, 64, 0.5))))
    table, kind, params = Joined(spans, None, linear_table()), CANDIDATES["pooled"], {**PARAMS, "block": 64}
    assert kind.cost(table, params, 1024, None, Share(0.25)) == pytest.approx(3.0 + 2.0)
    assert kind.cost(table, params, 1024) == pytest.approx(9.0 + 2.0)
    # Blocks were counted among those within the model's own window.
    half = (512 * 513 / 2 + 512 * 512) / (1024 * 1025 / 2)
    assert kind.cost(table, params, 1024, 512, Share(0.5)) == pytest.approx(1 + 8 * 0.5 * half + 2.0)
    assert table.id == f"{spans.id}+{linear_table().id}" and table.lengths == (1024,)
    # On a machine that was half as fast when blocks were timed, they would have cost as much.
    busy = replace(linear_table(), dense=((512, 5.0), (1024, 20.0)))
    assert kind.cost(Joined(spans, None, busy), params, 1024) == pytest.approx((9.0 + 2.0) / 2)
    with pytest.raises(AttnoptError, match="spans only"):
        kind.cost(spans, params, 1024)


def test_where_nothing_is_timed_pairs_and_operations_count() -> None:
    table, kind = CostTable.by_density(), CANDIDATES["pooled"]
    pairs = kept_pairs(1024, 0, 1024)
    expected = pairs * 0.5 * 0.8 + kind.scored(PARAMS, 1024)
    assert kind.cost(table, PARAMS, 1024, None, Share(0.5, 0.4)) == pytest.approx(expected / 1e6)
    # Everything visited is dearer than dense.
    assert kind.cost(table, PARAMS, 1024) > table.cost(1024, 0, 1024)
    card = Roofline(device("h100"), "bfloat16", 32, 8, 128, 128)
    assert kind.cost(card, PARAMS, 1 << 17, None, Share(0.1)) < card.cost(1 << 17, 0, 1 << 17) / 5
    for name, least in (("vertical_slash", 64 * 1024), ("antidiagonal", 1024**2 // 16), ("proxy", 256**2 // 2)):
        other = CANDIDATES[name]
        assert all(other.scored(dict(c.params), 1024) > least for c in other.menu(1024)[:1]), name


def selection(name: str, params: dict[str, float]) -> Selection:
    kind = CANDIDATES[name]
    return Selection(name, kind.timing(params), kind.settings(params))


def test_walks_and_selections_are_timed_once_and_damaged_tables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, bolder = selection("pooled", PARAMS), selection("pooled", {**PARAMS, "mass": 0.25})
    whole = selection("threshold", {"sink": 0, "window": 1 << 30, "block": 16, "skip": 1.0})
    seen: list[str] = []
    table = load_or_measure_blocks(
        SPEC, [64, 80], [pooled, bolder], rounds=1, progress=lambda done, of, what: seen.append(what)
    )
    assert table.lengths == (64, 80) and seen == ["64 tokens", "64 tokens", "80 tokens", "80 tokens"]
    # What both share is timed once; of walks the least there is, a quarter besides, all, and all but the first skipped.
    assert [what for what, _ in table.selections] == [(n, "pooled", (16.0,)) for n in (64, 80)]
    at = [(visited, skipped) for (n, _, visited, skipped), _ in table.walks if n == 64]
    assert at[-2:] == [(1.0, 0.0), (1.0, pytest.approx(0.6))] and at[0][0] == pytest.approx(0.7)
    assert all(ms > 0 for _, ms in (*table.walks, *table.selections))
    path: Path = path_of(key_of(SPEC, "cpu"), "blocks")
    assert BlockTable.load(path) == table
    monkeypatch.setattr("attnopt.cost.blocks.interleaved", lambda calls, *_: [7.0] * len(calls))
    assert load_or_measure_blocks(SPEC, [80], [bolder]) == table  # stored: nothing is timed again
    more = load_or_measure_blocks(SPEC, [80], [pooled, whole])
    assert more.walks == table.walks
    # Two heads of half as many took as long as dense on all: twice a head's share of what dense took before.
    told = 2 * dict(table.dense)[80]
    assert dict(more.selections) == {**dict(table.selections), (80, "threshold", (16.0,)): pytest.approx(told)}
    # A plan that was made with it before finds it still.
    assert more.id == table.id != replace(more, key=(("device", "another"),)).id
    path.write_text(path.read_text().replace(f" {dict(table.dense)[80]}]", " -1]"))
    with pytest.raises(AttnoptError, match="damaged: -1 is no time"):
        load_or_measure_blocks(SPEC, [80], [pooled])
    path.unlink()
