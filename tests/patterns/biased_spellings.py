"""More spellings: soft-caps, biases and sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .spellings import (
    CAP,
    HEADS,
    INF,
    REACH,
    SCALE,
    columns,
    flat,
    lower,
    rows,
    scores,
    sdpa,
    spelling,
)

# --- soft-cap, biases, sinks ------------------------------------------------------------------------------------------


@spelling("capped")
def cap_by_three_steps(q, k, v):
    """Gemma 2."""
    s = scores(q, k) * SCALE
    s = s / CAP
    s = torch.tanh(s)
    s = s * CAP
    return F.softmax(s + torch.full(s.shape[-2:], torch.finfo(s.dtype).min, dtype=s.dtype).triu(1), -1) @ v


@spelling("capped")
def cap_folded_into_the_scale(q, k, v):
    s = CAP * (scores(q, k) * (SCALE / CAP)).tanh()
    return F.softmax(s.masked_fill(~lower(q, k), -INF), -1) @ v


@spelling("capped")
def cap_of_scaled_queries(q, k, v):
    s = torch.tanh(torch.einsum("bhid,bhjd->bhij", q * SCALE, k) / CAP) * CAP
    return F.softmax(torch.where(lower(q, k), s, -INF), -1) @ v


@spelling("alibi")
def alibi_added(q, k, v, slopes):
    bias = slopes[:, None, None] * (columns(k) - rows(q))
    return F.softmax((scores(q, k) * SCALE + bias).masked_fill(~lower(q, k), -INF), -1) @ v


@spelling("alibi")
def alibi_subtracted(q, k, v, slopes):
    bias = (rows(q) - columns(k)).to(q.dtype) * slopes.view(1, HEADS, 1, 1)
    return F.softmax((scores(q, k) * SCALE - bias).masked_fill(~lower(q, k), -INF), -1) @ v


@spelling("alibi")
def sdpa_alibi(q, k, v, slopes):
    bias = (columns(k) - rows(q)) * slopes[:, None, None]
    return sdpa(q, k, v, attn_mask=bias.masked_fill(columns(k) > rows(q), -INF).to(q.dtype)[None])


@spelling("alibi")
def alibi_baddbmm(q, k, v, slopes):
    b, n = q.shape[0], q.shape[2]
    bias = (slopes[:, None, None] * (columns(k) - rows(q))).expand(b, -1, -1, -1).flatten(0, 1)
    s = torch.baddbmm(bias, flat(q), flat(k).mT, beta=1.0, alpha=SCALE).view(b, HEADS, n, n)
    return F.softmax(s.masked_fill(~lower(q, k), -INF), -1) @ v


@spelling("relative")
def table_looked_up(q, k, v, table):
    bias = table[columns(k) - rows(q) + REACH].permute(2, 0, 1)
    return F.softmax(scores(q, k) * SCALE + bias.unsqueeze(0), -1) @ v


@spelling("relative")
def table_embedded(q, k, v, table):
    """T5: an embedding read at the distance."""
    bias = F.embedding(columns(k) - rows(q) + REACH, table).permute(2, 0, 1)[None]
    return F.softmax(scores(q, k) * SCALE + bias, -1) @ v


@spelling("relative")
def sdpa_table(q, k, v, table):
    at = (columns(k) - rows(q) + REACH).view(-1)
    bias = table[at].view(q.shape[2], k.shape[2], HEADS).permute(2, 0, 1).contiguous()
    return sdpa(q, k, v, attn_mask=bias[None])


@spelling("biased")
def bias_added(q, k, v, bias):
    return F.softmax(scores(q, k) * SCALE + bias, -1) @ v


@spelling("biased")
def bias_added_before_the_scale(q, k, v, bias):
    return F.softmax((bias / SCALE + scores(q, k)) * SCALE, -1) @ v


@spelling("biased")
def sdpa_bias(q, k, v, bias):
    return sdpa(q, k, v, attn_mask=bias)


@spelling("sink")
def sink_column(q, k, v, sink):
    """GPT-OSS: one more column, dropped after the soft-max."""
    s = (scores(q, k) * SCALE).masked_fill(~lower(q, k), -INF)
    column = sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    s = torch.cat([s, column], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return F.softmax(s, dim=-1)[..., :-1] @ v


@spelling("sink")
def sink_in_the_sum(q, k, v, sink):
    s = (scores(q, k) * SCALE).masked_fill(~lower(q, k), -INF)
    e = torch.exp(s)
    return (e / (e.sum(-1, keepdim=True) + sink.exp()[None, :, None, None])) @ v


@spelling("sink")
def sink_column_first(q, k, v, sink):
    s = (scores(q, k) * SCALE).masked_fill(~lower(q, k), -INF)
    s = torch.cat([sink[None, :, None, None].expand(*s.shape[:3], 1), s], -1)
    return F.softmax(s, -1)[:, :, :, 1:] @ v


@spelling("off by one")
def one_in_the_sum(q, k, v):
    e = torch.exp(scores(q, k) * SCALE)
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@spelling("off by one")
def column_of_zeros(q, k, v):
    s = scores(q, k) * SCALE
    return F.softmax(F.pad(s, (0, 1)), -1)[..., :-1] @ v


@spelling("zero key")
def key_and_value_of_zeros(q, k, v):
    """add_zero_attn: one more key and value, both zero."""
    k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
    return F.softmax(scores(q, k) * SCALE, -1) @ v
