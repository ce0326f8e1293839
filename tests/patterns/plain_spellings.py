"""Spellings without a mask: the products, the scale, the soft-max, packed projections and whole modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spellings import DIM, HEADS, SCALE, Inputs, flat, scores, sdpa, spelling, swapped, swapped_back

# --- plain: the products, the scale and the soft-max ------------------------------------------------------------------


@spelling("plain", "wide", "cross")
def multiplied(q, k, v):
    return torch.softmax(scores(q, k) * SCALE, -1) @ v


@spelling("plain")
def divided(q, k, v):
    return F.softmax(torch.matmul(q, k.mT) / math.sqrt(DIM), dim=3).matmul(v)


@spelling("plain")
def scale_on_q(q, k, v):
    return F.softmax(scores(q * SCALE, k), -1) @ v


@spelling("plain")
def scale_on_k(q, k, v):
    return F.softmax(q @ (k / math.sqrt(DIM)).transpose(2, 3), -1) @ v


@spelling("plain")
def scale_split(q, k, v):
    root = DIM**-0.25
    return F.softmax(scores(q * root, k * root), -1) @ v


@spelling("plain")
def scale_computed(q, k, v):
    return F.softmax(scores(q, k) / (k.size(-1) ** 0.5), -1) @ v


@spelling("plain")
def scale_in_steps(q, k, v):
    return F.softmax(SCALE * 2 * scores(q, k) / 2.0, -1) @ v


@spelling("plain")
def scale_of_a_constant_tensor(q, k, v):
    # In float32 whatever the scores are: in bfloat16 it would be another scale.
    return F.softmax(scores(q, k) / torch.full([], v.size(-1) ** 0.5, dtype=torch.float32), -1) @ v


@spelling("plain")
def scale_after_the_transpose(q, k, v):
    return F.softmax((k.transpose(2, 3) * SCALE).__rmatmul__(q), -1) @ v


@spelling("unscaled")
def no_scale(q, k, v):
    return F.softmax(scores(q, k), -1) @ v


@spelling("unscaled")
def sdpa_without_scale(q, k, v):
    return sdpa(q, k, v, scale=1.0)


@spelling("plain", "wide", "cross")
def bmm(q, k, v):
    weights = torch.bmm(flat(q), flat(k).transpose(1, 2)).mul(SCALE).softmax(-1)
    return torch.bmm(weights, flat(v)).view(-1, HEADS, q.shape[2], v.shape[3])


@spelling("plain")
def baddbmm(q, k, v):
    blank = torch.empty(q.shape[0] * HEADS, q.shape[2], k.shape[2], dtype=q.dtype)
    s = torch.baddbmm(blank, flat(q), flat(k).transpose(1, 2), beta=0, alpha=SCALE)
    return (F.softmax(s.view(-1, HEADS, *s.shape[1:]), -1).flatten(0, 1) @ flat(v)).view(q.shape)


@spelling("plain", "cross")
def einsum(q, k, v):
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spelling("plain", "wide", layout=swapped, restore=swapped_back)
def einsum_of_odd_letters(q, k, v):
    energy = torch.einsum("nqhc,nkhc->nhqk", [q, k])
    return torch.einsum("nhql,nlhc->nqhc", [torch.softmax(energy / DIM**0.5, dim=3), v])


@spelling("plain", layout=swapped, restore=swapped_back)
def heads_innermost(q, k, v):
    """Scores (B, i, j, H), the soft-max over j in the middle."""
    weights = F.softmax(torch.einsum("bihd,bjhd->bijh", q, k) * SCALE, dim=2)
    return torch.einsum("bijh,bjhd->bihd", weights, v)


@spelling("plain")
def keys_by_queries(q, k, v):
    """Scores (B, H, j, i), the soft-max over their rows, and everything transposed at the end."""
    weights = F.softmax(k @ q.mT * SCALE, dim=-2)
    return (v.mT @ weights).mT


@spelling("plain", "cross")
def multiply_and_sum(q, k, v):
    weights = F.softmax((q[:, :, :, None] * k[:, :, None]).sum(-1) * SCALE, -1)
    return (weights[..., None] * v[:, :, None]).sum(3)


@spelling("plain", layout=lambda q, k, v: (q, k.mT.contiguous(), v))
def keys_given_transposed(q, kt, v):
    return F.softmax(q @ kt * SCALE, -1) @ v


@spelling("plain", layout=lambda q, k, v: (q, k, v.mT.contiguous()))
def values_given_transposed(q, k, vt):
    return torch.einsum("bhij,bhdj->bhid", F.softmax(scores(q, k) * SCALE, -1), vt)


@spelling("plain", layout=swapped, restore=lambda out: out.view(*out.shape[:2], HEADS, DIM).transpose(1, 2))
def permuted_and_merged(q, k, v):
    """GPT style: heads split by a permute, merged again at the end."""
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    out = F.softmax(torch.matmul(q, k) / math.sqrt(DIM), -1) @ v
    return out.permute(0, 2, 1, 3).contiguous().view(out.shape[0], -1, HEADS * DIM)


@spelling("plain")
def upcast(q, k, v):
    return F.softmax(scores(q, k) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling("plain")
def upcast_before(q, k, v):
    return torch.softmax((scores(q, k) * SCALE).float(), -1).type_as(q) @ v


@spelling("plain")
def upcast_operands(q, k, v):
    return (F.softmax(scores(q.float(), k.float()) * SCALE, -1) @ v.float()).to(q.dtype)


@spelling("plain")
def clones_between(q, k, v):
    s = (scores(q.contiguous(), k.clone()) * SCALE).contiguous()
    return (F.softmax(s, -1).clone().to(q.dtype) @ v.contiguous()).contiguous()


@spelling("plain")
def softmax_of_the_last_by_number(q, k, v):
    s = scores(q, k) * SCALE
    return nn.Softmax(dim=s.dim() - 1)(s) @ v


@spelling("plain")
def log_softmax(q, k, v):
    return F.log_softmax(scores(q, k) * SCALE, -1).exp() @ v


@spelling("plain")
def logsumexp(q, k, v):
    s = scores(q, k) * SCALE
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


@spelling("plain")
def exp_over_sum(q, k, v):
    e = torch.exp(scores(q, k) * SCALE)
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling("plain")
def exp_over_sum_without_the_maximum(q, k, v):
    s = scores(q, k) * SCALE
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spelling("plain")
def maximum_subtracted_twice(q, k, v):
    """By hand and by the soft-max itself."""
    s = scores(q, k) * SCALE
    return F.softmax(s - s.amax(-1, True), -1) @ v


@spelling("plain")
def dropout_of_nothing(q, k, v):
    return F.dropout(F.softmax(scores(q, k) * SCALE, -1), 0.0, training=True) @ v


@spelling("plain")
def dropout_while_evaluating(q, k, v):
    return F.dropout(F.softmax(scores(q, k) * SCALE, -1), 0.4, training=False) @ v


@spelling("plain")
def nothing_in_the_cache(q, k, v):
    """The first call with an empty cache: concatenated with nothing."""
    k, v = (torch.cat([torch.tensor([], dtype=t.dtype), t], -2) for t in (k, v))
    return F.softmax(scores(q, k) * SCALE, -1) @ v


@spelling("plain")
def nothing_added(q, k, v):
    s = scores(q, k) * SCALE
    return F.softmax(s + torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=s.dtype), -1) @ v


@spelling("plain", "wide", "cross")
def sdpa_plain(q, k, v):
    return sdpa(q, k, v)


@spelling("plain", "cross")
def sdpa_all_true(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))


@spelling("plain")
def sdpa_of_three_dimensions(q, k, v):
    return sdpa(flat(q), flat(k), flat(v)).unflatten(0, (-1, HEADS))


@spelling("plain")
def sdpa_of_scaled_queries(q, k, v):
    return sdpa(q * SCALE, k, v, scale=1.0)


# --- packed projections and whole modules -----------------------------------------------------------------------------


def merged(t: Tensor) -> Tensor:
    """(B, S, H·D)."""
    return t.transpose(1, 2).flatten(2)


def split_heads(t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], -1, DIM).transpose(1, 2)


def in_one_row(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """(B, S, 3·H·D), all queries first."""
    return (torch.cat([merged(q), merged(k), merged(v)], -1),)


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """(B, S, H·3·D), each head's query, key and value side by side."""
    return (torch.cat(swapped(q, k, v), -1).flatten(2),)


