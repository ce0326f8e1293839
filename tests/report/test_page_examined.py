"""What the page says of a model that was examined: savings, timings, graph breaks and recompilations."""

from __future__ import annotations

import io
from html import unescape
from typing import Any

import pages
from rich.console import Console

from attnopt.examine import Counted, Examined, Graph, Saving
from attnopt.report import data, terminal
from attnopt.report.page import render, strip


def saving(length: int, before: int, after: int, **changed: Any) -> dict[str, Any]:
    row = {"phase": "prefill", "cache": "", "length": length, "pairs_before": before, "pairs_after": after,
           "mask_bytes": 2 << 20, "repeated_bytes": 0, "scores_bytes": 0, "unsized": 0, "at_most": False}  # fmt: skip
    return row | changed


def timing(**changed: Any) -> dict[str, Any]:
    return {"site": "layers.0.attn", "lowering": "SDPA is_causal", "queries": 8, "keys": 16, "before_ms": 2.5,
            "after_ms": 1.25, "ratio": 2.0, "like": 3, "wrong": "", **changed}  # fmt: skip


def examined() -> dict[str, Any]:
    found = data.graphs_json([pages.graph()])
    found["graphs"][0] |= {"phase": "decode", "cache": "StaticCache", "timings": [timing(), timing(wrong="off by 1")]}
    return found | {
        "savings": [saving(1024, 1 << 20, 1 << 19), saving(8192, 1 << 26, 1 << 25, at_most=True), saving(0, 0, 0)],
        "machine": "a <fast> machine",
        "breaks": [{"phase": "prefill", "cache": "", "cause": "print(<x>)", "times": 2, "explanation": "it prints",
                    "source": "model.py:7"}],
        "recompiles": [{"phase": "decode", "cache": "DynamicCache", "when": "a longer prompt", "causes": ["7", "8"],
                        "function": "forward", "source": "model.py:9"}],
    }  # fmt: skip


def test_the_strip_says_what_is_saved_at_the_longest_length() -> None:
    tile = strip({"graphs": examined()})[-1]
    assert (tile.label, tile.value) == ("Query-key pairs saved", "at least 50.0 %")
    assert tile.detail == "prefill at 8192 tokens, exact mode: 67.1 M to 33.6 M"


def test_where_every_pair_stays_the_strip_says_what_is_no_longer_made() -> None:
    given = examined() | {"savings": [saving(1024, 1 << 20, 1 << 20, repeated_bytes=1 << 20)]}
    tile = strip({"graphs": given})[-1]
    assert (tile.label, tile.value) == ("Bytes not written", "3 MiB") and tile.detail.startswith(
        "prefill at 1024 tokens"
    )


def test_savings_timings_breaks_and_recompilations_are_told() -> None:
    text = render({"graphs": examined()})
    for row in (
        '<td>prefill</td><td class="n">1024</td><td>1.05 M</td><td>524 k</td><td>2 MiB</td>',
        "<td>67.1 M</td><td>≤ 33.6 M</td>",
        "Timed on a &lt;fast&gt; machine",
        "<td>decode, StaticCache</td><td>layers.0.attn and 2 like it</td>",
        "<td>off by 1</td>",
        "<b>print(&lt;x&gt;), 2 times</b><p>it prints</p>",
        "<b>7; 8</b><p>a longer prompt</p>",
    ):
        assert row in text, row
    assert "decode, DynamicCache · forward at model.py:9" in text and "prefill · model.py:7" in text
    assert "copies of K and V" not in unescape(text)


def test_a_rewriting_that_was_wrong_has_no_times() -> None:
    given = examined()
    given["graphs"][0]["timings"] = [timing(wrong="off by 1")]
    text = render({"graphs": given})
    assert "off by 1" in text and "times as fast" not in text


def test_graphs_that_were_only_compiled_have_none_of_it() -> None:
    text = render({"graphs": data.graphs_json([pages.graph()])})
    assert "Graph breaks" not in text and "counted for one sequence" not in text and "Timed on" not in text


def test_what_another_length_makes_otherwise_is_told() -> None:
    """Savings count what a length would do: a site that is left alone as traced may well be rewritten there."""
    report = pages.graph()
    first, *_, odd = report.sites
    sites = (Counted(first.name, "sdpa_causal", "", 64, 36, False), Counted(odd.name, "span kernel", "", 64, 36, False))
    found = data.examined_json(Examined((Graph(report, "prefill", savings=(Saving(1024, 1, 0, 0, sites),)),)))
    (row,) = found["savings"]
    assert row["otherwise"] == {"span kernel": 1}
    said = "at 1024 tokens 1 attention becomes span kernel; as traced, it does not."
    out = io.StringIO()
    terminal.print_examined(found, Console(file=out, width=200))
    assert f"prefill: {said}" in out.getvalue() and f"prefill {said}" in render({"graphs": found})
