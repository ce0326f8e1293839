"""More families beside those of tests/generation/test_families.py: they generate as they did, or are refused by name.

Exact, with left padding, past the models' own windows; logits against the model's own cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import attnopt
from attnopt.errors import ModelError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 8}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
# Class, and what its configuration has beside the sizes: norms, rotations, biases, positions, windows of their kinds.
SERVED: list[tuple[str, dict[str, Any]]] = [
    ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    ("Cohere2ForCausalLM", GROUPED | MIXED | {"logit_scale": 1.0}),
    ("MixtralForCausalLM", GROUPED | {"num_local_experts": 2}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GPTJForCausalLM", {"rotary_dim": 4}, "attention functions"),
    ("MambaForCausalLM", {}, "attention|layers"),
    ("MoshiForCausalLM", GROUPED | WINDOW | {"head_dim": 8}, "masks it makes have none"),
]


def build(name: str, own: dict[str, Any]) -> Any:
    """Weights large enough for attention to matter."""
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**SIZES | own)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize(("name", "own"), SERVED, ids=[name for name, _ in SERVED])
def test_served(name: str, own: dict[str, Any]) -> None:
    model, ids, mask = build(name, own), torch.randint(1, 61, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    expected = logits(model, ids * mask, mask)
    attnopt.enable(model)
    found = logits(model, ids * mask, mask)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(("name", "own", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_refused(name: str, own: dict[str, Any], reason: str) -> None:
    model = build(name, own)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason) as refused:
        attnopt.enable(model)
    assert name in refused.value.problem and refused.value.remedy
    assert model.config._attn_implementation == before
    generation = attnopt.explain(model).generation
    assert generation is not None and not generation.enabled
