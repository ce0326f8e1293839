"""Profiling a model: the same statistics however attention is spelled, and a run that can be interrupted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import HEADS, LAYERS, NanoGPT, build, tokens

from attnopt import profiler
from attnopt.errors import ModelError, ProfileError
from attnopt.profile_file import Profile, merged
from attnopt.profiler import observed_loss, profile_model
from attnopt.statistics import Grid

GRID = Grid((0, 2), (4, 8))
SEQUENCES = [tokens(1, 24, seed=n) for n in range(3)]


def equal(one: Profile, other: Profile, rtol: float = 1e-5) -> None:
    assert one.header == other.header and list(one.observations) == list(other.observations)
    for key, seen in one.observations.items():
        again = other.observations[key]
        assert (seen.rows, seen.samples) == (again.rows, again.samples)
        for name in seen.sums:
            torch.testing.assert_close(seen.sums[name], again.sums[name], rtol=rtol, atol=1e-7 + rtol)


@pytest.fixture(scope="module")
def whole():
    return profile_model(build("llama"), SEQUENCES, GRID)


def test_what_a_profile_holds(whole):
    assert whole.sites == tuple(f"model.layers.{n}.self_attn" for n in range(LAYERS)) and whole.lengths == (24,)
    assert whole.samples == {24: 3} and len(whole.header.data) == 3
    for seen in whole.observations.values():
        assert seen.heads == HEADS and seen.rows == 3 * 24 and (seen.t2 > 0).all()
        # Wider spans drop less: the windows' mass falls.
        assert (seen.mass[..., 0] >= seen.mass[..., 1]).all()


def test_a_run_is_reproducible(whole):
    equal(profile_model(build("llama"), SEQUENCES, GRID), whole, rtol=1e-9)


def test_sdpa_and_eager_give_equal_statistics(whole):
    eager = profile_model(build("llama", "eager"), SEQUENCES, GRID)
    assert eager.sites == whole.sites and eager.header.data == whole.header.data
    for key, seen in whole.observations.items():
        for name in seen.sums:
            torch.testing.assert_close(eager.observations[key].sums[name], seen.sums[name], rtol=1e-3, atol=1e-4)


def test_written_out_and_flash_give_equal_statistics():
    one, other = (profile_model(NanoGPT(flash).eval(), SEQUENCES[:1], GRID) for flash in (True, False))
    assert one.sites == other.sites == ("h.0", "h.1")
    for key, seen in one.observations.items():
        torch.testing.assert_close(other.observations[key].t2, seen.t2, rtol=1e-3, atol=1e-4)


def test_profiles_of_disjoint_text_merge_to_that_of_all(whole):
    parts = [(str(n), profile_model(build("llama"), [ids], GRID)) for n, ids in enumerate(SEQUENCES)]
    equal(merged(parts), whole, rtol=1e-12)
    equal(merged(reversed(parts)), whole, rtol=1e-12)
    with pytest.raises(ProfileError, match="0 and 0 observed the same text"):
        merged([*parts, parts[0]])
    with pytest.raises(ProfileError, match="grid: these profiles do not add"):
        merged([parts[0], ("grid", profile_model(build("llama"), SEQUENCES[1:2], Grid((0,), (4,))))])
    with pytest.raises(ProfileError, match="nothing to merge"):
        merged([])


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_a_profile_and_resumes(whole, tmp_path, monkeypatch):
    partial, counted = tmp_path / "partial.safetensors", []

    def stop(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        profile_model(build("llama"), SEQUENCES, GRID, progress=stop, partial=partial)
    left = Profile.load(partial)
    assert left.samples == {24: 2} and set(left.header.data) < set(whole.header.data)
    one_sequence = profiler.one_sequence
    monkeypatch.setattr(profiler, "one_sequence", lambda *a: counted.append(1) or one_sequence(*a))
    equal(profile_model(build("llama"), SEQUENCES, GRID, partial=partial), whole, rtol=1e-9)
    assert len(counted) == 1


def test_an_interruption_within_a_sequence_counts_nothing_of_it(tmp_path, monkeypatch):
    partial, calls = tmp_path / "partial.safetensors", []

    def loss(logits, generator):
        calls.append(1)
        value = observed_loss(logits, generator)
        if len(calls) == 2:
            value.register_hook(lambda _: (_ for _ in ()).throw(Interrupted()))
        return value

    model = build("llama")
    monkeypatch.setattr(profiler, "observed_loss", loss)
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
        model = build("llama", seed=9) if other == "model" else build("llama")
        grid = GRID if other == "model" else Grid((0,), (4,))
        profile_model(model, SEQUENCES[:1], grid, partial=partial)
    found = profile_model(build("llama"), SEQUENCES, GRID, partial=partial)
    equal(found, whole, rtol=1e-9)


def test_another_seed_draws_other_labels(whole):
    again = profile_model(build("llama"), SEQUENCES, GRID, seed=1)
    (name, *_), seen = next(iter(whole.observations)), next(iter(whole.observations.values()))
    assert not torch.allclose(again.observations[name, 24].t2, seen.t2, rtol=1e-3)
    assert set(again.header.data).isdisjoint(whole.header.data)


def test_labels_come_from_the_model_itself():
    """A distribution that is certain gives its own token and no loss, whatever the text says."""
    logits = torch.full((1, 2500, 5), -50.0)
    logits[..., 3] = 50.0
    assert observed_loss(logits, torch.Generator().manual_seed(0)).item() == 0.0
    uniform = observed_loss(torch.zeros(1, 2500, 5), torch.Generator().manual_seed(0))
    assert uniform.item() == pytest.approx(2500 * torch.tensor(5.0).log().item(), rel=1e-4)


def test_no_text():
    with pytest.raises(ProfileError, match="no text"):
        profile_model(build("llama"), [], GRID)


def test_a_model_without_attention():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(61, 16)

        def forward(self, ids):
            return F.linear(self.wte(ids), self.wte.weight)

    with pytest.raises(ModelError, match="no attention was found"):
        profile_model(Plain(), SEQUENCES, GRID)
