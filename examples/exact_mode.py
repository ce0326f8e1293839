"""Exact mode on transformers models with random weights: a Llama and a BERT, without and with padding.

    python examples/exact_mode.py

Prints what attnopt did to each attention, and how far the outputs are from the uncompiled model's.
"""

from __future__ import annotations

import torch
import transformers

from attnopt import backend

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    return {"Llama": llama.eval(), "BERT": bert.eval()}


@torch.no_grad()
def compare(name: str, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> float:
    """Print the report and the largest difference over the tokens that count."""
    print(f"{name}, {'no padding' if mask is None else 'padded'}")
    backend.clear_reports()
    torch._dynamo.reset()
    found = torch.compile(model, backend="attnopt")(ids, attention_mask=mask).logits
    for report in backend.reports():
        print("\n".join(f"  {line}" for line in report.lines()))
    difference = (found - model(ids, attention_mask=mask).logits).abs()
    largest = (difference if mask is None else difference[mask.bool()]).max().item()
    print(f"  largest difference to eager: {largest:.1e}")
    return largest


def main() -> None:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 48:] = 0
    worst = max(compare(name, model, ids, m) for name, model in models().items() for m in (None, mask))
    assert worst < 1e-4, worst


if __name__ == "__main__":
    main()
