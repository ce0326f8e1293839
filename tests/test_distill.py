"""Distilling a tiny model: what is fitted, what is tried, a run that is interrupted, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import HEAD_DIM, HEADS, LAYERS, NanoGPT, build, tokens

from attnopt import distill
from attnopt.distill import Menu, distill_model
from attnopt.errors import FittedError, OptionError, ProfileError
from attnopt.fitted import Fitted
from attnopt.ir import Choice
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from attnopt.supervision import Sample

LENGTH = 64
FIT = [tokens(1, LENGTH, seed=n) for n in range(2)]
TRIED = [tokens(1, LENGTH, seed=n) for n in (7, 8)]
MENU = Menu((6,), (3,), (4, 16), (2,), steps=4)
SITES = tuple(f"h.{n}" for n in range(LAYERS))


def window(size: int) -> Choice:
    return Choice.of("sink_window", {"sink": 2, "alpha": size, "beta": 0.0})


@pytest.fixture(scope="module")
def whole() -> Fitted:
    return distill_model(NanoGPT().eval(), FIT, TRIED, MENU)


def test_what_is_fitted_and_tried(whole: Fitted) -> None:
    assert whole.sites == SITES and whole.header.lengths == (LENGTH,) and len(whole.header.data) == 4
    assert set(whole.maps) == {(site, name) for site in SITES for name in ("linear/6", "taylor/3")}
    for found in whole.maps.values():
        assert found.heads == HEADS and not found.problem(HEAD_DIM)
    # Two windows: a window alone, the mean, features, an expansion; and nothing at all.
    assert all(len(whole.choices(site)) == 2 * 4 + 1 for site in SITES)
    assert all((whole.damage(site, LENGTH, choice) >= 0).all() for site in SITES for choice in whole.choices(site))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_model(NanoGPT().eval(), TRIED, Grid((0, 2), (4, 16)))


def test_windows_are_worth_what_a_profile_says(whole: Fitted, profile: Profile) -> None:
    """The same text, labels and formula: the profile's own sums."""
    for site in SITES:
        seen = profile.observations[site, LENGTH]
        for size in (4, 16):
            expected = seen.t2[(slice(None), *seen.grid.index(2, size))] / 2 / seen.tokens
            torch.testing.assert_close(whole.damage(site, LENGTH, window(size)), expected, rtol=1e-3, atol=1e-9)


def test_a_head_is_offered_what_is_better_than_its_window(whole: Fitted) -> None:
    for site in SITES:
        for name, size in (("linear", {"features": 6}), ("taylor", {"rank": 3})):
            choice = Choice.of(name, {"sink": 2, "window": 4, **size})
            better = whole.damage(site, LENGTH, choice) < whole.damage(site, LENGTH, window(4))
            assert torch.equal(whole.offered(site, choice), better)
        assert whole.offered(site, Choice("pruned")).all()
        assert not whole.offered(site, Choice.of("linear", {"sink": 2, "window": 5, "features": 6})).any()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_alike(
    whole: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, model = tmp_path / "partial", NanoGPT().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    stages: list[str] = []

    def stop_at(stage: str) -> Any:
        def progress(what: str, done: int, of: int) -> None:
            stages.append(what)
            if what.startswith(stage) and done:
                raise Interrupted

        return progress

    # After the first site, and after the first sequence that is tried.
    for stage, sites, tried in ((f"fitting {SITES[1]}", 1, 2), ("trying", 2, 3)):
        with pytest.raises(Interrupted):
            distill_model(model, FIT, TRIED, MENU, progress=stop_at(stage), partial=partial)
        left = Fitted.load(partial)
        assert len(left.means) == sites and len(left.header.data) == tried
    stages.clear()
    again = distill_model(model, FIT, TRIED, MENU, progress=stop_at("never"), partial=partial)
    assert {stage.partition(":")[0] for stage in stages} == {"tracing", "trying"}
    assert {f"trying: {site}" for site in SITES} <= set(stages)
    assert again.to_bytes() == whole.to_bytes()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())

    # Of another seed, other settings or other text nothing is taken up.
    fit_marks = tuple(mark for mark in whole.header.data if mark.endswith("-fit"))
    tried = set(whole.header.data) - set(fit_marks)
    for other in (replace(whole.header, seed=1), replace(whole.header, settings="")):
        assert distill.resumed(Fitted(replace(other, data=fit_marks)), partial, tried).maps == {}
    alike = Fitted(replace(whole.header, data=fit_marks))
    assert distill.resumed(alike, partial, tried).maps != {}
    assert distill.resumed(alike, partial, set()).maps == {}
    assert distill.resumed(Fitted(replace(whole.header, data=("0-fit",))), partial, tried).maps == {}


def test_maps_that_break_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not finite on rows held out: not fitted. Not finite on text it was not fitted to: not offered."""
    menu = Menu((), (3,), (4,), (2,), families=("taylor",))
    expansion = distill.SiteFit.expansion

    def broken(self: Any, rank: int) -> Any:
        map, fits = expansion(self, rank)
        map.wq[1] = 3e38
        return map, fits

    monkeypatch.setattr(distill.SiteFit, "expansion", broken)
    # What is tried may weigh its tokens.
    weights = torch.zeros(LENGTH)
    weights[-8:] = 1.0
    made = distill_model(build("llama", num_hidden_layers=1), FIT, [Sample(TRIED[0], weights)], menu)
    assert made.trials["model.layers.0.self_attn", LENGTH].tokens == 8.0
    choice = Choice.of("taylor", {"sink": 2, "window": 4, "rank": 3})
    refused = [fit.refused for fit in made.fits["model.layers.0.self_attn", "taylor/3"]]
    assert refused == ["", "outputs were not finite on the text tried", "", ""]
    assert not made.offered("model.layers.0.self_attn", choice)[1]
    assert Fitted.from_bytes(made.to_bytes(), "again").to_bytes() == made.to_bytes()


def test_what_cannot_be_distilled(profile: Profile) -> None:
    model = build("llama", num_hidden_layers=1)
    with pytest.raises(FittedError, match="1 sequences to fit on"):
        distill_model(model, FIT[:1], TRIED, MENU)
    with pytest.raises(FittedError, match="fitted and tried on"):
        distill_model(model, FIT, [*TRIED, FIT[0]], MENU)
    with pytest.raises(FittedError, match="No key of 64 tokens lies beyond 66"):
        distill_model(model, FIT, TRIED, Menu((6,), (3,), (64,), (2,)))
    with pytest.raises(FittedError, match="at any of the 1 attentions"):
        distill_model(
            build("mistral", num_hidden_layers=1), FIT, TRIED, Menu((6,), (), (4,), (2,), families=("linear",))
        )
    with pytest.raises(OptionError, match="not ascending"):
        Menu(windows=(128, 64))
    with pytest.raises(OptionError, match="no family hedgehog"):
        Menu(families=("linear", "hedgehog"))
    with pytest.raises(OptionError, match="Without a window"):
        Menu(windows=())
    with pytest.raises(ProfileError, match="another model"):
        distill_model(model, FIT, TRIED, MENU, profile=profile)
