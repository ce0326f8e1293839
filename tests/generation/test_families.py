"""Models of other builders: as they are without a plan, and the oracle under one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from generation import models, oracle
from generation.models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MAX_LENGTH, OWN_WINDOW, VOCABULARY, generate

import attnopt

SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": HEADS, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
GROUPED = SIZES | {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
MIXED = GROUPED | {"sliding_window": OWN_WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
OLD = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "pad_token_id": 0}
OLD |= {"bos_token_id": None, "eos_token_id": None}
# What a configuration is given, where the attentions are, and the windows they have of their own. Positions that are
# added, fused projections, two rotations, layers without one.
SERVED: dict[str, tuple[dict[str, Any], str, list[int | None]]] = {
    "GPT2": (OLD, "transformer.h.{}.attn", [None, None]),
    "Phi3": (GROUPED | {"sliding_window": OWN_WINDOW}, "model.layers.{}.self_attn", [OWN_WINDOW] * 2),
    "Gemma3Text": (MIXED, "model.layers.{}.self_attn", [None, OWN_WINDOW]),
    "SmolLM3": (GROUPED | {"no_rope_layers": [1, 0]}, "model.layers.{}.self_attn", [None, None]),
}
RULE = (2, 5, 0.0)


def build(name: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**sizes)
    prefix = name.removesuffix("Text")
    torch.manual_seed(0)
    made = getattr(transformers, f"{prefix}ForCausalLM", None) or getattr(transformers, f"{prefix}LMHeadModel")
    model = made(config).eval()
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if parameter.ndim > 1 and "attn" in where:
                parameter.mul_(8.0)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_models_of_other_builders(name: str) -> None:
    sizes, path, windows = SERVED[name]
    model = build(name, sizes)
    ids, mask = models.left_padded()
    stock = generate(model, ids, mask, 20)
    spread = models.produced_logits(stock).std()
    attnopt.enable(model, max_length=MAX_LENGTH)
    exact = generate(model, ids, mask, 20)
    attnopt.disable(model)
    assert models.difference(models.produced_logits(exact), models.produced_logits(stock)) < 1e-5 * spread
    groups = getattr(model.config, "num_key_value_heads", None) or HEADS
    sites = [models.site(path.format(layer), HEADS, groups, HEAD_DIM, own) for layer, own in enumerate(windows)]
    plan = models.plan_at(model, sites, ((RULE,) * HEADS,) * 2)
    spans = [[oracle.span(*RULE, MAX_LENGTH, own)] * HEADS for own in windows]
    attnopt.enable(model, plan, max_length=MAX_LENGTH)
    out = generate(model, ids, mask, 20)
    attnopt.disable(model)
    expected = oracle.following(model, ids, mask, out, spans, dtype=torch.float32)
    assert models.difference(models.produced_logits(out), expected) < 1e-5 * spread
    first = models.produced_logits(out)[:, 0], models.produced_logits(stock)[:, 0]
    assert models.difference(*first) > 0.3 * spread
