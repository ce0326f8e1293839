"""Times of steps that select tokens: what is predicted of them against what was measured, and what plans make of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import CostTable, Joined, StepTable, load_or_measure_steps
from attnopt.cost.steps import key_of
from attnopt.cost.timing import path_of
from attnopt.errors import AttnoptError
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.planner import Problem
from attnopt.planner.exact import compare
from attnopt.planner.frontier import front
from attnopt.planner.knapsack import EVERY, Limits, code_of
from attnopt.planner.problem import min_length_of
from attnopt.planner.steps import fallen_back, layer_keys, step_share

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "token_decode-cpu.json"
# As benchmarks/token_decode.py has it.
COUNT, SINK, RECENT, FEATURES = 256, 4, 64, 16
NEAR = {"sink": SINK, "recent": RECENT}
OWN = {"every": 1, "similar": 0.0, "behind": 0}
SETTINGS = {
    "selected": Choice.of("top_tokens", {"k": COUNT, **NEAR, **OWN}),
    "channels": Choice.of("channels", {"k": COUNT, **NEAR, "r": FEATURES, "every": 1}),
    "reused": Choice.of("top_tokens", {"k": COUNT, **NEAR, **OWN, "every": 1 << 16}),
}
DENSITY = CostTable.by_density()


def site_of(case: dict[str, Any]) -> Site:
    heads, groups, dim = case["heads"], case["kv_heads"], case["dim"]
    return Site("h", 0, "sdpa", heads, groups, dim, dim, dim**-0.5, case["dtype"], Mask(causal=True))


def table_of(rows: list[dict[str, Any]]) -> StepTable:
    """Of what the benchmark measured, at its lengths."""
    case, read, steps = rows[0]["case"], COUNT + SINK + RECENT, {}
    for row in rows:
        n, ms = row["case"]["length"], row["times_ms"]
        steps[n, 0, read] = ms["reused"]
        steps[n, FEATURES, read], steps[n, case["dim"], read] = ms["channels"], ms["selected"]
    dense = tuple(((row["case"]["length"],) * 2, row["times_ms"]["dense"]) for row in rows)
    key = (("heads", str(case["heads"])), ("kv_heads", str(case["kv_heads"])))
    return StepTable(key, dense, tuple(sorted(steps.items())))


def shapes() -> list[list[dict[str, Any]]]:
    rows = json.loads(MEASURED.read_text())["rows"]

    def shape(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row["case"][name] for name in ("dtype", "heads", "dim"))

    return [list(group) for _, group in itertools.groupby(sorted(rows, key=shape), shape)]


@pytest.mark.parametrize("rows", shapes(), ids=lambda rows: f"{rows[0]['case']['dtype']}-{rows[0]['case']['dim']}")
def test_what_is_predicted_is_near_what_was_measured(rows: list[dict[str, Any]]) -> None:
    """At a length between those that were timed, within a factor of 1.6, by every setting that the benchmark has; what
    dense decoding took at that length varies by as much."""
    *_, middle = sorted(row["case"]["length"] for row in rows)[:2]
    ends = Joined(DENSITY, steps=table_of([row for row in rows if row["case"]["length"] != middle]))
    row = next(row for row in rows if row["case"]["length"] == middle)
    site = site_of(row["case"])
    for name, choice in SETTINGS.items():
        found = 1 / step_share({"h": (choice,) * site.heads}, [site], {"h": ends}, middle, None)
        assert 1 / 1.6 < found / row["ratios"][name] < 1.6, name
    # Bytes tell less: where dense decoding has a kernel, of reuse up to seven times as much.
    by_bytes = 1 / step_share({"h": (SETTINGS["reused"],) * site.heads}, [site], {"h": DENSITY}, middle, None)
    assert by_bytes > 2 * row["ratios"]["reused"] or site.dtype == "bfloat16"


def test_a_kv_head_is_scanned_once_and_read_by_every_head_that_selects() -> None:
    site, span = site_of({"heads": 8, "kv_heads": 2, "dim": 64, "dtype": "float32"}), (4, 60)
    wide, few = Choice.of("top_tokens", {"k": 1024, **NEAR, **OWN, "every": 8}), SETTINGS["channels"]
    window = Choice.of("sink_window", {"sink": span[0], "alpha": span[1], "beta": 0.0})

    def keys(*heads: Choice) -> float:
        return layer_keys(DENSITY, site, (*heads, *[window] * (8 - len(heads))), 8192)

    spans, one = 2 * sum(span), 1024 + SINK + RECENT
    assert keys() == spans
    # Half of the bytes of 8192 keys, in each eighth step; a span beside it is read as well.
    assert keys(wide) == pytest.approx(spans + 8192 / 16 + one, rel=0.01)
    assert keys(wide, wide, wide) - keys(wide) == 2 * one
    assert keys(*[wide] * 4) == sum(span) + 8192 / 16 + 4 * one
    assert keys(few) == pytest.approx(spans + 8192 / 8 + COUNT + SINK + RECENT, rel=0.01)
    assert keys(*[DENSE] * 8) == 2 * 8192 and keys(DENSE, wide) == 2 * sum(span) - sum(span) + 8192 + 8192 / 16 + one


def test_front_and_exact_plan_against_every_assignment_of_heads_that_select() -> None:
    """Dense, a window, and two that select: by a scan and keys of their own."""
    length, drawn = 1024, np.random.default_rng(0)
    codes = [code_of(0, length, length), code_of(4, 64, length), 512 << 32, 100 << 32]
    problem = Problem(
        heads=tuple(("a", h) for h in range(4)), choices=(DENSE, *SETTINGS.values()),
        damage=np.stack([np.zeros(4), *drawn.uniform(0.1, 1.0, (3, 4))], 1),
        cost=np.tile([0.0, 0.0, 0.02, 0.05], (4, 1)), span=np.tile([codes[0], codes[1], codes[0], codes[0]], (4, 1)),
        site=np.zeros(4, dtype=np.int64), group_cost=np.zeros(1), length=length, kv=np.array([0, 0, 1, 1]),
        key_cost=np.full(2, 1e-3), key_bytes=np.full(2, 2.0), group=np.tile(np.arange(4), (4, 1)),
        reads=np.tile(codes, (4, 1)),
    )  # fmt: skip
    assert problem.reading.length == EVERY and problem.reading.span is problem.reads
    spans, scans = [1024, 68, 0, 0], [0, 0, 512, 100]
    every = []
    for index in itertools.product(range(4), repeat=4):
        solution = problem.of(np.array(index))
        pairs = (index[:2], index[2:])
        keys = sum(max(spans[i] for i in pair) + max(scans[i] for i in pair) for pair in pairs)
        # The sinks of the one are in the place of the other's scan: four keys at most.
        assert solution.cost == pytest.approx(problem.cost[0, list(index)].sum() + 1e-3 * keys, abs=2.1 * 4e-3)
        assert solution.memory == 2.0 * sum(1024 if {0, 2, 3} & {*pair} else 68 for pair in pairs)
        every.append(solution)
    sweep = front(problem, Limits())
    for most in (0.2, 0.6, 1.0, 2.0):
        best = min(s.cost for s in every if s.damage <= most)
        assert compare(sweep, max_damage=most, gap=0).solution.cost == pytest.approx(best, rel=1e-6)


def test_steps_stay_dense_where_selecting_takes_longer() -> None:
    rows = next(rows for rows in shapes() if rows[0]["case"] | {"length": 0} == {
        "threads": 1, "dtype": "float32", "heads": 32, "kv_heads": 8, "dim": 128, "length": 0})  # fmt: skip
    lengths, site = [row["case"]["length"] for row in rows], site_of(rows[0]["case"])
    spans = CostTable((), tuple(((n, 0, n), n / 64) for n in lengths))
    table = Joined(spans, steps=table_of(rows))

    def least(name: str, objective: str, of: Any = table) -> int:
        return min_length_of({"h": (SETTINGS[name],) * site.heads}, [site], {"h": of}, None, objective)

    # By the medians 0.78 times as fast as dense at 4096 keys, 1.01 at 16384 and 1.36 at 32768.
    assert (least("selected", "decode"), least("reused", "decode")) == (32768, 4096)
    # Prompts run as they are: half of what is weighed.
    assert least("reused", "mixed") == 4096 and least("selected", "mixed") == 32768
    assert least("selected", "decode", spans) == 0 and least("selected", "memory") == 0
    assert least("selected", "prefill") == 32769


def test_steps_are_timed_once_and_damaged_tables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.cost.steps.BETWEEN", 4096)
    spec, seen = SpanPrefill("cpu", "float32", 4, 2, 16, 16, False), []
    table = load_or_measure_steps(
        spec, [64, 96], [16, 4], rounds=1, progress=lambda done, of, what: seen.append(what)
    )  # fmt: skip
    assert table.lengths == (64, 96) and seen == ["64 tokens", "64 tokens", "96 tokens", "96 tokens"]
    assert [what for what, _ in table.steps] == [(64, 0, 32), (64, 4, 32), (64, 16, 32), *(
        (96, features, 48) for features in (0, 4, 16)
    )]  # fmt: skip
    assert [what for what, _ in table.spans] == [(64, 32), (64, 64), (96, 48), (96, 96)]
    assert table.key_time(64) > 0 and table.gathered(64, 32) > 0 and table.scanned(96, 8) >= 0
    path: Path = path_of(key_of(spec, "cpu"), "steps")
    assert StepTable.load(path) == table
    monkeypatch.setattr("attnopt.cost.steps.interleaved", lambda calls, *_, before: [7.0] * len(calls))
    assert load_or_measure_steps(spec, [64], [4]) == table  # stored: nothing is timed again
    more = load_or_measure_steps(spec, [64], [8])
    # All of the length anew, in one run; a plan made before finds its table all the same.
    assert {ms for (n, *_), ms in more.steps if n == 64} == {7.0} and len(more.steps) == 7 and more.id == table.id
    assert Joined(DENSITY, steps=more).id == f"density+{more.id}"
    with pytest.raises(AttnoptError, match="No step that selects"):
        replace(table, steps=()).scanned(64, 16)
    path.write_text(path.read_text().replace("7.0", "-1", 1))
    with pytest.raises(AttnoptError, match="damaged: -1 is no time"):
        load_or_measure_steps(spec, [64], [4])


def test_what_a_call_takes_is_no_part_of_a_key() -> None:
    """3 ms whatever is read, and a thousandth for each key of 2 KV heads."""
    spans = tuple(((n, w), 3 + 2 * w / 1000) for n in (1024, 4096) for w in (64, n))
    steps = tuple(((n, seen, c), 4 + 8 * c / 500) for n in (1024, 4096) for seen in (0, 64) for c in (64, 320))
    table = StepTable((("heads", "8"), ("kv_heads", "2")), spans, steps)
    assert [table.key_time(n) for n in (1024, 4096)] == pytest.approx([1e-3] * 2)
    assert table.overhead(4096) == pytest.approx(3 / 8 * 1000) and replace(table, spans=spans[1::2]).overhead(64) == 0
    # All of a step of 8 heads, of which one key takes twice as long where it stands alone.
    assert table.gathered(4096, 100) == pytest.approx(4 / 8 * 1000 + 2 * 100)
    site, joined = site_of({"heads": 8, "kv_heads": 2, "dim": 64, "dtype": "float32"}), Joined(DENSITY, steps=table)
    assert layer_keys(joined, site, [DENSE] * 8, 4096) == pytest.approx((3 + 2 * 4.096) * 1000, rel=1e-3)
    reused = layer_keys(joined, site, [SETTINGS["reused"]] * 8, 4096)
    assert reused == pytest.approx((4 + 8 * 324 / 500) * 1000, rel=0.02)
    # Where dense was no slower than narrow, by chance.
    even = replace(table, spans=tuple((at, 3.0) for at, _ in spans))
    assert even.key_time(4096) == pytest.approx(0.3 / 4096 / 2)


def test_where_no_kernel_selects_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of({"heads": 2, "kv_heads": 1, "dim": 64, "dtype": "float64"})
    one, none = {"h": (SETTINGS["reused"], DENSE)}, {"h": (DENSE, DENSE)}
    assert not fallen_back(one, [site], "triton") and not fallen_back(none, [site], "cpu")
    assert "they have no float64" in fallen_back(one, [site], "cpu")[0]
    assert "look at every key in each step" in fallen_back(one, [site], "reference")[0]
    monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    both = [replace(site, dtype="float32"), replace(site, dtype="float32", path="g")]
    (said,) = fallen_back({"h": one["h"], "g": one["h"]}, both, "cpu")
    assert said.startswith("h and 1 more") and "ATTNOPT_NATIVE is 0" in said
