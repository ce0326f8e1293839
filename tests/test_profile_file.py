"""Profiles: they add, they survive the disk, and files that are not whole are refused with a remedy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.errors import ProfileError
from attnopt.fingerprint import Fingerprint
from attnopt.profile_file import KEY, Profile, merged
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation, stream

safetensors = pytest.importorskip("safetensors.torch")

GRID = Grid((0, 2), (4, 16, 32))
PRINT = Fingerprint("00ff00ff00ff00ff", (0.125, 0.5))


def profile(
    seed: int = 0, *, sites: tuple[str, ...] = ("layers.0.attn", "layers.1.attn"), lengths: tuple[int, ...] = (24, 40),
    grid: Grid = GRID, fingerprint: Fingerprint = PRINT, delta: bool = False, data: str = "text",
) -> Profile:  # fmt: skip
    torch.manual_seed(seed)
    result = Profile.empty(fingerprint, grid, [data], ["float32"], delta)
    for length in lengths:
        result.scalars[length] = {data: {site: torch.randn(4, len(grid.sinks), len(grid.windows)) for site in sites}}
        for site in sites:
            q, grad = torch.randn(2, 4, length, 8), torch.randn(2, 4, length, 8)
            k, v = torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
            stream(q, k, v, grad, 8**-0.5, None, result.observation(site, 4, length))
    return result


def same(a: Profile, b: Profile) -> bool:
    keys = list(a.observations)
    return (
        a.header == b.header
        and keys == list(b.observations)
        and all(_same_sums(a.observations[key], b.observations[key]) for key in keys)
        and a.scalars.keys() == b.scalars.keys()
        and all(torch.equal(t, b.sample_t1(n)[site]) for n in a.scalars for site, t in a.sample_t1(n).items())
    )


def _same_sums(a: Observation, b: Observation) -> bool:
    counts = (a.rows, a.samples, a.heads, a.length, a.held) == (b.rows, b.samples, b.heads, b.length, b.held)
    return (
        counts
        and (a.asked, a.probe.keys()) == (b.asked, b.probe.keys())
        and all(torch.equal(a.sums[name], b.sums[name]) for name in a.sums)
        and all(torch.equal(a.probe[name], b.probe[name]) for name in a.probe)
    )


def with_probe(one: Profile, asked: float = 7.0) -> Profile:
    """`one`, and as much again of a retrieval probe."""
    for seen in one.observations.values():
        seen.counted = asked
        probe = seen.as_probe()
        seen.counted = None
        seen += probe
    return one


def test_a_probe_stands_beside_the_text_and_adds(tmp_path: Path) -> None:
    plain, one, two = profile(), with_probe(profile()), with_probe(profile(1, data="more"), 3.0)
    one.save(tmp_path / "a.profile")
    assert same(one, Profile.load(tmp_path / "a.profile"))
    for key, seen in one.observations.items():
        assert seen.of_probe is not None and seen.of_probe.tokens == 7.0
        assert torch.equal(seen.of_probe.scores(), seen.t2 / 2 / 7.0)
        # What is known of the text is what it was.
        assert seen.tokens == plain.observations[key].tokens and torch.equal(seen.t2, plain.observations[key].t2)
        assert plain.observations[key].of_probe is None
    key = ("layers.0.attn", 24)
    both, mixed = (one + two).observations[key], (plain + two).observations[key]
    assert both.asked == 10.0 and mixed.asked == 3.0
    assert torch.equal(both.probe["t2"], one.observations[key].t2 + two.observations[key].t2)
    assert torch.equal(mixed.probe["t2"], two.observations[key].t2)


@pytest.mark.parametrize("delta", [False, True])
def test_round_trip_is_exact(tmp_path: Path, delta: bool) -> None:
    one = profile(delta=delta)
    one.save(tmp_path / "new" / "a.profile")
    again = Profile.load(tmp_path / "new" / "a.profile")
    assert same(one, again)
    assert again.lengths == (24, 40) and again.samples == {24: 2, 40: 2}
    assert again.sites == ("layers.0.attn", "layers.1.attn")
    assert again.header.held == one.observations["layers.0.attn", 24].held
    again.save(tmp_path / "b.profile")
    assert (tmp_path / "b.profile").read_bytes() == (tmp_path / "new" / "a.profile").read_bytes()
    assert [p.name for p in tmp_path.rglob("*.partial")] == []


def test_an_empty_profile_round_trips(tmp_path: Path) -> None:
    empty = profile(lengths=())
    empty.save(tmp_path / "a")
    assert same(Profile.load(tmp_path / "a"), empty)


def test_profiles_add(tmp_path: Path) -> None:
    one, two = profile(0, data="b"), profile(1, data="a", lengths=(40, 48))
    total = one + two
    key = ("layers.1.attn", 40)
    assert torch.equal(total.observations[key].t2, one.observations[key].t2 + two.observations[key].t2)
    assert total.samples == {24: 2, 40: 4, 48: 2}
    assert total.header.data == ("a", "b")
    assert one.samples == {24: 2, 40: 2}, "adding leaves the terms as they were"
    one.add(two)
    assert same(one, total)
    total.save(tmp_path / "a")
    assert same(Profile.load(tmp_path / "a"), total)


@pytest.mark.parametrize(
    "other, problem",
    [
        (lambda: profile(grid=Grid((0,), (4,))), "grid"),
        (lambda: profile(delta=True), "held"),
        (lambda: profile(fingerprint=Fingerprint("another", (0.125, 0.5))), "class, configuration"),
        (lambda: profile(fingerprint=replace(PRINT, samples=(0.125, 0.6))), "different weights"),
    ],
)
def test_profiles_that_do_not_add(other: Callable[[], Profile], problem: str) -> None:
    one = profile()
    with pytest.raises(ProfileError, match=problem):
        one.add(other())
    assert same(one, profile())


def test_profiles_of_other_supervision_add_on_purpose_only(tmp_path: Path) -> None:
    one, two = profile(0, data="a"), profile(1, data="b")
    two.header = replace(two.header, supervision=("data labels on chat answers",))
    two.observations["layers.0.attn", 24].counted = 3.5
    with pytest.raises(ProfileError, match="model labels on text, the other data labels on chat answers") as caught:
        merged([("one", one), ("two", two)])
    assert "--mixed" in caught.value.remedy
    both = merged([("one", one), ("two", two)], mixed=True)
    assert both.header.supervision == ("data labels on chat answers", "model labels on text")
    assert both.observations["layers.0.attn", 24].tokens == one.observations["layers.0.attn", 24].rows + 3.5
    both.save(tmp_path / "a")
    assert same(Profile.load(tmp_path / "a"), both)
    assert Profile.load(tmp_path / "a").observations["layers.0.attn", 24].tokens == 51.5


def test_statistics_that_were_not_gathered_are_refused(tmp_path: Path) -> None:
    """A profile without a backward pass is read, and what needs one says so when it asks."""
    forward = Profile.empty(PRINT, GRID, ["text"], ["float32"], delta=True, backward=False)
    qkv = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2))
    stream(*qkv, None, 8**-0.5, None, forward.observation("layers.0.attn", 4, 24))
    forward.save(tmp_path / "a")
    seen = Profile.load(tmp_path / "a").observations["layers.0.attn", 24]
    assert (seen.delta > 0).any()
    with pytest.raises(ProfileError, match="does not hold t2") as caught:
        CANDIDATES["sink_window"].damage(seen, {"sink": 0, "alpha": 8, "beta": 0.0}, 24)
    assert "without --forward-only" in caught.value.remedy
    with pytest.raises(ProfileError, match="held"):
        profile().add(forward)


def test_a_cast_model_is_the_same_model() -> None:
    rounded = replace(PRINT, samples=(0.1255, 0.499))
    assert (profile() + profile(1, fingerprint=rounded)).samples[24] == 4
    profile().check_model(rounded)
    with pytest.raises(ProfileError, match="another model"):
        profile().check_model(Fingerprint("another", PRINT.samples))


def test_heads_of_a_site_do_not_change() -> None:
    with pytest.raises(ProfileError, match="4 heads"):
        profile().observation("layers.0.attn", 8, 24)


def refused(path: Path, problem: str) -> None:
    with pytest.raises(ProfileError, match=problem) as caught:
        Profile.load(path)
    assert caught.value.remedy


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no profile")
    refused(tmp_path, "folder")


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    profile(lengths=(24,)).save(path)
    content = path.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path, "truncated or not a safetensors file")


def test_not_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("hello, this is some text and not a profile")
    refused(path, "not a safetensors file")
    path.write_bytes(pickle.dumps({"x": torch.zeros(3)}))
    refused(path, "not a safetensors file")
    path.write_bytes(safetensors.save({"x": torch.zeros(3)}))
    refused(path, "not a profile")
    path.write_bytes(safetensors.save({}, {KEY: "{"}))
    refused(path, "header")


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Write a profile again with its header or its tensors changed."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][KEY])
    tensors = safetensors.load(content)
    change(header, tensors)
    path.write_bytes(safetensors.save(tensors, {KEY: json.dumps(header)}))


EDITS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "schema": (lambda h, t: h.update(schema=99), "format 99"),
    "no schema": (lambda h, t: h.pop("schema"), "header"),
    "no grid": (lambda h, t: h.pop("grid"), "contradicts itself: no 'grid'"),
    "grid": (lambda h, t: h["grid"]["windows"].append(64), "mass of layers.0.attn is"),
    "grid descends": (lambda h, t: h["grid"].update(windows=[32, 16, 4]), "ascending"),
    "grid of fractions": (lambda h, t: h["grid"].update(windows=[4.5]), "not a count"),
    "heads": (lambda h, t: h["observations"][1].update(heads=5), "ablation_t2 of layers.1.attn is"),
    "length": (lambda h, t: h["observations"][0].update(length=99), "mass_by_distance of layers.0.attn"),
    "rows": (lambda h, t: h["observations"][0].update(rows=10**6), "1000000 rows"),
    "samples": (lambda h, t: h["samples"].update({"24": 3}), "numbers of samples"),
    "lengths": (lambda h, t: h.update(lengths=[40]), "lengths"),
    "twice": (lambda h, t: h["observations"][1].update(site="layers.0.attn"), "twice"),
    "held": (lambda h, t: h["held"].append("x"), "does not know"),
    "fingerprint": (lambda h, t: h.update(fingerprint=3), "fingerprint"),
    "versions": (lambda h, t: h.update(versions=[["torch"]]), "contradicts itself"),
    "tokens": (lambda h, t: h["observations"][0].update(tokens=-1.0), "no sum of weights"),
    "no supervision": (lambda h, t: h.pop("supervision"), "no 'supervision'"),
    "shape": (lambda h, t: t.update({"0.t2": torch.zeros(4, 2, 2, dtype=torch.float64)}), "t2 of layers.0.attn is"),
    "dtype": (lambda h, t: t.update({"0.t2": torch.zeros(4, 2, 3)}), "torch.float32"),
    "nan": (lambda h, t: t["1.mass"].fill_(float("nan")), "mass of layers.1.attn is not finite"),
    "negative": (lambda h, t: t["1.t2"].neg_(), "negative"),
    "sample": (lambda h, t: t["1.sample_t1"].fill_(float("nan")), "sample_t1 of layers.1.attn"),
    "missing sample": (lambda h, t: t.pop("0.sample_t1"), "sample_t1 of layers.0.attn"),
    "unknown sample": (lambda h, t: h["sampled"].update({"24": ["x"]}), "not among the text"),
    "unnamed sample": (lambda h, t: h["sampled"].clear(), "does not name"),
    "missing tensor": (lambda h, t: t.pop("1.entropy"), "entropy of layers.1.attn at length 24 is missing"),
    "foreign tensor": (lambda h, t: t.update(x=torch.zeros(1)), "does not name: x"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited(tmp_path: Path, case: str) -> None:
    change, problem = EDITS[case]
    profile(lengths=(24,)).save(tmp_path / "a")
    edit(tmp_path / "a", lambda h, t: None)
    assert same(Profile.load(tmp_path / "a"), profile(lengths=(24,)))
    edit(tmp_path / "a", change)
    refused(tmp_path / "a", problem)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile(0).save(tmp_path / "a")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("attnopt.profile_file.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        profile(1).save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert same(Profile.load(tmp_path / "a"), profile(0))


def test_sums_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = profile(lengths=(24,))
    broken.observations["layers.1.attn", 24].t1[0] = float("inf")
    with pytest.raises(ProfileError, match=r"layers.1.attn at length 24 is not finite"):
        broken.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
