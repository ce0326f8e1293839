"""More spellings: masks, biases, soft-caps and sinks, and the ways a KV head is shared by several query heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .spellings import (
    CACHED,
    CAP,
    DIM,
    GROUP,
    HEADS,
    INF,
    KV_HEADS,
    PREFIX,
    REACH,
    SCALE,
    WINDOW,
    columns,
    flat,
    lower,
    rows,
    scores,
    sdpa,
    spelling,
    swapped,
    swapped_back,
)

# --- causal -----------------------------------------------------------------------------------------------------------


@spelling("causal")
def masked_fill(q, k, v):
    n = q.shape[2]
    keep = torch.tril(torch.ones(n, n, dtype=torch.bool))
    return F.softmax((scores(q, k) * SCALE).masked_fill(~keep, -INF), -1) @ v


@spelling("causal")
def masked_fill_in_place(q, k, v):
    s = scores(q, k)
    s *= SCALE
    s.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), torch.finfo(s.dtype).min)
    return F.softmax(s, -1) @ v


@spelling("causal")
def masked_before_the_scale(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~lower(q, k), -INF) * SCALE, -1) @ v


@spelling("causal")
def where_positions(q, k, v):
    return F.softmax(torch.where(lower(q, k), scores(q, k) * SCALE, -INF), -1) @ v


@spelling("causal")
def where_future(q, k, v):
    s = scores(q, k) * SCALE
    least = torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)
    return F.softmax(torch.where(columns(k) > rows(q), least, s), -1) @ v


@spelling("causal")
def added_triangle(q, k, v):
    n = q.shape[2]
    return F.softmax(scores(q, k) * SCALE + torch.full((n, n), -INF, dtype=q.dtype).triu(1), -1) @ v


@spelling("causal")
def added_on_the_left(q, k, v):
    n = q.shape[2]
    mask = torch.triu(torch.full((n, n), -1e9, dtype=q.dtype), diagonal=1)[None, None]
    return F.softmax(mask + scores(q, k) / DIM**0.5, -1) @ v


@spelling("causal")
def added_complement(q, k, v):
    n = q.shape[2]
    keep = torch.tril(torch.ones(n, n, dtype=q.dtype))
    return F.softmax(scores(q, k) * SCALE + (1.0 - keep) * torch.finfo(q.dtype).min, -1) @ v


@spelling("causal")
def multiplied_and_shifted(q, k, v):
    """OpenAI-GPT."""
    n = q.shape[2]
    b = torch.tril(torch.ones(n, n, dtype=q.dtype)).view(1, 1, n, n)
    return F.softmax(scores(q, k) * SCALE * b + -1e4 * (1 - b), -1) @ v


@spelling("causal")
def masked_twice(q, k, v):
    s = (scores(q, k) * SCALE).masked_fill(~lower(q, k), -INF)
    return F.softmax(s + torch.zeros_like(s).masked_fill(columns(k) > rows(q), -INF), -1) @ v


@spelling("causal", layout=swapped, restore=swapped_back)
def transformers_eager(q, k, v):
    """transformers' eager attention: an additive mask, sliced to the keys, a soft-max in float32."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    least, n = torch.finfo(q.dtype).min, q.shape[2]
    mask = torch.where(lower(q, k), torch.tensor(0.0, dtype=q.dtype), least)[None, None].expand(q.shape[0], 1, n, n)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE
    s = s + mask[:, :, :, : k.shape[-2]]
    weights = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=False), v).transpose(1, 2).contiguous()


@spelling("causal")
def bmm_masked(q, k, v):
    keep = lower(q, k).expand(q.shape[0] * HEADS, -1, -1)
    s = torch.bmm(flat(q) * SCALE, flat(k).mT).masked_fill(keep.logical_not(), -INF)
    return torch.bmm(F.softmax(s, -1), flat(v)).view(q.shape)


@spelling("causal")
def baddbmm_masked(q, k, v):
    n = q.shape[2]
    mask = torch.full((n, n), -INF, dtype=q.dtype).triu(1).expand(q.shape[0] * HEADS, n, n)
    weights = F.softmax(torch.baddbmm(mask, flat(q), flat(k).mT, alpha=SCALE), -1)
    return (weights @ flat(v)).view(q.shape)


