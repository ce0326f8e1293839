"""Near misses in what masks keep, in what becomes of the weights, and in a soft-max that is no attention's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .near_misses import ALIKE, ANY, PLAIN, lower, near_miss, normal, positions, scores, sdpa, weights

# --- masks ------------------------------------------------------------------------------------------------------------


@near_miss()
def scores_times_a_mask(q, k, v):
    """A dropped score is 0, and keeps its weight."""
    return F.softmax(scores(q, k) * lower(q), -1) @ v


@near_miss(says="fill|infinity|hid")
def filled_with_zero(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~lower(q), 0.0), -1) @ v


@near_miss(says="fill|infinity|hid")
def filled_with_little(q, k, v):
    return F.softmax(scores(q, k).masked_fill(~lower(q), -3.0), -1) @ v


@near_miss(r".* bias=.*")
def a_step_added(q, k, v):
    i, j = positions(q)
    return F.softmax(scores(q, k) + torch.where(j <= i, 0.0, -3.0), -1) @ v


@near_miss(says="fill|infinity|hid")
def filled_before_a_tiny_scale(q, k, v):
    return F.softmax((q @ k.mT).masked_fill(~lower(q), -1e4) * 1e-4, -1) @ v


@near_miss(says="fill|infinity|hid")
def filled_before_a_negative_scale(q, k, v):
    return F.softmax((q @ k.mT).masked_fill(~lower(q), -1e9) * -1e-9, -1) @ v


@near_miss(r".* bias=.*")
def added_before_a_tiny_scale(q, k, v):
    n = q.shape[2]
    return F.softmax((q @ k.mT + torch.full((n, n), -1.2e4).triu(1)) * 1e-4, -1) @ v


@near_miss()
def chosen_between_scores(q, k, v):
    return F.softmax(torch.where(lower(q), scores(q, k), scores(q, v)), -1) @ v


@near_miss()
def masked_after_the_softmax(q, k, v):
    return weights(q, k).masked_fill(~lower(q), 0.0) @ v


@near_miss()
def multiplied_after_the_softmax(q, k, v):
    return (weights(q, k) * lower(q)) @ v


@near_miss()
def added_after_the_softmax(q, k, v):
    return (weights(q, k) + lower(q)) @ v


@near_miss(r".* keep j <= i")
def normalised_again_after_a_mask(q, k, v):
    """This one is causal attention."""
    w = weights(q, k) * lower(q)
    return (w / w.sum(-1, keepdim=True)) @ v


NOT_CAUSAL = r"(?!.*keep j <= i$).*"


@near_miss(NOT_CAUSAL)
def what_is_dropped_given_as_kept(q, k, v):
    i, j = positions(q)
    return sdpa(q, k, v, attn_mask=j >= i)


@near_miss(NOT_CAUSAL)
def one_short_of_causal(q, k, v):
    """The first query keeps nothing: the smallest number then averages over every key."""
    i, j = positions(q)
    return F.softmax(scores(q, k).masked_fill(j >= i, torch.finfo(q.dtype).min), -1) @ v


@near_miss(NOT_CAUSAL)
def one_more_than_causal(q, k, v):
    i, j = positions(q)
    return sdpa(q, k, v, attn_mask=j <= i + 1)


@near_miss(NOT_CAUSAL)
def half_the_distance(q, k, v):
    i, j = positions(q)
    return sdpa(q, k, v, attn_mask=2 * j <= i)


@near_miss(r"(?!.*i - j < \d+$).*")
def a_window_of_each_head(q, k, v):
    i, j = positions(q)
    reach = torch.arange(q.shape[1]).view(-1, 1, 1)
    return sdpa(q, k, v, attn_mask=(j <= i) & (i - j < 2 + reach))


@near_miss(NOT_CAUSAL)
def causal_or_not_by_sample(q, k, v):
    every = torch.arange(q.shape[0]).view(-1, 1, 1, 1) == 0
    return sdpa(q, k, v, attn_mask=lower(q) | every)


@near_miss(r"(?!.*L0\[b, j\]$).*", more=lambda q: (normal(q.shape[0], q.shape[2]) > -1,))
def queries_padded(q, k, v, pad):
    """[b, i] where [b, j] is meant: with a square mask the shapes are the same."""
    return F.softmax(scores(q, k).masked_fill(~pad[:, None, :, None], -1e9), -1) @ v


@near_miss(ANY, sizes=({"batch": 8, "length": 8},), more=lambda q: (torch.eye(8) + normal(8, 8) > 0,))
def padding_read_transposed(q, k, v, pad):
    return F.softmax(scores(q, k).masked_fill(~pad.t()[:, None, None], -1e9), -1) @ v


@near_miss(r".* bias=.*", more=lambda q: (normal(q.shape[0], 1, 1, q.shape[2]),))
def padding_of_any_number(q, k, v, pad):
    """A mask of 0 and 1 would drop keys, but nothing says that these are."""
    return F.softmax(scores(q, k) + (1.0 - pad) * -1e4, -1) @ v


@near_miss(r"(?!.*keep j <= i$).*", sizes=({"length": 5, "keys": 13},))
def aligned_to_the_last_key(q, k, v):
    i, j = torch.arange(5)[:, None], torch.arange(13)
    return sdpa(q, k, v, attn_mask=j <= i + 8)


@near_miss(r".*keep j <= i", sizes=({"length": 5, "keys": 13},))
def aligned_to_the_first_key(q, k, v):
    return sdpa(q, k, v, is_causal=True)


# --- the weights ------------------------------------------------------------------------------------------------------


@near_miss(sizes=ALIKE)
def softmax_twice(q, k, v):
    return F.softmax(weights(q, k), -1) @ v


@near_miss()
def logarithms_of_weights(q, k, v):
    return F.log_softmax(scores(q, k), -1) @ v


@near_miss()
def exponentials_not_normalised(q, k, v):
    return scores(q, k).exp() @ v


@near_miss(sizes=ALIKE)
def normalised_over_queries(q, k, v):
    e = scores(q, k).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


@near_miss()
def normalised_over_all(q, k, v):
    e = scores(q, k).exp()
    return (e / e.sum()) @ v


@near_miss()
def divided_by_the_largest(q, k, v):
    e = scores(q, k).exp()
    return (e / e.amax(-1, keepdim=True)) @ v


@near_miss(sizes=ALIKE)
def normalised_by_another_sum(q, k, v):
    return (scores(q, k).exp() / scores(q, v).exp().sum(-1, keepdim=True)) @ v


@near_miss(sizes=ALIKE)
def less_the_logsumexp_of_others(q, k, v):
    return torch.exp(scores(q, k) - torch.logsumexp(scores(q, v), -1, keepdim=True)) @ v


@near_miss(sizes=ALIKE)
def less_the_logsumexp_of_queries(q, k, v):
    s = scores(q, k)
    return torch.exp(s - torch.logsumexp(s, -2, keepdim=True)) @ v


@near_miss()
def weights_squared(q, k, v):
    return weights(q, k).square() @ v


@near_miss()
def weights_times_scores(q, k, v):
    s = scores(q, k)
    return (s * F.softmax(s, -1)) @ v


@near_miss(sizes=ALIKE)
def weights_times_weights(q, k, v):
    w = weights(q, k)
    return w @ w @ v


@near_miss(PLAIN, more=lambda q: (normal(1, q.shape[1], 1, 1),))
def heads_gated(q, k, v, gate):
    return (weights(q, k) * gate) @ v


@near_miss()
def difference_of_two(q, k, v):
    """Differential attention, as one product with V."""
    return (weights(q, k) - 0.3 * weights(k, q)) @ v


@near_miss(PLAIN)
def nan_guarded(q, k, v):
    w = weights(q, k)
    return torch.where(torch.isnan(w), 0.0, w) @ v


@near_miss(says="dropout")
def dropout_of_weights(q, k, v):
    return F.dropout(weights(q, k), 1e-9, training=True) @ v


@near_miss(says="dropout")
def dropout_of_scores(q, k, v):
    return F.softmax(F.dropout(scores(q, k), 1e-9, training=True), -1) @ v


@near_miss(says="dropout")
def sdpa_dropout(q, k, v):
    return sdpa(q, k, v, dropout_p=1e-9)


@near_miss(PLAIN)
def weights_returned(q, k, v):
    w = weights(q, k)
    return w @ v, w


@near_miss(PLAIN)
def scores_returned(q, k, v):
    s = scores(q, k)
    return F.softmax(s, -1) @ v, s


@near_miss(PLAIN)
def weights_summed_as_well(q, k, v):
    """Accumulated for each key, as cache eviction does."""
    w = weights(q, k)
    return w @ v, w.sum(-2)


@near_miss(PLAIN, sizes=ALIKE)
def weights_of_two_values(q, k, v):
    w = weights(q, k)
    return w @ v + w @ k


@near_miss(says="|".join(("slice", "follow", "proved", "clamp", "pass", "own scores")))
def largest_weights_only(q, k, v):
    w = weights(q, k)
    least = w.topk(3, -1).values[..., -1:]
    return torch.where(w >= least, w, 0.0) @ v


# --- soft-max without attention ---------------------------------------------------------------------------------------


@near_miss(r"heads=1 dim=8 .*", more=lambda q: (normal(8, 5), normal(5, 8)))
def a_memory(q, k, v, keys, values):
    """A layer, a soft-max and a layer: an attention over five learned slots, if one wants."""
    return F.softmax(q[0, 0] @ keys, -1) @ values


@near_miss(more=lambda q: (normal(8, 6),))
def a_layer_of_a_softmax(q, k, v, w):
    return F.softmax(q, -1) @ w


@near_miss(more=lambda q: (normal(8, 6),))
def a_router(q, k, v, w):
    gate, expert = F.softmax(q @ w, -1).topk(2, -1)
    return gate / gate.sum(-1, keepdim=True), expert


@near_miss(sizes=ALIKE)
def linear_attention(q, k, v):
    return F.softmax(q, -1) @ (F.softmax(k, -2).mT @ v)


@near_miss()
def sigmoid_attention(q, k, v):
    return torch.sigmoid(scores(q, k) - math.log(q.shape[2])) @ v


@near_miss()
def rectified_attention(q, k, v):
    return F.relu(scores(q, k)).square() / q.shape[2] @ v


@near_miss()
def a_classifier(q, k, v):
    return F.softmax(scores(q, k), -1).argmax(-1)


@near_miss(more=lambda q: (normal(8, 8),))
def a_mixture(q, k, v, w):
    """A soft-max over features between two products."""
    return F.softmax(q @ k.mT @ k @ w, -1) @ v.mT
