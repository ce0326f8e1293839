"""Profiling a model: the same statistics however attention is spelled, and a run that can be interrupted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import HEADS, LAYERS, NanoGPT, build, tokens

from attnopt import profiler
from attnopt.errors import ModelError, OptionError, ProfileError
from attnopt.profile_file import Profile, merged
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from attnopt.supervision import Sample, loss_and_gradient

pytestmark = pytest.mark.slow

GRID = Grid((0, 2), (4, 8))
SEQUENCES = [tokens(1, 24, seed=n) for n in range(3)]


def equal(one: Profile, other: Profile, rtol: float = 1e-5) -> None:
    assert one.header == other.header and list(one.observations) == list(other.observations)
    for key, seen in one.observations.items():
        again = other.observations[key]
        assert (seen.rows, seen.samples) == (again.rows, again.samples)
        for name in seen.sums:
            torch.testing.assert_close(seen.sums[name], again.sums[name], rtol=rtol, atol=1e-7 + rtol)


def small(seed=0):
    """Written by hand: a model of transformers takes five times as long to trace."""
    model = NanoGPT(flash=True).eval()
    with torch.no_grad():
        model.head.weight.mul_(1 + seed)
    return model


@pytest.fixture(scope="module")
def whole():
    return profile_model(small(), SEQUENCES, GRID)


def test_what_a_profile_holds(whole):
    assert whole.sites == tuple(f"h.{n}" for n in range(LAYERS)) and whole.lengths == (24,)
    assert whole.samples == {24: 3} and len(whole.header.data) == 3
    for seen in whole.observations.values():
        assert seen.heads == HEADS and seen.rows == 3 * 24 and (seen.t2 > 0).all()
        # Wider spans drop less: the windows' mass falls.
        assert (seen.mass[..., 0] >= seen.mass[..., 1]).all()


def test_a_run_is_reproducible(whole):
    equal(profile_model(small(), SEQUENCES, GRID), whole, rtol=1e-9)


def test_sdpa_and_eager_give_equal_statistics():
    sdpa, eager = (
        profile_model(build("llama", spelling, num_hidden_layers=1), SEQUENCES, GRID) for spelling in ("sdpa", "eager")
    )
    assert sdpa.sites == ("model.layers.0.self_attn",)
    assert eager.sites == sdpa.sites and eager.header.data == sdpa.header.data
    for key, seen in sdpa.observations.items():
        for name in seen.sums:
            torch.testing.assert_close(eager.observations[key].sums[name], seen.sums[name], rtol=1e-3, atol=1e-4)


def test_written_out_and_flash_give_equal_statistics():
    one, other = (profile_model(NanoGPT(flash).eval(), SEQUENCES[:1], GRID) for flash in (True, False))
    assert one.sites == other.sites == ("h.0", "h.1")
    for key, seen in one.observations.items():
        torch.testing.assert_close(other.observations[key].t2, seen.t2, rtol=1e-3, atol=1e-4)


def test_profiles_of_disjoint_text_merge_to_that_of_all(whole):
    parts = [(str(n), profile_model(small(), [ids], GRID)) for n, ids in enumerate(SEQUENCES)]
    equal(merged(parts), whole, rtol=1e-12)
    equal(merged(reversed(parts)), whole, rtol=1e-12)
    with pytest.raises(ProfileError, match="0 and 0 observed the same text"):
        merged([*parts, parts[0]])
    with pytest.raises(ProfileError, match="grid: these profiles do not add"):
        merged([parts[0], ("grid", profile_model(small(), SEQUENCES[1:2], Grid((0,), (4,))))])
    with pytest.raises(ProfileError, match="nothing to merge"):
        merged([])


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_a_profile_and_resumes(whole, tmp_path, monkeypatch):
    partial, counted = tmp_path / "partial.safetensors", []
    stages, told = [], []

    def stop(what, done, of):
        stages.append(what)
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        profile_model(small(), SEQUENCES, GRID, progress=stop, partial=partial)
    left = Profile.load(partial)
    assert left.samples == {24: 2} and set(left.header.data) < set(whole.header.data)
    one_sequence = profiler.one_sequence
    monkeypatch.setattr(profiler, "one_sequence", lambda *a: counted.append(1) or one_sequence(*a))
    equal(profile_model(small(), SEQUENCES, GRID, partial=partial, tell=told.append), whole, rtol=1e-9)
    assert len(counted) == 1 and told == [f"Going on from {partial}: 2 of 3 passes are done."]
    assert stages[0] == "tracing"
    assert "profiling: 24 tokens, h.1, backward" in stages


def test_a_partial_file_of_more_text_is_not_taken_up(whole, tmp_path):
    """It would come back with text that was not asked for."""
    partial, told = tmp_path / "partial.safetensors", []
    profile_model(small(), SEQUENCES, GRID, partial=partial)
    found = profile_model(small(), SEQUENCES[:1], GRID, partial=partial, tell=told.append)
    assert found.samples == {24: 1} and "not taken up" in told[0]


def test_an_interruption_within_a_sequence_counts_nothing_of_it(tmp_path, monkeypatch):
    partial, calls = tmp_path / "partial.safetensors", []

    def loss(logits, *rest):
        calls.append(1)
        if len(calls) == 2:
            logits.register_hook(lambda _: (_ for _ in ()).throw(Interrupted()))
        return loss_and_gradient(logits, *rest)

    model = build("llama", num_hidden_layers=1)
    monkeypatch.setattr(profiler, "loss_and_gradient", loss)
    with pytest.raises(Interrupted):
        profile_model(model, SEQUENCES, GRID, partial=partial)
    assert Profile.load(partial).samples == {24: 1}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("other", ["model", "grid", "garbage"])
def test_a_partial_file_of_something_else_is_not_taken_up(other, tmp_path, whole):
    partial = tmp_path / "partial.safetensors"
    if other == "garbage":
        partial.write_bytes(b"\x00" * 64)
    else:
        model = small(seed=9) if other == "model" else small()
        grid = GRID if other == "model" else Grid((0,), (4,))
        profile_model(model, SEQUENCES[:1], grid, partial=partial)
    found = profile_model(small(), SEQUENCES, GRID, partial=partial)
    equal(found, whole, rtol=1e-9)


def test_another_seed_draws_other_labels(whole):
    again = profile_model(small(), SEQUENCES, GRID, seed=1)
    (name, *_), seen = next(iter(whole.observations)), next(iter(whole.observations.values()))
    assert not torch.allclose(again.observations[name, 24].t2, seen.t2, rtol=1e-3)
    assert set(again.header.data).isdisjoint(whole.header.data)


def observed(model, samples, **how):
    return next(iter(profile_model(model, samples, GRID, **how).observations.values()))


def test_several_draws_are_several_samples(whole):
    three = profile_model(small(), SEQUENCES, GRID, draws=3)
    assert three.samples == {24: 9} and set(whole.header.data) < set(three.header.data)
    for key, seen in three.observations.items():
        assert seen.rows == seen.tokens == 9 * 24
        first = whole.observations[key]
        # Each pass over the same text: what does not depend on labels is three times as much.
        torch.testing.assert_close(seen.mass, 3 * first.mass)
        assert not torch.allclose(seen.t2, 3 * first.t2, rtol=1e-3)


def test_draws_that_are_there_are_not_drawn_again(tmp_path):
    partial = tmp_path / "partial.safetensors"
    profile_model(small(), SEQUENCES, GRID, partial=partial)
    more = profile_model(small(), SEQUENCES, GRID, draws=2, partial=partial)
    equal(more, profile_model(small(), SEQUENCES, GRID, draws=2), rtol=1e-6)


def test_scalars_of_samples_are_their_sums(whole, monkeypatch):
    """One per draw and sequence, alike for all sites; together they are t1, and few are a choice of marks alone."""
    draws = profile_model(small(), SEQUENCES, GRID, draws=2)
    kept = draws.sample_t1(24)
    assert list(draws.scalars[24]) == list(draws.header.data) and set(kept) == set(draws.sites)
    for (site, _), seen in draws.observations.items():
        assert kept[site].shape == (6, HEADS, 2, 2) and kept[site].dtype == torch.float32
        scale = kept[site].abs().sum(0).double()
        assert ((kept[site].double().sum(0) - seen.t1).abs() <= 1e-5 * scale + 1e-12).all()
        assert ((kept[site].double().square().sum(0) / seen.sample_sq - 1).abs() < 1e-3).all()
    monkeypatch.setattr("attnopt.profile_file.MOST_SCALARS", 2)
    parts = [profile_model(small(), [ids], GRID) for ids in SEQUENCES]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = parts[order[0]] + parts[order[1]] + parts[order[2]]
        assert list(total.scalars[24]) == sorted(whole.header.data)[:2]
        for site, found in total.sample_t1(24).items():
            torch.testing.assert_close(found, whole.sample_t1(24)[site][:2], rtol=1e-5, atol=1e-9)


def test_masked_tokens_have_no_loss():
    """Weights that leave one token to predict give the statistics of that token's loss alone, by autograd."""
    model, ids = small(), SEQUENCES[0]
    weights = torch.zeros(24)
    weights[20] = 1.0
    seen = observed(model, [Sample(ids, weights)], labels="data")
    assert (seen.rows, seen.counted) == (24, 1.0)
    logits = model(ids)[0, 19].detach().requires_grad_()
    gradient = torch.zeros(1, 24, logits.numel())
    (gradient[0, 19],) = torch.autograd.grad(F.cross_entropy(logits[None], ids[0, 20:21]), logits)
    found = loss_and_gradient(model(ids), Sample(ids, weights), "data", torch.Generator())[1]
    torch.testing.assert_close(found, gradient)
    # Rows after it cannot matter: the same text, cut there.
    short = observed(model, [Sample(ids[:, :21], weights[:21])], labels="data")
    torch.testing.assert_close(short.t2, seen.t2, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("labels, power", [("model", 1), ("data", 2)])
def test_a_weight_weighs_the_divergence_or_the_loss(labels, power):
    plain, weighed = (
        observed(small(), [Sample(SEQUENCES[0], torch.full((24,), w))], labels=labels) for w in (1.0, 4.0)
    )
    assert (plain.counted, weighed.counted) == (23.0, 92.0)
    # The labels of model draws are those of another seed: the weights are part of what seeds them.
    if labels == "data":
        torch.testing.assert_close(weighed.t2, 4.0**power * plain.t2, rtol=1e-4, atol=1e-12)
    else:
        factors = [loss_and_gradient(torch.zeros(1, 24, 61), Sample(SEQUENCES[0], torch.full((24,), w)), "model",
                                     torch.Generator().manual_seed(0))[1] for w in (1.0, 4.0)]  # fmt: skip
        torch.testing.assert_close(factors[1], 2.0 * factors[0])


def test_a_probe_is_observed_beside_the_text(whole, tmp_path):
    weights = torch.zeros(24)
    weights[20:] = 1.0
    asked = Sample(tokens(1, 24, seed=9), weights, "probe", 4.0)
    made = profile_model(small(), [*SEQUENCES, asked, asked], GRID, draws=1)
    assert len(made.header.data) == 4 and "model labels on probe answers, softened 4 times" in made.header.supervision
    assert made.samples == whole.samples and list(made.scalars[24]) == list(whole.scalars[24])
    alone = profile_model(small(), [Sample(asked.ids, asked.weights, "chat", 4.0)], GRID)
    for key, seen in made.observations.items():
        # What is known of the text is what it is without a probe.
        assert all(torch.equal(seen.sums[name], tensor) for name, tensor in whole.observations[key].sums.items())
        assert seen.tokens == whole.observations[key].tokens and seen.of_probe.tokens == 4.0
        assert (seen.probe["t2"] > 0).all() and seen.probe["t2"].shape == seen.t2.shape
        torch.testing.assert_close(alone.observations[key].tokens, seen.of_probe.tokens)
    # A process, or a part of a run, may have seen nothing else.
    only = profile_model(small(), [asked], GRID)
    only.save(tmp_path / "probe")
    again = Profile.load(tmp_path / "probe")
    assert all(o.rows == o.samples == 0 and o.asked == 4.0 for o in again.observations.values())
    equal(merged([("text", whole), ("probe", again)], mixed=True), made, rtol=1e-12)


def test_profiles_of_other_supervision_do_not_add(whole):
    data = profile_model(small(), SEQUENCES, GRID, labels="data")
    assert data.header.supervision == ("data labels on text",) and whole.header.supervision == ("model labels on text",)
    with pytest.raises(ProfileError, match="the other data labels on text"):
        whole.add(data)
    assert merged([("a", whole), ("b", data)], mixed=True).samples == {24: 6}
    again = profile_model(small(), SEQUENCES, GRID, labels="data", seed=5)
    with pytest.raises(ProfileError, match="observed the same text"):
        merged([("a", data), ("b", again)])


def test_without_a_backward_pass(whole, tmp_path):
    """How far outputs move ranks heads much as damages do; what needs a loss is refused, not read as nothing."""
    model = small()
    seen = profile_model(model, SEQUENCES, GRID, forward_only=True)
    assert seen.header.supervision == (profiler.FORWARD,) and seen.header.held == (
        "delta", "entropy", "mass", "mass_at_key", "mass_by_distance",
    )  # fmt: skip
    for key, found in seen.observations.items():
        full = whole.observations[key]
        assert found.rows == 3 * 24  # one block is all there is at this length
        torch.testing.assert_close(found.mass, full.mass, rtol=1e-4, atol=1e-4)
        # The squared size of what moves, projected, with the model's own weights.
        assert torch.equal(found.scores(), found.delta / found.rows) and (found.delta > 0).all()
    seen.save(tmp_path / "p")
    with pytest.raises(ProfileError, match="does not hold t2") as caught:
        Profile.load(tmp_path / "p").observations[key].damage(0, 0, 4)
    assert "without --forward-only" in caught.value.remedy
    with pytest.raises(ProfileError, match="do not add"):
        whole.add(seen)
    with pytest.raises(OptionError, match="no labels"):
        profile_model(model, SEQUENCES, GRID, forward_only=True, labels="data")
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    with pytest.raises(ProfileError, match="not finite"):
        profile_model(model, SEQUENCES, GRID, forward_only=True)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model, partial = small(), tmp_path / "partial"
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    with pytest.raises(ProfileError, match="loss of a sequence of 24 tokens is not finite") as caught:
        profile_model(model, SEQUENCES, GRID, partial=partial)
    assert "--dtype fp32" in caught.value.remedy and not partial.exists()


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    """A finite loss whose gradient overflows on its way down."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    model, partial = small(), tmp_path / "partial"
    logits = profiler.Instrumented.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiler.Instrumented, "logits", lambda self, ids: Steep.apply(logits(self, ids)))
        with pytest.raises(ProfileError, match=r"h\.0 at length 24 is not finite"):
            profile_model(model, SEQUENCES, GRID, partial=partial)
    assert not partial.exists()


def test_no_text():
    with pytest.raises(ProfileError, match="no text"):
        profile_model(small(), [], GRID)


def test_a_model_without_attention():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(61, 16)

        def forward(self, ids):
            return F.linear(self.wte(ids), self.wte.weight)

    with pytest.raises(ModelError, match="no attention was found"):
        profile_model(Plain(), SEQUENCES, GRID)
