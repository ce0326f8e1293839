"""Attention that is linear already or has no soft-max is named as such, what only looks like it goes unmentioned."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing import qkv, trace

SCALE = 8**-0.5


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def lower(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2]).tril()


def sigmoid(q, k, v):
    """Sigmoid attention with its bias -log N."""
    return torch.sigmoid(q @ k.transpose(-2, -1) * SCALE - 2.5) @ v


def relu_squared_causal(q, k, v):
    scores = F.relu(torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[2]) ** 2
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(lower(q) == 0, 0.0), v)


def relu_normalised(q, k, v):
    weights = F.relu(q @ k.mT)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def retention(q, k, v):
    """A decay between the products and no function at all."""
    i = torch.arange(q.shape[2])
    decay = torch.where(i[:, None] >= i, 0.9 ** (i[:, None] - i), 0.0)
    return (q @ k.mT * decay) @ v


def retention_tril(q, k, v):
    return torch.tril(q @ k.mT).to(torch.float64).float() @ v


def sigmoid_over_folded_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.sigmoid(torch.bmm(q, k.transpose(1, 2))), v).unflatten(0, (2, 4))


def linear_elu(q, k, v):
    q, k = elu1(q), elu1(k)
    return q @ (k.mT @ v)


def linear_relu_normalised(q, k, v):
    q, k = F.relu(q) + 1e-3, F.relu(k) + 1e-3
    state = torch.einsum("bhnd,bhne->bhde", k, v) / q.shape[2]
    out = torch.einsum("bhnd,bhde->bhne", q, state)
    return out / torch.einsum("bhnd,bhd->bhn", q, k.mean(2))[..., None]


def linear_causal(q, k, v):
    """Katharopoulos et al., arXiv:2006.16236, as first written: running sums of outer products."""
    q, k = elu1(q), elu1(k)
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    out = torch.einsum("bhnd,bhnde->bhne", q, state)
    return out / (q * k.cumsum(2)).sum(-1, keepdim=True)


def linear_causal_by_broadcast(q, k, v):
    q, k = torch.exp(q), torch.exp(k)
    state = (k[..., :, None] * v[..., None, :]).cumsum(2)
    return (q[..., None, :] @ state).squeeze(-2)


def linear_tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (F.silu(q), F.silu(k), v))
    return torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v)).transpose(1, 2)


class Projected(nn.Module):
    """As models have it: learned projections of one input, which is what makes them keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.qkv(q).chunk(3, -1)
        return linear_elu(q, k, v) if self.training else sigmoid(q, k, v)


SAID = {
    Projected().eval(): ("no-softmax", "made by sigmoid"),
    Projected().train(): ("already-linear", "through elu"),
    sigmoid: ("no-softmax", "made by sigmoid"),
    relu_squared_causal: ("no-softmax", "made by relu, square"),
    relu_normalised: ("no-softmax", "made by relu,"),
    retention: ("no-softmax", "masked scores"),
    retention_tril: ("no-softmax", "masked scores"),
    sigmoid_over_folded_heads: ("no-softmax", "made by sigmoid"),
    linear_elu: ("already-linear", r"through elu \+ 1\) .* over all positions"),
    linear_relu_normalised: ("already-linear", "through relu"),
    linear_causal: ("already-linear", r"elu \+ 1\) .* over the positions before"),
    linear_causal_by_broadcast: ("already-linear", "through exp"),
    linear_tokens_first: ("already-linear", "through silu"),
}


def misses(fn: Callable[..., Any], *inputs: Tensor) -> list[tuple[str, str]]:
    traced = trace(fn, *inputs)
    assert not traced.sites and not traced.refusals
    torch.testing.assert_close(traced.output, fn(*inputs), atol=1e-5, rtol=1e-4)
    return [(m.code, m.reason) for p in traced.programs for m in p.misses]


@pytest.mark.parametrize("fn", SAID, ids=lambda fn: getattr(fn, "__name__", type(fn).__name__))
@torch.no_grad()
def test_said(fn: Callable[..., Any]) -> None:
    code, reason = SAID[fn]
    ((found, said),) = misses(fn, *qkv(length=13))
    assert found == code and re.search(reason, said), said


# --- what only looks like it ------------------------------------------------------------------------------------------


def three_matrices(q, k, v):
    """A chain of products, whichever way it is put together."""
    return (q @ k.mT) @ v + q @ (k.mT @ v)


def scaled_chain(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[2], v)


def one_sided_features(q, k, v):
    """A feature map of the keys alone is an activation before a product."""
    return q @ (F.relu(k).mT @ v)


def gated(q, k, v):
    return torch.sigmoid(q @ k.mT) * (k @ q.mT)


def gated_linear_unit(q, k, v):
    return (F.silu(q) * k) @ v.mT


def running_sum(q, k, v):
    return (q.cumsum(2) @ k.mT).relu()


def pairwise_activation_alone(q, k, v):
    """Weights that are summed, and meet no values."""
    return torch.sigmoid(q @ k.mT).sum(-1)


def over_rows(q, k, v):
    """The second product sums over what only V and a constant share."""
    return torch.sigmoid(q @ k.mT).sum(-1, keepdim=True) * v


class Experts(nn.Module):
    """A mixture of perceptrons: rank-three weights that the model has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.register_buffer("down", torch.randn(4, 16, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.relu(q @ self.up.to(q.dtype)) @ (self.down * 0.5)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.conv = nn.Linear(8, 16), nn.Linear(16, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.down(F.silu(self.up(q)))
        y = self.conv(F.relu(self.conv(k.flatten(0, 1).mT))).mT.unflatten(0, (-1, 4))
        squeezed = torch.sigmoid(self.down(F.relu(self.up(v.mean(2, keepdim=True)))))
        return x * squeezed + y


class Mixer(nn.Module):
    """Tokens mixed by learned matrices, as MLP-Mixer does it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(20, 13)), nn.Parameter(torch.randn(13, 20))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.down @ F.gelu(self.up @ q)


SILENT: list[Callable[..., Any]] = [
    three_matrices, scaled_chain, one_sided_features, gated, gated_linear_unit, running_sum, pairwise_activation_alone,
    over_rows, Experts(), Perceptron(), Mixer(),
]  # fmt: skip


@pytest.mark.parametrize("fn", SILENT, ids=lambda fn: getattr(fn, "__name__", type(fn).__name__))
@torch.no_grad()
def test_not_mentioned(fn: Callable[..., Any]) -> None:
    assert misses(fn, *qkv(length=13)) == []
    # Lengths, heads and features that coincide must not make an attention of it.
    if not isinstance(fn, Mixer):
        assert misses(fn, *qkv(batch=8, heads=4 if isinstance(fn, nn.Module) else 8, length=8)) == []
