"""What a replacement does to the loss, against the formula written out and against the profiler's own sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.ir import Choice
from attnopt.statistics import Grid, Observation, Observe, attention
from attnopt.statistics.trials import Trials, Try

B, H, G, N, D, DV = 2, 4, 2, 37, 8, 8
SCALE = 0.8
SPANS = ((0, 3), (2, 3), (2, 9), (0, 37))
WINDOWS = tuple(Choice.of("sink_window", {"sink": s, "alpha": w, "beta": 0.0}) for s, w in SPANS)
ZERO = Choice("pruned")


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (B, H, N, D), (B, G, N, D), (B, G, N, DV)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def replaced(choice: Choice, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> tuple[Tensor, None]:
    """A window by its N x N mask, or nothing at all."""
    if choice == ZERO:
        return torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), None
    i, j = torch.arange(N)[:, None], torch.arange(N)
    keep = (j <= i) & ((j < choice["sink"]) | (i - j < choice["alpha"]))
    scores = SCALE * q @ k.repeat_interleave(H // G, 1).mT
    masked = scores.masked_fill(~(keep if pad is None else keep & pad[:, None, None]), -torch.inf)
    return masked.softmax(-1).nan_to_num() @ v.repeat_interleave(H // G, 1), None


def tried(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, grad: Tensor) -> tuple[Trials, Tensor]:
    trials = Trials.zeros(H, (*WINDOWS, ZERO))
    out = Try.apply(q, k, v, SCALE, pad, trials, replaced)
    out.backward(grad)
    return trials, out


@pytest.mark.parametrize("padded", [False, True])
def test_windows_agree_with_what_the_profiler_observes(padded: bool) -> None:
    q, k, v = inputs()
    pad = torch.arange(N) >= torch.tensor([[0], [5]]) if padded else None
    grad = torch.randn(B, H, N, DV, dtype=torch.float64)
    trials, out = tried(q, k, v, pad, grad)
    gradients = [x.grad.clone() for x in (q, k, v)]
    q.grad = k.grad = v.grad = None

    seen = Observation.zeros(H, Grid((0, 2), (3, 9, 37)), N)
    again = Observe.apply(q, k, v, SCALE, pad, seen)
    again.backward(grad)
    torch.testing.assert_close(out, again)
    for x, expected in zip((q, k, v), gradients, strict=True):
        torch.testing.assert_close(x.grad, expected)
    for column, (sink, window) in enumerate(SPANS):
        at = (slice(None), *seen.grid.index(sink, window))
        for name in ("t2", "t1", "sample_sq"):
            torch.testing.assert_close(getattr(trials, name)[:, column], seen.sums[name][at], rtol=1e-9, atol=1e-12)
    # A head that is gone leaves -O: the sum of D_i^2.
    torch.testing.assert_close(trials.t2[:, -1], seen.ablation_t2, rtol=1e-9, atol=1e-12)
    assert (trials.t2[:, :3] > 0).all() and (trials.t2[:, 3] < 1e-20).all()


def test_a_naive_twin() -> None:
    q, k, v = inputs()
    grad = torch.randn(B, H, N, DV, dtype=torch.float64)
    trials, _ = tried(q, k, v, None, grad)
    with torch.no_grad():
        moved = replaced(WINDOWS[1], q, k, v, None)[0] - attention(q, k, v, SCALE, None, None)
        for head in range(H):
            t = [[float(grad[b, head, i] @ moved[b, head, i]) for i in range(N)] for b in range(B)]
            assert float(trials.t2[head, 1]) == pytest.approx(sum(x * x for row in t for x in row))
            assert float(trials.t1[head, 1]) == pytest.approx(sum(map(sum, t)))
            assert float(trials.sample_sq[head, 1]) == pytest.approx(sum(sum(row) ** 2 for row in t))
    trials.tokens = 10.0
    torch.testing.assert_close(trials.damage(WINDOWS[1]), trials.t2[:, 1] / 20)


def test_half_precision_is_tried_in_single() -> None:
    """What does nothing must count nothing, not the roundings of two outputs."""
    q, k, v = inputs(torch.bfloat16)
    grad = torch.randn(B, H, N, DV, dtype=torch.bfloat16)
    trials, out = tried(q, k, v, None, grad)
    assert out.dtype == q.grad.dtype == torch.bfloat16
    assert (trials.t2[:, 3] < 1e-9).all() and (trials.t2[:, 2] > 1e-2).all()


def test_trials_add() -> None:
    one, other = (Trials.zeros(H, WINDOWS) for _ in range(2))
    one.t2 += 1.0
    other.t2 += 2.0
    one.tokens = other.tokens = 4.0
    one += other
    assert one.tokens == 8.0 and (one.t2 == 3.0).all()
    with pytest.raises(ValueError, match="do not add"):
        one += Trials.zeros(H, WINDOWS[:1])
