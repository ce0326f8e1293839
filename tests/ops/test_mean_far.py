"""The mean far token: against means taken key by key in float64, at odd sizes, with padding, and its gradients."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt import ops

HEADS = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
SINKS = torch.tensor([0, 3, 0, 3, 90, 0], dtype=torch.int32)
ALPHAS = torch.tensor([2**30, 5, 1, 5, 0, 0], dtype=torch.int32)
BETAS = torch.tensor([0, 0, 0, 0, 0.25, 0.5], dtype=torch.float64)
SCALE = 0.3
# Its name in the package is the operator's.
module = sys.modules["attnopt.ops.mean_far"]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", {"cpu": 8})
    monkeypatch.setattr(module, "CHUNK", 3)


def inputs(length: int, dtype: torch.dtype = torch.float64, padded: bool = False) -> tuple[Any, ...]:
    """Six query heads over three KV heads, of which four have a far part; values wider than keys."""
    generator = torch.Generator().manual_seed(length)
    shapes = (6, length, 5), (3, length, 5), (3, length, 7)
    q, k, v = (torch.randn(2, *s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    pad = torch.rand(2, length, generator=generator) < 0.6 if padded else None
    if pad is not None:
        pad[0, :20] = False  # far keys are there, and none counts
        with torch.no_grad():
            k.mT[:, :, :, :] = torch.where(pad[:, None, None, :], k.mT, torch.nan)
    return q, k, v, HEADS, SINKS, ALPHAS, BETAS, pad


def far(length: int, head: int, pad: Tensor | None, min_length: int = 0) -> Tensor:
    """The far keys (B | 1, N, N) of a head, pair by pair."""
    window = int(ops.windows_at(ALPHAS, BETAS, length)[head]) if length >= min_length else length
    i, j = torch.arange(length)[:, None], torch.arange(length)
    kept = ((j >= SINKS[head]) & (j <= i - window))[None]
    return kept if pad is None else kept & pad[:, None, :]


def naive(arguments: tuple[Any, ...], min_length: int = 0) -> tuple[Tensor, Tensor]:
    q, k, v, heads, *_, pad = arguments
    outs, sums = [], []
    k, v = (x if pad is None else torch.where(pad[:, None, :, None], x, 0.0) for x in (k, v))
    for head in heads.tolist():
        keep = far(q.shape[2], head, pad, min_length).to(q.dtype)
        count = keep.sum(-1, keepdim=True)
        keys, values = (keep @ x[:, head // 2] / count.clamp(min=1) for x in (k, v))
        outs.append(values)
        sums.append(SCALE * (q[:, head] * keys).sum(-1) + count[..., 0].log())
    return torch.stack(outs, 1), torch.stack(sums, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("length", [0, 1, 9, 51])
def test_against_means_pair_by_pair(length: int, padded: bool) -> None:
    arguments = inputs(length, padded=padded)
    out, lse = ops.mean_far(*arguments, SCALE, 0)
    expected = naive(arguments)
    torch.testing.assert_close((out, lse), expected, atol=1e-12, rtol=1e-12)
    assert out.transpose(1, 2).is_contiguous()
    if length == 51:
        # The heads served: dense, windowed, a window of one, and a sink as long as all but its window.
        assert [bool((lse[:, at] > -torch.inf).any()) for at in range(4)] == [False, True, True, False]
        assert (out[lse == -torch.inf] == 0).all()
    short = ops.mean_far(*arguments, SCALE, length + 1)
    assert (short[1] == -torch.inf).all() and (short[0] == 0).all()


def test_gradients() -> None:
    for padded in (False, True):
        arguments = inputs(51, padded=padded)
        if padded:
            with torch.no_grad():
                arguments[1].nan_to_num_(0.3)
        there = naive(arguments)[1].detach().isfinite()

        def both(function: Any, arguments: Any = arguments, there: Tensor = there) -> Tensor:
            out, lse = function(*arguments)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            return (out * weights).sum() + (torch.where(there, lse, 0.0).sin() * weights[..., 0]).sum()

        found = torch.autograd.grad(both(lambda *a: ops.mean_far(*a, SCALE, 0)), arguments[:3])
        expected = torch.autograd.grad(both(lambda *a: naive(a)), arguments[:3])
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right, atol=1e-11, rtol=1e-11)


def test_long_sums_of_bfloat16_stay_exact() -> None:
    """40 000 keys with a mean of 1: a running sum in bfloat16 would stop growing at 256."""
    module_inputs = [torch.randn(1, 1, 40_000, 8, generator=torch.Generator().manual_seed(n)) + 1 for n in range(3)]
    q, k, v = (x.to(torch.bfloat16) for x in module_inputs)
    one = torch.zeros(1, dtype=torch.int32)
    out, lse = ops.mean_far(q, k, v, one, one, one + 1, one.double(), None, SCALE, 0)
    means = [x.double().mean(2) for x in (k[:, :, :-1], v[:, :, :-1])]
    torch.testing.assert_close(out[:, :, -1].double(), means[1], atol=0.0, rtol=2**-8)
    score = SCALE * (q[:, :, -1].double() * means[0]).sum(-1)
    torch.testing.assert_close(
        lse[:, :, -1].double(), score + torch.tensor(39_999.0).double().log(), rtol=1e-5, atol=0.0
    )


def test_registration() -> None:
    for grad in (True, False):
        arguments = inputs(19, torch.float32)
        given = [
            x.detach().requires_grad_(grad) if x.is_floating_point() and n < 3 else x
            for n, x in enumerate(arguments[:7])
        ]
        torch.library.opcheck(torch.ops.attnopt.mean_far.default, (*given, None, SCALE, 0))
