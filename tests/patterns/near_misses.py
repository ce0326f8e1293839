"""What looks like attention and is something else, or an attention other than the one it looks like.

Each takes (B, 4, S, 8) tensors q, k, v and more. `right` matches the records that would be right for it, with loads
named L0, L1, ... in order; without one no site may be found. `says` matches the reason that must then be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 8**-0.5
INF = float("inf")
sdpa = F.scaled_dot_product_attention

Sizes = tuple[Mapping[str, int], ...]
GENERAL: Sizes = ({},)
# Lengths, heads and features that coincide hide a wrong axis from whoever compares sizes.
SQUARE: Sizes = ({"length": 8}, {"heads": 8, "length": 8})
ALIKE: Sizes = ({}, {"length": 4}, {"heads": 8, "length": 8})

ANY = r"heads=.*"
PLAIN = r"heads=\d+ dim=\d+ scale=0\.353553 keep all"


@dataclass(frozen=True)
class NearMiss:
    fn: Callable[..., Any]
    sizes: Sizes
    right: str
    says: str
    more: Callable[[Tensor], tuple[Tensor, ...]]

    def __str__(self) -> str:
        return self.fn.__name__


NEAR_MISSES: list[NearMiss] = []


def near_miss(
    right: str = "", says: str = "", sizes: Sizes = GENERAL,
    more: Callable[[Tensor], tuple[Tensor, ...]] = lambda q: (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # fmt: skip
    """Register a function; `more` makes its further inputs from q."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append(NearMiss(fn, sizes, right, says, more))
        return fn

    return add


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def weights(q: Tensor, k: Tensor) -> Tensor:
    return F.softmax(scores(q, k), -1)


def positions(q: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[2])
    return i[:, None], i[None, :]


def lower(q: Tensor) -> Tensor:
    i, j = positions(q)
    return j <= i


# --- axes -------------------------------------------------------------------------------------------------------------


@near_miss(says="axis|over the keys|summed", sizes=ALIKE)
def softmax_over_queries(q, k, v):
    return F.softmax(scores(q, k), -2) @ v


@near_miss(says="axis|over the keys|summed", sizes=ALIKE)
def softmax_over_heads(q, k, v):
    return F.softmax(scores(q, k), 1) @ v


@near_miss(says="axis|over the keys|summed", sizes=ALIKE)
def softmax_over_the_batch(q, k, v):
    return F.softmax(scores(q, k), 0) @ v


@near_miss(PLAIN, sizes=({"heads": 8, "length": 8},))
def keys_permuted(q, k, v):
    """Heads and positions of K change places: another attention, of K transposed."""
    return F.softmax((q @ k.permute(0, 2, 3, 1)) * SCALE, -1) @ v


@near_miss(PLAIN, sizes=SQUARE)
def keys_not_transposed(q, k, v):
    return F.softmax((q @ k) * SCALE, -1) @ v


@near_miss(PLAIN, sizes=SQUARE)
def values_transposed(q, k, v):
    return weights(q, k) @ v.mT


@near_miss(PLAIN, sizes=({"length": 4}, {"heads": 8, "length": 8}))
def values_of_heads_for_positions(q, k, v):
    return weights(q, k) @ v.transpose(1, 2)


@near_miss(PLAIN, sizes=({"batch": 4},))
def values_of_samples_for_heads(q, k, v):
    return weights(q, k) @ v.transpose(0, 1)


@near_miss(PLAIN, sizes=ALIKE)
def values_of_other_heads(q, k, v):
    return weights(q, k) @ v.roll(1, 1)


@near_miss(PLAIN, sizes=ALIKE)
def keys_in_reverse(q, k, v):
    return weights(q, k.flip(2)) @ v


@near_miss(PLAIN, sizes=ALIKE)
def values_in_reverse(q, k, v):
    return weights(q, k) @ v.flip(2)


@near_miss(PLAIN, sizes=ALIKE)
def weights_in_reverse(q, k, v):
    return weights(q, k).flip(-1) @ v


@near_miss(PLAIN, sizes=ALIKE)
def scores_rolled(q, k, v):
    return F.softmax(scores(q, k).roll(1, -1), -1) @ v


@near_miss(PLAIN, sizes=ALIKE)
def weights_rolled(q, k, v):
    return weights(q, k).roll(1, -1) @ v


@near_miss(says="axis|over the keys|summed", sizes=ALIKE)
def weights_transposed(q, k, v):
    return weights(q, k).transpose(-1, -2) @ v


@near_miss(says="axis|over the keys|summed", sizes=ALIKE)
def summed_over_queries(q, k, v):
    return torch.einsum("bhij,bhid->bhjd", weights(q, k), v)


@near_miss(sizes=SQUARE)
def values_on_the_left(q, k, v):
    return v @ weights(q, k)


