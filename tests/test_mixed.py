"""Heads of every family in one attention, against the mixture pair by pair in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixtures import CHOICES, PRUNED, fits, linear, mean, naive, site, window
from torch import Tensor
from tracing import qkv

from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice, Mask
from attnopt.mixed import FarPart, attend, far_parts

FITTED = fits({"attention": CHOICES})


def inputs(length: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv(2, 8, kv_heads, length, dtype=dtype)
    return 0.5 * q, 0.5 * k, v


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("length", [1, 37])
def test_every_family_beside_the_others(length: int, padded: bool, kv_heads: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(length, kv_heads))
    pad = torch.arange(length).repeat(2, 1) >= torch.tensor([[15], [0]]) if padded else None
    choices = (*CHOICES[:-1], PRUNED)
    of = site(kv_heads=kv_heads)
    found = attend(q, k, v, choices, of, FITTED, pad)
    expected = naive(q, k, v, choices, of, FITTED, pad)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, choices, of, FITTED, pad), found)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    gradients = (torch.autograd.grad(out, (q, k, v), weight) for out in (found, expected))
    for one, right in zip(*gradients, strict=True):
        torch.testing.assert_close(one, right, atol=1e-9, rtol=1e-9)
    if length > 1:
        # Every head's choice shows: no two of these are the same.
        plain = naive(q, k, v, (DENSE,) * 8, of, FITTED, pad)
        differs = (found - plain).abs().amax((0, 2, 3)) > 1e-3
        assert differs.tolist() == [False] + [True] * 7


def test_one_family_alone_and_none() -> None:
    q, k, v = inputs(29)
    for choices in ((linear(2, 5),) * 8, (mean(0, 3),) * 8, (window(1, 4),) * 8, (DENSE,) * 8, (PRUNED,) * 8):
        expected = naive(q, k, v, choices, site(), FITTED)
        torch.testing.assert_close(attend(q, k, v, choices, site(), FITTED), expected, atol=1e-10, rtol=1e-10)


def test_below_the_least_length_all_is_dense_but_what_is_gone() -> None:
    q, k, v = inputs(29)
    choices = (*CHOICES[:-1], PRUNED)
    found = attend(q, k, v, choices, site(), FITTED, min_length=30)
    torch.testing.assert_close(found, naive(q, k, v, choices, site(), FITTED, min_length=30), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found[:, 5], naive(q, k, v, (DENSE,) * 8, site(), FITTED)[:, 5])


def test_low_precision() -> None:
    q, k, v = inputs(37, dtype=torch.bfloat16)
    found = attend(q, k, v, CHOICES, site(), FITTED)
    expected = naive(q, k, v, CHOICES, site(), FITTED)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).norm() / expected.norm()) < 8e-3


def test_heads_of_equal_maps_are_served_at_once() -> None:
    assert far_parts(CHOICES) == (
        FarPart("linear", "linear/6", (1, 4, 7)),
        FarPart("mean", "", (3, 6)),
        FarPart("linear", "taylor/2", (5,)),
    )
    assert [str(part) for part in far_parts(CHOICES)[1:]] == ["mean tail on 2 heads", "linear tail on 1 head"]


@pytest.mark.parametrize(
    ("choices", "changes", "given", "said"),
    [
        (CHOICES, {}, None, "needs feature maps, and there are none"),
        ((linear(2, 5, 7),) * 8, {}, FITTED, "no feature map linear/7 of head 0"),
        ((PRUNED,) * 8, {}, None, "is to be its mean output, and there is none"),
        (CHOICES[:3], {}, FITTED, "3 choices for the 8 heads"),
        ((mean(0, 3),) * 8, {"mask": Mask(causal=True, window=9)}, FITTED, "has a window of its own"),
    ],
    ids=["no fits", "no map", "no means", "heads", "window"],
)
def test_what_cannot_run_says_why(choices: tuple[Choice, ...], changes: dict, given: object, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        attend(*inputs(9), choices, replace(site(), **changes), given)  # type: ignore[arg-type]
    assert caught.value.remedy
