"""The models of this comparison, trained here: `python -m benchmarks.mixtures.trained diffuse` takes minutes on a core.

Llama's architecture as transformers has it, so that they pass through capture, matcher and planner as any other model.
Saved in the cache folder under all that decides their weights, and trained once.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import settings
from benchmarks.mixtures.documents import KINDS, Documents

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """layers, width, heads, kv_heads, dim: the model. steps of `tokens` tokens, in sequences of the first of `lengths`
    and for the last third of the steps of the second; positions are spread over `reach`: what is far is met at any
    distance, at the cost of short sequences (PoSE, Zhu et al. 2023).
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    dim: int = 64
    lengths: tuple[int, int] = (512, 2048)
    tokens: int = 2048
    steps: int = 1000
    reach: int = 65536
    theta: float = 1e6
    rate: float = 3e-3
    seed: int = 0


def folder_of(kind: Documents, recipe: Recipe) -> Path:
    """Where a model is kept: named by what it was made from."""
    made = json.dumps([asdict(kind), asdict(recipe)], sort_keys=True)
    return settings.cache_dir() / "models" / f"{kind.name}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"


def build(kind: Documents, recipe: Recipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=kind.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.dim,
        max_position_embeddings=recipe.reach,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def positions(rng: random.Random, length: int, reach: int) -> list[int]:
    """`length` rising positions below `reach`, in three runs with gaps between them of any size."""
    # Half of the sequences are as they will be read; else the near ones would never be far from the first.
    spare = 0 if rng.random() < 0.5 else int((reach - length) ** rng.random())
    cuts = sorted(rng.randrange(1, length) for _ in range(2))
    first = rng.randrange(spare + 1)
    return [n + (first if n >= cuts[0] else 0) + (spare - first if n >= cuts[1] else 0) for n in range(length)]


def train(kind: Documents, recipe: Recipe, say: Say = print) -> Any:
    """The trained model, in evaluation mode."""
    model = build(kind, recipe).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rng, begun = random.Random(recipe.seed), time.perf_counter()
    for step in range(recipe.steps):
        done = step / recipe.steps
        length = recipe.lengths[done > 2 / 3]
        ids = kind.sequences("train", length + 1, recipe.tokens // length, recipe.seed * 1_000_003 + step)
        places = torch.tensor([positions(rng, length, recipe.reach) for _ in ids])
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = recipe.rate * min(1.0, (step + 1) / 20, (1 - done) / 0.4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # With an explicit mask a gap between positions is not taken for a border between documents.
            seen = torch.ones_like(places)
            logits = model(ids[:, :-1], attention_mask=seen, position_ids=places, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == recipe.steps:
            say(f"step {step} of {recipe.steps}: loss {loss.item():.4f}, {time.perf_counter() - begun:.0f} s")
    return model.eval()


def trained(kind: Documents, recipe: Recipe | None = None, say: Say = print) -> Path:
    """The folder of a trained model; trains it where it is not there yet."""
    recipe = recipe or RECIPES[kind.name]
    folder = folder_of(kind, recipe)
    if not (folder / "config.json").exists():
        model = train(kind, recipe, say)
        partial = folder.with_name(folder.name + ".partial")
        model.save_pretrained(partial)
        partial.replace(folder)
    return folder


@torch.no_grad()
def value_losses(call: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Nats (samples, pairs) of every value, of what returns logits (1, N, V) of ids (1, N)."""
    return torch.stack([
        F.cross_entropy(call(row[None])[0, :-1].float(), row[1:], reduction="none")[::2] for row in ids
    ])  # fmt: skip


RECIPES = {"diffuse": Recipe(), "recall": Recipe()}


if __name__ == "__main__":
    for name in sys.argv[1:] or KINDS:
        print(trained(KINDS[name]))
