"""The damage against the true KL divergence; what sites lose together, from sketches, against products of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.statistics import Grid, Observation, Observe, attention, stream


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Two layers, four heads, vocabulary of 50; sharp, partly local attention as training makes it."""

    def __init__(self, length: int, dim: int = 48, heads: int = 4, layers: int = 2, words: int = 50) -> None:
        super().__init__()
        self.heads, self.layers = heads, layers
        self.words, self.places = nn.Embedding(words, dim), nn.Parameter(torch.randn(length, dim) * 0.5)
        self.qkv = nn.ParameterList(torch.randn(dim, 3 * dim) * 1.5 * dim**-0.5 for _ in range(layers))
        self.out = nn.ParameterList(torch.randn(dim, dim) * 0.7 * dim**-0.5 for _ in range(layers))
        self.head = nn.Parameter(torch.randn(dim, words) * 1.2 * dim**-0.5)

    def forward(
        self, tokens: Tensor, sites: list[Observation] | None = None, keep: dict[int, Tensor] | None = None
    ) -> Tensor:
        """tokens (B, N) -> log-probabilities (B, N, words); keep: layer -> mask (heads, N, N)."""
        x = self.words(tokens) + self.places
        for n in range(self.layers):
            y = F.layer_norm(x, x.shape[-1:]) @ self.qkv[n]
            q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in y.chunk(3, -1))
            scale = q.shape[-1] ** -0.5
            if sites is not None:
                o = Observe.apply(q, k, v, scale, None, sites[n])
            elif keep and n in keep:
                o = F.scaled_dot_product_attention(q, k, v, keep[n][None], scale=scale)
            else:
                o = attention(q, k, v, scale, None, None)
            x = x + o.transpose(1, 2).flatten(-2) @ self.out[n]
        return torch.log_softmax(F.layer_norm(x, x.shape[-1:]) @ self.head, -1)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_damage_is_the_kl_divergence_in_nats() -> None:
    torch.manual_seed(11)
    length, batch, draws = 96, 8, 8
    grid = Grid((0, 2), (8, 16, 32, 64))
    model = Small(length)
    tokens = torch.randint(50, (batch, length))
    sites = [Observation.zeros(model.heads, grid, length) for _ in range(model.layers)]
    log_p = model(tokens, sites)
    for _ in range(draws):
        labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1)
        F.nll_loss(log_p.flatten(0, 1), labels[:, 0], reduction="sum").backward(retain_graph=True)
    assert sites[0].samples == batch * draws
    i = torch.arange(length)
    causal = i <= i[:, None]
    predicted, true = [], []
    with torch.no_grad():
        for layer in range(model.layers):
            for head in range(model.heads):
                for sink in grid.sinks:
                    for window in grid.windows:
                        mask = causal.expand(model.heads, -1, -1).clone()
                        mask[head] &= (i < sink) | (i[:, None] - i < window)
                        log_q = model(tokens, keep={layer: mask})
                        true.append(float((log_p.exp() * (log_p - log_q)).sum()))
                        predicted.append(sites[layer].damage(head, sink, window) / draws)
    found, kl = torch.tensor(predicted), torch.tensor(true)
    ratio = (found / kl)[kl > 1e-3 * batch]
    within = ((ratio > 0.7) & (ratio < 1.5)).float().mean()
    assert len(ratio) >= 48 and within >= 0.9
    assert spearman(found, kl) > 0.9


def test_products_of_sketches_are_products_of_rows() -> None:
    """Two sites that share an output gradient: what their dropped keys do together, from sketches and from rows."""
    together, exact = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        length, grid = 96, Grid((2,), (4,))
        q, k, v = torch.randn(3, 1, 6, length, 8).unbind()
        base = torch.randn(1, 1, length, 8)
        grad = base + 0.5 * torch.randn(1, 6, length, 8)
        v = v + base.flip(2)
        observation = Observation.zeros(6, grid, length)
        observation.key = str(seed)
        stream(q, k, v, grad, 8**-0.5, None, observation)
        i = torch.arange(length)
        keep = (i <= i[:, None]) & ((i < 2) | (i[:, None] - i < 4))
        scores = q @ k.mT * 8**-0.5
        dense = scores.masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v
        moved = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v - dense
        t = (grad * moved).sum(-1)[0].double()
        exact.append(float(t.sum(0).square().sum()))
        sketch = observation.sketch.sum(0)
        together.append(float(sketch.square().mean()))
        # One estimate has a relative error of sqrt(2 / 256) = 0.09.
        assert abs(together[-1] / exact[-1] - 1) < 0.45
    ratio = sum(together) / sum(exact)
    assert abs(ratio - 1) < 0.06
    # Without the products between heads it would be another number.
    assert abs(float(observation.t2[:, 0, 0].sum()) / exact[-1] - 1) > 0.05


def test_sketches_of_two_passes_are_independent() -> None:
    torch.manual_seed(5)
    q, k, v, grad = (torch.randn(2, 4, 150, 8) for _ in range(4))
    observation = Observation.zeros(4, Grid((4,), (8,)), 150)
    stream(q, k, v, grad, 8**-0.5, None, observation)
    once = observation.sketch.clone()
    stream(q, k, v, grad, 8**-0.5, None, observation)
    twice, t2 = observation.sketch, observation.t2[:, -1]
    assert not torch.equal(twice, 2 * once)
    # The squares of the same rows under other signs add; under the same ones they would be twice as much.
    assert abs(float(twice.square().mean(-1).sum() / t2.sum()) - 1) < 0.2
