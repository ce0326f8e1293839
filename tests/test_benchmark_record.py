"""What every benchmark writes: no speed-up of a wrong result, no folder of a machine, comparisons that know noise."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from benchmarks import timing
from benchmarks.record import Aim, Row, Run, WrongResult, compare, environment, relative_error


def row(ratio=2.0, low=1.9, error=1e-3, **case):
    return Row(
        {"dtype": "bfloat16", "length": 4096, **case}, error, 1e-2, {"dense": ratio}, {"dense": low}, {"ours": 5.0}
    )


@pytest.mark.parametrize("error", [0.02, math.inf, math.nan])
def test_a_wrong_row_gives_no_figure(error, tmp_path):
    wrong = row(error=error)
    for name in ("ratios", "lower", "times_ms"):
        with pytest.raises(WrongResult, match="WRONG: bfloat16 4096"):
            getattr(wrong, name)
    assert "WRONG" in str(wrong) and "dense" not in str(wrong)
    run = Run("some", [wrong, row(length=8192)], {})
    run.save(tmp_path / "run.json")
    kept = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert kept[0]["WRONG"] and not {"ratios", "lower", "times_ms"} & set(kept[0])
    again = Run.load(tmp_path / "run.json")
    assert again.rows[0].wrong and again.rows[1].ratios == {"dense": 2.0}
    changes, said = compare(again, again)
    assert [c.label for c in changes] == ["bfloat16 8192"] and "WRONG" in said[0]


def test_the_error_is_taken_in_float64_and_nan_is_no_match():
    expected = torch.randn(3, 5, dtype=torch.float64)
    assert relative_error(expected.float(), expected) < 1e-7
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_error(torch.full((3, 5), math.nan), expected) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(5), expected)


def test_a_run_comes_back_as_it_was_saved_and_is_drawn_the_same_twice(tmp_path):
    run = Run("some", [row(), row(3.0, 2.5, length=8192)], environment(), [Aim("speed", 2.5, 3.0)], ["a skip"])
    run.save(tmp_path / "a.json")
    again = Run.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert again.aims == run.aims and again.notes == ["a skip"] and again.rows[1].lower == {"dense": 2.5}
    for name in ("a.svg", "b.svg"):
        again.figure(tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "bfloat16 8192" in drawn and len(drawn) < 40_000
    # Neither black nor white: it stands on dark and on light pages.
    assert "currentColor" not in drawn and "#767c85" in drawn
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no run of schema"):
        Run.load(tmp_path / "other.json")


def test_the_environment_names_the_machine_but_none_of_its_folders(monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", "/some/where")
    found = environment()
    assert {"device", "date", "torch", "triton", "transformers", "attnopt", "threads"} <= set(found)
    assert "/some/where" not in json.dumps(found) and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])


@pytest.mark.parametrize(
    ("aim", "verdict"),
    [(Aim("x", 2, 2.0), "met"), (Aim("x", 2, 1.9), "missed"), (Aim("x", 2), "goal, unmeasured"),
     (Aim("x", 1.25, 1.2, at_most=True), "met"), (Aim("x", 1.25, 1.3, at_most=True), "missed")],
)  # fmt: skip
def test_an_aim_is_met_missed_or_unmeasured(aim, verdict):
    assert aim.verdict == verdict and str(aim).endswith(verdict)


def test_a_regression_is_what_noise_and_tolerance_do_not_explain():
    old = Run("some", [row(2.0, 1.98), row(2.0, 1.2, length=1), row(2.0, 1.98, length=2), row(length=3)], {})
    new = Run("some", [row(1.5, 1.48), row(1.5, 1.2, length=1), row(1.95, 1.94, length=2), row(length=4)], {})
    changes, said = compare(old, new)
    assert [c.slower(0.05) for c in changes] == [True, False, False]
    assert [c.beyond_noise for c in changes] == [True, False, True]
    assert changes[0].factor == pytest.approx(0.75) and "slower" in str(changes[0])
    assert said == ["bfloat16 4: only in the new run", "bfloat16 3: only in the old run"]


def test_bounds_belong_to_ratios():
    with pytest.raises(ValueError, match="bounds of no ratio: b"):
        Row({}, 0, 1, {"a": 1}, {"b": 1}, {})


def test_calls_take_turns_and_each_is_called_once_before():
    seen = []
    times = timing.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    seen.clear()
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    timing.interleaved(calls, 2, before=lambda: seen.append("-"))
    assert "".join(seen) == "ab" + "-a-b" + "-a-b"
    with pytest.raises(KeyError):
        timing.interleaved({}, 1, clock="sundial")


def test_rounds_end_when_their_time_is_up():
    assert len(timing.interleaved({"a": lambda: None}, 10_000_000, seconds=0.0)["a"]) == 3


def test_a_ratio_is_of_pairs_and_its_bound_below_it():
    value, low = timing.ratio([2.0, 4.4, 6.0, 8.2, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert value == 2.0 and low == 2.0
    value, low = timing.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert value == 3.0 and 1.0 <= low < 3.0
    with pytest.raises(ValueError, match="pair up"):
        timing.ratio([1.0], [1.0, 2.0])
