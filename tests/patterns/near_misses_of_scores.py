"""Near misses in what becomes of the scores: scales, sums, soft-caps, sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .near_misses import ANY, INF, PLAIN, SCALE, lower, near_miss, normal, positions, scores, weights

# --- the scores -------------------------------------------------------------------------------------------------------


@near_miss()
def rectified_scores(q, k, v):
    return F.softmax(F.relu(scores(q, k)), -1) @ v


@near_miss()
def sigmoid_of_scores(q, k, v):
    return F.softmax(torch.sigmoid(scores(q, k)), -1) @ v


@near_miss()
def squared_scores(q, k, v):
    return F.softmax(scores(q, k).square(), -1) @ v


@near_miss()
def absolute_scores(q, k, v):
    return F.softmax(scores(q, k).abs(), -1) @ v


@near_miss()
def exponential_scores(q, k, v):
    return F.softmax((scores(q, k) / 4).exp(), -1) @ v


@near_miss(says="integer|round|no (rule|pattern) follows")
def rounded_scores(q, k, v):
    return F.softmax(scores(q, k).round(), -1) @ v


@near_miss(says="integer")
def integer_scores(q, k, v):
    return F.softmax((4 * scores(q, k)).long().to(q.dtype), -1) @ v


@near_miss()
def clamped_scores(q, k, v):
    return F.softmax(scores(q, k).clamp(-1.0, 1.0), -1) @ v


@near_miss()
def clamped_from_above(q, k, v):
    """The floor hides nothing, the ceiling does something."""
    return F.softmax(scores(q, k).clamp(min=-1e9, max=1.0), -1) @ v


@near_miss()
def normalised_scores(q, k, v):
    return F.softmax(F.layer_norm(scores(q, k), (k.shape[2],)), -1) @ v


@near_miss(PLAIN)
def cosine_of_unit_vectors(q, k, v):
    return weights(F.normalize(q, dim=-1), F.normalize(k, dim=-1)) @ v


@near_miss(ANY)
def cosine_by_dividing_the_scores(q, k, v):
    s = scores(q, k) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None])
    return F.softmax(s, -1) @ v


@near_miss(ANY)
def temperature_of_a_query(q, k, v):
    return F.softmax(scores(q, k) * q.mean(-1, keepdim=True), -1) @ v


@near_miss(ANY)
def temperature_of_a_key(q, k, v):
    return F.softmax(scores(q, k) * torch.arange(1.0, k.shape[2] + 1), -1) @ v


@near_miss(ANY, more=lambda q: (normal(q.shape[1], 1, 1),))
def temperature_of_a_head(q, k, v, t):
    return F.softmax(scores(q, k) * t, -1) @ v


@near_miss(ANY, more=lambda q: (normal(1)[0],))
def temperature_given(q, k, v, t):
    return F.softmax(scores(q, k) * t, -1) @ v


@near_miss(r"heads=\d dim=8 scale=-0\.353553 keep all")
def softmin(q, k, v):
    return F.softmin(scores(q, k), -1) @ v


@near_miss(r"heads=\d dim=8 scale=0 keep all")
def scaled_by_zero(q, k, v):
    return F.softmax(scores(q, k) * 0.0, -1) @ v


@near_miss(r"heads=\d dim=8 scale=0\.707107 keep all")
def scaled_by_a_number_cut_to_an_integer(q, k, v):
    """2.7 held as an integer is 2."""
    return F.softmax(scores(q, k) * torch.full([], 2.7, dtype=torch.long), -1) @ v


@near_miss(r"heads=\d dim=8 scale=0\.707107 keep all")
def scaled_by_a_number_cast_to_an_integer(q, k, v):
    return F.softmax(scores(q, k) * torch.full([], 2.7).long(), -1) @ v


@near_miss(r"heads=\d dim=8 scale=0\.245064 keep all")
def powers_of_two(q, k, v):
    """ln 2 is part of the scale."""
    e = torch.pow(2.0, scores(q, k))
    return (e / e.sum(-1, keepdim=True)) @ v


@near_miss(r".* bias=.*")
def sum_of_two_products(q, k, v):
    """One of the products could be data that is added; the other alone is not the attention."""
    return F.softmax(scores(q, k) + v @ k.mT, -1) @ v


@near_miss()
def product_of_two_scores(q, k, v):
    return F.softmax(scores(q, k) * scores(k, v), -1) @ v


@near_miss()
def squared_distances(q, k, v):
    return F.softmax(-(q[:, :, :, None] - k[:, :, None]).square().sum(-1), -1) @ v


@near_miss(more=lambda q: (normal(8),))
def additive_attention(q, k, v, w):
    """Bahdanau: no product of queries and keys."""
    return F.softmax(torch.tanh(q[:, :, :, None] + k[:, :, None]) @ w, -1) @ v


@near_miss(r".* bias=.*", more=lambda q: (normal(q.shape[2], 3, q.shape[1]),))
def maximum_of_another_axis(q, k, v, t):
    """The soft-max runs over dimension 1, the maximum over what is dimension 2 once broadcast: it does not cancel."""
    s = torch.einsum("bhid,bhjd->bjih", q, k) * SCALE - t.amax(1, keepdim=True)
    return torch.einsum("bjih,bhjd->bhid", F.softmax(s, 1), v)


# --- soft-caps and sinks ----------------------------------------------------------------------------------------------


@near_miss(r"heads=\d dim=8 scale=0\.353553 softcap=1 keep all")
def tanh_alone(q, k, v):
    return F.softmax(torch.tanh(scores(q, k)), -1) @ v


@near_miss(r"heads=\d dim=8 scale=0\.252538 softcap=5 keep all")
def cap_of_two_numbers(q, k, v):
    return F.softmax(5.0 * torch.tanh(scores(q, k) / 7.0), -1) @ v


@near_miss()
def number_inside_the_cap(q, k, v):
    """What a soft-max cancels, a tanh does not."""
    return F.softmax(5.0 * torch.tanh((scores(q, k) + 3.0) / 5.0), -1) @ v


@near_miss()
def maximum_inside_the_cap(q, k, v):
    s = scores(q, k)
    return F.softmax(5.0 * torch.tanh((s - s.amax(-1, keepdim=True)) / 5.0), -1) @ v


@near_miss()
def mask_inside_the_cap(q, k, v):
    """A masked score becomes minus the cap, and keeps its weight."""
    return F.softmax(5.0 * torch.tanh(scores(q, k).masked_fill(~lower(q), -INF) / 5.0), -1) @ v


@near_miss()
def additive_mask_inside_the_cap(q, k, v):
    i, j = positions(q)
    return F.softmax(5.0 * torch.tanh((scores(q, k) + torch.where(j <= i, 0.0, -1e9)) / 5.0), -1) @ v


@near_miss(more=lambda q: (normal(q.shape[1], 1, 1),))
def bias_inside_the_cap(q, k, v, bias):
    return F.softmax(5.0 * torch.tanh((scores(q, k) + bias) / 5.0), -1) @ v


def logits(q: Tensor) -> tuple[Tensor]:
    return (normal(1, q.shape[1], 1, 1),)


def beside(s: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([s, sink.expand(*s.shape[:3], 1)], -1)


@near_miss(more=logits)
def number_beside_a_sink(q, k, v, sink):
    """What is added to every key but not to the sink does not cancel."""
    return F.softmax(beside(scores(q, k) + 3.0, sink), -1)[..., :-1] @ v


@near_miss(more=logits)
def maximum_beside_a_sink(q, k, v, sink):
    s = scores(q, k)
    return F.softmax(beside(s - s.amax(-1, keepdim=True), sink), -1)[..., :-1] @ v


@near_miss(more=logits)
def bias_of_queries_beside_a_sink(q, k, v, sink):
    return F.softmax(beside(scores(q, k) + q[..., :1], sink), -1)[..., :-1] @ v


@near_miss(r".* sink=.*", more=logits)
def scaled_with_the_sink(q, k, v, sink):
    """The sink is scaled as well: its logit is not the input."""
    return F.softmax(beside(q @ k.mT, sink) * SCALE, -1)[..., :-1] @ v


@near_miss(more=logits)
def the_wrong_column_dropped(q, k, v, sink):
    return F.softmax(beside(scores(q, k), sink), -1)[..., 1:] @ v


@near_miss(r".* sink=.*", more=lambda q: (normal(1, q.shape[1], 1, 2),))
def two_sinks(q, k, v, sinks):
    s = torch.cat([scores(q, k), sinks.expand(*q.shape[:3], 2)], -1)
    return F.softmax(s, -1)[..., :-2] @ v


@near_miss(r".* sink=\w+\[b, h, i\].*", more=lambda q: (normal(*q.shape[:3], 1),))
def a_sink_of_each_query(q, k, v, sink):
    return F.softmax(torch.cat([scores(q, k), sink], -1), -1)[..., :-1] @ v


@near_miss(more=lambda q: (normal(1, q.shape[1], 1, 1), normal(1, q.shape[1], 1, 8)))
def a_column_with_a_value(q, k, v, sink, value):
    return F.softmax(beside(scores(q, k), sink), -1) @ torch.cat([v, value.expand(q.shape[0], -1, -1, -1)], 2)


@near_miss()
def one_in_the_sum_after_the_maximum(q, k, v):
    """The maximum is subtracted from every key, but the one stays: no off-by-one soft-max."""
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@near_miss()
def a_little_in_the_sum(q, k, v):
    e = torch.exp(scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + 0.1)) @ v
