"""More spellings: the ways a KV head is shared by several query heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .spellings import (
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    SCALE,
    lower,
    scores,
    sdpa,
    softmax_of,
    spelling,
    swapped,
    swapped_back,
)

# --- key and value heads shared by groups of query heads --------------------------------------------------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_of(scores(q, k), lower(q, k)) @ v


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores(q, k) * SCALE, -1) @ v


@spelling("causal grouped", "causal one key head")
def sdpa_grouped(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


@spelling("causal grouped")
def repeat_interleave(q, k, v):
    return causal(q, *(t.repeat_interleave(GROUP, dim=1) for t in (k, v)))


@spelling("grouped")
def repeat_interleave_counted_from_the_end(q, k, v):
    return unmasked(q, *(torch.repeat_interleave(t, GROUP, -3) for t in (k, v)))


def repeated(t: Tensor) -> Tensor:
    """transformers' repeat_kv."""
    b, g, n, d = t.shape
    return t[:, :, None, :, :].expand(b, g, GROUP, n, d).reshape(b, g * GROUP, n, d)


@spelling("causal grouped")
def repeat_kv(q, k, v):
    return causal(q, repeated(k), repeated(v))


@spelling("causal grouped")
def sdpa_repeat_kv(q, k, v):
    return sdpa(q, repeated(k), repeated(v), attn_mask=lower(q, k), scale=SCALE)


@spelling("grouped")
def repeated_by_copies(q, k, v):
    return unmasked(q, *(t[:, :, None].repeat(1, 1, GROUP, 1, 1).flatten(1, 2) for t in (k, v)))


@spelling("grouped")
def repeated_by_a_stack(q, k, v):
    return unmasked(q, *(torch.stack([t] * GROUP, 2).flatten(1, 2) for t in (k, v)))


@spelling("grouped")
def repeated_by_an_index(q, k, v):
    group = torch.arange(HEADS) // GROUP
    return unmasked(q, k[:, group], v[:, group])


@spelling("grouped")
def five_dimensional_einsum(q, k, v):
    s = torch.einsum("bgrid,bgjd->bgrij", q.unflatten(1, (KV_HEADS, GROUP)), k)
    return torch.einsum("bgrij,bgjd->bgrid", F.softmax(s * SCALE, -1), v).flatten(1, 2)


@spelling("causal grouped", layout=swapped, restore=swapped_back)
def five_dimensional_einsum_of_rows(q, k, v):
    q = q.view(*q.shape[:2], KV_HEADS, GROUP, DIM)
    s = torch.einsum("btkgh,bskh->bkgts", q, k) * SCALE
    n = q.shape[1]
    s = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), s, torch.finfo(s.dtype).min)
    return torch.einsum("bkgts,bskh->btkgh", F.softmax(s, -1), v).reshape(*q.shape[:2], HEADS, DIM)


@spelling("causal grouped")
def five_dimensional_product(q, k, v):
    q = q.reshape(q.shape[0], KV_HEADS, GROUP, *q.shape[2:])
    return causal(q, k[:, :, None], v[:, :, None]).flatten(1, 2)


@spelling("grouped")
def five_dimensional_sdpa(q, k, v):
    q = q.unflatten(1, (KV_HEADS, GROUP))
    return sdpa(q, *(t.unsqueeze(2).expand(-1, -1, GROUP, -1, -1) for t in (k, v))).flatten(1, 2)


@spelling("causal one key head")
def broadcast(q, k, v):
    return causal(q, k, v)


@spelling("causal one key head")
def sdpa_broadcast(q, k, v):
    return sdpa(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1), is_causal=True)


@spelling("causal one key head")
def einsum_without_key_heads(q, k, v):
    weights = softmax_of(torch.einsum("bhid,bjd->bhij", q, k[:, 0]), lower(q, k))
    return torch.einsum("bhij,bjd->bhid", weights, v.squeeze(1))


@spelling("causal one key head")
def rows_of_all_heads(q, k, v):
    """GPT-BigCode: the queries of all heads are rows of one product."""
    b, n = q.shape[0], q.shape[2]
    s = torch.bmm(q.transpose(1, 2).reshape(b, n * HEADS, DIM), k[:, 0].mT).view(b, n, HEADS, n)
    weights = softmax_of(s, lower(q, k)[:, None, :]).view(b, n * HEADS, n)
    return torch.bmm(weights, v[:, 0]).view(b, n, HEADS, DIM).transpose(1, 2)
