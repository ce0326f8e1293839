"""More spellings: causal masks, padding, windows, chunks, prefixes, documents, offsets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .spellings import (
    CACHED,
    DIM,
    HEADS,
    INF,
    PREFIX,
    SCALE,
    WINDOW,
    columns,
    flat,
    lower,
    rows,
    scores,
    sdpa,
    softmax_of,
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
