"""The comparisons of planners and of scores: equal densities, the same text, and attnopt's own figures in nats."""

from __future__ import annotations

import json
import sys

import pytest

from attnopt.cost import CostTable
from attnopt.ir import Mask, Site
from benchmarks import planner, prediction
from benchmarks.planners import fixed
from benchmarks.planners.terms import Terms, times


def run(module, monkeypatch, out, *line):
    monkeypatch.setattr(sys, "argv", ["benchmark", "demo", *line, "--out", str(out)])
    module.main()
    return json.loads(out.read_text())


@pytest.mark.full
@pytest.mark.slow
def test_planners_are_compared_at_one_cost(tmp_path, monkeypatch, capsys):
    names = ["attnopt", "uniform"]
    sizes = ["--lengths", "256,512", "--length", "512", "--samples", "1", "--densities", "0.5", "--equal", "pairs"]
    few = ["--documents", "1", "--reach", "256", "--reach-most", "512", "--planners", *names]
    data = run(planner, monkeypatch, tmp_path / "rows.json", *sizes, *few)
    rows = {r["planner"]: r for r in data["rows"]}
    assert set(rows) == {"dense", *names}
    assert rows["dense"]["increase"] == rows["dense"]["kl"] == 0.0 and rows["dense"]["recall"] >= 0.9
    planned = {n: r for n, r in rows.items() if n != "dense"}
    assert all(r["wanted"] == 0.5 and r["cost"] <= 0.5001 for r in planned.values())
    assert all(r["cost"] == pytest.approx(r["density"], abs=1e-3) for r in planned.values())
    assert all(r["density"] == pytest.approx(0.5, abs=0.02) for r in planned.values())
    assert rows["dense"]["measured"] == 1.0 and all(0 < r["measured"] < 3 for r in planned.values())
    assert 0 < rows["attnopt"]["kl"] < rows["uniform"]["kl"]
    # A window of 256 tokens reaches as far as that, and heads that differ farther.
    assert 256 <= data["reach"]["uniform"] <= 320 < data["reach"]["attnopt"] == 512
    assert "attnopt" in capsys.readouterr().out


def test_measured_terms_count_what_a_layer_pays():
    (site,) = (Site("a", 0, "sdpa", 4, 2, 8, 8, 0.3, "float32", Mask(causal=True)),)
    table = CostTable(
        (("target", "cpu"),),
        tuple(((512, s, w), ms) for s, w, ms in ((0, 512, 8.0), (64, 64, 1.0), (64, 256, 4.0))), ((512, 0.5),),
    )  # fmt: skip
    terms = Terms(512, (site,), {"a": table})
    narrow, wide = fixed.span(4, 64), fixed.span(4, 256)
    assert terms.cost({}) == 4 * 8.0
    assert terms.share({"a": (narrow, narrow, wide, wide)}) == pytest.approx((2 * 1 + 2 * 4 + 0.5) / 32)
    found = fixed.uniform({"a": 4}, 512, 0.25, terms.share)
    assert found is not None and found["a"][0]["alpha"] in range(100, 256) and terms.share(found) <= 0.25
    assert fixed.uniform({"a": 4}, 512, 0.05, terms.share) is None


def test_plans_are_timed_side_by_side():
    site = Site("a", 0, "sdpa", 4, 2, 16, 16, 0.25, "float32", Mask(causal=True))
    dense, narrow = times([site], 2048, [{}, {"a": (fixed.span(4, 64),) * 4}], rounds=3)
    assert 0 < narrow < dense


@pytest.mark.full
@pytest.mark.slow
def test_scores_are_compared_with_what_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "PASSES", 1)
    data = run(
        prediction, monkeypatch, tmp_path / "rows.json",
        "--length", "160", "--samples", "2", "--draws", "1", "--mixtures", "2",
    )  # fmt: skip
    found = data["summary"]["one head"]
    assert found["plans"] == len([r for r in data["rows"] if r["kind"] == "one head"]) == 48
    # The sum of first-order terms cancels; what adds up before it is squared does not.
    assert found["together"]["spearman"] == found["alone"]["spearman"] > 0.6
    assert found["first order"]["spearman"] < 0.5
    # Two short sequences bound little; how close it comes on more is what the benchmark prints.
    assert 0.1 < found["together"]["ratio"] < 10.0 and "ratio" not in found["moa"]
    assert "together" in capsys.readouterr().out