@near_miss(PLAIN, sizes=ALIKE)
def values_summed_over_samples(q, k, v):
    return torch.einsum("bhij,chjd->bhid", weights(q, k), v)


@near_miss(sizes=ALIKE)
def output_summed_over_samples(q, k, v):
    return torch.einsum("bhij,bhjd->hid", weights(q, k), v)


@near_miss(sizes=ALIKE)
def output_summed_over_heads(q, k, v):
    return torch.einsum("bhij,bhjd->bid", weights(q, k), v)


@near_miss(PLAIN, more=lambda q: (normal(q.shape[1], q.shape[1]),), sizes=ALIKE)
def heads_mixed_in_the_output(q, k, v, mix):
    return torch.einsum("bhij,bhjd,hk->bkid", weights(q, k), v, mix)


@near_miss(r"heads=1 dim=.*", sizes=ALIKE)
def scores_summed_over_heads(q, k, v):
    w = F.softmax(torch.einsum("bhid,bhjd->bij", q, k) * SCALE, -1)
    return torch.einsum("bij,bhjd->bhid", w, v)


@near_miss(more=lambda q: (normal(q.shape[1], q.shape[1]),), sizes=ALIKE)
def talking_heads(q, k, v, mix):
    return F.softmax(torch.einsum("bhij,hg->bgij", scores(q, k), mix), -1) @ v


@near_miss(more=lambda q: (normal(q.shape[1], q.shape[1]),), sizes=ALIKE)
def talking_weights(q, k, v, mix):
    return torch.einsum("bhij,hg->bgij", weights(q, k), mix) @ v


@near_miss(sizes=ALIKE)
def softmax_over_all_pairs(q, k, v):
    s = scores(q, k)
    return F.softmax(s.flatten(2), -1).view(s.shape) @ v


@near_miss(says="slice|summed|axis", sizes=ALIKE)
def weights_cut(q, k, v):
    """The first keys' weights, which do not sum to one."""
    return weights(q, k)[..., :3] @ v[:, :, :3]


@near_miss(r"heads=\d dim=8 scale=0\.353553 keep .*", sizes=ALIKE)
def scores_cut(q, k, v):
    """An attention over the first keys."""
    return F.softmax(scores(q, k)[..., :3], -1) @ v[:, :, :3]


@near_miss(r"heads=\d dim=8 scale=0\.353553 keep .*", sizes=ALIKE)
def every_other_key(q, k, v):
    return F.softmax(scores(q, k)[..., ::2], -1) @ v[:, :, ::2]


@near_miss(r"heads=4 dim=13 scale=0\.353553 keep all")
def features_attend(q, k, v):
    """XCiT: positions and features have changed places."""
    return (F.softmax(q.mT @ k * SCALE, -1) @ v.mT).mT


# --- heads ------------------------------------------------------------------------------------------------------------

GROUPED = r"heads=4(/2)? dim=8 scale=0\.353553 keep all"
UNGROUPED = r"heads=4 dim=8 scale=0\.353553 keep all"


@near_miss(UNGROUPED)
def heads_tiled(q, k, v):
    """repeat, not repeat_interleave: query head h reads KV head h mod 2, which is no group of consecutive heads."""
    return weights(q, k[:, :2].repeat(1, 2, 1, 1)) @ v[:, :2].repeat(1, 2, 1, 1)


@near_miss(UNGROUPED)
def heads_tiled_by_expand(q, k, v):
    b, _, n, d = k.shape
    k, v = (t[:, None, :2].expand(b, 2, 2, n, d).reshape(b, 4, n, d) for t in (k, v))
    return weights(q, k) @ v


@near_miss(UNGROUPED)
def heads_tiled_by_cat(q, k, v):
    return weights(q, torch.cat([k[:, :2]] * 2, 1)) @ torch.cat([v[:, :2]] * 2, 1)


@near_miss(UNGROUPED)
def keys_repeated_values_tiled(q, k, v):
    return weights(q, k[:, :2].repeat_interleave(2, 1)) @ v[:, :2].repeat(1, 2, 1, 1)


@near_miss(UNGROUPED)
def keys_repeated_values_of_every_head(q, k, v):
    return weights(q, k[:, :2].repeat_interleave(2, 1)) @ v


@near_miss(GROUPED)
def groups_counted_the_other_way(q, k, v):
    """Query head h reads KV head h mod 2 in five dimensions."""
    q = q.unflatten(1, (2, 2))
    return (F.softmax(q @ k[:, None, :2].mT * SCALE, -1) @ v[:, None, :2]).flatten(1, 2)


@near_miss(UNGROUPED)
def heads_by_an_uneven_index(q, k, v):
    group = torch.tensor([0, 0, 0, 1])
    return weights(q, k[:, group]) @ v[:, group]


@near_miss(r"heads=4(/1)? dim=8 scale=0\.353553 keep all")
def values_shared_keys_not(q, k, v):
    return weights(q, k) @ v[:, :1]


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
