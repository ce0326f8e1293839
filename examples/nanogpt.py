"""A hand-written GPT: attnopt finds attention by what it computes, also where it is written out, mask and all.

    python examples/nanogpt.py

No class of this file is known to attnopt. Soft-max, scale and the registered `tril` mask are read off the graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt import backend

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 65, 128, 3, 4, 256


class SelfAttention(nn.Module):
    """Packed q, k and v; every score is formed, and those of the future are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).split(WIDTH, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        past = torch.tril(torch.ones(length, length, device=x.device))
        weights = F.softmax(scores.masked_fill(past == 0, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention, self.norm_2 = nn.LayerNorm(WIDTH), SelfAttention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Token ids (batch, length) -> logits (batch, length, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model, ids = GPT().eval(), torch.randint(0, VOCABULARY, (2, 128))
    with torch.no_grad():
        difference = (torch.compile(model, backend="attnopt")(ids) - model(ids)).abs().max().item()
    (report,) = backend.reports()
    for site in report.sites:
        print(f"found  {site}")
    for line in report.lines():
        print(f"did    {line}")
    print(f"largest difference to eager: {difference:.1e}")
    assert difference < 1e-4 and len(report.rewrites) == LAYERS


if __name__ == "__main__":
    main()
