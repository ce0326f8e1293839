"""A search for a plan that was interrupted goes on where it was, and ends as if it never had been."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NanoGPT, tokens

from attnopt.cost import CostTable
from attnopt.measure import Sequences, Spans
from attnopt.plan import Budget
from attnopt.planner.evaluate import Kept
from attnopt.planner.make import Made, make_plan
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid

LENGTH, SAMPLES = 64, 8


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_model(NanoGPT().eval(), [tokens(1, LENGTH, seed=n) for n in range(2)], Grid((0, 2), (8, 16, 32)))


def planned(
    profile: Profile, partial: Path | None, limit: float = 50.0, text: int = 3, model: Any = None, **more: Any
) -> Made:
    verify, final = ({LENGTH: tokens(SAMPLES, LENGTH, seed=text + n)} for n in (0, 1))
    return make_plan(
        model or NanoGPT().eval(), "nano", profile, verify, final, Budget("loss", limit), LENGTH,
        tables=CostTable.by_density(), partial=partial, **more,
    )  # fmt: skip


def test_an_interrupted_search_goes_on_and_ends_alike(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, ran = tmp_path / "plan.json.partial", Counter[str]()
    losses = Spans.losses

    def counted(self: Spans, ids: Any, *rest: Any) -> Sequences:
        ran["sequences"] += len(ids)
        return losses(self, ids, *rest)

    monkeypatch.setattr(Spans, "losses", counted)
    whole = planned(profile, None)
    all_of_it = ran.pop("sequences")

    def stop_in(stage: str, at: int) -> Any:
        def progress(what: str, done: int, of: int) -> None:
            if what.startswith(stage) and done == at:
                raise KeyboardInterrupt

        return progress

    # Within a plan, and within the one look at the final split.
    for stage, at in (("verifying, planned", 5), ("final check", 2)):
        with pytest.raises(KeyboardInterrupt):
            planned(profile, partial, progress=stop_in(stage, at))
        assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    told: list[str] = []
    again = planned(profile, partial, tell=told.append)
    assert again.plan == whole.plan and again.verified.records == whole.verified.records
    assert again.dense == whole.dense and again.planned == whole.planned
    # Nothing was measured twice; each call ran one short sequence to find the sites.
    assert ran["sequences"] == all_of_it + 2
    assert len(told) == 1 and "Going on from" in told[0]
    # Another text has other losses.
    with pytest.raises(KeyboardInterrupt):
        planned(profile, partial, text=5, tell=told.append, progress=stop_in("verifying", 1))
    assert told[1:] == [f"{partial} is not taken up: it is of other text."]
    # So has a model of other weights, by as little as its fingerprint does not see.
    tuned = NanoGPT().eval()
    with torch.no_grad():
        tuned.head.weight[0, 0] += 1e-4
    with pytest.raises(KeyboardInterrupt):
        planned(profile, partial, text=5, model=tuned, tell=told.append, progress=stop_in("verifying", 1))
    assert told[2:] == [f"{partial} is not taken up: it is of other weights."]


def damaged(partial: Path) -> None:
    partial.write_bytes(partial.read_bytes()[:-40])


def emptied(partial: Path) -> None:
    partial.write_text("[]")


def of_another_format(partial: Path) -> None:
    partial.write_text(partial.read_text().replace('"schema": 1', '"schema": 0'))


def with_a_word(partial: Path) -> None:
    data = json.loads(partial.read_text())
    next(iter(data["rows"].values()))[0][1] = ["low"]
    partial.write_text(json.dumps(data))


def with_less_than_nothing(partial: Path) -> None:
    partial.write_text(partial.read_text().replace("[63]", "[-63]"))


def nested(partial: Path) -> None:
    partial.write_text("[" * 100_000)


@pytest.mark.parametrize("spoil", [damaged, emptied, of_another_format, with_a_word, with_less_than_nothing, nested])
def test_a_file_that_does_not_do_is_not_taken_up(spoil: Any, tmp_path: Path) -> None:
    partial, told = tmp_path / "partial", list[str]()
    kept = Kept({"model": "a"}, partial)
    kept.add("verifying, 64, loss, dense", Sequences((63,), (1.5,), (0.0,)))
    assert Kept.begin({"model": "a"}, partial, told.append).rows == kept.rows
    spoil(partial)
    assert Kept.begin({"model": "a"}, partial, told.append).rows == {}
    assert Kept.begin({"model": "b"}, partial, told.append).rows == {}
    assert "1 sequences are measured" in told[0] and "is not taken up" in told[1]


def test_a_loss_that_is_not_finite_is_kept_as_it_is(tmp_path: Path) -> None:
    kept = Kept({}, tmp_path / "partial")
    kept.add("x", Sequences((63,), (float("inf"),), (0.1,), (0.3,), (7,)))
    assert Kept.begin({}, tmp_path / "partial", lambda line: None).rows == kept.rows
