"""What the models of the mixture benchmarks are trained on, and the benchmarks themselves at their smallest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnopt.feature_maps import FeatureMap
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted, Header, HeadFit
from attnopt.ir import DENSE, Choice, Mask, Site
from benchmarks import linear_decode, mixture
from benchmarks.mixtures import subject as subject_module
from benchmarks.mixtures import trained
from benchmarks.mixtures.decoding import Layer, Token, cache_bytes, expected
from benchmarks.mixtures.documents import DIFFUSE, RECALL, Documents
from benchmarks.mixtures.subject import Sizes, Subject
from benchmarks.record import relative_error

SMALL = Documents("small", 3, 4, 0.5, 0.7)


@pytest.mark.parametrize("window", [None, 2, 5, 8, 400])
def test_the_best_loss_is_that_of_counting_what_is_seen(window):
    """A query at position 2n sees the `window` positions up to its own."""
    ids = SMALL.sequences("verify", 120, 2)
    found = SMALL.best_losses(ids, window)
    for row, losses in zip(ids.tolist(), found.tolist(), strict=True):
        for n, loss in enumerate(losses):
            first = 0 if window is None else max(0, 2 * n - window + 1)
            seen = [row[at] for at in range(first, 2 * n + 1) if at % 2]
            own = [value for value in seen if (value - 3) // 4 == row[2 * n]]
            share = (own.count(row[2 * n + 1]) + 0.5) / (len(own) + 4 * 0.5)
            assert loss == pytest.approx(-math.log(share))


def test_documents_alternate_and_splits_differ():
    for kind in (SMALL, DIFFUSE, RECALL):
        ids = kind.sequences("calibrate", 201, 2)
        markers, values = ids[:, ::2], ids[:, 1::2]
        assert ids.shape == (2, 201) and ids.dtype == torch.int64
        assert bool((markers < kind.markers).all()) and int(values.max()) < kind.vocabulary
        assert bool(((values - kind.markers) // kind.values == markers[:, :-1]).all())
        assert torch.equal(ids, kind.sequences("calibrate", 201, 2))
        assert not torch.equal(ids, kind.sequences("verify", 201, 2))


def test_far_keys_are_worth_a_histogram_or_a_lookup():
    """What 64 tokens are short of, in nats per value, is what the two kinds of document are made for."""
    worth = {}
    for kind in (DIFFUSE, RECALL):
        ids = kind.sequences("verify", 4096, 1)
        near, everything = (kind.best_losses(ids, w)[:, 1024:].mean().item() for w in (64, None))
        worth[kind.name] = near - everything
    assert worth["diffuse"] > 0.3 and worth["recall"] > 0.9


def random_map(kind: str, heads: int, rank: int, dim: int, generator: torch.Generator) -> FeatureMap:
    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    # A map of the second order has no use for the squared norms.
    squares = [draw(heads).abs() if kind == "exp" else torch.zeros(heads) for _ in range(2)]
    query, key = ((draw(heads, rank, dim), draw(heads, rank), c) for c in squares)
    return FeatureMap(kind, *query, *key, draw(heads, dim), draw(heads))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [17, 40, 150])
def test_a_decoding_step_is_what_the_choices_say(kv_heads, length):
    """At 17 tokens some windows leave nothing far, or one key: the very one that leaves with this query."""
    generator = torch.Generator().manual_seed(length)
    site = Site("a", 0, "sdpa", 4, kv_heads, 16, 16, 0.3, "float32", Mask(causal=True))
    fitted = Fitted(Header(Fingerprint("x", (1.0,))), means={"a": torch.randn(4, 16, generator=generator)})
    fits = [HeadFit("random", 0.1)] * 4
    fitted.add_map("a", "linear/8", random_map("exp", 4, 8, 16, generator), fits)
    fitted.add_map("a", "taylor/3", random_map("taylor", 4, 3, 16, generator), fits)
    linear = Choice.of("linear", {"sink": 4, "window": 16, "features": 8})
    wider = Choice.of("linear", {"sink": 0, "window": 64, "features": 8})
    taylor = Choice.of("taylor", {"sink": 4, "window": 32, "rank": 3})
    mean = Choice.of("compensation", {"sink": 0, "alpha": 16, "beta": 0.0})
    plain, gone = Choice.of("sink_window", {"sink": 4, "alpha": 16, "beta": 0.0}), Choice.of("pruned")
    for choices in (
        (linear, taylor, mean, DENSE), (linear,) * 4, (gone, plain, DENSE, linear), (gone,) * 4,
        (mean, mean, gone, wider), (linear, wider, plain, plain), (plain, linear, wider, DENSE), (DENSE,) * 4,
    ):  # fmt: skip
        token = Token.random(site, length, batch=2)
        layer = Layer(site, token, choices, fitted)
        assert relative_error(layer.step(token.q), expected(site, token, choices, fitted)) < 1e-5, choices


def test_a_cache_holds_unions_and_states():
    site = Site("a", 0, "sdpa", 4, 2, 16, 8, 0.3, "bfloat16", Mask(causal=True))
    plain, gone = Choice.of("sink_window", {"sink": 4, "alpha": 16, "beta": 0.0}), Choice.of("pruned")
    linear = Choice.of("linear", {"sink": 0, "window": 32, "features": 8})
    per_key = (16 + 8) * 2
    assert cache_bytes(site, (DENSE,) * 4, 1000) == 2 * 1000 * per_key
    assert cache_bytes(site, (plain, linear, gone, gone), 1000) == 36 * per_key + 8 * 9 * 4
    assert cache_bytes(site, (plain, linear, gone, plain), 30) == (30 + 20) * per_key  # nothing is far in 30 tokens


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A model of one layer, hardly trained, profiled and fitted at its smallest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATTNOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setitem(trained.RECIPES, "diffuse", trained.Recipe(1, 32, 2, 2, 16, (64, 64), 128, 3))
        # Every length is traced anew by each of what looks into a model.
        patched.setattr(subject_module, "CHECKED", 160)
        sizes = Sizes((160,), 160, 1, 1, features=(8,), ranks=(2,), windows=(32,), steps=4)
        yield Subject("diffuse", sizes, lambda line: None)


@pytest.mark.slow
@pytest.mark.full
def test_every_family_is_measured_and_a_wrong_operator_has_no_figures(subject, monkeypatch, tmp_path):
    made = mixture.Mixture(subject, dict.fromkeys(mixture.OBJECTIVES, (0.6,)))
    rows = [row for objective in mixture.OBJECTIVES for row in made.rows(objective)]
    dense, *times = made.times(1)
    assert len(times) == len(rows) and dense > 0
    rows = [replace(r, timed=ms / dense) for r, ms in zip(rows, times, strict=True)]
    by = {(r.objective, r.families): r for r in rows}
    assert all(r.planned <= 0.6 + 1e-9 and r.error < 1e-5 and sum(r.heads.values()) == 2 for r in rows)
    spans = by["memory", "spans"]
    assert set(spans.heads) <= {"dense", "sink_window"} and spans.cache == pytest.approx(spans.planned)
    assert "pruned" not in by["memory", "no prune"].heads
    assert set(by["memory", "mean"].heads) <= {"dense", "sink_window", "compensation"}
    text = mixture.described("diffuse", rows, mixture.against_window(rows), subject.sizes)
    assert "| no taylor |" in text and "WRONG" not in text and "compensation tokens against plain windows" in text
    mixture.figure(rows, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").stat().st_size > 1000
    monkeypatch.setattr(Subject, "error", lambda self, choices: 0.1)
    (wrong,) = [
        r
        for r in mixture.Mixture(subject, dict.fromkeys(mixture.OBJECTIVES, (0.6,))).rows("memory")
        if r.families == "spans"
    ]
    assert wrong.increase is None and "WRONG" in str(wrong) and mixture.cell(wrong, "memory") == "WRONG"


def test_decoding_at_equal_loss_holds_what_was_asked(subject):
    rows, said = linear_decode.rows_of(subject, 160, 5.0, [1], 3)
    assert [r.case["plan"] for r in rows] == ["dense", "spans", "tails"]
    dense, spans, tails = (r.ratios for r in rows)
    assert dense["cache"] == 1.0 <= spans["cache"] and tails["cache, over spans"] == tails["cache"] / spans["cache"]
    assert len(said) == 2 and all(r.error < 1e-5 for r in rows)
    assert all(float(line.split("loss ")[1].split()[0]) <= 5.0 for line in said)


def test_operators_are_held_against_the_references(subject, monkeypatch):
    choices = {
        s.name: (Choice.of("linear", {"sink": 4, "window": 32, "features": 8}),) * s.heads for s in subject.sites
    }
    assert subject.error(choices) < 1e-5
    right = subject_module.attend
    monkeypatch.setattr(subject_module, "attend", lambda *given: right(*given) * 1.01)
    assert subject.error(choices) == pytest.approx(0.01, rel=0.01)
