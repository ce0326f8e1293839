"""What generation under a plan does not run is refused, by name and with a remedy, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from generation import models
from generation.models import MAX_LENGTH, RULES, attending, enabled, generate

import attnopt
from attnopt.errors import AttnoptError, PlanError
from attnopt.ir import Choice

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def latent() -> Any:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    config = transformers.DeepseekV3Config(**SIZES, **ranks, first_k_dense_replace=2)
    return transformers.DeepseekV3ForCausalLM(config)


def shared_keys() -> Any:
    own = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "head_dim": 16}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    sizes = SIZES | own | layers | {"num_hidden_layers": 4}
    config = transformers.Gemma3nTextConfig(**sizes, num_kv_shared_layers=2)
    return transformers.Gemma3nForCausalLM(config)


def learned_sinks() -> Any:
    config = transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config)


def encoder_decoder() -> Any:
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (latent, "latent|MLA"),
        (shared_keys, "shared KV"),
        (learned_sinks, "learned sink"),
        (encoder_decoder, "encoder-decoder"),
    ],
    ids=["latent", "shared keys", "learned sinks", "encoder-decoder"],
)
def test_models(build: Callable[[], Any], name: str) -> None:
    model = build().eval()
    before, own = model.config._attn_implementation, set(vars(model))
    with pytest.raises(AttnoptError, match=f"(?i){name}") as refused:
        attnopt.enable(model)
    assert refused.value.remedy
    assert model.config._attn_implementation == before and set(vars(model)) == own


def test_a_model_that_computes_with_its_cached_values() -> None:
    config = transformers.DiffLlamaConfig(**SIZES, pad_token_id=0)
    model = transformers.DiffLlamaForCausalLM(config).eval()
    attnopt.enable(model)
    with pytest.raises(AttnoptError, match=r"torch\.chunk"):
        generate(model, models.prompts(), None, 4)


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_caches_of_other_kinds(kind: str) -> None:
    model = models.shared("llama")
    with enabled(model, RULES), pytest.raises(AttnoptError, match=kind) as refused:
        generate(model, models.prompts(), None, 4, cache_implementation=kind)
    assert refused.value.remedy


def test_attention_weights_are_not_handed_out() -> None:
    model = models.shared("llama")
    with enabled(model, RULES), pytest.raises(AttnoptError, match="output_attentions"):
        generate(model, models.prompts(), None, 4, output_attentions=True)


def test_a_foreign_cache_with_a_past() -> None:
    model = models.shared("llama")
    ids = models.prompts()
    past = generate(model, ids, None, 4).past_key_values
    with enabled(model, RULES), pytest.raises(AttnoptError, match="cache") as refused, torch.no_grad():
        model(ids[:, :1], past_key_values=past)
    assert "SpanCache" in str(refused.value)


def test_a_span_cache_without_its_attention() -> None:
    model = models.shared("llama")
    with pytest.raises(AttnoptError, match=r"attnopt\.enable"):
        attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=MAX_LENGTH)
    with attending(model):
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=MAX_LENGTH)
    with pytest.raises(Exception, match="attnopt"):
        generate(model, models.prompts(), None, 4, past_key_values=cache)


def test_caches_of_other_models_and_batches() -> None:
    """Another model's windows, another number of KV heads, other rows; beams over a cache of one row among them."""
    llama, mistral, wide = (
        models.shared("llama"),
        models.shared("mistral"),
        models.build("llama", num_key_value_heads=4),
    )
    ids = models.prompts(1)
    with attending(llama), attending(mistral), attending(wide), torch.no_grad():
        for other, wrong in ((mistral, "sliding window"), (wide, "4 KV heads")):
            cache = attnopt.SpanCache.for_model(other, max_length=MAX_LENGTH)
            with pytest.raises(AttnoptError, match=wrong):
                llama(ids, past_key_values=cache)
        cache = attnopt.SpanCache.for_model(llama, max_length=MAX_LENGTH)
        llama(ids, past_key_values=cache)
        with pytest.raises(AttnoptError, match="1 rows, and tokens of 3"):
            llama(models.prompts(3, 1), past_key_values=cache)
        longer = torch.cat([ids, models.prompts(1, 4)], 1)
        with pytest.raises(AttnoptError, match="1 rows, and tokens of 2"):
            generate(llama, longer, None, 4, past_key_values=cache, num_beams=2)
        assert int(cache.get_seq_length()) == ids.shape[1]


def test_more_than_the_cache_was_made_for() -> None:
    model = models.shared("llama")
    ids = models.prompts(length=60)
    with attending(model):
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=MAX_LENGTH)
        generate(model, ids, None, 5, past_key_values=cache)
        cache.reset()
        with pytest.raises(AttnoptError, match="max_length"):
            generate(model, ids, None, 6, past_key_values=cache)


@pytest.mark.parametrize(
    ("candidate", "name"),
    [("linear", "linear"), ("taylor", "taylor"), ("compensation", "compensation"), ("pruned", "gone")],
)
def test_plans_whose_heads_are_more_than_spans(candidate: str, name: str) -> None:
    model = models.shared("llama")
    plan = models.plan_of(model, RULES)
    params = {
        "linear": {"sink": 2, "window": 5, "features": 6},
        "taylor": {"sink": 2, "window": 5, "rank": 2},
        "compensation": {"sink": 1, "alpha": 4, "beta": 0.0},
        "pruned": {},
    }[candidate]
    site = next(iter(plan.choices))
    choices = {**plan.choices, site: (Choice.of(candidate, params), *plan.choices[site][1:])}
    with pytest.raises(PlanError, match=name) as refused:
        attnopt.enable(model, dataclasses.replace(plan, choices=choices))
    assert refused.value.remedy
    assert model.config._attn_implementation == "sdpa"


def test_plans_of_other_models() -> None:
    model = models.shared("llama")
    plan = models.plan_of(model, RULES)
    names = {site.replace("layers.1", "layers.7"): choices for site, choices in plan.choices.items()}
    fewer = {site: choices[:2] for site, choices in plan.choices.items()}
    for wrong in (models.foreign(plan), *(dataclasses.replace(plan, choices=c) for c in (names, fewer))):
        with pytest.raises(PlanError) as refused:
            attnopt.enable(model, wrong)
        assert refused.value.remedy
    assert model.config._attn_implementation == "sdpa"


def test_sites_the_plan_leaves_out_are_dense() -> None:
    """Of two layers the plan knows one; the other keeps everything."""
    model = models.shared("llama")
    plan = models.plan_of(model, RULES)
    ids, mask = models.left_padded()
    first = {site: choices for site, choices in plan.choices.items() if "layers.0" in site}
    attnopt.enable(model, dataclasses.replace(plan, choices=first), max_length=MAX_LENGTH)
    try:
        out = generate(model, ids, mask, 20)
    finally:
        attnopt.disable(model)
    models.assert_follows(model, (RULES[0], models.ALL_FULL[1]), ids, mask, out)
