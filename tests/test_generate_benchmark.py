"""The benchmark of generation: the split of its plan, what it asks for, and what it finds on a short prompt."""

from __future__ import annotations

from typing import Any

import pytest

from attnopt.ir import DENSE
from benchmarks import generate
from benchmarks.generate import Case, aims_of, measure
from benchmarks.record import Row


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 1, "DIM": 16, "SINK": 4, "NEW": 3}.items():
        monkeypatch.setattr(generate, name, value)


@pytest.mark.parametrize(("kv_heads", "full"), [(8, 2), (2, 4)])
def test_a_quarter_of_the_heads_is_full_or_half_of_the_kv_heads(kv_heads: int, full: int, small: None) -> None:
    case = Case(kv_heads, 1, 64, "float32", 1)
    (choices,) = case.plan(case.model).choices.values()
    assert choices[:full] == (DENSE,) * full and DENSE not in choices[full:] and len(choices) == 8


def test_a_short_prompt(small: None) -> None:
    row = measure(Case(2, 2, 256, "float32", 1), rounds=1)
    assert row.error < 1e-5 and all(value > 0 for value in row.ratios.values())
    # One KV head keeps 256 + 3 tokens, one 4 + 32: of 259 twice.
    assert row.ratios["memory"] == pytest.approx(2 * 259 / (272 + 48), rel=1e-6)
    assert row.ratios["ideal"] == pytest.approx((272 + 48) / (259 + 36), rel=1e-6)


def found(ratios: dict[str, float], **case: Any) -> Row:
    facts = {"kv_heads": 8, "batch": 1, "length": 16384, "dtype": "float32", "threads": 1}
    return Row(facts | case, 0.0, 1e-4, {"memory": 2.8, "ideal": 1.01, "python": 2.0} | ratios, {}, {})


def test_aims_are_of_the_long_prompt_and_of_the_worst() -> None:
    rows = [
        found({"static": 2.0, "dynamic": 9.0}),
        found({"static": 1.9, "dynamic": 5.0, "python": 6.0}, dtype="bfloat16"),
        found({"static": 1.2, "dynamic": 3.0, "memory": 1.7}, kv_heads=2),
        found({"static": 1.1, "dynamic": 4.0, "ideal": 1.2}, length=4096),
        Row({"kv_heads": 8, "length": 16384, "threads": 1}, 1.0, 1e-4, {"static": 0.1}, {}, {}),
    ]
    held = [(aim.found, aim.met) for aim in aims_of(rows)]
    assert held[:4] == [(2.0, True), (9.0, True), (1.9, True), (5.0, False)]
    assert held[4:] == [(2.8, True), (1.7, True), (1.2, False), (6.0, False)]