@spelling("causal")
def exp_times_mask(q, k, v):
    """The mask multiplies the exponentials, before they are summed."""
    e = torch.exp(scores(q, k) * SCALE) * lower(q, k)
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling("causal")
def positions_by_cumsum(q, k, v):
    at = torch.ones(q.shape[2], dtype=torch.long).cumsum(0) - 1
    return F.softmax((scores(q, k) * SCALE).masked_fill(at[None, :] > at[:, None], -INF), -1) @ v


@spelling("causal")
def sdpa_is_causal(q, k, v):
    return sdpa(q, k, v, is_causal=True)


@spelling("causal")
def sdpa_boolean(q, k, v):
    return sdpa(q, k, v, attn_mask=lower(q, k)[None, None].expand(q.shape[0], 1, -1, -1))


@spelling("causal")
def sdpa_additive(q, k, v):
    n = q.shape[2]
    return sdpa(q, k, v, attn_mask=torch.zeros(n, n, dtype=q.dtype).masked_fill(~lower(q, k), -INF))


@spelling("causal", layout=swapped, restore=swapped_back)
def sdpa_transposed(q, k, v):
    return sdpa(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


# --- key and value heads shared by groups of query heads --------------------------------------------------------------


def softmax_of(s: Tensor, keep: Tensor) -> Tensor:
    return F.softmax((s * SCALE).masked_fill(~keep, -INF), -1)


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


# --- padding ----------------------------------------------------------------------------------------------------------


@spelling("padded")
def padding_filled(q, k, v, pad):
    return softmax_of(scores(q, k), pad[:, None, None, :]) @ v


@spelling("padded")
def padding_where(q, k, v, pad):
    s = scores(q, k) * SCALE
    return F.softmax(torch.where(pad.view(-1, 1, 1, k.shape[2]), s, torch.finfo(s.dtype).min), -1) @ v


@spelling("padded")
def padding_added(q, k, v, pad):
    """BERT's extended attention mask."""
    mask = (1.0 - pad[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return F.softmax(scores(q, k) / math.sqrt(DIM) + mask, dim=-1) @ v


@spelling("padded", layout=lambda q, k, v, pad: (q, k, v, ~pad))
def padding_given_as_what_is_dropped(q, k, v, drop):
    return F.softmax((scores(q, k) * SCALE).masked_fill(drop[:, None, None], -INF), -1) @ v


@spelling("padded")
def padding_of_bmm(q, k, v, pad):
    keep = pad[:, None, None].expand(-1, HEADS, q.shape[2], -1).flatten(0, 1)
    return torch.bmm(softmax_of(torch.bmm(flat(q), flat(k).mT), keep), flat(v)).view(q.shape)


@spelling("padded", layout=lambda q, k, v, pad: (q, k, v, pad.long()))
def padding_given_as_numbers(q, k, v, pad):
    return softmax_of(scores(q, k), (pad != 0)[:, None, None, :]) @ v


@spelling("padded")
def sdpa_padding(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=pad[:, None, None, :].expand(-1, 1, q.shape[2], -1))


@spelling("causal padded")
def causal_and_padding(q, k, v, pad):
    return softmax_of(scores(q, k), lower(q, k) & pad[:, None, None, :]) @ v


@spelling("causal padded")
def causal_then_padding(q, k, v, pad):
    s = (scores(q, k) * SCALE).masked_fill(~lower(q, k), -INF)
    return F.softmax(s.masked_fill(~pad[:, None, None], -INF), -1) @ v


@spelling("causal padded")
def causal_plus_padding(q, k, v, pad):
    """Two additive masks."""
    n = q.shape[2]
    ahead = torch.full((n, n), -INF, dtype=q.dtype).triu(1)
    absent = torch.zeros_like(pad, dtype=q.dtype).masked_fill(~pad, -INF)
    return F.softmax(scores(q, k) * SCALE + ahead + absent[:, None, None, :], -1) @ v


@spelling("causal padded")
def causal_or_padding_dropped(q, k, v, pad):
    drop = (columns(k) > rows(q)) | ~pad[:, None, None]
    return F.softmax((scores(q, k) * SCALE).masked_fill(drop, -INF), -1) @ v


@spelling("causal padded")
def sdpa_causal_and_padding(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=torch.logical_and(lower(q, k), pad[:, None, None]))


# --- windows, chunks, prefixes, documents, offsets --------------------------------------------------------------------


@spelling("sliding")
def window_of_distances(q, k, v):
    distance = rows(q) - columns(k)
    return softmax_of(scores(q, k), (distance >= 0) & (distance < WINDOW)) @ v


@spelling("sliding")
def window_of_triangles(q, k, v):
    every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return softmax_of(scores(q, k), every.tril() & every.triu(1 - WINDOW)) @ v


@spelling("sliding")
def window_of_one_triangle_in_the_other(q, k, v):
    every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return softmax_of(scores(q, k), every.tril().triu(1 - WINDOW)) @ v


@spelling("sliding")
def window_without_what_is_older(q, k, v):
    """A triangle less another."""
    every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return softmax_of(scores(q, k), every.tril() & ~every.tril(-WINDOW)) @ v


@spelling("sliding")
def sdpa_window(q, k, v):
    return sdpa(q, k, v, attn_mask=lower(q, k) & (columns(k) > rows(q) - WINDOW))


@spelling("band")
def band_of_absolute_distances(q, k, v):
    return softmax_of(scores(q, k), (rows(q) - columns(k)).abs() < WINDOW) @ v


@spelling("band")
def band_of_two_bounds(q, k, v):
    drop = (columns(k) <= rows(q) - WINDOW) | (columns(k) >= rows(q) + WINDOW)
    return F.softmax((scores(q, k) * SCALE).masked_fill(drop, torch.finfo(q.dtype).min), -1) @ v


@spelling("chunked")
def chunks_by_division(q, k, v):
    return softmax_of(scores(q, k), lower(q, k) & (rows(q) // WINDOW == columns(k) // WINDOW)) @ v


@spelling("chunked")
def sdpa_chunks(q, k, v):
    chunk = torch.div(torch.arange(q.shape[2]), WINDOW, rounding_mode="floor")
    return sdpa(q, k, v, attn_mask=lower(q, k) & (chunk[:, None] == chunk))


@spelling("prefix")
def prefix_or_causal(q, k, v):
    return softmax_of(scores(q, k), lower(q, k) | (columns(k) < PREFIX)) @ v


@spelling("prefix")
def prefix_dropped(q, k, v):
    drop = (columns(k) > rows(q)) & (columns(k) >= PREFIX)
    return F.softmax(torch.where(drop, -INF, scores(q, k) * SCALE), -1) @ v


@spelling("prefix")
def sdpa_prefix(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.where(columns(k) < PREFIX, True, lower(q, k)))


@spelling("packed")
def documents_compared(q, k, v, doc):
    keep = lower(q, k) & (doc[:, :, None] == doc[:, None, :])
    return softmax_of(scores(q, k), keep[:, None]) @ v


@spelling("packed")
def sdpa_documents(q, k, v, doc):
    other = doc.unsqueeze(1).ne(doc.unsqueeze(2))
    return sdpa(q, k, v, attn_mask=~(other | (columns(k) > rows(q))).unsqueeze(1))


@spelling("decoding")
def offset_by_lengths(q, k, v):
    return softmax_of(scores(q, k), columns(k) <= rows(q) + (k.shape[2] - q.shape[2])) @ v


@spelling("decoding")
def offset_triangle(q, k, v):
    n, m = q.shape[2], k.shape[2]
    return softmax_of(scores(q, k), torch.ones(n, m, dtype=torch.bool).tril(m - n)) @ v


@spelling("decoding")
def offset_rows_of_a_square(q, k, v):
    """GPT-2: the last rows of the causal square."""
    n, m = q.shape[2], k.shape[2]
    square = torch.ones(m, m, dtype=torch.bool).tril()[None, None]
    return softmax_of(scores(q, k), square[:, :, m - n : m, :m]) @ v


@spelling("decoding")
def sdpa_offset(q, k, v):
    at = torch.arange(q.shape[2]) + CACHED
    return sdpa(q, k, v, attn_mask=columns(k) <= at[:, None])


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
