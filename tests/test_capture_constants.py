"""Masks kept in buffers: rewritten by their values for as long as those are the same, and eager's result ever after."""

from __future__ import annotations

import pytest
import torch
from models import scaled_up, tokens

from attnopt import backend
from attnopt.errors import ModelError
from attnopt.instrument import Instrumented
from attnopt.statistics import attention

LENGTH = 20


def gpt_neo():
    """A boolean triangle in each layer, sliced and chosen by; the second layer's is a band."""
    import transformers

    config = transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, intermediate_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def openai_gpt():
    """A float triangle b in its layer: scores * b - 1e4 * (1 - b)."""
    import transformers

    config = transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    return transformers.OpenAIGPTLMHeadModel(config)


FAMILIES = {"neo": gpt_neo, "openai": openai_gpt}
MEANT = {"neo": ["j <= i", "j <= i and i - j < 6"], "openai": ["j <= i"]}


def build(family):
    torch.manual_seed(0)
    return scaled_up(FAMILIES[family](), 16.0).eval()


def masks(model):
    """(module, buffer) of every mask."""
    return [(m, b) for m in model.modules() for n, b in m.named_buffers(recurse=False) if b.ndim == 4]


def write(model):
    for _, buffer in masks(model):
        buffer[:, :, :, 1:3] = 1


def replace(model):
    for module, buffer in masks(model):
        module.bias = torch.ones_like(buffer)


def exchange_data(model):
    for _, buffer in masks(model):
        buffer.data = torch.ones_like(buffer)


CHANGES = {"write": write, "replace": replace, "data": exchange_data}


@pytest.mark.parametrize(("family", "change"), [("neo", "write"), ("neo", "data"), ("openai", "replace")])
def test_a_mask_in_a_buffer(family, change, monkeypatch):
    """The graphs run eagerly; a change is seen in eager's own result, so that a stale mask would be as well."""
    for module in (backend, backend.inductor):
        monkeypatch.setattr(module, "to_inductor", lambda gm, inputs, patches: gm.forward)
    backend.clear_reports()
    model, ids = build(family), tokens(2, LENGTH)
    call = torch.compile(model, backend=backend.attnopt)
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(call(ids).logits, before, atol=1e-4, rtol=1e-4)
        (report,) = backend.reports()
        assert [str(s.mask) for s in report.sites] == MEANT[family] and len(report.rewrites) == len(MEANT[family])
        CHANGES[change](model)
        after = model(ids).logits
        assert float((after - before).abs().max()) > 0.05
        for _ in range(2):
            torch.testing.assert_close(call(ids).logits, after, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openai", pytest.param("neo", marks=pytest.mark.full)])
def test_a_mask_in_a_buffer_through_inductor(family):
    """As above; a model that is moved to another dtype and back has other buffers too."""
    backend.clear_reports()
    model, ids = build(family), tokens(2, LENGTH)
    call = torch.compile(model, backend=backend.attnopt)

    def same():
        torch.testing.assert_close(call(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)

    with torch.no_grad():
        same()
        assert [str(s.mask) for s in backend.reports()[0].sites] == MEANT[family]
        model.double().float()
        same()
        write(model)
        same()
        replace(model)
        same()


def observed(model):
    return Instrumented(model, lambda site: lambda q, k, v, pad: attention(
        q, k, v, site.scale, pad, site.mask.window))  # fmt: skip


@pytest.mark.parametrize(("family", "change"), [("neo", "replace"), ("openai", "write")])
def test_an_observer_says_when_its_mask_is_no_longer_the_models(family, change):
    model, ids = build(family), tokens(2, LENGTH)
    instrumented = observed(model)
    with torch.no_grad():
        torch.testing.assert_close(instrumented(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        assert [str(s.mask) for s in instrumented.sites.values()] == MEANT[family]
        CHANGES[change](model)
        with pytest.raises(ModelError, match="Observe the model anew"):
            instrumented(ids)
