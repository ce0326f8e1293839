"""Plan files: one exact form, and a named place and remedy for everything that is wrong in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnopt.errors import PlanError
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.plan import Budget, Constraints, Lengths, Measured, Plan, Predicted, fold

NARROW = Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0})
ELASTIC = Choice.of("sink_window", {"sink": 0, "alpha": -64, "beta": 0.125})
FIRST = (NARROW,) * 4 + (DENSE, DENSE, NARROW, ELASTIC)


def make() -> Plan:
    plan = Plan(
        model="demo",
        fingerprint=Fingerprint("0123456789abcdef", (0.125, 1e-05)),
        budget=Budget("loss", 1.0),
        lengths=Lengths((512, 1024), 4096, (2048,)),
        choices={"layers.0.attn": FIRST, "layers.1.attn": (DENSE, DENSE)},
        predicted=Predicted(0.0125, "measured", "ms", 12.5, 5.0, 2.5, 0.375),
        constraints=Constraints(max_rules=4, protect=("layers.1.attn",)),
        min_length=256,
        cost_table="89abcdef0123",
        calibration="feedfacefeed",
        seed=7,
        versions={"attnopt": "0.1.0", "torch": "2.13.0"},
    )
    measured = Measured("final", 2048, 32, 65504, 2.0, 2.01, 0.5, 0.75, plan.choices_id, 0.0125, 0.97)
    return replace(plan, measured=(measured,))


def sites(heads: tuple[int, int] = (8, 2), names: tuple[str, ...] = ("layers.0.attn", "layers.1.attn")) -> list[Site]:
    causal = Mask(causal=True)
    return [Site(n, 0, "sdpa", h, 1, 8, 8, 0.3, "float32", causal) for n, h in zip(names, heads, strict=False)]


def test_the_file_is_the_golden_one() -> None:
    golden = (Path(__file__).parent / "golden" / "plan.json").read_text(encoding="utf-8")
    assert make().dump() == golden
    assert Plan.parse(golden) == make()


def test_load_and_dump_give_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    make().save(path)
    loaded = Plan.load(path)
    assert loaded == make() and loaded.dump() == path.read_text(encoding="utf-8") and loaded.id == make().id
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]  # nothing half-written is left behind


@given(
    st.lists(
        st.builds(
            lambda s, a, b: Choice.of("sink_window", {"sink": s, "alpha": a, "beta": b / 64}),
            st.integers(0, 8),
            st.integers(-(1 << 30), 1 << 30),
            st.integers(0, 64),
        )
        | st.just(DENSE),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1e6),
    st.text(max_size=10),
)
def test_any_plan_survives_the_round_trip(choices: list[Choice], number: float, name: str) -> None:
    plan = replace(make(), choices={name + "x": tuple(choices)}, model=name, budget=Budget("kl", number))
    assert Plan.parse(plan.dump()) == plan
    assert Plan.parse(plan.dump()).dump() == plan.dump()


def test_equal_heads_fold_in_the_order_of_their_first() -> None:
    assert list(fold(FIRST)) == ["0-3,6", "4-5", "7"]
    assert list(fold((DENSE, NARROW, DENSE, NARROW))) == ["0,2", "1,3"]


def test_the_id_follows_the_content_and_an_edit_is_seen() -> None:
    plan = make()
    assert not plan.edited and plan.id == make().id
    edited = Plan.parse(plan.dump().replace('"alpha": 128', '"alpha": 256'))
    assert edited.edited and edited.id != plan.id and edited.choices_id != plan.choices_id
    assert replace(plan, seed=8).choices_id == plan.choices_id


def test_tables_follow_the_length_the_break_even_and_the_sites_own_window() -> None:
    plan = make()
    sinks, windows = plan.tables("layers.0.attn", 1024)
    assert sinks == [4, 4, 4, 4, 0, 0, 4, 0]
    assert windows == [128, 128, 128, 128, 1024, 1024, 128, 64]
    assert plan.tables("layers.0.attn", 255) == ([0] * 8, [255] * 8)
    sliding = replace(sites()[0], mask=Mask(causal=True, window=100))
    assert plan.tables(sliding, 1024) == ([0] * 8, [100] * 7 + [64])


Edit = Callable[[dict[str, Any]], Any]


def heads_of(data: dict[str, Any]) -> dict[str, Any]:
    return data["sites"]["layers.0.attn"]["choices"]


BAD: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "unknown key": (lambda d: d.update(sties={}), ("unknown key 'sties'", "Did you mean 'sites'?")),
    "unknown inner key": (lambda d: d["budget"].update(limits=1), ("budget: unknown key 'limits'", "'limit'")),
    "missing key": (lambda d: d.pop("seed"), ("'seed' is missing",)),
    "wrong schema": (lambda d: d.update(schema=1), ("schema 1", "reads schema 4", "attnopt plan")),
    "schema text": (lambda d: d.update(schema="1"), ("schema '1'",)),
    "head missing": (lambda d: heads_of(d).pop("4-5"), ("no choice for head 4-5 of 8", "dense")),
    "heads overlap": (lambda d: heads_of(d).update({"6-7": heads_of(d).pop("7")}), ("head 6 is chosen twice",)),
    "head too many": (lambda d: heads_of(d).update({"8": {"candidate": "dense"}}), ("heads '8' do not exist", "0-7")),
    "heads backwards": (lambda d: heads_of(d).update({"5-4": heads_of(d).pop("4-5")}), ("heads '5-4' do not exist",)),
    "heads nonsense": (lambda d: heads_of(d).update({"all": {"candidate": "dense"}}), ("'all' does not name heads",)),
    "no heads": (lambda d: d["sites"]["layers.0.attn"].update(heads=0), ("heads: a whole number of at least 1",)),
    "unknown candidate": (
        lambda d: heads_of(d)["7"].update(candidate="sink_windw"),
        ("choices.7: unknown candidate 'sink_windw'", "Did you mean 'sink_window'?"),
    ),
    "no candidate": (lambda d: heads_of(d).update({"7": "dense"}), ("a candidate is needed here, not 'dense'",)),
    "negative sink": (lambda d: heads_of(d)["7"].update(sink=-1), ("choices.7: sink must be between 0", "-1")),
    "odd beta": (lambda d: heads_of(d)["7"].update(beta=0.1), ("beta must be a multiple of",)),
    "parameter missing": (lambda d: heads_of(d)["7"].pop("alpha"), ("'alpha' is missing",)),
    "parameter of another": (lambda d: heads_of(d)["4-5"].update(sink=4), ("unknown key 'sink'",)),
    "budget kind": (lambda d: d["budget"].update(kind="speed"), ("'speed' is no budget", "loss or kl")),
    "budget unit": (lambda d: d["budget"].update(kind="kl"), ("budget.unit", "nats per token")),
    "budget negative": (lambda d: d["budget"].update(limit=-1), ("budget.limit", "at least 0")),
    "length text": (lambda d: d["lengths"].update(planned="4k"), ("lengths.planned", "'4k'")),
    "length zero": (lambda d: d["lengths"]["profiled"].append(0), ("lengths.profiled[2]",)),
    "lengths no list": (lambda d: d["lengths"].update(profiled=512), ("a list is needed",)),
    "measured number": (lambda d: d["measured"][0].update(tokens=1.5), ("measured[0].tokens", "whole number")),
    "measured bool": (lambda d: d["measured"][0].update(tokens=True), ("measured[0].tokens",)),
    "predicted text": (lambda d: d["predicted"].update(speedup="2x"), ("predicted.speedup", "'2x'")),
    "fingerprint": (lambda d: d["model"].update(fingerprint="abc"), ("model.fingerprint", "a record")),
    "fingerprint samples": (lambda d: d["model"]["fingerprint"].update(samples=["a"]), ("samples[0]",)),
    "objective": (lambda d: d.update(objective="speed"), ("'speed' is no objective", "prefill, decode")),
    "constraint unknown": (lambda d: d["constraints"].update(max_rule=3), ("'max_rule'", "'max_rules'")),
    "constraint text": (lambda d: d["constraints"].update(max_rules="3"), ("constraints.max_rules", "whole number")),
    "protect number": (lambda d: d["constraints"].update(protect=[3]), ("constraints.protect[0]", "a string")),
    "gap null": (lambda d: d["predicted"].update(speedup=None), ("predicted.speedup", "a number")),
    "sites empty": (lambda d: d.update(sites={}), ("a record of sites is needed",)),
    "sites list": (lambda d: d.update(sites=[1]), ("a record of sites is needed",)),
    "version number": (lambda d: d["versions"].update(torch=2), ("versions.torch", "a string")),
    "allow number": (lambda d: d["constraints"].update(allow=[3]), ("constraints.allow[0]", "a string")),
    "fitted nonsense": (lambda d: d.update(fitted="abc"), ("fitted: 'abc' is no sha256",)),
    "fitted number": (lambda d: d.update(fitted=3), ("fitted", "a string")),
    "huge number": (lambda d: d.update(seed=10**400), ("seed",)),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused_with_place_and_remedy(name: str, tmp_path: Path) -> None:
    edit, texts = BAD[name]
    data = json.loads(make().dump())
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value) and caught.value.remedy
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: "", "line 1"),
        (lambda t: t[: len(t) // 2], "cut off"),
        (lambda t: t.replace('"seed": 7', '"seed": 7, "seed": 8'), "'seed' stands twice"),
        (lambda t: t.replace('"limit": 1.0', '"limit": NaN'), "NaN is no number"),
        (lambda t: t.replace('"limit": 1.0', '"limit": 1e999'), "budget.limit"),
        (lambda t: "[]", "a record is needed"),
        (lambda t: "[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_text_is_refused(change: Callable[[str], str], text: str) -> None:
    with pytest.raises(PlanError, match=r"plan\.json") as caught:
        Plan.parse(change(make().dump()), "plan.json")
    assert text in str(caught.value) and caught.value.remedy


def test_every_cut_of_the_file_is_refused() -> None:
    text = make().dump()
    for end in range(0, len(text) - 2, 7):
        with pytest.raises(PlanError):
            Plan.parse(text[:end])


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="There is no plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "bytes.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


def test_check_accepts_its_own_model_and_one_graph_of_it() -> None:
    plan = make()
    plan.check(sites(), plan.fingerprint)
    plan.check(sites()[:1], complete=False)


@pytest.mark.parametrize(
    ("found", "texts"),
    [
        (sites()[:1], ("plans layers.1.attn, which this model does not have", "2 sites, 1 here")),
        ([*sites(), *sites(names=("layers.2.attn",))], ("nothing for layers.2.attn",)),
        (sites((8, 4)), ("2 heads at layers.1.attn, this model has 4",)),
    ],
)
def test_check_refuses_another_model(found: list[Site], texts: tuple[str, ...]) -> None:
    with pytest.raises(PlanError) as caught:
        make().check(found)
    assert all(text in str(caught.value) for text in texts) and "attnopt profile" in caught.value.remedy


def test_check_refuses_another_fingerprint() -> None:
    with pytest.raises(PlanError, match="made for another model") as caught:
        make().check(sites(), Fingerprint("other", (0.125, 1e-05)))
    assert "0123456789abcdef" in str(caught.value) and "'demo'" in caught.value.remedy
