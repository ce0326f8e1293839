"""What looks like attention and is something else, or an attention other than the one it looks like.

Each takes (B, 4, S, 8) tensors q, k, v and more. `right` matches the records that would be right for it, with loads
named L0, L1, ... in order; without one no site may be found. `says` matches the reason that must then be given.
"""

from __future__ import annotations

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
