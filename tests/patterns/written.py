"""Pieces of attention written out in plain PyTorch, for heads of 8 features."""

from __future__ import annotations

import math

import torch

from attnopt.ir import Mask

CAUSAL, SCALE = Mask(causal=True), 1 / math.sqrt(8)


def triangle(n):
    return torch.tril(torch.ones(n, n, dtype=torch.bool))


def positions(n):
    i = torch.arange(n)
    return i[:, None], i[None, :]


def scores(q, k):
    return q @ k.transpose(-2, -1)
