"""The comparisons of planners and of scores: equal densities, the same text, and attnopt's own figures in nats."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import planner, prediction


def run(module, monkeypatch, out, *line):
    monkeypatch.setattr(sys, "argv", ["benchmark", "demo", *line, "--out", str(out)])
    module.main()
    return json.loads(out.read_text())


def test_planners_are_compared_at_one_density(tmp_path, monkeypatch, capsys):
    names = ["attnopt", "uniform"]
    sizes = ["--lengths", "256,512", "--length", "512", "--samples", "1", "--densities", "0.5"]
    few = ["--documents", "1", "--planners", *names]
    data = run(planner, monkeypatch, tmp_path / "rows.json", *sizes, *few)
    rows = {r["planner"]: r for r in data["rows"]}
    assert set(rows) == {"dense", *names}
    assert rows["dense"]["increase"] == rows["dense"]["kl"] == 0.0 and rows["dense"]["recall"] >= 0.9
    planned = {n: r for n, r in rows.items() if n != "dense"}
    assert all(r["wanted"] == 0.5 and r["density"] <= 0.51 for r in planned.values())
    assert all(rows[n]["density"] == pytest.approx(0.5, abs=0.02) for n in ("attnopt", "uniform"))
    assert 0 < rows["attnopt"]["kl"] < rows["uniform"]["kl"]
    assert "attnopt" in capsys.readouterr().out


def test_scores_are_compared_with_what_is_measured(tmp_path, monkeypatch, capsys):
    data = run(
        prediction, monkeypatch, tmp_path / "rows.json",
        "--length", "192", "--samples", "2", "--draws", "1", "--mixtures", "4",
    )  # fmt: skip
    found = data["summary"]["one head"]
    assert found["plans"] == len([r for r in data["rows"] if r["kind"] == "one head"]) == 48
    # The sum of first-order terms cancels; what adds up before it is squared does not.
    assert found["together"]["spearman"] == found["alone"]["spearman"] > 0.6
    assert found["first order"]["spearman"] < 0.5
    # Two short sequences bound little; how close it comes on more is what the benchmark prints.
    assert 0.1 < found["together"]["ratio"] < 10.0 and "ratio" not in found["moa"]
    assert "together" in capsys.readouterr().out
