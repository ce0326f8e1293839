"""Files of fits: what is offered and why not, what a plan takes of them, and files that are refused with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnopt.errors import FittedError
from attnopt.feature_maps import NAMES, FeatureMap, shapes
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import KEY, Fitted, Header, HeadFit
from attnopt.ir import DENSE, Choice
from attnopt.statistics.trials import Trials

safetensors = pytest.importorskip("safetensors.torch")

PRINT = Fingerprint("00ff00ff00ff00ff", (0.125, 0.5))
SITES, H, D, LENGTHS = ("layers.0.attn", "layers.1.attn"), 3, 4, (32, 64)
WINDOW = Choice.of("sink_window", {"sink": 2, "alpha": 8, "beta": 0.0})
LINEAR = Choice.of("linear", {"sink": 2, "window": 8, "features": 6})
TAYLOR = Choice.of("taylor", {"sink": 2, "window": 8, "rank": 2})
MEAN = Choice.of("compensation", {"sink": 2, "alpha": 8, "beta": 0.0})
PRUNED = Choice("pruned")
CHOICES = (WINDOW, LINEAR, TAYLOR, MEAN, PRUNED)


def map_of(kind: str, rank: int) -> FeatureMap:
    return FeatureMap(kind, *(torch.randn(shape) for shape in shapes(H, rank, D).values()))


def fitted() -> Fitted:
    torch.manual_seed(0)
    made = Fitted(Header(PRINT, ("a-fit", "b-0"), LENGTHS, 3, "features 6"))
    for site in SITES:
        made.add_map(site, "linear/6", map_of("exp", 6), [HeadFit("learned", 0.25)] * H)
        made.add_map(site, "taylor/2", map_of("taylor", 2), [HeadFit("expansion", 0.1 * h) for h in range(H)])
        made.means[site] = torch.randn(H, D)
        for length in LENGTHS:
            sums = Trials.zeros(H, CHOICES)
            sums.t2 += torch.rand(H, len(CHOICES), dtype=torch.float64)
            sums.t1 += torch.randn(H, len(CHOICES), dtype=torch.float64)
            sums.tokens = float(length)
            made.trials[site, length] = sums
    return made


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    made = fitted()
    made.save(tmp_path / "f")
    again = Fitted.load(tmp_path / "f")
    assert again.header == made.header and again.fits == made.fits and again.held == made.held
    assert again.sites == SITES and again.choices(SITES[0]) == CHOICES
    for key, found in made.maps.items():
        assert again.maps[key].kind == found.kind
        assert all(torch.equal(x, y) for x, y in zip(again.maps[key].tensors, found.tensors, strict=True))
    for choice in CHOICES:
        assert torch.equal(again.damage(SITES[1], 64, choice), made.damage(SITES[1], 64, choice))
    assert again.to_bytes() == made.to_bytes() == (tmp_path / "f").read_bytes()
    again.check_model(PRINT)
    with pytest.raises(FittedError, match="another model"):
        again.check_model(replace(PRINT, structure="11ff00ff00ff00ff"))


@pytest.mark.parametrize("choice", [LINEAR, TAYLOR, MEAN], ids=str)
def test_offered_is_what_beats_its_own_window(choice: Choice) -> None:
    made = fitted()
    at, plain = CHOICES.index(choice), CHOICES.index(WINDOW)
    short, long = (made.trials[SITES[0], n].t2 for n in LENGTHS)
    short[:, plain] = long[:, plain] = 1.0
    # Better at both; better at one and worse at the other; equal at both.
    short[:, at], long[:, at] = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0.5, 1.1, 1.0])
    assert made.offered(SITES[0], choice).tolist() == [True, False, False]
    short[1:, at], long[1:, at] = 1.0, torch.tensor([0.9, 1.0])
    assert made.offered(SITES[0], choice).tolist() == [True, True, False]
    assert made.offered(SITES[0], PRUNED).all()
    if choice != MEAN:
        name = "linear/6" if choice == LINEAR else "taylor/2"
        made.fits[SITES[0], name] = (HeadFit("random", 0.1, "not finite"), *made.fits[SITES[0], name][1:])
        assert made.offered(SITES[0], choice).tolist() == [False, True, False]
    # Without its window there is nothing that it is better than, and what was not tried is not offered.
    for trials in made.trials.values():
        trials.choices = tuple(Choice.of("dense") if c == WINDOW else c for c in trials.choices)
    assert not made.offered(SITES[0], choice).any()
    assert not made.offered(SITES[0], Choice.of("linear", {"sink": 0, "window": 8, "features": 6})).any()


def test_a_plan_takes_what_its_heads_use() -> None:
    made = fitted()
    choices = {SITES[0]: (LINEAR, DENSE, LINEAR), SITES[1]: (WINDOW, PRUNED, TAYLOR)}
    part = made.part_of(choices)
    assert part.held == {(SITES[0], "linear/6"): (0, 2), (SITES[1], "taylor/2"): (2,)}
    assert set(part.means) == {SITES[1]} and not part.trials
    again = Fitted.from_bytes(part.to_bytes(), "part")
    for site, name, heads in ((SITES[0], "linear/6", [2, 0]), (SITES[1], "taylor/2", [2])):
        for x, y in zip(again.map_of(site, name, heads).tensors, made.map_of(site, name, heads).tensors, strict=True):
            assert torch.equal(x, y)
    assert torch.equal(again.mean_of(SITES[1], [1]), made.means[SITES[1]][1:2])
    assert again.part_of(choices).to_bytes() == part.to_bytes()
    with pytest.raises(FittedError, match=r"no feature map linear/6 of head 1 of layers\.0\.attn"):
        again.map_of(SITES[0], "linear/6", [1])
    with pytest.raises(FittedError, match="no feature map taylor/2"):
        again.part_of({SITES[0]: (TAYLOR, DENSE, DENSE)})
    with pytest.raises(FittedError, match="no mean outputs"):
        again.part_of({SITES[0]: (PRUNED, DENSE, DENSE)})


def test_what_was_not_tried_has_no_damage() -> None:
    with pytest.raises(FittedError, match="tried are the lengths 32, 64"):
        fitted().damage(SITES[0], 128, LINEAR)
    with pytest.raises(FittedError, match="was not tried"):
        fitted().damage(SITES[0], 64, Choice.of("linear", {"sink": 2, "window": 8, "features": 7}))


def poison(made: Fitted, name: str) -> None:
    getattr(made.maps[SITES[0], "linear/6"], name).view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: poison(made, "wk"), "wk is not finite"),
        (lambda made: made.means[SITES[0]].view(-1)[:1].fill_(torch.inf), "mean outputs of layers.0.attn"),
        (lambda made: made.trials[SITES[0], 32].t1[:1].fill_(torch.nan), "t1 of the trials"),
        (lambda made: made.trials[SITES[0], 32].t2[:1].fill_(-1.0), "t2 of the trials"),
        (lambda made: made.held.update({(SITES[0], "linear/6"): (0, 2, 1)}), "expected ascending"),
        (lambda made: made.held.update({(SITES[0], "linear/6"): (0, 1)}), "it is of 3 heads"),
    ],
)
def test_numbers_that_must_not_be_used_are_not_written(change: Callable[[Fitted], object], words: str) -> None:
    made = fitted()
    change(made)
    with pytest.raises(FittedError, match=words):
        made.to_bytes()


def rewritten(path: Path, header: Callable[[dict], object] = lambda _: None, drop: str = "", **tensors) -> Path:
    content = fitted().to_bytes()
    size = int.from_bytes(content[:8], "little")
    data = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][KEY])
    header(data)
    held = {name: x for name, x in safetensors.load(content).items() if name != drop} | tensors
    path.write_bytes(safetensors.save(held, {KEY: json.dumps(data)}))
    return path


@pytest.mark.parametrize(
    ("header", "drop", "extra", "words"),
    [
        (lambda d: d.update(schema=9), "", {}, "format of fits 9"),
        (lambda d: d.pop("seed"), "", {}, "no 'seed'"),
        (lambda d: d.update(lengths=[0]), "", {}, "0 is not a whole number"),
        (lambda d: None, "map.0.wq", {}, r"no 'map\.0\.wq'"),
        (lambda d: None, "", {"map.9.wq": torch.zeros(1)}, "does not name: map.9.wq"),
        (lambda d: d["maps"][0].update(kind="sine"), "", {}, "'sine'"),
        (lambda d: d["maps"].append(d["maps"][0]), "", {}, "no 'map.4.wq'"),
        (lambda d: d["trials"][0]["choices"][1].update(features=0), "", {}, "features must be between"),
        (lambda d: d["trials"][0]["choices"][1].update(color=1), "", {}, "no choice of this attnopt"),
        (lambda d: d["trials"][0]["choices"][1].update(candidate="linnear"), "", {}, "no candidate"),
        (lambda d: d["trials"][0].update(tokens=0.0), "", {}, "nothing was tried"),
        (lambda d: d["trials"][0].update(rows=-1.0), "", {}, "-1.0 is no amount"),
        (lambda d: None, "", {"map.1.u": torch.zeros(H, D + 1)}, r"u is float32 \(3, 5\)"),
        (lambda d: None, "", {"trial.0.t2": torch.zeros(H, 2, dtype=torch.float64)}, "t2 of the trials"),
    ],
)
def test_files_that_contradict_themselves(header, drop, extra, words, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FittedError, match=words) as caught:
        Fitted.load(rewritten(tmp_path / "f", header, drop, **extra))
    assert caught.value.remedy


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "half").write_bytes(fitted().to_bytes()[:-7])
    (tmp_path / "other").write_bytes(safetensors.save({name: torch.zeros(1) for name in NAMES}))
    for name, words in {
        "none": "no file of fits", ".": "is a folder", "text": "not a safetensors", "half": "truncated",
        "other": "holds no fits",
    }.items():  # fmt: skip
        with pytest.raises(FittedError, match=words) as caught:
            Fitted.load(tmp_path / name)
        assert caught.value.remedy
