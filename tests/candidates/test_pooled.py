"""pooled: which blocks it visits, by a loop over blocks; what it may not choose; parameters out of range."""

from __future__ import annotations

import math

import pytest
import torch
from candidates.degenerate import SCALE, Degenerate, any_inputs
from candidates.selecting import asked_for, kept_by, padded, visits_by

from attnopt.candidates import Number
from attnopt.registry import CANDIDATES

POOLED = CANDIDATES["pooled"]
EVERY: dict[str, Number] = {"mass": 1.0, "count": 1 << 20, "alike": -1.0, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("the whole mass of every row", EVERY),
    Degenerate("no block is alike enough to be judged by its mean", {**EVERY, "mass": 1 / 64, "alike": 1.0}),
    Degenerate("a window of the model's own", EVERY, own_window=20),
]


def by_hand(params: dict[str, Number], pad: torch.Tensor | None) -> torch.Tensor:
    """bool (B, h, R, C): the fewest best blocks of each row, one by one."""
    asked = asked_for(POOLED, params, pad)
    q, k = asked.queries, asked.of_heads(asked.k)
    size, found = asked.block, torch.zeros(q.shape[0], q.shape[1], asked.rows, asked.columns, dtype=torch.bool)
    for b in range(q.shape[0]):
        real = torch.ones(k.shape[2], dtype=torch.bool) if pad is None else pad[b]
        for h in range(q.shape[1]):
            for r in range(asked.rows):
                rows = torch.arange(r * size, min((r + 1) * size, q.shape[2]))
                rows = rows[real[rows]]
                query = q[b, h, rows].mean(0) if len(rows) else torch.zeros(q.shape[3], dtype=q.dtype)
                scores = {}
                for c in range(r + 1):
                    columns = torch.arange(c * size, min((c + 1) * size, k.shape[2]))
                    columns = columns[real[columns]]
                    if len(columns):
                        scores[c] = float(query @ k[b, h, columns].mean(0)) * SCALE
                total = sum(math.exp(s) for s in scores.values())
                gathered = 0.0
                for n, c in enumerate(sorted(scores, key=lambda c: -scores[c])):
                    if gathered < params["mass"] * total and n < params["count"]:
                        found[b, h, r, c] = True
                    gathered += math.exp(scores[c])
    return found


@pytest.mark.parametrize("mass, count", [(0.5, 1 << 20), (0.75, 1 << 20), (1.0, 1), (1.0, 2)])
@pytest.mark.parametrize("holes", [False, True])
def test_it_keeps_the_fewest_blocks_of_most_mass(mass: float, count: int, holes: bool) -> None:
    params, pad = {**EVERY, "mass": mass, "count": count}, padded() if holes else None
    found = kept_by(POOLED, params, pad)
    assert torch.equal(found, by_hand(params, pad) & asked_for(POOLED, params, pad).possible)
    assert 0 < int(found.sum()) < int(kept_by(POOLED, EVERY, pad).sum())


def test_a_block_of_unlike_keys_is_visited_by_all() -> None:
    """Keys of one block point everywhere: its mean is nothing, and every later row visits it all the same."""
    q, k, v = any_inputs()
    k = k[:, :, :1].expand_as(k).clone()
    k[:, :, 16:32] = torch.randn(16, k.shape[3], generator=torch.Generator().manual_seed(1), dtype=k.dtype)
    narrow = {**EVERY, "mass": 1 / 64, "count": 1}
    without, with_test = (
        visits_by(POOLED, {**narrow, "alike": least}, inputs=(q.abs(), k, v)) for least in (-1.0, 0.5)
    )
    assert bool(with_test[:, :, 2, 1].all()) and not bool(without[:, :, 2, 1].all())
    assert int(with_test.sum()) > int(without.sum())


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"mass": 0.0}, "mass must be between"), ({"mass": 1.5}, "mass must be between"), ({"mass": 0.3}, "a multiple"),
        ({"count": 0}, "count must be between"), ({"block": 24}, "block must be one of 16, 32, 64, 128"),
        ({"block": 8}, "block must be between"), ({"skip": -1.0}, "skip must be between"),
        ({"alike": float("nan")}, "alike must be between"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in POOLED.problem({**EVERY, **changed})
    assert not POOLED.problem(EVERY)