@spelling("causal", layout=in_one_row, restore=split_heads)
def packed_split(x):
    """nanoGPT."""
    q, k, v = (split_heads(t) for t in x.split(HEADS * DIM, dim=2))
    n = x.shape[1]
    bias = torch.tril(torch.ones(n, n)).view(1, 1, n, n)
    s = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    s = s.masked_fill(bias[:, :, :n, :n] == 0, float("-inf"))
    y = F.dropout(F.softmax(s, dim=-1), 0.1, training=False) @ v
    return y.transpose(1, 2).contiguous().view(x.shape[0], n, HEADS * DIM)


@spelling("plain", layout=in_one_row)
def packed_chunk(x):
    q, k, v = (split_heads(t) for t in x.chunk(3, -1))
    return F.softmax(scores(q, k) * SCALE, -1) @ v


@spelling("plain", layout=in_one_row)
def packed_unbind(x):
    """timm."""
    q, k, v = x.reshape(x.shape[0], -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@spelling("causal", layout=head_by_head)
def packed_by_head(x):
    """GPT-NeoX."""
    q, k, v = x.view(*x.shape[:2], HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1)
    return sdpa(q, k, v, is_causal=True)


def identity_attention(dtype: torch.dtype) -> nn.MultiheadAttention:
    """A module whose projections leave everything as it is."""
    module = nn.MultiheadAttention(HEADS * DIM, HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(HEADS * DIM).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(HEADS * DIM))
    return module.to(dtype).eval().requires_grad_(False)


MODULES = {dtype: identity_attention(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}


@spelling("plain", "cross", layout=lambda q, k, v: (merged(q), merged(k), merged(v)), restore=split_heads)
def module(q, k, v):
    return MODULES[q.dtype](q, k, v, need_weights=False)[0]


@spelling("plain", layout=lambda q, k, v: (merged(q), merged(k), merged(v)), restore=split_heads)
def module_returning_weights(q, k, v):
    return MODULES[q.dtype](q, k, v)[0]


@spelling("causal", layout=lambda q, k, v: (merged(q), merged(k), merged(v)), restore=split_heads)
def module_with_a_mask(q, k, v):
    n = q.shape[1]
    drop = torch.ones(n, n, dtype=torch.bool).triu(1)
    return MODULES[q.dtype](q, k, v, attn_mask=drop, need_weights=False)[0]


@spelling("padded", layout=lambda q, k, v, keep: (merged(q), merged(k), merged(v), ~keep), restore=split_heads)
def module_with_padding(q, k, v, drop):
    return MODULES[q.dtype](q, k, v, key_padding_mask=drop, need_weights=False)[0]
