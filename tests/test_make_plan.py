"""From a profile to a verified plan on a tiny model, costs by density."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from models import HEADS, NanoGPT, tokens

from attnopt.cost import CostTable
from attnopt.errors import BudgetError, ModelError, TextError
from attnopt.plan import Budget
from attnopt.planner.make import Made, make_plan, uniform_at_cost
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid

LENGTH = 64


@cache
def observed() -> Profile:
    sequences = [tokens(1, LENGTH, seed=n) for n in range(2)]
    return profile_model(NanoGPT().eval(), sequences, Grid((0, 2), (8, 16, 32)))


def made_with(budget: Budget, samples: int = 8, records: list[Any] | None = None) -> Made:
    verify, final = ({LENGTH: tokens(samples, LENGTH, seed=n)} for n in (3, 4))
    report = records.append if records is not None else None
    return make_plan(
        NanoGPT().eval(),
        "nano",
        observed(),
        verify,
        final,
        budget,
        LENGTH,
        tables=CostTable.by_density(),
        report=report,
    )


def test_a_plan_is_measured_on_both_splits_and_within_its_budget() -> None:
    records: list[Any] = []
    made = made_with(Budget("loss", 50.0), records=records)
    assert records == list(made.verified.records)
    assert {m.split for m in made.plan.measured} == {"verify", "final"}
    assert all(m.upper_95 <= 50.0 and m.choices == made.plan.choices_id for m in made.plan.measured)
    assert list(made.plan.choices) == ["h.0", "h.1"] and all(len(c) == HEADS for c in made.plan.choices.values())
    assert made.plan.predicted.planned_cost < made.plan.predicted.dense_cost
    assert torch.tensor(made.dense[LENGTH].loss).isfinite().all()


def test_one_window_for_all_heads_costs_about_the_same() -> None:
    made = made_with(Budget("loss", 50.0))
    from attnopt.measure import Spans

    spans = Spans(NanoGPT().eval())
    spans.losses(tokens(1, LENGTH), None)
    uniform = uniform_at_cost(made.problem, made.verified.solution.cost, list(spans.sites.values()))
    (choice,) = {c for of_site in uniform.values()
                 for c in of_site}  # fmt: skip
    assert choice.candidate == "sink_window" and choice["beta"] == 0.0


def test_what_cannot_be_kept_or_decided_is_an_error() -> None:
    with pytest.raises(BudgetError):
        made_with(Budget("kl", 1e-300))
    with pytest.raises(TextError, match="are the least"):
        made_with(Budget("loss", 50.0), samples=2)


@pytest.mark.parametrize("budget", [Budget("loss", 1.0), Budget("kl", 1.0)], ids=str)
def test_a_dense_loss_that_is_not_finite_is_refused(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.measure._compared", lambda *_: (math.nan, 0.0, math.nan, 0))
    with pytest.raises(ModelError, match="loss is not finite on this text at 64 tokens") as caught:
        made_with(budget)
    assert caught.value.exit_code == 2 and "fp32" in caught.value.remedy
