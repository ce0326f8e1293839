"""Scores times a tensor that is the same for every key: the spellings, and what only looks like them.

Factors have both signs, so that one that was taken for positive would show. Families are compared with their formula,
near misses with the plain function, in `test_spelling_matrix` and `test_near_misses`; here both run in float64 too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .near_misses import near_miss
from .spellings import CAUSAL, HEADS, INF, SCALE, also, attend, family, lower, normal, scores, spelling

# --- families ---------------------------------------------------------------------------------------------------------

family("tempered", CAUSAL, also(lambda *_: normal(HEADS)))(
    lambda q, k, v, t: attend(q * t[:, None, None], k, v, keep=lower(q, k))
)
family("tempered rows", "all", also(lambda b, n: normal(b, 1, n, 1)))(lambda q, k, v, t: attend(q * t, k, v))
family("tempered biased", "all", also(lambda *_: normal(1)[0]), extra=r" bias=.+")(
    lambda q, k, v, t: attend(q * t, k, v, bias=-(torch.arange(k.shape[2])[None, :] * 0.5).to(q.dtype))
)
family("tempered capped", "all", also(lambda *_: normal(HEADS, 1, 1)), extra=" softcap=5")(
    lambda q, k, v, t: attend(q * t, k, v, cap=5.0)
)


def drop(q, k):
    return ~lower(q, k)


@spelling("tempered")
def temperature_then_fill(q, k, v, t):
    return F.softmax((scores(q, k) * SCALE * t[:, None, None]).masked_fill(drop(q, k), -INF), -1) @ v


@spelling("tempered")
def temperature_on_the_left(q, k, v, t):
    s = t.view(1, -1, 1, 1) * scores(q, k)
    return F.softmax(torch.where(lower(q, k), s * SCALE, -INF), -1) @ v


@spelling("tempered")
def temperature_divides(q, k, v, t):
    return F.softmax((scores(q, k) / (1 / t)[:, None, None] * SCALE).masked_fill(drop(q, k), -INF), -1) @ v


@spelling("tempered")
def temperature_on_q(q, k, v, t):
    return F.softmax((scores(q * t[:, None, None], k) * SCALE).masked_fill(drop(q, k), -INF), -1) @ v


@spelling("tempered")
def temperature_on_k(q, k, v, t):
    return F.softmax((scores(q, k * t[:, None, None]) * SCALE).masked_fill(drop(q, k), -INF), -1) @ v


@spelling("tempered")
def temperature_in_two_factors(q, k, v, t):
    s = scores(q, k) * t.abs()[:, None, None] * SCALE * t.sign()[None, :, None, None]
    return F.softmax(s.masked_fill(drop(q, k), -INF), -1) @ v


@spelling("tempered")
def temperature_of_merged_heads(q, k, v, t):
    """Batch and heads are one dimension, and the factor has one entry for each."""
    b, h, n, d = q.shape
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * t.expand(b, -1).reshape(-1, 1, 1) * SCALE
    s = s.masked_fill(drop(q, k), -INF)
    return torch.bmm(F.softmax(s, -1), v.flatten(0, 1)).view(b, h, n, d)


@spelling("tempered")
def temperature_in_float32(q, k, v, t):
    s = (scores(q, k) * SCALE).to(torch.promote_types(q.dtype, torch.float32)) * t[:, None, None]
    return F.softmax(s.masked_fill(drop(q, k), -INF), -1).to(q.dtype) @ v


@spelling("tempered", layout=lambda q, k, v, t: (*(x.transpose(1, 2) for x in (q, k, v)), t))
def temperature_of_the_scores_transposed(q, k, v, t):
    s = torch.einsum("bihd,bjhd->bijh", q, k) * t * SCALE
    keep = (torch.arange(k.shape[1])[None, :] <= torch.arange(q.shape[1])[:, None])[..., None]
    return torch.einsum("bijh,bjhd->bhid", F.softmax(s.masked_fill(~keep, -INF), 2), v)


@spelling("tempered rows")
def temperature_of_a_row(q, k, v, t):
    return F.softmax(scores(q, k) * SCALE * t, -1) @ v


@spelling("tempered rows")
def temperature_of_a_row_expanded(q, k, v, t):
    return F.softmax(t.expand(-1, HEADS, -1, -1) * (q @ k.mT) * SCALE, -1) @ v


@spelling("tempered rows")
def temperature_before_the_maximum_goes(q, k, v, t):
    s = scores(q, k) * SCALE * t
    return F.softmax(s - s.amax(-1, keepdim=True), -1) @ v


@spelling("tempered biased")
def temperature_given_then_a_bias(q, k, v, t):
    return F.softmax(scores(q, k) * SCALE * t - (torch.arange(k.shape[2])[None, :] * 0.5).to(q.dtype), -1) @ v


@spelling("tempered biased")
def temperature_given_divides(q, k, v, t):
    bias = (torch.arange(k.shape[2]) * -0.5).to(q.dtype)
    return F.softmax(SCALE * (q @ k.mT) / t.reciprocal() + bias, -1) @ v


@spelling("tempered capped")
def temperature_inside_the_cap(q, k, v, t):
    return F.softmax(5 * torch.tanh(scores(q, k) * SCALE * t / 5), -1) @ v


# --- near misses ------------------------------------------------------------------------------------------------------

MULTIPLIED = "multiplied by .* afterwards"


def of_heads(q):
    return (torch.linspace(-1.0, 2.0, q.shape[1])[:, None, None],)


@near_miss(says=MULTIPLIED, more=lambda q: (of_heads(q)[0].abs() + 0.1,))
def factor_above_an_infinite_fill(q, k, v, t):
    return F.softmax((scores(q, k) * SCALE).masked_fill(drop(q, k), -INF) * t, -1) @ v


@near_miss(says=MULTIPLIED, more=of_heads)
def factor_above_a_finite_fill(q, k, v, t):
    """Where it is negative the masked keys win."""
    return F.softmax((scores(q, k) * SCALE).masked_fill(drop(q, k), -1e9) * t, -1) @ v


@near_miss(says=MULTIPLIED, more=lambda q: (of_heads(q)[0] * 1e-9,))
def factor_above_a_chosen_fill(q, k, v, t):
    """So small that what was masked is seen again."""
    return F.softmax(torch.where(lower(q, k), scores(q, k) * SCALE, -1e9) * t, -1) @ v


@near_miss(says=MULTIPLIED, more=of_heads)
def factor_above_an_added_mask(q, k, v, t):
    mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill(drop(q, k), -1e9)
    return F.softmax((scores(q, k) * SCALE + mask) * t, -1) @ v


@near_miss(says=MULTIPLIED, more=of_heads)
def factor_above_a_bias(q, k, v, t):
    return F.softmax((scores(q, k) * SCALE - torch.arange(k.shape[2]) * 0.5) * t, -1) @ v


@near_miss(says=MULTIPLIED, more=of_heads)
def factor_above_the_cap(q, k, v, t):
    return F.softmax(5 * torch.tanh(scores(q, k) * SCALE / 5) * t, -1) @ v


@near_miss(says="joined|sliced", more=of_heads)
def factor_above_a_sink(q, k, v, t):
    """The sink's column is multiplied with the rest."""
    s = torch.cat([scores(q, k) * SCALE, q.new_ones(*q.shape[:3], 1)], -1) * t
    return F.softmax(s, -1)[..., :-1] @ v


