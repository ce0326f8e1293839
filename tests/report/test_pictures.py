"""Pictures of a site before and after its rewrite: what is in them, and that no box lies on another."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from attnopt.ir import REST, GraphReport, Mask, Op, Rewrite, Site
from attnopt.report import figures
from attnopt.report.pictures import merged, panel, picture_svg, pictures_json

drawn = pytest.mark.skipif(not figures.available(), reason="matplotlib is not installed")

INPUTS = tuple(Op(name, "input", (), "1, 4, 8, 16") for name in "qkv")
CALL = "aten.scaled_dot_product_attention.default"
BEFORE = (
    Op("arange", "aten.arange.default", (), "8 int64"),
    Op("row", "aten.unsqueeze.default", ("arange",), "1, 8 int64"),
    Op("column", "aten.unsqueeze.default", ("arange",), "8, 1 int64"),
    Op("le", "aten.le.Tensor", ("row", "column"), "8, 8 bool"),
    *INPUTS,
    Op("wide", "aten.unsqueeze.default", ("k",), "1, 4, 1, 8, 16"),
    Op("repeated", "aten.expand.default", ("wide",), "1, 4, 2, 8, 16"),
    Op("copied", "aten.clone.default", ("repeated",), "1, 4, 2, 8, 16"),
    Op("keys", "aten._unsafe_view.default", ("copied",), "1, 8, 8, 16"),
    Op("out", CALL, ("q", "keys", "v", "le"), "1, 4, 8, 16"),
)
AFTER = (*INPUTS, Op("new", CALL, ("q", "k", "v"), "1, 4, 8, 16"))


def rewrite(layer: int, before: tuple[Op, ...] = BEFORE) -> Rewrite:
    site = Site(f"layers.{layer}.attn", 0, "sdpa", 4, 4, 16, 16, 0.25, "float32", Mask(causal=True))

    def called(op: Op) -> Op:
        """As in the graph of another layer."""
        own = {name: name if name in ("q", "k", "v", REST) else f"{name}_{layer}" for name in (op.name, *op.inputs)}
        return replace(op, name=own[op.name], inputs=tuple(own[name] for name in op.inputs))

    return Rewrite(site, "SDPA is_causal", before=tuple(map(called, before)), after=tuple(map(called, AFTER)))


def test_equal_rewrites_are_one_item() -> None:
    other = (replace(BEFORE[0], shape="9 int64"), *BEFORE[1:])
    without = Rewrite(rewrite(0).site, "pruned")
    reports = [GraphReport(rewrites=(rewrite(0), rewrite(1), without)), GraphReport(rewrites=(rewrite(2, other),))]
    folded, alone = pictures_json(reports)
    assert (folded["site"], alone["site"]) == ("layers.0-1.attn", "layers.2.attn")
    assert folded["caption"] == "SDPA is_causal: 9 operations before, 1 operation after"
    assert folded["after"][-1] == {
        "name": "new_0", "op": CALL, "inputs": ["q", "k", "v"], "shape": "1, 4, 8, 16",
    }  # fmt: skip


def test_a_chain_of_views_is_one_box() -> None:
    boxes = merged(BEFORE)
    assert boxes["keys"]["label"] == "view ×4" and boxes["keys"]["inputs"] == ["k"]
    # What two others read stays apart from them.
    assert {"arange", "row", "column"} <= boxes.keys() and not {"wide", "repeated", "copied"} & boxes.keys()


def test_what_only_the_mask_needs_is_told_from_the_rest() -> None:
    boxes, _ = panel(BEFORE)
    kinds = {name: box["kind"] for name, box in boxes.items()}
    assert {name for name, kind in kinds.items() if kind == "mask"} == {"arange", "row", "column", "le"}
    assert {name for name, kind in kinds.items() if kind == "operand"} == {"q", "k", "v"}
    assert kinds["out"] == "core" and kinds["keys"] == ""


def test_no_box_lies_on_another_and_edges_go_down() -> None:
    boxes, layout = panel(BEFORE)
    assert layout.place.keys() == boxes.keys()
    for one, (x, row) in layout.place.items():
        for two, (other, its_row) in layout.place.items():
            if one != two and row == its_row:
                assert abs(x - other) > (boxes[str(one)]["width"] + boxes[str(two)]["width"]) / 2
        margin = boxes[str(one)]["width"] / 2
        assert margin <= x + 1e-9 and x + margin <= layout.width + 1e-9
    assert len(layout.ways) == sum(len(box["inputs"]) for box in boxes.values())
    for (start, end), way in layout.ways.items():
        assert way[0] == layout.place[start] and way[-1] == layout.place[end]
        assert [row for _, row in way] == list(range(way[0][1], way[-1][1] + 1))


def test_tables_that_one_node_reads_are_one_box() -> None:
    tables = tuple(Op(f"table_{n}", "input", (), "8") for n in range(4))
    names = tuple(op.name for op in tables)
    boxes, _ = panel((*INPUTS, *tables, Op("out", "attnopt.span_attention.default", ("q", "k", "v", *names), "1, 8")))
    assert boxes["out"]["inputs"] == ["q", "k", "v", "table_0"] and boxes["table_0"]["label"] == "4 tensors"
    # Two are shown as they are, and so is what something else reads as well.
    boxes, _ = panel((*INPUTS, *tables[:2], Op("out", CALL, ("q", "k", "v", *names[:2]), "1, 8")))
    assert {"table_0", "table_1"} <= boxes.keys()


@drawn
def test_what_is_too_wide_stands_one_below_the_other() -> None:
    wide = tuple(Op(f"mask_{n}", "aten.zeros.default", (), "1, 1, 1024, 1024 bool") for n in range(6))
    ops = (*INPUTS, *wide, Op("out", CALL, ("q", "k", "v", *(op.name for op in wide)), "1"))
    (small,), (large,) = (pictures_json([GraphReport(rewrites=(rewrite(0, before),))]) for before in (BEFORE, ops))

    def height(item: dict[str, object], text: str) -> float:
        found = re.search(
            rf'<text [^>]*?y="([-\d.]+)"[^>]*>{text}|translate\([\d.]+ ([\d.]+)\)[^>]*>{text}', picture_svg(item)
        )
        assert found is not None
        return float(found[1] or found[2])

    assert height(small, "before: ") == height(small, "after: ")
    assert height(large, "before: ") < height(large, "after: ")


@drawn
def test_the_picture_says_what_the_item_says() -> None:
    (item,) = pictures_json([GraphReport(rewrites=(rewrite(0),))])
    svg = picture_svg(item)
    words = [
        "".join(text.itertext()).strip() for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("}text")
    ]
    assert {"before: 9 operations", "after: 1 operation", "le", "view ×4"} <= set(words)
    assert words.count("SDPA") == 2 and words.count("q") == 2 and words.count("le") == 1
    width = re.search(r'width="([\d.]+)pt"', svg)
    # On a page 700 pixels wide, of 4/3 to a point, nothing is shrunk.
    assert width is not None and float(width[1]) * 4 / 3 <= 700
    assert "currentColor" in svg and svg == picture_svg(item)


@drawn
def test_names_are_text_and_what_was_cut_off_is_said() -> None:
    odd = Op("<b>$x$", "input", (), "1")
    cut = (odd, Op("out", CALL, ("<b>$x$",), "1"), Op(REST, "and 7 more"))
    (item,) = pictures_json([GraphReport(rewrites=(rewrite(0, cut),))])
    assert item["caption"].startswith("SDPA is_causal: 1 operation and 7 more before")
    svg = picture_svg(item)
    assert "&lt;b&gt;$x$_0" in svg and "<b>" not in svg and "1 operation and 7 more" in svg
