"""The schema of plan files takes what the reader takes, and refuses what the reader refuses in a file's structure."""

from __future__ import annotations

import copy
import json
import runpy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from attnopt.errors import PlanError
from attnopt.plan import OBJECTIVES, UNITS, Plan
from attnopt.plan.schema import plan_schema
from attnopt.registry import CANDIDATES

from .blocks import ROOT, blocks_of

SCHEMA = plan_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
GOLDEN = json.loads((ROOT / "tests/golden/plan.json").read_text(encoding="utf-8"))


def read(data: Any) -> bool:
    """Whether the reader takes the file."""
    try:
        Plan.parse(json.dumps(data))
    except PlanError:
        return False
    return True


def changed(path: tuple[str | int, ...], value: Any) -> Any:
    """The golden plan with another value at `path`; with none, the key is gone."""
    data = copy.deepcopy(GOLDEN)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


def paths(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in the plan."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(path for key, part in inner for path in paths(part, (*at, key)))]


PLACES = paths(GOLDEN)
VALUES = [KeyError, None, True, -1, 0, 7, 0.5, 2.5, "", "text", [], ["text"], [1], {}, {"candidate": "dense"}]
# What only the reader can know: that every head is there, and that the file beside the plan is.
HEADS = {path for path in PLACES if path[-2:-1] == ("choices",)}
FREE = {path for path in PLACES if path[-1] in ("heads", "fitted")}


def test_the_schema_is_a_schema_and_takes_the_golden_plan() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert read(GOLDEN) and VALIDATOR.is_valid(GOLDEN)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_any_value_anywhere_is_judged_alike(value: Any) -> None:
    places = [p for p in PLACES if p not in FREE and not (value is KeyError and p in HEADS)]
    cases = {path: changed(path, value) for path in places}
    differ = [path for path, data in cases.items() if read(data) != VALIDATOR.is_valid(data)]
    assert len(places) > 60 and not differ


@pytest.mark.parametrize("path", sorted(HEADS | FREE, key=str), ids=str)
def test_the_reader_refuses_more_than_the_schema(path: tuple[str | int, ...]) -> None:
    """Heads that are left out, more heads than are chosen, a file that is not there."""
    value = {"heads": 9, "fitted": "0" * 64}.get(str(path[-1]), KeyError)
    data = changed(path, value)
    assert not read(data) and VALIDATOR.is_valid(data) == (len(data["sites"]["layers.1.attn"]["choices"]) > 0)


def test_an_unknown_key_anywhere_is_refused_by_both() -> None:
    records = {path[:-1] for path in PLACES if isinstance(path[-1], str)} - {("versions",)}
    for path in records:
        data = changed((*path, "extra"), 1)
        assert not read(data) and not VALIDATOR.is_valid(data), path
    assert len(records) > 8


def choices() -> st.SearchStrategy[dict[str, Any]]:
    """A candidate with parameters in and around their range, some of them missing."""

    def parameters(name: str) -> st.SearchStrategy[dict[str, Any]]:
        values = {
            p.name: st.one_of(
                st.sampled_from([p.least, p.most, p.least - 1, p.most + 1, p.step, p.step / 2, True, "1", *p.among]),
                st.integers(-5, 200),
            )
            for p in CANDIDATES[name].params
        }
        return st.fixed_dictionaries({"candidate": st.just(name)}, optional=values)

    return st.sampled_from([name for name, _ in CANDIDATES if CANDIDATES[name].far not in ("linear", "gone")]).flatmap(
        parameters
    )


@settings(max_examples=150)
@given(choice=choices())
def test_a_candidate_is_taken_with_the_parameters_it_has(choice: dict[str, Any]) -> None:
    """But a whole number that is written 5.0, which a schema cannot tell from 5."""
    choice = {k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in choice.items()}
    data = changed(("sites", "layers.1.attn", "choices"), {"0-1": choice})
    assert read(data) == VALIDATOR.is_valid(data), choice


@pytest.mark.parametrize(("text", "good"), [("0-1", True), ("0,1", True), ("0 - 1", False), ("a", False), ("", False)])
def test_heads_are_named_alike(text: str, good: bool) -> None:
    data = changed(("sites", "layers.1.attn", "choices"), {text: {"candidate": "dense"}})
    assert read(data) == VALIDATOR.is_valid(data) == good


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", UNITS)
def test_every_objective_and_budget_is_taken(objective: str, kind: str) -> None:
    data = changed(("objective",), objective) | {"budget": {"kind": kind, "limit": 1, "unit": UNITS[kind]}}
    assert read(data) and VALIDATOR.is_valid(data)


def test_every_key_says_what_it_means() -> None:
    def silent(schema: dict[str, Any], at: str = "") -> list[str]:
        found = []
        for name, value in schema.get("properties", {}).items():
            if not value.get("description") and "const" not in value and "candidate" not in schema["properties"]:
                found.append(f"{at}.{name}")
            found += silent(value, f"{at}.{name}") + silent(value.get("items", {}), f"{at}.{name}")
        return found

    assert not silent(SCHEMA)


def test_the_example_of_the_page_is_a_plan() -> None:
    page = (ROOT / "docs/plan-file.md").read_text(encoding="utf-8")
    (example,) = [block for block in blocks_of("docs/plan-file.md", page) if '"schema"' in block.text]
    assert VALIDATOR.is_valid(json.loads(example.text)) and Plan.parse(example.text)


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "attnopt/plan/schema.py"), run_name="__main__")
    assert json.loads(capsys.readouterr().out) == SCHEMA