@near_miss(says="scaled by", more=lambda q: (torch.linspace(0.5, 2, q.shape[2]),))
def factor_of_a_key(q, k, v, t):
    return F.softmax(scores(q, k) * SCALE * t, -1) @ v


@near_miss(says="scaled by", sizes=({"heads": 8, "length": 8},), more=lambda q: (torch.linspace(0.5, 2, 8),))
def factor_of_a_key_like_one_of_a_head(q, k, v, t):
    """As many heads as keys: without the two dimensions it meets the keys."""
    return F.softmax(scores(q, k) * SCALE * t, -1) @ v


@near_miss(says="scaled by", more=lambda q: (torch.rand(q.shape[1], 1, q.shape[2]) + 0.5,))
def factor_of_a_head_and_a_key(q, k, v, t):
    return F.softmax(scores(q, k) * SCALE * t, -1) @ v


@near_miss(says="scaled by", more=of_heads)
def factor_divided_by_the_scores(q, k, v, t):
    return F.softmax(t / (scores(q, k) + 3), -1) @ v


@near_miss(says="own scores")
def factor_made_of_the_scores(q, k, v):
    s = scores(q, k) * SCALE
    return F.softmax(s * s.amax(-1, keepdim=True), -1) @ v


@near_miss(
    says="scaled by",
    more=lambda q: (torch.linspace(-1, 2, 5)[:, None, None, None, None],),
)
def factor_of_an_axis_of_its_own(q, k, v, t):
    """Five temperatures for the same q and k: the scores are made larger by it."""
    return F.softmax((scores(q, k) * SCALE) * t, -1) @ v


@near_miss(says="no other operand shares", more=of_heads)
def factor_of_repeated_scores(q, k, v, t):
    s = (scores(q[:, :1], k[:, :1]) * SCALE).expand(-1, q.shape[1], -1, -1)
    return F.softmax(s * t, -1) @ v


@near_miss(says="part of q's axes", more=lambda q: (torch.linspace(-1, 2, 2)[:, None, None, None],))
def factor_of_pairs_of_heads(q, k, v, t):
    s = (scores(q, k) * SCALE).unflatten(1, (2, -1)) * t
    return F.softmax(s, -1).flatten(1, 2) @ v
