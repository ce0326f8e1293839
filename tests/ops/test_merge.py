"""Two parts of the keys under one normaliser are the soft-max over both."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt import ops


def part(scores: Tensor, values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return weights @ values, lse


def test_both_parts_together_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    # Scores of hundreds: neither exponential can be taken by itself.
    scores = (300 * torch.randn(2, 3, 11, 9, generator=generator)).double().requires_grad_()
    values = torch.randn(2, 3, 9, 5, generator=generator).double().requires_grad_()
    near = torch.rand(2, 3, 11, 9, generator=generator) < 0.5
    near[..., 2, :], near[..., 4, :] = False, True  # rows of one part alone, and one of none
    far = ~near
    far[..., 6, :] = near[..., 6, :] = False
    whole = part(scores, values, near | far)[0]
    found = ops.merge(*part(scores, values, near), *part(scores, values, far))
    torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-12)
    assert (found[..., 6, :] == 0).all()


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 7, 3), (2, 7), (2, 7, 3), (2, 7)
    out, lse, far_out, far_lse = (torch.randn(s, generator=generator).double().requires_grad_() for s in shapes)
    assert torch.autograd.gradcheck(ops.merge, (out, lse, far_out, far_lse))
    empty = [lse.detach().clone().requires_grad_(), far_lse.detach().clone().requires_grad_()]
    with torch.no_grad():
        empty[0][:, :2] = empty[1][:, 1:3] = -torch.inf
    found = torch.autograd.grad(ops.merge(out, empty[0], far_out, empty[1]).sum(), (out, far_out, *empty))
    assert all(x.isfinite().all() for x in found)
    # One part alone: all of the gradient is at it, and none at what it was weighed against.
    assert (found[1][:, 0] == 1).all() and (found[0][:, 2] == 1).all()
    assert (found[2][:, :3] == 0).all() and (found[3][:, :3] == 0).all()


def test_in_low_precision() -> None:
    out, far_out = (torch.full((1, 4), x, dtype=torch.bfloat16) for x in (1.0, 2.0))
    lse = torch.tensor([1000.0])
    found = ops.merge(out, lse, far_out, lse)
    assert found.dtype == torch.bfloat16 and (found == 1.5).all()
