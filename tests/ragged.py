"""Ragged caches that the tests of every decode kernel share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DENSE = 2**30


@dataclass(frozen=True)
class Case:
    """Capacities of the KV heads and, for each batch entry, how many slots are filled (None: all)."""

    capacities: list[int]
    share: int = 2
    filled: list[list[int]] | None = None
    tokens: int = 1
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    windows: list[int] = field(default_factory=list)
    shared_positions: bool = False
    scale: float = 0.25


CASES = {
    "equal": Case([100] * 4),
    "one slot": Case([1, 1]),
    "one dense head of four": Case([300, 40, 40, 40]),
    "dense heads apart": Case([300, 40, 300, 40]),
    "uneven": Case([7, 300, 40, 7, 40, 90]),
    "many heads, one KV head": Case([65], share=8, batch=1),
    "as many KV heads": Case([65, 10, 65], share=1),
    "left padding": Case([300, 40, 40, 40], filled=[[300, 40, 40, 40], [123, 40, 40, 40], [7, 7, 7, 7]], batch=3),
    "unequal in a run": Case([40, 40, 40], filled=[[1, 40, 7], [1, 40, 7]]),
    "nothing filled": Case([40, 40], filled=[[0, 0], [0, 3]]),
    "a head without slots": Case([40, 0, 40]),
    "counts beyond the segments": Case([40, 50], filled=[[41, 99], [40, 50]]),
    "values of another size": Case([90, 40], dims=(16, 24)),
    "several tokens": Case([90, 40, 40], tokens=3),
    "empty batch": Case([40, 40], batch=0),
    "spans": Case([300, 40, 40], windows=[DENSE, 100, 30, 30, 20, DENSE]),
    "spans, several tokens": Case([300, 40, 40], tokens=4, windows=[DENSE, 100, 30, 30, 20, 1]),
    "equal spans, several tokens": Case([90, 40], tokens=3, windows=[50, 50, 9, 9]),
    "spans, positions for all": Case([300, 40], windows=[50, 100, 30, 33], shared_positions=True),
    "nothing in the window": Case([40, 40], windows=[5, 0, 0, 5]),
    "scale zero": Case([40, 90], windows=[5, 9, 50, 99], scale=0.0),
    "negative scale": Case([40, 90], windows=[5, 9, 50, 99], scale=-0.3),
}


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v, starts, filled, and where the case has windows also sinks, windows, positions and at."""
    generator = torch.Generator().manual_seed(sum(case.capacities) + case.share)
    groups, slots = len(case.capacities), sum(case.capacities)
    starts = torch.tensor([0, *case.capacities], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    counts = case.filled or [case.capacities] * case.batch
    filled = torch.tensor(counts, dtype=torch.int32).view(case.batch, groups)
    dim, dim_v = case.dims
    q, k, v = (
        torch.randn(case.batch, *sizes, generator=generator).to(dtype)
        for sizes in ((groups * case.share, case.tokens, dim), (slots, dim), (slots, dim_v))
    )
    for entry, row in enumerate(counts if case.batch else []):
        for start, end, count in zip(starts.tolist(), starts.tolist()[1:], row, strict=False):
            k[entry, min(start + count, end) : end] = float("nan")
            v[entry, min(start + count, end) : end] = float("nan")
    if not case.windows:
        return q, k, v, starts, filled
    # Each segment holds its last keys before token 400, in an order of its own, and two of the first.
    held = torch.cat([torch.randperm(size, generator=generator) + 400 - size for size in case.capacities])
    held[starts[:-1].long()[torch.tensor(case.capacities) > 2]] = 1
    positions = held.int() if case.shared_positions else held.int().repeat(case.batch, 1)
    sinks = torch.tensor([2, 0] * len(case.windows), dtype=torch.int32)[: len(case.windows)]
    at = torch.full((case.batch,), 400 - case.tokens, dtype=torch.int32)
    return q, k, v, starts, filled, sinks, torch.tensor(case.windows, dtype=torch.int32), positions, at


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def drawn(seed: int) -> Case:
    """A case drawn at random: segments, counts, head sharing, tokens, spans."""
    generator = random.Random(seed)
    groups, share, batch = generator.randint(1, 6), generator.randint(1, 3), generator.randint(1, 4)
    sizes = [generator.choice((0, 1, 5, 5, 17, 40)) for _ in range(3)]
    capacities = [generator.choice(sizes) for _ in range(groups)]
    counts = [[generator.randint(0, size) if seed % 3 else size for size in capacities] for _ in range(batch)]
    windows = [generator.choice((DENSE, 0, 3, 30)) for _ in range(groups * share)] if seed % 2 else []
    return Case(capacities, share, counts, generator.randint(1, 3), (8, 8), batch, windows, seed % 5 == 0)
