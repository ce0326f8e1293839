"""Tiny models that several tests share: transformers' from a configuration, and hand-written ones.

Weights are scaled up from their initial ones, so that attention is far from uniform and a wrong mask shows.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS = 61, 64, 2, 4, 2
HEAD_DIM = HIDDEN // HEADS
FAMILIES = ("llama", "mistral", "gpt2", "bert")


def scaled_up(model: nn.Module, factor: float = 8.0) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name and "lm_head" not in name:
                parameter.mul_(factor)
    return model


def config_of(family: str, **changes: Any) -> Any:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    grouped = {"num_key_value_heads": KV_HEADS, "intermediate_size": 96, "max_position_embeddings": 512}
    if family == "llama":
        return transformers.LlamaConfig(**sizes | grouped | changes)
    if family == "mistral":
        return transformers.MistralConfig(**sizes | grouped | {"sliding_window": 7} | changes)
    if family == "bert":
        return transformers.BertConfig(**sizes | {"intermediate_size": 96, "max_position_embeddings": 512} | changes)
    sizes = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512}
    return transformers.GPT2Config(**sizes | changes)


def build(family: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A model of transformers with random weights, in evaluation mode; BERT without a head."""
    import transformers

    config = config_of(family, **changes)
    torch.manual_seed(seed)
    classes = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "bert": "BertModel",
    }
    config._attn_implementation = attention
    return scaled_up(getattr(transformers, classes[family])(config)).eval()


def tokens(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, side: str) -> Tensor:
    """An attention mask int64 (batch, length); the last sequence is whole."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch - 1):
        if side == "left":
            mask[row, : 3 + row] = 0
        else:
            mask[row, length - 3 - row :] = 0
    return mask


class Block(nn.Module):
    """Causal self-attention as nanoGPT writes it: packed q, k and v; by SDPA or through a registered tril."""

    def __init__(self, flash: bool, made_here: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm, self.flash, self.made_here = nn.LayerNorm(HIDDEN), flash, made_here
        self.register_buffer("bias", torch.tril(torch.ones(512, 512)).view(1, 1, 512, 512), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(self.norm(x)).split(HIDDEN, dim=2)
        q, k, v = (t.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if self.made_here:
                below = torch.tril(torch.ones(length, length, device=x.device)).view(1, 1, length, length)
            else:
                below = self.bias[:, :, :length, :length]
            y = F.softmax(scores.masked_fill(below == 0, float("-inf")), dim=-1) @ v
        return x + self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, HIDDEN))


class NanoGPT(nn.Module):
    """Embedding, blocks, head: logits (batch, length, vocabulary)."""

    def __init__(self, flash: bool = True, made_here: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(VOCABULARY, HIDDEN)
        self.h = nn.ModuleList(Block(flash, made_here) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        scaled_up(self, 3.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


def make_plan(choices: dict[str, Any], min_length: int = 0, name: str = "tiny") -> Any:
    """A plan of the given choices, with nothing predicted or measured."""
    from attnopt.fingerprint import Fingerprint
    from attnopt.plan import Budget, Lengths, Plan, Predicted

    return Plan(
        model=name,
        fingerprint=Fingerprint("0" * 16, ()),
        budget=Budget("kl", 1.0),
        lengths=Lengths((64,), 64),
        choices={site: tuple(of_site) for site, of_site in choices.items()},
        predicted=Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0),
        min_length=min_length,
    )


class ExplicitMasks:
    """A context in which each causal SDPA call of a model, in order, keeps only the keys of its heads' spans.

    The plain way to run a plan: dense scores under a boolean mask (H, N, N) per layer, for what is to equal it.
    """

    def __init__(self, layers: list[list[tuple[int, int]]]) -> None:
        self.layers, self.calls = layers, 0

    def __enter__(self) -> ExplicitMasks:
        self.original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self.masked  # type: ignore[assignment]
        torch.nn.functional.scaled_dot_product_attention = self.masked  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self.original  # type: ignore[assignment]

    def masked(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, scale: Any = None, **kw: Any
    ) -> Tensor:
        from attnopt.codegen.reference_prefill import span_mask

        sinks, windows = (
            torch.tensor(column) for column in zip(*self.layers[self.calls % len(self.layers)], strict=True)
        )
        self.calls += 1
        keep = span_mask(q.shape[2], sinks, windows)[None]
        if attn_mask is not None:
            keep = keep & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return self.original(q, k, v, attn_mask=keep, scale=scale)


def save_model(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random Llama in transformers format with the demo model's tokenizer."""
    import transformers

    from attnopt.hf import demo_model_path

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | changes
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, max_position_embeddings=8192, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, folder)
