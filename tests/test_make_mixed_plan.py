"""From a profile and fits to a verified plan of a tiny model whose heads are replaced by every family."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from models import HEADS, NanoGPT, tokens
from torch import nn

from attnopt.cost import CostTable
from attnopt.distill import Menu, distill_model
from attnopt.errors import FittedError, OptionError
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted
from attnopt.ir import Choice
from attnopt.measure import Spans
from attnopt.plan import Budget, Constraints, Plan
from attnopt.planner.cuttable import not_cuttable
from attnopt.planner.make import Made, make_plan
from attnopt.planner.verify import verify_loop
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid

LENGTH = 64
EVERY = ("linear", "taylor", "compensation", "prune")
WANTED = ["linear", "taylor", "compensation", "pruned"]
Evidence = tuple[Profile, Fitted]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """A profile and fits of one text, of which it is then said that every head but those of h.0 must be dense, and that
    these lose nothing by one family each."""
    model, text = NanoGPT().eval(), [tokens(1, LENGTH, seed=n) for n in range(2)]
    profile = profile_model(model, text, Grid((0, 2), (8, 16, 32)))
    fitted = distill_model(model, text, [tokens(1, LENGTH, seed=7)], Menu((6,), (3,), (8,), (2,), steps=2))
    for (site, _), trials in fitted.trials.items():
        trials.t2.fill_(1e9)
        for c, choice in enumerate(trials.choices):
            if site == "h.0" and choice.candidate in WANTED:
                trials.t2[WANTED.index(choice.candidate), c] = 0.0
    for seen in profile.observations.values():
        seen.t2.fill_(1e9)
        seen.ablation_t2.zero_()
    return profile, fitted


def made_with(evidence: Evidence, fitted: Fitted | None, allow: tuple[str, ...] | None) -> Made:
    verify, final = ({LENGTH: tokens(8, LENGTH, seed=n)} for n in (3, 4))
    return make_plan(
        NanoGPT().eval(), "nano", evidence[0], verify, final, Budget("kl", 10.0), LENGTH, tables=CostTable.by_density(),
        objective="memory", fitted=fitted, allow=allow,
    )  # fmt: skip


def test_a_plan_of_every_family_is_measured_as_it_is_shipped(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first point tried, where the prediction meets the budget: measured, cheaper ones would hold it as well.
    monkeypatch.setattr("attnopt.planner.make.verify_loop", partial(verify_loop, max_evaluations=1))
    made = made_with(evidence, evidence[1], EVERY)
    assert [c.candidate for c in made.plan.choices["h.0"]] == [*WANTED, *["dense"] * (HEADS - 4)]
    assert made.plan.constraints.allow == tuple(sorted(EVERY)) and made.plan.predicted.kv_memory < 1
    made.plan.save(tmp_path / "plan.json")
    held = Plan.load(tmp_path / "plan.json")
    assert held.choices == made.plan.choices and held.fitted is not None and not held.fitted.trials
    # What the file holds is all that a run needs, and does what was measured.
    final = next(m for m in held.measured if m.split == "final")
    again = Spans(NanoGPT().eval(), held.fitted).losses(tokens(8, LENGTH, seed=4), held.choices)
    assert again.mean_loss == pytest.approx(final.planned_loss, rel=1e-6)


def test_where_no_family_is_allowed_spans_alone_are_chosen(evidence: Evidence) -> None:
    plain = made_with(evidence, evidence[1], ()).plan
    assert {c.candidate for heads in plain.choices.values() for c in heads} <= {"dense", "sink_window"}
    assert plain.fitted is None and plain.constraints.allow == ()


def test_sites_whose_projections_cannot_be_cut_are_named(evidence: Evidence) -> None:
    """A gate between the heads and their projection; the other layer has none."""
    model, fitted = NanoGPT().eval(), evidence[1]
    spans = Spans(model)
    spans.losses(tokens(1, LENGTH), None)
    sites, fingerprint = list(spans.sites.values()), fitted.header.fingerprint
    assert not_cuttable(model, tokens(1, LENGTH), sites, fingerprint, fitted) == {}

    class Gated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * torch.sigmoid(x))

    projection = model.h[1].c_proj
    model.h[1].c_proj = Gated(projection.in_features, projection.out_features)
    # Another graph of a function that Dynamo would compile no more, and run unseen.
    with torch._dynamo.config.patch(recompile_limit=1):
        (found,) = not_cuttable(model, tokens(1, LENGTH), sites, fingerprint, fitted).items()
    assert found[0] == "h.1" and "sigmoid" in found[1]


def test_heads_that_are_gone_do_not_come_back_below_a_length(evidence: Evidence) -> None:
    with pytest.raises(OptionError, match="--dense-below wants it back"):
        texts = {LENGTH: tokens(8, LENGTH)}
        make_plan(
            NanoGPT().eval(), "nano", evidence[0], texts, texts, Budget("kl", 10.0), LENGTH, fitted=evidence[1],
            allow=("prune",), constraints=Constraints(dense_below=32),
        )  # fmt: skip


def test_fits_of_another_model_are_refused(evidence: Evidence) -> None:
    fitted = evidence[1]
    other = Fitted.from_bytes(fitted.to_bytes(), "f")
    other.header = type(other.header)(Fingerprint("fedcba9876543210", (1.0,)), lengths=other.header.lengths)
    with pytest.raises(FittedError, match="another model"):
        made_with(evidence, other, None)
    assert (
        Choice("pruned") in fitted.choices("h.1")
        and torch.isfinite(fitted.damage("h.1", LENGTH, Choice("pruned"))).all()
    )
