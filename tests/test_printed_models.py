"""Models of transformers whose attention no SDPA call serves: rewritten to kernels with their masks printed in.

The reference target stands in for a GPU's. A wrong mask, bias, soft-cap or sink shows: without it the logits differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, build, padding, scaled_up, tokens
from tracing import trace

from attnopt import ops
from attnopt.passes import pays

LENGTH = 20
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": 96, "max_position_embeddings": 512,
    "sliding_window": 7,
}  # fmt: skip


def model_of(name: str) -> Any:
    import transformers

    if name == "llama":
        return build("llama")
    if name == "gemma2":
        config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=1)
        made: Any = transformers.Gemma2ForCausalLM
    elif name == "gpt-oss":
        config = transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
        made = transformers.GptOssForCausalLM
    else:
        config = transformers.MptConfig(vocab_size=VOCABULARY, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS)
        made = transformers.MptForCausalLM
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = scaled_up(made(config)).eval()
    if name == "gpt-oss":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.normal_()
    return model


# name -> (padded, what the reports say of its layers)
CASES = {
    "gemma2": (True, ["softcap=2, keep j <= i and i - j < 7 and", "softcap=2, keep j <= i and"]),
    "gpt-oss": (False, ["sink=logit[h], keep j <= i and i - j < 7", "sink=logit[h], keep j <= i"]),
    "mpt": (True, ["bias=(j - i)*", "bias=(j - i)*"]),
    "llama": (False, ["keep j <= i and "] * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_with_printed_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")
    padded, said = CASES[name]
    model, arguments = model_of(name), {"input_ids": tokens(2, LENGTH), "use_cache": False}
    rows = torch.ones(2, LENGTH, dtype=torch.bool)
    if padded:
        arguments["attention_mask"] = padding(2, LENGTH, "left")
        rows = arguments["attention_mask"].bool()
    if name == "llama":
        # Two documents in one row: transformers reads them off the positions.
        arguments["position_ids"] = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    with torch.no_grad():
        expected = model(**arguments).logits[rows]
    ops.launches.clear()
    traced = trace(model, **arguments)
    assert len(traced.rewrites) == LAYERS, (traced.left, traced.misses)
    assert all(a.startswith(f"{pays.PRINTED}, {b}") for a, b in zip(traced.rewrites, said, strict=True)), (
        traced.rewrites
    )
    # Once while verifying, and once in the model.
    assert sum(ops.launches.values()) == 2 * LAYERS
    assert (traced.output.logits[rows] - expected).abs().max() <= 1e-4 * expected.abs().max()
