"""The comparison of planners: every one at the density asked, on the same text."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import planner


def test_planners_are_compared_at_one_density(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    line = ["planner.py", "demo", "--lengths", "256,512", "--length", "512", "--samples", "1", "--densities", "0.5"]
    monkeypatch.setattr(sys, "argv", [*line, "--out", str(out)])
    planner.main()
    rows = {r["planner"]: r for r in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"attnopt", "moa", "uniform", "random"}
    assert all(r["wanted"] == 0.5 and r["density"] <= 0.51 for r in rows.values())
    assert all(r["density"] == pytest.approx(0.5, abs=0.02) for n, r in rows.items() if n != "moa")
    assert 0 < rows["attnopt"]["kl"] < rows["uniform"]["kl"] and rows["attnopt"]["kl"] < rows["random"]["kl"]
    assert "attnopt" in capsys.readouterr().out
