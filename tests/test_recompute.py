"""A graph in pieces computes what it does whole, keeps less, and its attentions count once."""

from __future__ import annotations

import pytest
import torch
from models import NanoGPT, build, tokens
from torch import nn

from attnopt import recompute
from attnopt.instrument import Instrumented, gradients_through
from attnopt.profiler import profile_model
from attnopt.statistics import Grid, attention

GRID = Grid((0, 2), (4, 8))
SEQUENCES = [tokens(1, 24, seed=n) for n in range(2)]


def made(name: str) -> nn.Module:
    return (
        NanoGPT(True).eval()
        if name == "nanogpt"
        else build(name, num_hidden_layers=4)
        if name == "llama"
        else build(name)
    )


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        pytest.param("llama", 1, marks=pytest.mark.full),
        ("llama", 2),
        ("gpt2", 1),
        pytest.param("mistral", 2, marks=pytest.mark.full),
        ("nanogpt", 1),
    ],
)
def test_profiles_are_the_same(name: str, draws: int) -> None:
    whole, pieces = (profile_model(made(name), SEQUENCES, GRID, draws=draws, recompute=r) for r in (False, True))
    assert whole.header == pieces.header and list(whole.observations) == list(pieces.observations)
    for key, seen in whole.observations.items():
        again = pieces.observations[key]
        assert (seen.rows, seen.samples) == (again.rows, again.samples)
        for sum_name in seen.sums:
            torch.testing.assert_close(again.sums[sum_name], seen.sums[sum_name], rtol=1e-6, atol=1e-12)


def instrumented(model: nn.Module, pieces: bool) -> Instrumented:
    return Instrumented(model, lambda site: lambda q, k, v, pad: attention(q, k, v, site.scale, pad, None), pieces)


def kept_bytes(model: nn.Module, pieces: bool) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass, parameters aside."""
    own, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()
    run = instrumented(model, pieces)

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = tokens(1, 128)
    with gradients_through(model):
        run.logits(ids)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = run.logits(ids)
    assert logits.requires_grad
    return sum(kept.values())


def test_less_is_kept() -> None:
    """Layers add what passes between them, not what they compute inside."""
    few, many = (build("llama", num_hidden_layers=n) for n in (1, 3))
    whole = kept_bytes(many, False) - kept_bytes(few, False)
    pieces = kept_bytes(many, True) - kept_bytes(few, True)
    hidden = 128 * many.config.hidden_size * 4
    assert 0 < pieces <= 2 * 2 * hidden < whole / 4


def test_cuts_carry_the_residual_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cut = build("llama", num_hidden_layers=3), []
    in_pieces = recompute.piece

    def watched(gm, nodes):  # type: ignore[no-untyped-def]
        cut.append(in_pieces(gm, nodes))
        return cut[-1]

    monkeypatch.setattr(recompute, "piece", watched)
    run = instrumented(model, True)
    with gradients_through(model):
        run.logits(tokens(1, 24))
    assert len(cut) == 3
    for part in cut[:-1]:
        shapes = [
            tuple(n.meta["val"].shape) for n in part.gives if n.meta["val"].requires_grad or n.meta["val"].ndim == 3
        ]
        assert (1, 24, model.config.hidden_size) in shapes
        assert sum(recompute.size_of(n) for n in part.gives) <= 24 * 4 * (model.config.hidden_size + 4 * 64)
