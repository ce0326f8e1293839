"""The N x N twin that the streamed statistics are tested against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnopt.statistics.observe import causal_mask
from attnopt.statistics.records import SINK_KEYS, Grid, Observation, distance_buckets, row_signs


def naive_observation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grid: Grid,
    scale: float,
    pad: Tensor | None = None,
    window: int | None = None,
    delta: bool = True,
    softcap: float = 0.0,
) -> Observation:
    """The reference of tests: float64, N x N, every candidate really soft-maxed again over its kept keys.

    Shapes as in `Observe`, grad (B, H, N, Dv) the gradient at the output. No formula of the package is used.
    """
    heads, length = q.shape[1:3]
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    i = torch.arange(length, device=q.device)
    distance = i[:, None] - i
    keep = causal_mask(length, window, pad, q.device)
    counted = torch.ones(q.shape[0], 1, length, dtype=torch.bool, device=q.device) if pad is None else pad[:, None]
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()

    def weights_of(mask: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).nan_to_num(0.0)

    weights = weights_of(keep)
    output, result = weights @ v, Observation.zeros(heads, grid, length, delta)
    sums = {name: torch.zeros_like(tensor) for name, tensor in result.sums.items()}

    def total(per_row: Tensor) -> Tensor:
        return per_row.masked_fill(~counted, 0.0).sum((0, 2))

    for a, sink in enumerate(grid.sinks):
        for b, size in enumerate(grid.windows):
            mask = keep & ((i < sink) | (distance < size))
            moved = weights_of(mask) @ v - output
            t = (grad * moved).sum(-1)
            sums["t1"][:, a, b], sums["t2"][:, a, b] = total(t), total(t.square())
            if sink == grid.sinks[-1]:
                signs = row_signs("0", q.shape[0], length).double()
                sums["sketch"] += torch.einsum("bhi,bik->hk", t.masked_fill(~counted, 0.0), signs)
            sums["sample_sq"][:, a, b] = t.masked_fill(~counted, 0.0).sum(2).square().sum(0)
            sums["mass"][:, a, b] = total(weights.masked_fill(mask, 0.0).sum(-1))
            if delta:
                sums["delta"][:, a, b] = total(moved.square().sum(-1))
    sums["ablation_t2"] = total((grad * output).sum(-1).square())
    sums["entropy"] = total(torch.special.entr(weights).sum(-1))
    ends = [*distance_buckets(length), length]
    for n, (begin, end) in enumerate(itertools.pairwise(ends)):
        sums["mass_by_distance"][:, n] = total((weights * ((distance >= begin) & (distance < end))).sum(-1))
    for n in range(min(SINK_KEYS, length)):
        sums["mass_at_key"][:, n] = total(weights[..., n])
    result._count(int(counted.expand(q.shape[0], 1, length).sum()), q.shape[0], sums)
    return result
