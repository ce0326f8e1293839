"""Attentions as models write them, which the tests of passes share."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def positions(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])


def call(q, k, v, mask=None, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **kwargs)


def written(q, k, v, mask=None, bias=None):
    share = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, share, -1, -1).flatten(1, 2) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def alibi(q, k, v):
    i, j = positions(q, k)
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, dtype=q.dtype)
    return written(q, k, v, j <= i, slopes[:, None, None] * j.to(q.dtype))


def padded(attend, causal):
    def fn(q, k, v, pad):
        i, j = positions(q, k)
        keep = pad[:, None, None].expand(-1, 1, q.shape[2], -1)
        return attend(q, k, v, keep & (j <= i) if causal else keep)

    return fn
