"""What is kept of a site while its model runs."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import FittedError
from attnopt.fitting.rows import Collect, Collected, drawn_rows
from attnopt.statistics import attention

B, H, G, N, D = 2, 4, 2, 20, 6


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (5, 0.0), (None, 2.0)])
def test_rows_means_and_metric(window: int | None, softcap: float) -> None:
    q, k, v = (torch.randn(B, heads, N, D, requires_grad=True) for heads in (H, G, G))
    grads, found, at = torch.randn(2, B, H, N, D), Collected(0.5), torch.tensor([3, 11, 19])
    for seen, grad in enumerate(grads):
        out = Collect.apply(q, k, v, 0.5, None, found, at, window, softcap)
        # Nothing is kept of a forward pass, which may be run again.
        assert len(found.rows) == seen * B
        gradients = torch.autograd.grad(out, (q, k, v), grad)
        expected = attention(q, k, v, 0.5, None, window, softcap)
        torch.testing.assert_close(out, expected)
        for x, y in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
            torch.testing.assert_close(x, y)
    assert found.count == 2 * B * N and len(found.rows) == 2 * B
    assert torch.equal(found.rows[1].q, q[1][:, at]) and torch.equal(found.rows[1].k, k[1])
    torch.testing.assert_close(found.mean(), expected.mean((0, 2)))
    # L L^T is the mean of dO dO^T, levelled to a mean diagonal of 1, a tenth of it even in all directions.
    metric = found.metric()
    fisher = torch.einsum("sbhni,sbhnj->hij", grads, grads)
    level = fisher.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    torch.testing.assert_close(metric @ metric.mT, 0.9 * fisher / level + 0.1 * torch.eye(D))


def test_padded_text_is_refused() -> None:
    q = torch.randn(1, H, N, D, requires_grad=True)
    pad, at = torch.arange(N)[None] > 2, torch.tensor([3])
    with pytest.raises(FittedError, match="is padded"):
        Collect.apply(q, q, q, 0.5, pad, Collected(0.5), at)
    Collect.apply(q, q, q, 0.5, pad | True, Collected(0.5), at)


def test_drawn_rows_have_far_keys() -> None:
    drawn = drawn_rows(50, 30, 8, torch.Generator().manual_seed(0))
    assert len(drawn) == 8 and drawn.tolist() == sorted(set(drawn.tolist())) and int(drawn.min()) >= 30
    assert drawn_rows(50, 60, 8, torch.Generator()).tolist() == [49]
