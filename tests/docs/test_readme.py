"""README.md: short, and nothing in it that the project's own files do not say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from attnopt.plan import Plan
from attnopt.report.data import plan_json

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
AT_A_GLANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## At a glance")[1].split("\n## ")[0]


def recorded(dtype: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/end_to_end-cpu-{dtype}.json").read_text(encoding="utf-8"))


def numbers(line: str) -> list[float]:
    return [float(cell.strip(" %")) for cell in line.strip("|").split("|") if re.fullmatch(r" *-?[\d.]+( %)? *", cell)]


def test_it_is_one_screen_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 80
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) > 20
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_its_two_commands_are_targets_of_the_makefile() -> None:
    named = re.findall(r"^\$ make (\w+) ", README, re.M)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert named == ["demo", "test"] and set(named) <= set(targets)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_its_table_is_that_of_the_recorded_run(dtype: str) -> None:
    run = recorded(dtype)
    ratios = {r["length"]: r for r in run["ratios"] if not r["padded"]}
    for of_plan in run["uniform"]:
        length, ratio = of_plan["length"], ratios[of_plan["length"]]
        times = [ratio[name] for name in ("exact / inductor", "exact / best other", "planned / exact")]
        loss = [of_plan[f"{name}_percent"] for name in ("plan_increase", "plan_upper_95", "uniform_increase")]
        (line,) = re.findall(rf"^\| {dtype} (\| {length} \|.*)$", README, re.M)
        assert numbers(line) == [length, *(round(value, 2) for value in times + loss)]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_told_at_a_glance_is_that_of_the_recorded_run(dtype: str) -> None:
    run = recorded(dtype)
    for ratio in run["ratios"]:
        padding = "yes" if ratio["padded"] else "no"
        (line,) = re.findall(rf"^\| {dtype} \| {ratio['length']} \| {padding} (\|.*)$", AT_A_GLANCE, re.M)
        times = [ratio[name] for name in ("exact / inductor", "exact / best other", "planned / exact")]
        assert numbers(line) == [round(value, 2) for value in times]
    for of_plan in run["uniform"]:
        (line,) = re.findall(rf"^\| {dtype} \| {of_plan['length']} (\| [\d.]+ % .*)$", AT_A_GLANCE, re.M)
        names = ("plan_increase", "plan_upper_95", "uniform_increase")
        assert numbers(line) == [round(of_plan[f"{name}_percent"], 2) for name in names]


def test_generation_at_a_glance_is_that_of_the_recorded_run() -> None:
    run = json.loads((ROOT / "benchmarks/results/generate-cpu.json").read_text(encoding="utf-8"))
    for row in run["rows"]:
        case, ratios = row["case"], row["ratios"]
        dtype = {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]]
        at = rf"^\| {dtype} \| {case['kv_heads']} \| {case['length']} \| {case['batch']} (\|.*)$"
        (line,) = re.findall(at, AT_A_GLANCE, re.M)
        shown = [ratios[name] for name in ("exact over static", "static", "dynamic", "memory")]
        assert numbers(line) == pytest.approx(shown, abs=0.0051)


def test_other_planners_at_a_glance_are_those_of_their_page() -> None:
    page = (ROOT / "docs/planner.md").read_text(encoding="utf-8")
    for model in ("demo", "mha", "deep"):
        section = page.split(f"<!-- planner-{model}: begin -->")[1].split(f"<!-- planner-{model}: end -->")[0]
        found = re.findall(r"^\| (\w[^|]*?) \|[^|]*\|[^|]*\| [\d.]+; (\S+) %; (\d+)%", section, re.M)
        cells = {name: (f"{loss} %", f"{share} %") for name, loss, share in found}
        best = min((cells[name] for name in cells if name.startswith("moa")), key=lambda cell: float(cell[0][:-2]))
        (line,) = re.findall(rf"^\| {model}, [^|]*\| (.*) \|$", AT_A_GLANCE, re.M)
        told = [tuple(cell.strip().split(", ")) for cell in line.split("|")[1:]]
        assert told == [cells["attnopt"], best, cells["duo"], cells["uniform"]]


def test_the_plan_it_shows_is_the_one_in_the_examples() -> None:
    plan = Plan.load(ROOT / "examples/demo_decode_plan.json")
    (final,) = [m for m in plan.measured if m.split == "final"]
    assert f"budget of\n{plan.budget.limit:g} % of the loss" in README
    assert f"it costs {final.increase:.2f} % (95 % bound: {final.upper_95:.2f} %)" in README


def test_its_picture_is_the_plan_s() -> None:
    spec = importlib.util.spec_from_file_location("draw_docs", ROOT / "tools/draw_docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = script.head_map(plan_json(Plan.load(script.PLAN)))
    assert drawn == (script.FIGURES / "head-map.svg").read_text(encoding="utf-8")
    assert drawn.count(">all<") == 6 and "19% of the KV cache" in drawn


def test_what_it_says_of_coverage_is_what_the_page_says() -> None:
    page = (ROOT / "docs/coverage.md").read_text(encoding="utf-8")
    (total,) = re.findall(r"^\| all \| (\d+) \| \d+ \| (\d+) \| ([\d.]+) % \|.*?\| 0 \| 0 \|", page, re.M)[:1]
    classes, calls, share = total
    text = " ".join(README.split())
    assert f"of {calls} attention calls of {classes} classes of transformers {share} % are recognised" in text
