"""Observers in the place of attention: called once a site with its operands, and the model computes the same."""

from __future__ import annotations

import pytest
import torch
from models import HEADS, LAYERS, NanoGPT, build, padding, tokens
from torch import nn

from attnopt.errors import ModelError
from attnopt.instrument import Instrumented, gradients_through, logits_of
from attnopt.statistics import attention


class Spy:
    """Observes nothing but its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, site):
        def attend(q, k, v, pad):
            self.calls.append((site.name, tuple(q.shape), tuple(k.shape), pad))
            return attention(q, k, v, site.scale, pad, site.mask.window)

        return attend


@pytest.mark.parametrize(("attn", "family"), [("sdpa", "mistral"), ("sdpa", "gpt2"), ("eager", "llama")])
def test_the_model_computes_the_same(family, attn):
    model, spy = build(family, attn), Spy()
    observed = Instrumented(model, spy)
    with torch.no_grad():
        for length in (20, 33):
            found = observed.logits(tokens(2, length))
            torch.testing.assert_close(found, model(tokens(2, length)).logits, atol=2e-3, rtol=2e-3)
    assert len(spy.calls) == 2 * LAYERS and len(observed.sites) == LAYERS and not observed.left_alone
    assert [q for _, q, _, _ in spy.calls] == [(2, HEADS, n, 16) for n in (20, 33) for _ in range(LAYERS)]
    assert all(pad is None for *_, pad in spy.calls)


def test_padding_reaches_the_observer():
    model, spy = build("llama"), Spy()
    mask = padding(2, 20, "left")
    with torch.no_grad():
        found = Instrumented(model, spy)(tokens(), attention_mask=mask, use_cache=False).logits
        expected = model(tokens(), attention_mask=mask, use_cache=False).logits
    assert all(pad.equal(mask.bool()) for *_, pad in spy.calls)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-3, rtol=2e-3)


def test_what_cannot_be_observed_is_named():
    observed = Instrumented(build("bert"), Spy())
    with torch.no_grad():
        observed(tokens())
    assert not observed.sites and len(observed.left_alone) == LAYERS
    with pytest.raises(ModelError, match="planned spans need a causal mask"):
        observed.need_sites()


def test_gradients_pass():
    model = NanoGPT().eval()
    model(tokens()).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    Instrumented(model, Spy()).logits(tokens()).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_through_restores_everything(fails):
    model = build("llama")
    frozen = next(model.parameters()).requires_grad_(False)
    kept = list(model.parameters())[1].grad = torch.ones_like(list(model.parameters())[1])
    try:
        with torch.no_grad(), gradients_through(model):
            assert torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
            assert not any(p.requires_grad for p in model.parameters() if p.ndim > 1)
            model(tokens()).logits.sum().backward()
            if fails:
                raise KeyError
    except KeyError:
        pass
    parameters = list(model.parameters())
    assert not frozen.requires_grad and all(p.requires_grad for p in parameters[1:])
    assert parameters[1].grad is kept and all(p.grad is None for p in parameters[2:])


def test_logits_of_what_models_return():
    logits = torch.zeros(1, 3, 5)
    ids = tokens(1, 3)
    assert logits_of(lambda ids: logits, ids) is logits and logits_of(lambda ids: (logits, None), ids) is logits
    with pytest.raises(ModelError, match="not logits"):
        logits_of(lambda ids: logits[0], ids)
    with pytest.raises(ModelError, match="not logits"):
        logits_of(nn.Identity(), ids)
