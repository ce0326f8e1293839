"""Spans measured through the kernels against the plain model, and the plain model under explicit masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixtures import PRUNED, ExplicitMixtures, fits, linear, mean, taylor
from models import HEAD_DIM, HEADS, LAYERS, ExplicitMasks, NanoGPT, build, tokens

from attnopt import ops
from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice
from attnopt.measure import Sequences, Spans

WIDE = (0, 2**30)
SPANS = [[WIDE, (4, 6), (0, 9), (4, 6)], [(1, 1), (0, 12), (2, 5), WIDE]]
PATHS = {"llama": "model.layers.{}.self_attn", "gpt2": "transformer.h.{}.attn", "nano": "h.{}"}


def choice(sink, window):
    params = {"sink": sink, "alpha": window, "beta": 0.0}
    return DENSE if (sink, window) == WIDE else Choice.of("sink_window", params)


def choices(family):
    return {PATHS[family].format(n): [choice(*s) for s in SPANS[n]] for n in range(LAYERS)}


def model_of(family):
    return NanoGPT().eval() if family == "nano" else build(family)


@torch.no_grad()
def plain_losses(model, ids):
    """Summed next-token losses, one sequence at a time, and the log-probabilities."""
    losses, rows = [], []
    for row in ids:
        out = model(row[None]) if isinstance(model, NanoGPT) else model(row[None], use_cache=False).logits
        rows.append(out[0, :-1].log_softmax(-1))
        losses.append(F.nll_loss(rows[-1], row[1:], reduction="sum").item())
    return losses, rows


@pytest.mark.parametrize("family", PATHS)
def test_dense_is_the_plain_model(family):
    model, ids = model_of(family), tokens(3, 40)
    spans = Spans(model)
    found = spans.losses(ids, None, divergence=True)
    assert found.loss == pytest.approx(plain_losses(model, ids)[0], rel=1e-5)
    assert found.tokens == (39,) * 3 and max(map(abs, found.kl)) < 1e-6
    assert found.agree == (39,) * 3 and found.dense == found.loss
    assert list(spans.sites) == [PATHS[family].format(n) for n in range(LAYERS)]


@pytest.mark.parametrize("family", PATHS)
def test_choices_are_the_model_under_explicit_masks(family):
    model, ids = model_of(family), tokens(3, 40)
    dense, dense_rows = plain_losses(model, ids)
    with ExplicitMasks(SPANS) as masks:
        expected, rows = plain_losses(model, ids)
    assert masks.calls == 3 * LAYERS
    spans, calls = Spans(model), []
    ops.launches.clear()
    found = spans.losses(ids, choices(family), divergence=True, progress=lambda: calls.append(1))
    assert found.loss == pytest.approx(expected, rel=1e-4)
    kl = [F.kl_div(a, b, reduction="sum", log_target=True).item() for a, b in zip(rows, dense_rows, strict=True)]
    assert found.kl == pytest.approx(kl, rel=1e-3) and min(kl) > 0.1
    same = [int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(rows, dense_rows, strict=True)]
    assert found.agree == tuple(same) and max(same) < 39 and found.dense == pytest.approx(dense, rel=1e-5)
    assert abs(sum(expected) - sum(dense)) > 1e-3, "the spans change nothing"
    assert len(calls) == 3 and sum(ops.launches.values()) == 3 * LAYERS
    # The choices do not outlive the call.
    assert spans.losses(ids, None).loss == pytest.approx(dense, rel=1e-5)


def test_a_models_own_window_stays():
    """Mistral's 7 keys: a wider span adds none, a sink adds none."""
    model, ids = build("mistral"), tokens(2, 40)
    dense, _ = plain_losses(model, ids)
    wide = {PATHS["llama"].format(n): [choice(4, 30)] * HEADS for n in range(LAYERS)}
    assert Spans(model).losses(ids, wide).loss == pytest.approx(dense, rel=1e-4)
    narrow = {name: [choice(4, 3)] * HEADS for name in wide}
    with ExplicitMasks([[(0, 3)] * HEADS] * LAYERS):
        expected, _ = plain_losses(model, ids)
    assert Spans(model).losses(ids, narrow).loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "nano"])
def test_choices_of_every_family(family):
    """Far parts and heads that are gone, each layer another mixture; and a mixture without a span."""
    model, ids = model_of(family), tokens(2, 40)
    first, second = (PATHS[family].format(n) for n in range(LAYERS))
    mixed = {
        first: (DENSE, linear(1, 4), mean(0, 6), PRUNED),
        second: (taylor(0, 5), PRUNED, choice(1, 5), linear(1, 7)),
    }
    fitted = fits(mixed, dim=HEAD_DIM)
    spans = Spans(model, fitted)
    for choices in (mixed, {first: (DENSE, PRUNED, PRUNED, DENSE), second: (DENSE,) * HEADS}):
        with ExplicitMixtures(choices, fitted) as explicit:
            expected, _ = plain_losses(model, ids)
        assert explicit.calls == 2 * LAYERS
        found = spans.losses(ids, choices, divergence=True)
        assert found.loss == pytest.approx(expected, rel=1e-4) and min(found.kl) > 0.1
    spans.fitted = None
    with pytest.raises(PlanError, match="there is none"):
        spans.losses(ids, mixed)


def test_means():
    found = Sequences((3, 1), (6.0, 2.0), (0.5, 1.5))
    assert (found.mean_loss, found.mean_kl) == (2.0, 0.5)
    assert Sequences((), (), ()).mean_loss == 0.0
