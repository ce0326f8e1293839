"""`python -m benchmarks`: every benchmark is listed, runs are compared, and failures reach the exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as front
from attnopt.ir import Mask, Site
from benchmarks import performance_document
from benchmarks.planners import fixed, terms
from benchmarks.readers import read
from benchmarks.record import Aim, Row, Run

RESULTS = Path(front.__file__).parent / "results"


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    front.main()


def test_every_script_with_a_main_is_a_benchmark_that_says_how_long_it_takes(capsys, monkeypatch):
    found = front.benchmarks()
    scripts = {p.stem for p in front.FOLDER.glob("*.py") if "\ndef main(" in p.read_text() and p.stem != "__main__"}
    assert scripts <= set(found) and {"cpu_prefill", "end_to_end", "exact_prefill"} <= scripts
    assert all(b.line and b.takes for b in found.values())
    call(monkeypatch)
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)


def test_one_is_run_with_its_arguments_and_fails_aloud(tmp_path, monkeypatch, capfd):
    (tmp_path / "benchmarks").mkdir()
    text = '"""Does it."""\nTAKES = "1 s"\nQUICK = ("--short",)\nimport sys\n\n\ndef main():\n    pass\n\n\n'
    text += 'print("given", sys.argv[1:])\nsys.exit("wrong" in sys.argv)\n'
    (tmp_path / "benchmarks/one.py").write_text(text)
    (tmp_path / "benchmarks/no_main.py").write_text('"""Nothing to run."""\n')
    (tmp_path / "benchmarks/card.py").write_text(text.replace("TAKES", 'NEEDS = "a GPU"\nTAKES'))
    monkeypatch.setattr(front, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = front.benchmarks
    monkeypatch.setattr(front, "benchmarks", lambda: found(tmp_path / "benchmarks"))
    assert set(front.benchmarks()) == {"one", "card"} and front.benchmarks()["one"].takes == "1 s"
    with pytest.raises(SystemExit) as done:
        call(monkeypatch, "run", "--all", "--quick", "--", "--more")
    assert done.value.code == 0
    said = capfd.readouterr().out
    assert "given ['--short', '--more']" in said and "card: left out, it needs a GPU" in said
    with pytest.raises(SystemExit) as done:
        call(monkeypatch, "run", "one", "--", "wrong")
    assert done.value.code == 1 and "failed: one" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="no such benchmark: two"):
        call(monkeypatch, "run", "two")


def test_a_slower_case_is_the_exit_status(tmp_path, monkeypatch, capsys):
    def saved(name, ratio, error=1e-3):
        run = Run(
            "some", [Row({"length": 8}, error, 1e-2, {"dense": ratio}, {"dense": 0.99 * ratio}, {})], {"cpu": name}
        )
        run.save(tmp_path / name)
        return str(tmp_path / name)

    old, new, wrong = saved("old", 2.0), saved("new", 1.5), saved("wrong", 2.0, error=1.0)
    for second, tolerance, status in ((new, "0.05", 1), (new, "0.3", 0), (old, "0.05", 0), (wrong, "0.05", 1)):
        with pytest.raises(SystemExit) as done:
            call(monkeypatch, "compare", old, second, "--tolerance", tolerance)
        assert done.value.code == status, second
    said = capsys.readouterr()
    assert "! 8, dense: 2 -> 1.5 (x 0.750, slower)" in said.out and "note: cpu was old and is new" in said.out
    assert "WRONG in the new run: 8" in said.err


@pytest.mark.parametrize(("name", "cells"), [("exact_prefill-cpu", 150), ("end_to_end-cpu-fp32", 10)])
def test_recorded_results_of_older_formats_compare_with_themselves(name, cells, tmp_path):
    run = read(RESULTS / f"{name}.json")
    assert len(run.rows) >= cells and not any(row.wrong for row in run.rows)
    labels = [row.label for row in run.rows]
    assert len(set(labels)) == len(labels)
    with pytest.raises(SystemExit, match="no ratios"):
        read(RESULTS / "planner-demo.json")


def test_a_wrong_cell_of_an_older_format_has_no_ratio(tmp_path):
    data = json.loads((RESULTS / "exact_prefill-cpu.json").read_text())
    cell = next(c for c in data["rows"] if "ratio" in c)
    cell["errors"]["attnopt"] = 1.0
    (tmp_path / "r.json").write_text(json.dumps({**data, "rows": [cell]}))
    assert read(tmp_path / "r.json").rows[0].wrong


def test_plans_are_not_timed_where_the_kernel_is_wrong(monkeypatch):
    site = Site("a", 0, "sdpa", 4, 2, 16, 16, 0.25, "float32", Mask(causal=True))
    plan = {"a": (fixed.span(4, 64),) * 4}
    right = terms.ops.prefill
    monkeypatch.setattr(terms.ops, "prefill", lambda *given: right(*given) * 1.01)
    with pytest.raises(SystemExit, match=r"a: the kernel of .* is off by 1\.00e-02"):
        terms.times([site], 512, [plan], rounds=1)


PLACES = "<!-- aims: begin -->\n<!-- aims: end -->\n<!-- results: begin -->\n<!-- results: end -->\n"


def test_the_page_shows_what_was_missed_and_what_is_unmeasured(tmp_path):
    right, wrong = ({"length": 8}, 1e-3), ({"length": 9}, 1.0)
    rows = [Row(*case, 1e-2, {"dense": 2.5}, {"dense": 2.25}, {}) for case in (right, wrong)]
    aims = [Aim("speed", 2.0, 2.5), Aim("more", 3.0, 2.5)]
    Run("cpu_prefill", rows, {"cpu": "a cpu", "threads": 1, "torch": "2"}, aims, ["a skip"]).save(tmp_path / "one.json")
    (tmp_path / "page.md").write_text(PLACES)
    performance_document.write(tmp_path / "page.md", tmp_path, tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "| prefill of per-head spans: speed | ≥ 2 | 2.5 | met |" in text.replace("CPU: ", "")
    unmeasured = len(performance_document.gpu_aims())
    assert "more | ≥ 3 | 2.5 | **missed** |" in text and f"1 met, 1 missed, {unmeasured} unmeasured" in text
    assert "GPU: decode, spans by KV head: times as fast as FlexAttention | ≥ 3 |  | goal, unmeasured |" in text
    assert "| 8 | 2.50 (≥ 2.25) | 1e-03 |" in text and "| 9 | WRONG | 1e+00 |" in text and "- a skip" in text
    assert "a cpu, 1 thread, torch 2." in text and (tmp_path / "one.svg").exists()
    again = text
    performance_document.write(tmp_path / "page.md", tmp_path, tmp_path)
    assert (tmp_path / "page.md").read_text() == again


def test_the_page_is_that_of_the_recorded_results(tmp_path):
    """After a recorded run: python -m benchmarks document."""
    page = performance_document.PAGE.read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    performance_document.write(tmp_path / "page.md", figures=tmp_path)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page
    assert all((performance_document.FIGURES / path.name).exists() for path in tmp_path.glob("*.svg"))
