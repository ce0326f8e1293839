"""Training under a plan and with sliding windows: the gradients are those of the same model under explicit masks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from compiling import LLAMA, compiled
from models import LAYERS, ExplicitMasks, build, make_plan, padding, tokens

from attnopt import backend

# The spans of the plan in compiling.py, as (sink, window) of each head.
MASKS = [[(0, 2**30), (2, 5), (0, 7), (2, 5)]] * LAYERS


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


def gradients(model, call, length=20, **arguments):
    """The loss of padded text, and its gradient at every weight."""
    ids = tokens(2, length)
    mask = padding(2, length, "right")
    model.zero_grad()
    loss = call(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-12, name


def test_training_under_a_plan(eagerly):
    model = build("llama").double().train()
    call = compiled(model, plan=make_plan(LLAMA))
    with torch.no_grad():
        call(input_ids=tokens(), attention_mask=padding(2, 20, "right"), use_cache=False)
    for length in (20, 31):
        found = gradients(model, call, length)
        with ExplicitMasks(MASKS) as masks:
            expected = gradients(model, model, length)
        assert masks.calls == LAYERS
        assert_close(found, expected, 1e-10)
    dense = gradients(model, model, 31)
    assert float((dense[1]["lm_head.weight"] - expected[1]["lm_head.weight"]).norm()) > 0.01
    assert {r.lowering for report in backend.reports() for r in report.rewrites} == {"span kernel, 3 spans"}
    # The form without a logsumexp runs where no gradient is asked for, and only there.
    operators = [{str(n.target) for n in gm.graph.nodes if "span_attention" in str(n.target)} for gm, _ in eagerly]
    assert operators[0] == {"attnopt.span_attention.default"}
    assert all(used == {"attnopt.span_attention_lse.default"} for used in operators[1:])

    twin, losses = copy.deepcopy(model), []
    for trained, run in ((model, call), (twin, twin)):
        optimiser = torch.optim.SGD(trained.parameters(), lr=0.05)
        steps = []
        for _ in range(5):
            with contextlib.nullcontext() if run is call else ExplicitMasks(MASKS):
                steps.append(gradients(trained, run)[0])
            optimiser.step()
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_gradients_of_sliding_windows(eagerly):
    model = build("mistral", num_hidden_layers=1).double().train()
    found = gradients(model, compiled(model))
    assert [r.lowering for r in backend.reports()[0].rewrites] == ["span kernel, window 7"]
    assert_close(found, gradients(model, model), 1e-10)
